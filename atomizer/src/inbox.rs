//! Hands the answers a node receives to whoever asked.

use std::num::NonZeroUsize;

use tokio::sync::oneshot;

use crate::{
    AtomId, Delivery, Message, Outcome, SettleError, Source,
    ask::Asker,
    intake::{Intake, Taken},
    settle::Settler,
};

/// How many answers may be delivered and not settled.
const WINDOW: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");

/// In whose name messages that are no answers go to the dead letters.
const INBOX: AtomId = AtomId::from_static("inbox");

/// Receives until it is dropped.
pub(crate) async fn run(asker: Asker, tried: oneshot::Sender<()>) {
    let Asker { node, link } = &asker;
    let mut intake = Intake::new(&asker, Source::Inbox, WINDOW, tried);
    let settler = Settler { asker: asker.clone(), atom: INBOX };
    loop {
        let Taken::Deliveries(deliveries) = intake.next(WINDOW).await else {
            continue;
        };
        let mut batch = Vec::with_capacity(deliveries.len());
        for Delivery { message, ticket, .. } in deliveries {
            let Message::Answer(answer) = message else {
                let (ticket, emit, _) = settler.unreadable(ticket, message);
                tracing::warn!(
                    "a message that is no answer goes from the inbox to the dead letters"
                );
                batch.push((ticket, Outcome::done(emit)));
                continue;
            };
            node.answer(link.id(), answer);
            batch.push((ticket, Outcome::done(Vec::new())));
        }
        if let Some(session) = intake.session() {
            let settled = session.settle(batch).await;
            let not_safe = settled.into_iter().filter_map(|result| match result {
                Err(SettleError::NotSafe { ticket, failed }) => Some((ticket, failed)),
                // Settled, or it comes again, and finds that nobody waits for it.
                _ => None,
            });
            for (ticket, failed) in not_safe {
                // No answer, and not to be set aside either. Given back it would come again at once.
                tracing::error!(?failed, "dropped a message from the inbox that is no answer");
                drop(session.settle(vec![(ticket, Outcome::done(Vec::new()))]).await);
            }
        }
    }
}
