//! Children that run inline: in their parent's slot, past the queue.
//!
//! Where so many parents wait that more would take up too much memory, a parent does not put its next child into the
//! queue, but lends it its permit and hands it to the worker of its atom. To that worker it is an electron like any
//! other, but that it has no ticket: what it comes to is its parent's business, and a parent that begins anew asks it
//! again. Its own children are run likewise, so a tree is finished depth first by one who waits, not level by level by
//! all.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::{
    AtomId, Electron, ElectronId,
    admission::{Lane, Slot},
    ask::Asker,
};

/// Where the children of one atom are handed to.
#[derive(Clone, Debug)]
pub(crate) struct Handing {
    pub(crate) lane: Lane,
    pub(crate) to: mpsc::UnboundedSender<Handed>,
}

/// What a worker is handed.
#[derive(Debug)]
pub(crate) enum Handed {
    Child(Child),
    /// The child that runs in this slot is not wanted any more.
    GivenUp {
        electron: ElectronId,
        slot: Arc<Slot>,
    },
}

/// A child that is to run with its parent's permit.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) electron: Arc<Electron>,
    pub(crate) slot: Arc<Slot>,
    /// Told when the run is over and what came of it is on its way; dropped when it is not run.
    pub(crate) over: oneshot::Sender<()>,
}

/// A child that runs inline, as its parent sees it. Dropping it before it is over gives it up.
#[derive(Debug)]
pub(crate) struct Inline {
    electron: ElectronId,
    slot: Arc<Slot>,
    over: oneshot::Receiver<()>,
    is_over: bool,
    worker: mpsc::UnboundedSender<Handed>,
}

impl Asker {
    /// Whether so many parents wait that children should run inline.
    pub(crate) fn is_crowded(&self) -> bool {
        self.node.admission.waiting() >= self.node.rules.waiting_max
    }

    /// Whether an atom can run inline here.
    pub(crate) fn can_run_inline(&self, atom: &AtomId) -> bool {
        self.link.handing(atom).is_some()
    }

    /// Runs a child with the permit of its parent's slot, if that can be.
    pub(crate) fn run_inline(&self, slot: &Arc<Slot>, child: &Arc<Electron>) -> Option<Inline> {
        let Handing { lane, to } = self.link.handing(&child.atom)?;
        let slot = slot.lend(*lane)?;
        let (over_tx, over) = oneshot::channel();
        let (electron, is_over, worker) = (child.id, false, to.clone());
        let handed = Child { electron: Arc::clone(child), slot: Arc::clone(&slot), over: over_tx };
        self.tell_sent(child);
        // An error says that the worker is gone; then its drop says that it was not run.
        drop(to.send(Handed::Child(handed)));
        Some(Inline { electron, slot, over, is_over, worker })
    }
}

impl Inline {
    /// Waits until the run is over. False when the child was not run, and is to go through the queue.
    ///
    /// Its answer is there by then, or comes later: from another attempt, or when it is safe.
    pub(crate) async fn over(&mut self) -> bool {
        let was_run = (&mut self.over).await.is_ok();
        self.is_over = true;
        was_run
    }
}

impl Drop for Inline {
    fn drop(&mut self) {
        // The parent goes on with the permit, whether the child heeds it or not.
        self.slot.revoke();
        if !self.is_over {
            let (electron, slot) = (self.electron, Arc::clone(&self.slot));
            // An error says that the worker is gone, and the run with it.
            drop(self.worker.send(Handed::GivenUp { electron, slot }));
        }
    }
}
