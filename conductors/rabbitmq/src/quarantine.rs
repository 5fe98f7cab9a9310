//! Queues that end the connection of whoever consumes them.
//!
//! A queue can be there while its process is not: it crashed too often, or an operator stopped it. RabbitMQ answers
//! who consumes it with INTERNAL_ERROR (541), which closes the connection, and all that was taken over it is
//! delivered again. So whether such a queue can be consumed is found out over a connection of its own from then on, and
//! costs nobody else anything.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use atomizer::SessionError;
use tokio::time::Instant;

/// How long a queue is remembered after it failed.
const KEPT: Duration = Duration::from_secs(60);

/// When each of them failed; shared by all sessions of a conductor, for the fault has cost the session that saw it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quarantine(Arc<Mutex<HashMap<String, Instant>>>);

impl Quarantine {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, queue: &str) {
        let mut failed = self.lock();
        failed.retain(|_, at| at.elapsed() < KEPT);
        if failed.insert(queue.to_owned(), Instant::now()).is_none() {
            tracing::warn!(queue, "whether this queue can be consumed is tried apart for now");
        }
    }

    pub(crate) fn holds(&self, queue: &str) -> bool {
        self.lock().get(queue).is_some_and(|at| at.elapsed() < KEPT)
    }
}

/// Whether this may be the answer to a consumer. Who waited for it is told either by the answer or by the end of the
/// connection, whichever is first: both have the broker's text, which begins with the name of the code.
pub(crate) fn is_internal(error: &SessionError) -> bool {
    matches!(error, SessionError::Lost(reason) if reason.starts_with("INTERNAL_ERROR"))
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_queue_is_forgotten_when_it_is_not_tried_any_more() {
        let quarantine = Quarantine::default();
        quarantine.add("a");
        advance(KEPT / 2).await;
        quarantine.add("b");
        assert!(quarantine.holds("a") && quarantine.holds("b"));
        advance(KEPT / 2).await;
        assert!(!quarantine.holds("a") && quarantine.holds("b"));
        quarantine.add("c");
        assert_eq!(quarantine.lock().len(), 2);
    }
}
