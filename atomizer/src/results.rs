//! Result addresses: outcomes that another process reads than the one that asked.

use std::{collections::VecDeque, fmt, num::NonZeroUsize, sync::Arc};

use tokio::sync::oneshot;

use crate::{
    AtomId, Delivery, Message, Outcome, Properties, ResultsId, Source, Ticket,
    ask::Asker,
    intake::{Intake, Taken},
    node::Stage,
    settle::Settler,
};

/// How many outcomes may be delivered and not taken.
const WINDOW: NonZeroUsize = NonZeroUsize::new(256).expect("not 0");

/// In whose name messages that are no outcomes go to the dead letters.
const RESULTS: AtomId = AtomId::from_static("results");

/// Reads the outcomes that are sent to a result address, as [`Spawning::results_to`](crate::Spawning::results_to) has
/// it. Made by [`Atomizer::results`](crate::Atomizer::results).
///
/// The outcomes wait there until somebody reads them; several readers share them. Each is delivered at least once.
pub struct Results {
    asker: Asker,
    intake: Intake,
    settler: Settler,
    ready: VecDeque<(Arc<Properties>, Ticket)>,
    /// Of the outcome that was returned last.
    last: Option<Ticket>,
}

impl Results {
    pub(crate) fn new(asker: Asker, id: ResultsId) -> Self {
        let (tried, _) = oneshot::channel();
        let intake = Intake::new(&asker, Source::Results(id), WINDOW, tried);
        let settler = Settler { asker: asker.clone(), atom: RESULTS };
        Self { asker, intake, settler, ready: VecDeque::new(), last: None }
    }

    /// Waits for the next outcome; none when the node drains. The one before it is removed: until then, and when this
    /// is dropped, it is kept for whoever reads next.
    ///
    /// # Cancel safety
    /// Safe: what is not returned is kept.
    pub async fn next(&mut self) -> Option<Arc<Properties>> {
        self.done().await;
        let node = Arc::clone(&self.asker.node);
        while self.ready.is_empty() {
            tokio::select! {
                biased;
                () = node.reached(Stage::Draining) => return None,
                taken = self.intake.next(WINDOW) => match taken {
                    Taken::Deliveries(deliveries) => self.receive(deliveries).await,
                    // What was delivered through it comes again.
                    Taken::Lost => self.ready.clear(),
                    Taken::Missed => {}
                },
            }
        }
        let (outcome, ticket) = self.ready.pop_front()?;
        self.last = Some(ticket);
        Some(outcome)
    }

    /// Removes the outcome that was returned last, without waiting for another.
    ///
    /// # Cancel safety
    /// Safe: it is removed, or kept for whoever reads next.
    pub async fn done(&mut self) {
        if let Some(ticket) = self.last.take() {
            self.settle(vec![(ticket, Outcome::done(Vec::new()))]).await;
        }
    }

    async fn receive(&mut self, deliveries: Vec<Delivery>) {
        let mut aside = Vec::new();
        for Delivery { message, ticket, .. } in deliveries {
            match message {
                Message::Answer(outcome) => self.ready.push_back((outcome, ticket)),
                other => {
                    let (emit, reason) = self.settler.aside(other);
                    tracing::warn!(reason, "what is no outcome goes to the dead letters");
                    aside.push((ticket, Outcome::done(emit)));
                }
            }
        }
        if !aside.is_empty() {
            self.settle(aside).await;
        }
    }

    /// What fails is delivered again.
    async fn settle(&self, batch: Vec<(Ticket, Outcome)>) {
        if let Some(session) = self.asker.link.session() {
            drop(self.asker.link.settle(&session, batch).await);
        }
    }
}

impl fmt::Debug for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Results").field("ready", &self.ready.len()).finish_non_exhaustive()
    }
}
