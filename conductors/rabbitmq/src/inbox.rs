//! Inboxes that were not there any more, and are made anew.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use atomizer::NodeId;
use lapin::Connection;

use crate::topology::Topology;

/// The nodes whose inbox was lost, until they are told; shared by all sessions of a conductor, for the one that made
/// it anew may end before anyone takes from it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inboxes(Arc<Mutex<HashSet<NodeId>>>);

impl Inboxes {
    fn lost(&self) -> MutexGuard<'_, HashSet<NodeId>> {
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
            self.lost().insert(node.clone());
        }
        topology.declare_inbox(connection, &topology.inbox_queue(node)).await
    }

    /// Whether the inbox of a node was lost, and what was sent to it: told once.
    pub(crate) fn take_lost(&self, node: &NodeId) -> bool {
        self.lost().remove(node)
    }
}
