//! What all parts of one node share.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{
    ConductorId, EventKind, NodeId, Properties, admission::Admission, ask::Pending, event::Events,
};

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) events: Events,
    pub(crate) admission: Arc<Admission>,
    pub(crate) pending: Pending,
    pub(crate) stage: watch::Receiver<Stage>,
}

impl Node {
    /// Hands an answer to who waits for it.
    pub(crate) fn answer(&self, conductor: &ConductorId, answer: Arc<Properties>) {
        let electron = answer.electron;
        if !self.pending.resolve(answer) {
            self.events.emit(Some(conductor), || EventKind::AnswerDropped { electron });
        }
    }

    /// Waits until the node is at `stage` or past it.
    pub(crate) async fn reached(&self, stage: Stage) {
        // An error says that the supervisor is gone, which is past every stage.
        drop(self.stage.clone().wait_for(|now| *now >= stage).await);
    }
}

/// A node's way to its end. It only ever moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Running,
    /// Take no more, finish what runs.
    Draining,
    /// Tell what runs to stop.
    Cancelling,
    /// Stop it; electrons go back.
    Aborting,
    /// Nothing runs: close the sessions.
    Closing,
}
