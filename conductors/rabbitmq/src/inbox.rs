//! Inboxes that were not there any more, and are made anew; and the queues by which it is found out whether one would
//! be any better.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use atomizer::NodeId;
use lapin::Connection;
use tokio::time::Instant;

use crate::topology::Topology;

/// How long an inbox that cannot be consumed is given: a new leader may be about to be elected.
const PATIENCE: Duration = Duration::from_secs(10);
/// Failures that are further apart have nothing to do with each other.
const APART: Duration = Duration::from_secs(60);

/// What is known of inboxes; shared by all sessions of a conductor, for the one that found it out may end before
/// anything is done about it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inboxes(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    /// The nodes whose inbox was lost, until they are told.
    lost: HashSet<NodeId>,
    /// Since when the inbox of a node could not be consumed, and when that was tried last.
    failing: HashMap<NodeId, (Instant, Instant)>,
    /// Queues that were made to try them, until they are deleted.
    trials: HashSet<String>,
}

impl Inboxes {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that the inbox of a node is there, and notes when it was not.
    pub(crate) async fn make(
        &self,
        topology: &Topology,
        connection: &Connection,
        node: &NodeId,
    ) -> lapin::Result<()> {
        if !topology.is_inbox_there(connection, node).await? {
            self.known().lost.insert(node.clone());
        }
        topology.declare_inbox(connection, &topology.inbox_queue(node)).await
    }

    /// Whether the inbox of a node was lost, and what was sent to it: told once.
    pub(crate) fn take_lost(&self, node: &NodeId) -> bool {
        self.known().lost.remove(node)
    }

    /// Notes that the inbox of a node could not be consumed, and whether it is time to do something about it.
    pub(crate) fn fails_for_long(&self, node: &NodeId) -> bool {
        let mut known = self.known();
        let now = Instant::now();
        let (since, last) = known.failing.entry(node.clone()).or_insert((now, now));
        if last.elapsed() > APART {
            *since = now;
        }
        *last = now;
        let for_long = since.elapsed() >= PATIENCE;
        if for_long {
            known.failing.remove(node);
        }
        for_long
    }

    /// Notes that the inbox of a node is consumed.
    pub(crate) fn works(&self, node: &NodeId) {
        self.known().failing.remove(node);
    }

    /// Notes that a queue is about to be made only to try it.
    pub(crate) fn tries(&self, queue: &str) {
        self.known().trials.insert(queue.to_owned());
    }

    pub(crate) fn tried(&self, queue: &str) {
        self.known().trials.remove(queue);
    }

    /// The queues that were tried and may be there still.
    pub(crate) fn trials(&self) -> Vec<String> {
        self.known().trials.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_inbox_fails_for_long_when_it_does_so_again_and_again() {
        let (inboxes, node) = (Inboxes::default(), NodeId::unique("node").unwrap());
        assert!(!inboxes.fails_for_long(&node));
        advance(PATIENCE / 2).await;
        assert!(!inboxes.fails_for_long(&node));
        inboxes.works(&node);
        advance(PATIENCE / 2).await;
        assert!(!inboxes.fails_for_long(&node));
        advance(PATIENCE).await;
        assert!(inboxes.fails_for_long(&node));
        assert!(!inboxes.fails_for_long(&node), "what is done about it is done once");
        advance(2 * APART).await;
        assert!(!inboxes.fails_for_long(&node), "that was long ago");
        assert_eq!(inboxes.known().failing.len(), 1);
    }
}
