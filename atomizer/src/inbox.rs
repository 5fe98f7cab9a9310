//! Hands the answers a node receives to whoever asked.

use std::{num::NonZeroUsize, time::Duration};

use futures::{FutureExt, StreamExt, future::OptionFuture, stream::FuturesUnordered};
use tokio::{sync::oneshot, time::sleep};

use crate::{
    AtomId, Delivery, Message, Outcome, SettleError, Source, Ticket,
    ask::Asker,
    cancel::tell,
    intake::{Intake, Taken},
    link::{Link, SharedSession},
    settle::Settler,
};

/// How many answers may be delivered and not settled.
const WINDOW: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");

/// How long to wait before messages that could not be set aside come again.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// In whose name messages that are no answers go to the dead letters.
const INBOX: AtomId = AtomId::from_static("inbox");

/// Receives until it is dropped.
pub(crate) async fn run(asker: Asker, tried: oneshot::Sender<()>) {
    let Asker { node, link } = &asker;
    let mut intake = Intake::new(&asker, Source::Inbox, WINDOW, tried);
    let settler = Settler { asker: asker.clone(), atom: INBOX };
    let mut asking_again = OptionFuture::default();
    // Beside the receiving: the next answer must not wait until the last one is removed. The window bounds them.
    let mut settling = FuturesUnordered::new();
    // Beside it, too. Each gives up in time.
    let mut telling = FuturesUnordered::new();
    loop {
        let taken = tokio::select! {
            taken = intake.next(WINDOW) => taken,
            Some(()) = settling.next() => continue,
            cancel = link.telling.next() => {
                telling.push(tell(link, &node.cancelled, cancel));
                continue;
            }
            Some(()) = telling.next() => continue,
            Some(()) = &mut asking_again => {
                asking_again = OptionFuture::default();
                continue;
            }
        };
        let deliveries = match taken {
            Taken::Deliveries(deliveries) => deliveries,
            Taken::Missed => {
                // Beside the receiving: sending may take as long as a broker is away. A later one asks for all.
                asking_again = Some(asker.clone().ask_again().boxed()).into();
                continue;
            }
            Taken::Lost => continue,
        };
        let mut batch = Vec::with_capacity(deliveries.len());
        for Delivery { message, ticket, .. } in deliveries {
            let emit = match message {
                Message::Answer(answer) => {
                    node.answer(link, answer);
                    Vec::new()
                }
                Message::Cancel(cancel) => {
                    node.cancelled.add(&cancel);
                    Vec::new()
                }
                other => {
                    tracing::warn!(
                        "a message that is no answer goes from the inbox to the dead letters"
                    );
                    settler.aside(other).0
                }
            };
            batch.push((ticket, Outcome::done(emit)));
        }
        if let Some(session) = link.session() {
            settling.push(settle(link, session, batch));
        }
    }
}

/// What is settled is done with; the rest comes again, and finds that nobody waits for it.
async fn settle(link: &Link, session: SharedSession, batch: Vec<(Ticket, Outcome)>) {
    let mut settled = link.settle(&session, batch).await;
    settled.retain(|result| matches!(result, Err(SettleError::NotSafe { .. })));
    if !settled.is_empty() {
        let messages = settled.len();
        tracing::warn!(messages, "messages that are no answers cannot be set aside now");
        // With these results their tickets are given back. Without a pause that would be a hot loop.
        sleep(TRY_AGAIN_AFTER).await;
    }
}
