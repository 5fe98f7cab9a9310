//! Inboxes that were not there any more, and are made anew; and the queues by which it is found out whether one would
//! be any better.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use atomizer::NodeId;
use lapin::Connection;

use crate::topology::Topology;

/// What is known of inboxes; shared by all sessions of a conductor, for the one that found it out may end before
/// anything is done about it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inboxes(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    /// The nodes whose inbox was lost, until they are told.
    lost: HashSet<NodeId>,
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
