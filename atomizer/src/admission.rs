//! Permits: nothing runs without one. Limits hold per atom and per node.
//!
//! A parent that waits for its children gives its permit back. When it can go on it queues again, ahead of
//! every electron that has not started: what is under way is finished before more is begun, and that bounds
//! how much can be under way.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use crate::Options;

/// The permits of one node.
pub(crate) struct Admission {
    state: Mutex<State>,
}

/// Names an atom within the admission of its node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lane(usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// Begin with a new electron.
    Start,
    /// Go on after waiting.
    Resume,
}

/// Invariant: after each change, nobody waits who could be served ([`State::grant`] is called until it is
/// empty). So whoever finds room has nobody to overtake.
struct State {
    /// Below 0 while atoms run that were not asked to queue ([`Admission::force`]).
    free: isize,
    lanes: Vec<LaneState>,
    /// Where the search for the next to be served begins, so that lanes take turns.
    next_lane: usize,
}

struct LaneState {
    free: isize,
    resuming: VecDeque<oneshot::Sender<Permit>>,
    starting: VecDeque<oneshot::Sender<Permit>>,
}

impl Admission {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let state = State { free: capped(limit), lanes: Vec::new(), next_lane: 0 };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// Adds an atom with its own limit.
    pub(crate) fn add_lane(&self, limit: usize) -> Lane {
        let mut state = self.lock();
        state.lanes.push(LaneState {
            free: capped(limit),
            resuming: VecDeque::new(),
            starting: VecDeque::new(),
        });
        Lane(state.lanes.len() - 1)
    }

    pub(crate) fn try_acquire(self: &Arc<Self>, lane: Lane) -> Option<Permit> {
        let took = self.lock().take(lane);
        took.then(|| self.permit(lane))
    }

    /// Takes a permit whether one is free or not; what is owed is paid back before anyone else is served.
    fn force(self: &Arc<Self>, lane: Lane) -> Permit {
        let mut state = self.lock();
        state.free -= 1;
        state.lanes[lane.0].free -= 1;
        drop(state);
        self.permit(lane)
    }

    /// Queues for a permit. Dropping the receiver leaves the queue.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        lane: Lane,
        priority: Priority,
    ) -> oneshot::Receiver<Permit> {
        let (tx, rx) = oneshot::channel();
        let mut state = self.lock();
        let waiting = &mut state.lanes[lane.0];
        match priority {
            Priority::Start => waiting.starting.push_back(tx),
            Priority::Resume => waiting.resuming.push_back(tx),
        }
        self.serve(state);
        rx
    }

    fn permit(self: &Arc<Self>, lane: Lane) -> Permit {
        Permit { admission: Arc::clone(self), lane }
    }

    fn give_back(self: &Arc<Self>, lane: Lane) {
        let mut state = self.lock();
        state.free += 1;
        state.lanes[lane.0].free += 1;
        self.serve(state);
    }

    /// Hands permits to all who can have one.
    fn serve<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
        while let Some((lane, waiter)) = state.grant() {
            // Unlocked, because a waiter that is gone drops its permit, which locks again.
            drop(state);
            drop(waiter.send(self.permit(lane)));
            state = self.lock();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock; were it so, the counts are still the best there is.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self, lane: Lane) -> bool {
        let lane = &mut self.lanes[lane.0];
        if self.free <= 0 || lane.free <= 0 {
            return false;
        }
        self.free -= 1;
        lane.free -= 1;
        true
    }

    /// Takes a permit for whoever is next, if anyone can be served.
    fn grant(&mut self) -> Option<(Lane, oneshot::Sender<Permit>)> {
        if self.free <= 0 {
            return None;
        }
        [Priority::Resume, Priority::Start].into_iter().find_map(|priority| {
            let count = self.lanes.len();
            (0..count).find_map(|step| {
                let at = (self.next_lane + step) % count;
                let waiter = self.lanes[at].pop(priority)?;
                self.next_lane = (at + 1) % count;
                self.free -= 1;
                self.lanes[at].free -= 1;
                Some((Lane(at), waiter))
            })
        })
    }
}

impl LaneState {
    fn pop(&mut self, priority: Priority) -> Option<oneshot::Sender<Permit>> {
        if self.free <= 0 {
            return None;
        }
        let queue = match priority {
            Priority::Start => &mut self.starting,
            Priority::Resume => &mut self.resuming,
        };
        std::iter::from_fn(|| queue.pop_front()).find(|waiter| !waiter.is_closed())
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Admission({} free)", self.lock().free)
    }
}

/// No node runs more at once; counts stay far from where they would wrap.
fn capped(limit: usize) -> isize {
    limit.min(Options::CONCURRENCY_MAX).cast_signed()
}

/// The right to run; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    admission: Arc<Admission>,
    lane: Lane,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.give_back(self.lane);
    }
}

/// Holds the permit of one running electron, and lets go of it while the electron waits.
#[derive(Debug)]
pub(crate) struct Slot {
    admission: Arc<Admission>,
    lane: Lane,
    permit: Mutex<Option<Permit>>,
    /// Held by the branch of the atom that queues for the permit, so that no other queues behind it for one
    /// that this slot holds.
    resuming: tokio::sync::Mutex<()>,
}

impl Slot {
    pub(crate) fn new(permit: Permit) -> Self {
        Self {
            admission: Arc::clone(&permit.admission),
            lane: permit.lane,
            permit: Mutex::new(Some(permit)),
            resuming: tokio::sync::Mutex::new(()),
        }
    }

    /// Awaits `future` without a permit, and queues for one again before it returns.
    ///
    /// An atom that waits in several branches at once gives back its permit with the first, and has it again
    /// with the first that goes on.
    pub(crate) async fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        drop(self.swap(None));
        let resume = ForceOnDrop(self);
        let output = future.await;
        {
            let _only_one = self.resuming.lock().await;
            if self.lock().is_none()
                && let Ok(permit) = self.admission.acquire(self.lane, Priority::Resume).await
            {
                drop(self.swap(Some(permit)));
            }
        }
        drop(resume);
        output
    }

    /// Swaps under the lock and returns the old permit, so that it is dropped outside.
    fn swap(&self, permit: Option<Permit>) -> Option<Permit> {
        std::mem::replace(&mut *self.lock(), permit)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Permit>> {
        self.permit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sees to it that an atom which stops waiting early (a time-out around a call, say) runs with a permit.
struct ForceOnDrop<'slot>(&'slot Slot);

impl Drop for ForceOnDrop<'_> {
    fn drop(&mut self) {
        if self.0.lock().is_none() {
            let permit = self.0.admission.force(self.0.lane);
            drop(self.0.swap(Some(permit)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_per_node_and_per_lane() {
        let admission = Admission::new(2);
        let (a, b) = (admission.add_lane(1), admission.add_lane(5));
        let first = admission.try_acquire(a).unwrap();
        assert!(admission.try_acquire(a).is_none(), "the lane is full");
        let second = admission.try_acquire(b).unwrap();
        assert!(admission.try_acquire(b).is_none(), "the node is full");
        drop((first, second));
        assert!(admission.try_acquire(a).is_some());
    }

    #[test]
    fn who_resumes_goes_before_who_starts() {
        let admission = Admission::new(1);
        let (a, b) = (admission.add_lane(1), admission.add_lane(1));
        let held = admission.try_acquire(a).unwrap();
        let mut start = admission.acquire(a, Priority::Start);
        let mut resume = admission.acquire(b, Priority::Resume);
        drop(held);
        assert!(start.try_recv().is_err());
        let resumed = resume.try_recv().unwrap();
        drop(resumed);
        assert!(start.try_recv().is_ok());
    }

    #[test]
    fn lanes_take_turns() {
        let admission = Admission::new(1);
        let (a, b) = (admission.add_lane(9), admission.add_lane(9));
        let held = admission.try_acquire(a).unwrap();
        let mut a1 = admission.acquire(a, Priority::Start);
        let mut a2 = admission.acquire(a, Priority::Start);
        let mut b1 = admission.acquire(b, Priority::Start);
        drop(held);
        drop(a1.try_recv().unwrap());
        assert!(a2.try_recv().is_err(), "it is b's turn");
        drop(b1.try_recv().unwrap());
        assert!(a2.try_recv().is_ok());
    }

    #[test]
    fn a_waiter_that_left_costs_no_permit() {
        let admission = Admission::new(1);
        let lane = admission.add_lane(1);
        let held = admission.try_acquire(lane).unwrap();
        drop(admission.acquire(lane, Priority::Start));
        let late = admission.acquire(lane, Priority::Start);
        drop(held);
        // Granted and dropped unread: it must come back all the same.
        drop(late);
        assert!(admission.try_acquire(lane).is_some());
    }

    #[tokio::test]
    async fn waiting_gives_the_permit_to_others() {
        let admission = Admission::new(1);
        let lane = admission.add_lane(1);
        let slot = Slot::new(admission.try_acquire(lane).unwrap());
        slot.wait(async { drop(admission.try_acquire(lane).expect("it is free while waiting")) })
            .await;
        assert!(admission.try_acquire(lane).is_none(), "it was taken again");
    }

    #[tokio::test]
    async fn an_atom_that_waits_in_two_branches_needs_one_permit() {
        let admission = Admission::new(1);
        let lane = admission.add_lane(1);
        let slot = Slot::new(admission.try_acquire(lane).unwrap());
        let both = async { tokio::join!(slot.wait(async {}), slot.wait(tokio::task::yield_now())) };
        tokio::time::timeout(std::time::Duration::from_secs(10), both).await.expect("it goes on");
        assert!(admission.try_acquire(lane).is_none());
    }

    #[test]
    fn a_limit_without_end_is_a_limit() {
        let admission = Admission::new(usize::MAX);
        let lane = admission.add_lane(usize::MAX);
        assert!(admission.try_acquire(lane).is_some());
    }

    #[tokio::test]
    async fn who_stops_waiting_early_has_its_permit_all_the_same() {
        let admission = Admission::new(1);
        let lane = admission.add_lane(1);
        let slot = Slot::new(admission.try_acquire(lane).unwrap());
        let other = {
            let mut waiting = Box::pin(slot.wait(std::future::pending::<()>()));
            assert!(futures::poll!(&mut waiting).is_pending());
            admission.try_acquire(lane).unwrap()
        };
        drop(other);
        assert!(admission.try_acquire(lane).is_none(), "the slot holds the only permit again");
        drop(slot);
        assert!(admission.try_acquire(lane).is_some());
    }
}
