//! Children that their parent does not want any more.
//!
//! Who drops a fan-out tells every node. There the deadline of its children is over from then on: what runs is
//! stopped, and what waits, here or still in its queue, ends without being run. It is a help and no guarantee: a node
//! that does not hear of it runs the child to its end, and the answer is dropped.

use std::{
    collections::{VecDeque, hash_map::Entry},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rustc_hash::FxHashMap;
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use crate::{Address, Electron, ElectronId, Envelope, Message, NodeId, link::Link};

/// Tells all nodes that some children are not wanted any more.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cancel {
    /// The node that asked them. What another asks under the same ids, for a later life of their parent, is wanted.
    pub sender: NodeId,
    /// They were asked in this [round](crate::Parent::round), or an earlier one.
    pub round: u64,
    /// The children.
    pub electrons: Vec<ElectronId>,
}

impl Cancel {
    /// How many children one message names at the most: an id takes 39 bytes there.
    pub(crate) const ELECTRONS_MAX: usize = 1024;

    /// Puts it together.
    #[must_use]
    pub fn new(sender: NodeId, round: u64, electrons: Vec<ElectronId>) -> Self {
        Self { sender, round, electrons }
    }
}

/// How many children are remembered that nobody wants: the last ones of which was told.
const KNOWN_MAX: usize = 64 * 1024;
/// How long it may take to tell other nodes. Where it takes longer they learn it from the deadlines.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// The children that nobody wants, as far as a node knows.
#[derive(Debug)]
pub(crate) struct Cancelled {
    known: Mutex<Known>,
    /// How many there are, to be read without the lock.
    count: AtomicUsize,
    /// How often this node has given up children.
    round: AtomicU64,
    /// Counts what is told, for those who wait for it.
    told: watch::Sender<u64>,
    /// How many messages are on their way to other nodes.
    unsent: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct Known {
    by_id: FxHashMap<ElectronId, (NodeId, u64)>,
    /// In the order in which they are forgotten.
    order: VecDeque<ElectronId>,
}

impl Default for Cancelled {
    fn default() -> Self {
        let (told, unsent) = (watch::Sender::new(0), watch::Sender::new(0));
        let (count, round) = (AtomicUsize::new(0), AtomicU64::new(0));
        Self { known: Mutex::default(), count, round, told, unsent }
    }
}

impl Cancelled {
    /// Remembers it, and tells the workers.
    pub(crate) fn add(&self, cancel: &Cancel) {
        let mut locked = self.lock();
        let known = &mut *locked;
        for electron in &cancel.electrons {
            let of = (cancel.sender.clone(), cancel.round);
            match known.by_id.entry(*electron) {
                Entry::Vacant(entry) => {
                    entry.insert(of);
                    known.order.push_back(*electron);
                }
                // What comes late takes nothing back.
                Entry::Occupied(entry) if entry.get().0 == of.0 && entry.get().1 >= of.1 => {}
                Entry::Occupied(mut entry) => drop(entry.insert(of)),
            }
        }
        while known.order.len() > KNOWN_MAX {
            if let Some(oldest) = known.order.pop_front() {
                known.by_id.remove(&oldest);
            }
        }
        self.count.store(known.by_id.len(), Ordering::Release);
        drop(locked);
        self.told.send_modify(|told| *told += 1);
    }

    /// Whether an electron is a child that nobody wants.
    pub(crate) fn contains(&self, electron: &Electron) -> bool {
        let (Some(parent), Some(sender)) = (&electron.parent, &electron.sender) else {
            return false;
        };
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        self.lock()
            .by_id
            .get(&electron.id)
            .is_some_and(|(by, round)| by == sender && parent.round <= *round)
    }

    /// Returns in which round children are asked now.
    pub(crate) fn round(&self) -> u64 {
        self.round.load(Ordering::Acquire)
    }

    /// Ends this round, if it has not ended: what is asked from now on is of a later one.
    pub(crate) fn end_round(&self, round: u64) {
        self.round.fetch_max(round + 1, Ordering::AcqRel);
    }

    /// Returns what changes whenever something is told.
    pub(crate) fn told(&self) -> watch::Receiver<u64> {
        self.told.subscribe()
    }

    /// Waits until all that was given up here is told to the other nodes.
    pub(crate) async fn sent(&self) {
        let mut unsent = self.unsent.subscribe();
        // An error says that the node is gone.
        drop(unsent.wait_for(|unsent| *unsent == 0).await);
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // What a panic leaves half done is forgotten a little early.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was given up through one conductor, until other nodes are told.
#[derive(Debug, Default)]
pub(crate) struct Telling {
    waiting: Mutex<VecDeque<Cancel>>,
    bell: Notify,
}

impl Telling {
    /// Gives up children, here at once and elsewhere soon. May be called from any thread.
    pub(crate) fn give_up(&self, cancelled: &Cancelled, cancel: Cancel) {
        cancelled.add(&cancel);
        cancelled.unsent.send_modify(|unsent| *unsent += 1);
        self.lock().push_back(cancel);
        self.bell.notify_one();
    }

    /// Waits for the next of which others are to be told.
    ///
    /// Cancel safe.
    pub(crate) async fn next(&self) -> Cancel {
        loop {
            if let Some(cancel) = self.lock().pop_front() {
                return cancel;
            }
            self.bell.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Cancel>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells other nodes. One that does not hear of it learns it from the deadline.
pub(crate) async fn tell(link: &Link, cancelled: &Cancelled, cancel: Cancel) {
    let electrons = cancel.electrons.len();
    let envelope = Envelope::new(Address::Nodes, Message::from(cancel));
    let sent = timeout(SEND_TIMEOUT, link.send(&[envelope])).await;
    let error = match sent.map(|mut sent| sent.pop()) {
        Ok(Some(Err(error))) => Some(error.to_string()),
        Ok(_) => None,
        Err(_) => Some(format!("no confirmation within {SEND_TIMEOUT:?}")),
    };
    if let Some(error) = error {
        tracing::debug!(conductor = %link.id(), electrons, %error, "other nodes do not hear what was given up");
    }
    cancelled.unsent.send_modify(|unsent| *unsent -= 1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AtomId, Parent, Payload};

    fn child(index: u64, round: u64, sender: &NodeId) -> Electron {
        let parent: ElectronId = "01932c07-e8f1-7a3b-9c4d-5e6f70819203".parse().unwrap();
        let atom = AtomId::from_static("child");
        let mut child = Electron::with_id(parent.child(index), atom, Payload::json("1"));
        child.parent = Some(Parent::new(parent, index).round(round));
        child.sender = Some(sender.clone());
        child
    }

    #[test]
    fn what_a_later_life_or_another_node_asks_is_wanted() {
        let (here, there) = (NodeId::from_static("here"), NodeId::from_static("there"));
        let cancelled = Cancelled::default();
        assert!(!cancelled.contains(&child(0, 0, &here)));
        cancelled.add(&Cancel::new(here.clone(), 1, vec![child(0, 1, &here).id]));
        assert!(cancelled.contains(&child(0, 0, &here)), "asked before");
        assert!(cancelled.contains(&child(0, 1, &here)));
        assert!(!cancelled.contains(&child(0, 2, &here)), "asked again since");
        assert!(!cancelled.contains(&child(0, 1, &there)), "asked by another node");
        assert!(!cancelled.contains(&child(1, 1, &here)), "another child");
        cancelled.add(&Cancel::new(here.clone(), 0, vec![child(0, 0, &here).id]));
        assert!(cancelled.contains(&child(0, 1, &here)), "what comes late takes nothing back");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let here = NodeId::from_static("here");
        let cancelled = Cancelled::default();
        for index in 0..=KNOWN_MAX as u64 {
            cancelled.add(&Cancel::new(here.clone(), 0, vec![child(index, 0, &here).id]));
        }
        assert!(!cancelled.contains(&child(0, 0, &here)), "the oldest makes room");
        assert!(cancelled.contains(&child(1, 0, &here)));
    }
}
