//! Permits: nothing runs without one. Limits hold per atom and per node.
//!
//! A parent that waits for its children gives its permit back. When it can go on it queues again, ahead of
//! every electron that has not started: what is under way is finished before more is begun, and that bounds
//! how much can be under way.
//!
//! Or it lends its permit to one of them, which runs in its place then: where so many parents wait already that more
//! would take up too much memory.
//!
//! The permit of a singleton is of two parts. While it waits it gives back the node's part only: its place is
//! kept, so that no other instance runs until it has truly ended.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
};

use ::metrics::Gauge;
use tokio::sync::{Notify, oneshot};

use crate::{Options, metrics, run::Waits};

/// The permits of one node.
pub(crate) struct Admission {
    state: Mutex<State>,
    /// How many parents wait for their children.
    waiting: AtomicUsize,
    waiting_shown: Gauge,
}

/// Names an atom within the admission of its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lane(usize);

/// How many permits are out, and how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) running: usize,
    pub(crate) limit: usize,
}

impl Usage {
    fn new(limit: usize, free: isize) -> Self {
        let limit = limit.min(Options::CONCURRENCY_MAX);
        Self { running: limit.saturating_add_signed(-free), limit }
    }
}

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
    limit: usize,
    lanes: Vec<LaneState>,
    /// Where the search for the next to be served begins, so that lanes take turns.
    next_lane: usize,
}

struct LaneState {
    free: isize,
    limit: usize,
    /// Who waits keeps its place in the lane.
    keeps: bool,
    resuming: VecDeque<oneshot::Sender<Permit>>,
    starting: VecDeque<oneshot::Sender<Permit>>,
}

impl Admission {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let state = State { free: capped(limit), limit, lanes: Vec::new(), next_lane: 0 };
        Arc::new(Self {
            state: Mutex::new(state),
            waiting: AtomicUsize::new(0),
            waiting_shown: metrics::parents_waiting(),
        })
    }

    /// Returns how many parents wait for their children, those included that have lent them their permits.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Returns how many permits of the node are out.
    pub(crate) fn usage(&self) -> Usage {
        let state = self.lock();
        Usage::new(state.limit, state.free)
    }

    /// Returns how many permits of an atom are out.
    pub(crate) fn usage_of(&self, lane: Lane) -> Usage {
        let state = self.lock();
        let lane = &state.lanes[lane.0];
        Usage::new(lane.limit, lane.free)
    }

    /// Adds an atom with its own limit. `keeps` says that who waits keeps its place.
    pub(crate) fn add_lane(&self, limit: usize, keeps: bool) -> Lane {
        let mut state = self.lock();
        state.lanes.push(LaneState {
            free: capped(limit),
            limit,
            keeps,
            resuming: VecDeque::new(),
            starting: VecDeque::new(),
        });
        Lane(state.lanes.len() - 1)
    }

    pub(crate) fn try_acquire(self: &Arc<Self>, lane: Lane) -> Option<Permit> {
        let took = self.lock().take(lane);
        took.then(|| self.permit(lane, true))
    }

    /// Takes a permit whether one is free or not; what is owed is paid back before anyone else is served.
    fn force(self: &Arc<Self>, lane: Lane) -> Permit {
        let mut state = self.lock();
        state.free -= 1;
        let place = state.lanes[lane.0].gives_place(Priority::Resume);
        state.lanes[lane.0].free -= isize::from(place);
        drop(state);
        self.permit(lane, place)
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

    fn permit(self: &Arc<Self>, lane: Lane, place: bool) -> Permit {
        Permit { admission: Arc::clone(self), lane, node: true, place }
    }

    fn give_back(self: &Arc<Self>, lane: Lane, node: bool, place: bool) {
        let mut state = self.lock();
        state.free += isize::from(node);
        state.lanes[lane.0].free += isize::from(place);
        self.serve(state);
    }

    /// Hands permits to all who can have one.
    fn serve<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
        while let Some((lane, place, waiter)) = state.grant() {
            // Unlocked, because a waiter that is gone drops its permit, which locks again.
            drop(state);
            drop(waiter.send(self.permit(lane, place)));
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
    fn grant(&mut self) -> Option<(Lane, bool, oneshot::Sender<Permit>)> {
        if self.free <= 0 {
            return None;
        }
        [Priority::Resume, Priority::Start].into_iter().find_map(|priority| {
            let count = self.lanes.len();
            (0..count).find_map(|step| {
                let at = (self.next_lane + step) % count;
                let waiter = self.lanes[at].pop(priority)?;
                self.next_lane = (at + 1) % count;
                let place = self.lanes[at].gives_place(priority);
                self.free -= 1;
                self.lanes[at].free -= isize::from(place);
                Some((Lane(at), place, waiter))
            })
        })
    }
}

impl LaneState {
    /// Whether a permit comes with a place in the lane, or its holder has kept one.
    fn gives_place(&self, priority: Priority) -> bool {
        priority == Priority::Start || !self.keeps
    }

    fn pop(&mut self, priority: Priority) -> Option<oneshot::Sender<Permit>> {
        if self.free <= 0 && self.gives_place(priority) {
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
    /// It counts towards the limit of the node.
    node: bool,
    /// It counts towards the limit of the lane.
    place: bool,
}

impl Permit {
    /// Parts the place that is kept while waiting from what is given back.
    fn keep_place(&mut self) -> Option<Self> {
        let keeps = self.admission.lock().lanes[self.lane.0].keeps;
        (keeps && std::mem::take(&mut self.place)).then(|| Self {
            admission: Arc::clone(&self.admission),
            lane: self.lane,
            node: false,
            place: true,
        })
    }

    /// Turns into a permit of another lane, or stays what it is where that has no room.
    fn turn_to(mut self, lane: Lane, priority: Priority) -> Result<Self, Self> {
        let admission = Arc::clone(&self.admission);
        let mut state = admission.lock();
        let to = &mut state.lanes[lane.0];
        let place = to.gives_place(priority);
        if (lane, place) == (self.lane, self.place) {
            return Ok(self);
        }
        if place && to.free <= 0 {
            return Err(self);
        }
        to.free -= isize::from(place);
        state.lanes[self.lane.0].free += isize::from(self.place);
        (self.lane, self.place) = (lane, place);
        admission.serve(state);
        Ok(self)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.give_back(self.lane, self.node, self.place);
    }
}

/// Holds the permit of one running electron, and lets go of it while the electron waits. The run and its
/// worker share it.
#[derive(Debug)]
pub(crate) struct Slot {
    /// None for a resident, which runs without a permit.
    admission: Option<(Arc<Admission>, Lane)>,
    permit: Mutex<Place>,
    /// Odd while the run is being polled. Who looks twice and finds the same odd number knows a run that holds
    /// its thread.
    polls: AtomicU32,
    /// Held by the branch of the atom that queues for the permit, so that no other queues behind it for one
    /// that this slot holds.
    resuming: tokio::sync::Mutex<()>,
    /// Rung when a permit that was lent is back.
    returned: Notify,
    /// Who is told when it gives back its permit for a while.
    waits: Option<Waits>,
    /// The parent that has lent the permit.
    lender: Option<Weak<Self>>,
}

impl Slot {
    pub(crate) fn new(mut permit: Permit) -> Self {
        let admission = Some((Arc::clone(&permit.admission), permit.lane));
        let kept = permit.keep_place();
        Self { admission, ..Self::with(Place::Running { permit, _kept: kept }) }
    }

    /// Tells when the run waits.
    pub(crate) fn tells(self, waits: Waits) -> Self {
        Self { waits: Some(waits), ..self }
    }

    /// A slot of what runs without a permit.
    pub(crate) fn unlimited() -> Self {
        Self::with(Place::Revoked)
    }

    fn with(place: Place) -> Self {
        Self {
            admission: None,
            permit: Mutex::new(place),
            polls: AtomicU32::new(0),
            resuming: tokio::sync::Mutex::new(()),
            returned: Notify::new(),
            waits: None,
            lender: None,
        }
    }

    /// Lends the permit to a child, whose slot it returns. None where there is no permit to lend, or the child's lane
    /// has no room.
    pub(crate) fn lend(self: &Arc<Self>, lane: Lane) -> Option<Arc<Self>> {
        let permit = self.part_with_permit(|_kept, _counted| Place::Lent { _kept, _counted })?;
        let permit = match permit.turn_to(lane, Priority::Start) {
            Ok(permit) => permit,
            Err(permit) => {
                self.take_back(Some(permit));
                return None;
            }
        };
        self.waits.iter().for_each(Waits::tell);
        let admission = Some((Arc::clone(&permit.admission), lane));
        let lender = Some(Arc::downgrade(self));
        let place = Place::Running { permit, _kept: None };
        Some(Arc::new(Self { admission, lender, ..Self::with(place) }))
    }

    /// Takes the permit away for good: the run is given up, whether it has ended or not. What was lent is returned.
    pub(crate) fn revoke(&self) {
        let revoked = std::mem::replace(&mut *self.lock(), Place::Revoked);
        let Some(lender) = self.lender.as_ref().and_then(Weak::upgrade) else { return };
        match revoked {
            Place::Running { permit, .. } => lender.take_back(Some(permit)),
            // A permit that it lent in turn, or queues for, never gets as far as its lender.
            Place::Waiting { .. } | Place::Lent { .. } => lender.take_back(None),
            Place::Revoked => {}
        }
    }

    /// The child is over, or given up: holds a permit again, or is to queue for one.
    fn take_back(&self, permit: Option<Permit>) {
        let Some((_, lane)) = self.admission else { return };
        let permit = permit.and_then(|permit| permit.turn_to(lane, Priority::Resume).ok());
        let mut place = self.lock();
        let now = std::mem::replace(&mut *place, Place::Revoked);
        let unwanted = match (now, permit) {
            (Place::Lent { _kept, .. }, Some(permit)) => {
                *place = Place::Running { permit, _kept };
                self.returned.notify_one();
                None
            }
            (Place::Lent { _kept, _counted }, None) => {
                *place = Place::Waiting { _kept, _counted };
                None
            }
            (other, permit) => {
                *place = other;
                permit
            }
        };
        drop(place);
        drop(unwanted);
    }

    pub(crate) fn polling(&self) {
        self.polls.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn polled(&self) {
        self.polls.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the run holds a thread at this moment.
    pub(crate) fn is_polled(&self) -> bool {
        self.polls() % 2 == 1
    }

    /// Returns how often polling began and ended.
    pub(crate) fn polls(&self) -> u32 {
        self.polls.load(Ordering::Relaxed)
    }

    /// Awaits `future` without a permit, and queues for one again before it returns.
    ///
    /// An atom that waits in several branches at once gives back its permit with the first, and has it again
    /// with the first that goes on.
    pub(crate) async fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.pause();
        let resume = ForceOnDrop(self);
        let output = future.await;
        {
            let _only_one = self.resuming.lock().await;
            while let Some((admission, lane)) = self.waiting() {
                tokio::select! {
                    permit = admission.acquire(*lane, Priority::Resume) => match permit {
                        Ok(permit) => self.resume(permit),
                        // An error says that the node is gone.
                        Err(_) => break,
                    },
                    // What another branch had lent to a child.
                    () = self.returned.notified() => {}
                }
            }
        }
        drop(resume);
        output
    }

    /// Where to queue, when the permit was given back for a while.
    fn waiting(&self) -> Option<&(Arc<Admission>, Lane)> {
        self.admission.as_ref().filter(|_| self.is_waiting())
    }

    /// Gives the permit back for a while, all but the place that is kept.
    pub(crate) fn pause(&self) {
        let permit = self.part_with_permit(|_kept, _counted| Place::Waiting { _kept, _counted });
        if let Some(permit) = permit {
            drop(permit);
            self.waits.iter().for_each(Waits::tell);
        }
    }

    /// Takes the permit out, if there is one. Dropping it serves others: not under the lock.
    fn part_with_permit(&self, to: fn(Option<Permit>, Counted) -> Place) -> Option<Permit> {
        let mut place = self.lock();
        match std::mem::replace(&mut *place, Place::Revoked) {
            Place::Running { permit, _kept } => {
                *place = to(_kept, Counted::new(&permit.admission));
                Some(permit)
            }
            other => {
                *place = other;
                None
            }
        }
    }

    /// Whether the run waits, without a permit.
    pub(crate) fn is_waiting(&self) -> bool {
        matches!(*self.lock(), Place::Waiting { .. } | Place::Lent { .. })
    }

    /// Goes on with a permit, unless that is not wanted any more: then it is given back.
    fn resume(&self, permit: Permit) {
        let mut place = self.lock();
        let now = std::mem::replace(&mut *place, Place::Revoked);
        let unwanted = match now {
            Place::Waiting { _kept, .. } | Place::Lent { _kept, .. } => {
                *place = Place::Running { permit, _kept };
                None
            }
            other => {
                *place = other;
                Some(permit)
            }
        };
        drop(place);
        drop(unwanted);
    }

    fn lock(&self) -> MutexGuard<'_, Place> {
        self.permit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a slot holds.
#[derive(Debug)]
enum Place {
    Running {
        permit: Permit,
        _kept: Option<Permit>,
    },
    /// Nothing for a while.
    Waiting {
        _kept: Option<Permit>,
        _counted: Counted,
    },
    /// Nothing while a child runs with it.
    Lent {
        _kept: Option<Permit>,
        _counted: Counted,
    },
    /// Nothing, for good.
    Revoked,
}

/// A parent that waits, as it is counted.
#[derive(Debug)]
struct Counted(Arc<Admission>);

impl Counted {
    fn new(admission: &Arc<Admission>) -> Self {
        admission.waiting.fetch_add(1, Ordering::Relaxed);
        admission.waiting_shown.increment(1);
        Self(Arc::clone(admission))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        self.0.waiting_shown.decrement(1);
    }
}

/// Sees to it that an atom which stops waiting early (a time-out around a call, say) runs with a permit.
struct ForceOnDrop<'slot>(&'slot Slot);

impl Drop for ForceOnDrop<'_> {
    fn drop(&mut self) {
        if let Some((admission, lane)) = self.0.waiting() {
            self.0.resume(admission.force(*lane));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_per_node_and_per_lane() {
        let admission = Admission::new(2);
        let (a, b) = (admission.add_lane(1, false), admission.add_lane(5, false));
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
        let (a, b) = (admission.add_lane(1, false), admission.add_lane(1, false));
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
        let (a, b) = (admission.add_lane(9, false), admission.add_lane(9, false));
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
        let lane = admission.add_lane(1, false);
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
        let lane = admission.add_lane(1, false);
        let slot = Slot::new(admission.try_acquire(lane).unwrap());
        slot.wait(async { drop(admission.try_acquire(lane).expect("it is free while waiting")) })
            .await;
        assert!(admission.try_acquire(lane).is_none(), "it was taken again");
    }

    #[tokio::test]
    async fn an_atom_that_waits_in_two_branches_needs_one_permit() {
        let admission = Admission::new(1);
        let lane = admission.add_lane(1, false);
        let slot = Slot::new(admission.try_acquire(lane).unwrap());
        let both = async { tokio::join!(slot.wait(async {}), slot.wait(tokio::task::yield_now())) };
        tokio::time::timeout(std::time::Duration::from_secs(10), both).await.expect("it goes on");
        assert!(admission.try_acquire(lane).is_none());
    }

    #[test]
    fn a_limit_without_end_is_a_limit() {
        let admission = Admission::new(usize::MAX);
        let lane = admission.add_lane(usize::MAX, false);
        assert!(admission.try_acquire(lane).is_some());
    }

    #[tokio::test]
    async fn who_stops_waiting_early_has_its_permit_all_the_same() {
        let admission = Admission::new(1);
        let lane = admission.add_lane(1, false);
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

    #[tokio::test]
    async fn a_singleton_that_waits_keeps_its_place_and_gives_back_the_nodes_permit() {
        let admission = Admission::new(1);
        let (single, other) = (admission.add_lane(1, true), admission.add_lane(1, false));
        let slot = Slot::new(admission.try_acquire(single).unwrap());
        let mut second = admission.acquire(single, Priority::Start);
        let waited = slot.wait(async {
            assert!(second.try_recv().is_err(), "its place is taken");
            drop(admission.try_acquire(other).expect("the node has room"));
        });
        tokio::time::timeout(std::time::Duration::from_secs(10), waited).await.expect("it goes on");
        assert!(admission.try_acquire(other).is_none(), "it runs again");
        drop(slot);
        assert!(second.try_recv().is_ok(), "its place is free");
    }

    #[tokio::test]
    async fn what_is_revoked_is_never_taken_again() {
        let admission = Admission::new(1);
        let lane = admission.add_lane(1, false);
        let slot = Slot::new(admission.try_acquire(lane).unwrap());
        slot.wait(async { slot.revoke() }).await;
        assert!(admission.try_acquire(lane).is_some(), "it is for others");
        slot.wait(async {}).await;
        assert!(admission.try_acquire(lane).is_some(), "still");
    }

    #[test]
    fn what_is_lent_comes_back_and_is_one_permit_all_the_while() {
        let admission = Admission::new(1);
        let lane = admission.add_lane(1, false);
        let parent = Arc::new(Slot::new(admission.try_acquire(lane).unwrap()));
        let child = parent.lend(lane).expect("it has one");
        assert!(parent.lend(lane).is_none(), "there is but one");
        assert_eq!(admission.waiting(), 1);
        let mut other = admission.acquire(lane, Priority::Start);
        child.revoke();
        assert!(other.try_recv().is_err(), "the parent has it again");
        assert_eq!(admission.waiting(), 0);
        drop((child, parent));
        assert!(other.try_recv().is_ok());
    }

    #[test]
    fn a_child_of_another_lane_runs_within_the_limit_of_that() {
        let admission = Admission::new(3);
        let (of_parent, of_child) = (admission.add_lane(1, false), admission.add_lane(1, false));
        let parent = Arc::new(Slot::new(admission.try_acquire(of_parent).unwrap()));
        let busy = admission.try_acquire(of_child).unwrap();
        assert!(parent.lend(of_child).is_none(), "its lane is full");
        assert!(!parent.is_waiting(), "and the parent runs");
        drop(busy);
        let child = parent.lend(of_child).unwrap();
        assert!(admission.try_acquire(of_child).is_none());
        let second = admission.try_acquire(of_parent).expect("who waits leaves its place");
        child.revoke();
        assert!(parent.is_waiting(), "its place is taken meanwhile");
        drop(second);
        assert!(admission.try_acquire(of_child).is_some());
    }

    #[tokio::test]
    async fn a_child_that_waits_gives_the_permit_to_others_and_its_parent_queues() {
        let admission = Admission::new(1);
        let lane = admission.add_lane(1, false);
        let parent = Arc::new(Slot::new(admission.try_acquire(lane).unwrap()));
        let child = parent.lend(lane).unwrap();
        let over = async {
            let waits = Box::pin(child.wait(std::future::pending::<()>()));
            assert!(futures::poll!(waits).is_pending());
            child.pause();
            drop(admission.try_acquire(lane).expect("it is free while the child waits"));
            child.revoke();
        };
        tokio::time::timeout(std::time::Duration::from_secs(10), parent.wait(over))
            .await
            .expect("it goes on");
        assert!(admission.try_acquire(lane).is_none(), "it was taken again");
    }

    #[tokio::test]
    async fn a_branch_that_queues_goes_on_with_what_another_had_lent() {
        let admission = Admission::new(1);
        let lane = admission.add_lane(1, false);
        let parent = Arc::new(Slot::new(admission.try_acquire(lane).unwrap()));
        let child = parent.lend(lane).unwrap();
        let queues = parent.wait(async {});
        let mut queues = std::pin::pin!(queues);
        assert!(futures::poll!(&mut queues).is_pending(), "the child has the permit");
        child.revoke();
        let limit = std::time::Duration::from_secs(10);
        tokio::time::timeout(limit, queues).await.expect("it goes on");
        tokio::time::timeout(limit, parent.wait(async {})).await.expect("and waits again");
    }

    #[test]
    fn what_a_parent_lent_that_is_given_up_is_for_others() {
        let admission = Admission::new(1);
        let lane = admission.add_lane(1, false);
        let parent = Arc::new(Slot::new(admission.try_acquire(lane).unwrap()));
        let child = parent.lend(lane).unwrap();
        parent.revoke();
        assert_eq!(admission.waiting(), 0);
        assert!(admission.try_acquire(lane).is_none(), "the child runs");
        child.revoke();
        assert!(admission.try_acquire(lane).is_some());
    }
}
