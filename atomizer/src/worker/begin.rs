//! How an electron begins to run.

use std::{sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::Instant};

use super::{
    EXPIRED, GIVEN_UP, NODE_STOPS, Step, TICK, Worker,
    held::{Began, Begun, Held, Running, later},
};
use crate::{
    Context, Electron, ElectronId, EventKind, Failure, FailureKind, Outcome, SettleError,
    admission::{Permit, Priority, Slot},
    claim::Claim,
    life::{Fact, Leave, State},
    run::{Report, RunId, Waits},
    settle::Why,
};

impl Worker {
    pub(super) fn on_admitted(&mut self, permit: Permit) {
        self.queued = None;
        if let Some(held) = self.ready.pop_front() {
            self.start(held, permit, Began::now());
        }
        self.start_ready();
    }

    /// Starts what there are permits for, and queues for one more when something is left.
    pub(super) fn start_ready(&mut self) {
        if self.queued.is_some() || self.ready.is_empty() {
            return;
        }
        let admission = Arc::clone(&self.asker.node.admission);
        let began = Began::now();
        while let Some(held) = self.ready.pop_front() {
            let Some(permit) = admission.try_acquire(self.atom.lane) else {
                self.ready.push_front(held);
                self.queued = Some(admission.acquire(self.atom.lane, Priority::Start));
                return;
            };
            self.start(held, permit, began);
        }
    }

    pub(super) fn start(&mut self, held: Held, permit: Permit, began: Began) {
        let id = held.electron.id;
        if self.is_begun_once(&held.electron, held.deadline) {
            if let Some(claim) = held.ticket {
                self.drop_duplicate(claim);
            }
            return;
        }
        if let Some(begun) = self.begun.get(&id) {
            if !begun.held().is_asked_by(&held.electron) {
                self.start_later(held);
            } else if let Some(claim) = held.ticket {
                self.adopt(held.electron, claim, held.deadline);
            }
            return;
        }
        if self.taking.contains_key(&id) {
            return self.start_later(held);
        }
        let Some(held) = self.unexpired(held, began) else { return };
        if self.atom.options.is_at_most_once() && held.ticket.is_some() {
            return self.take_for_good(held, permit);
        }
        self.begin(held, permit, began);
    }

    /// Takes in another delivery of what is begun.
    ///
    /// What the run itself has asked keeps the deadline that it had then.
    pub(super) fn adopt(
        &mut self,
        electron: Arc<Electron>,
        claim: Claim,
        deadline: Option<Instant>,
    ) {
        let id = electron.id;
        let Some(begun) = self.begun.get_mut(&id) else { return };
        let held = begun.held_mut();
        self.out -= held.out();
        held.adopt(electron, claim);
        held.extend(deadline);
        self.out += held.out();
        self.renew_limit(id);
    }

    /// Has a run stop when that is due now.
    fn renew_limit(&mut self, id: ElectronId) {
        let Some(Begun::Running(running)) = self.begun.get(&id) else { return };
        let limit = self.limit(&running.held, running.began.instant);
        if let Some((at, _)) = limit {
            self.look_after(id, at);
        }
        if let Some(Begun::Running(running)) = self.begun.get_mut(&id) {
            running.limit = limit;
        }
    }

    /// Puts back what has the id of something else that is begun: a later life of its parent asks in another order.
    fn start_later(&self, mut held: Held) {
        held.on(Fact::Late);
        let reason = "something else is worked on here under its id".to_owned();
        self.put_back(held, Began::now(), TICK, &Why::Late(reason));
    }

    /// Returns an electron whose deadline is not over; the others fail.
    pub(super) fn unexpired(&self, mut held: Held, began: Began) -> Option<Held> {
        let is_cancelled = held.is_cancelled(&self.asker.node.cancelled);
        if !is_cancelled && !held.is_expired(began.instant) {
            return Some(held);
        }
        let message = if is_cancelled { GIVEN_UP } else { EXPIRED };
        let failure = Failure::new(FailureKind::Expired, message);
        let failure = self.stamp(failure, &held.electron);
        let asked = held.electron.reply_to.is_some();
        let dead = held.on(Fact::Expired { asked }) == State::Leaving(Leave::Failed { dead: true });
        let batch = self.fail(held, began, &failure, dead);
        self.settle(batch);
        None
    }

    /// Removes an electron from its queue before it is begun, so that it can never be begun again.
    pub(super) fn take_for_good(&mut self, mut held: Held, permit: Permit) {
        let link = Arc::clone(&self.asker.link);
        self.taking.insert(held.electron.id, (Arc::clone(&held.electron), held.deadline));
        let claim = held.ticket.take().expect("it was looked at");
        self.asked.push(Box::pin(async move {
            let taken = match (link.session(), claim.ticket().await) {
                (Some(session), Ok(ticket)) => {
                    let batch = vec![(ticket, Outcome::take())];
                    link.settle(&session, batch).await.pop().unwrap_or(Ok(()))
                }
                _ => Err(SettleError::Stale),
            };
            Step::TakenForGood { held, permit, taken }
        }));
    }

    pub(super) fn on_taken_for_good(
        &mut self,
        mut held: Held,
        permit: Permit,
        taken: Result<(), SettleError>,
    ) {
        self.taken_for(&mut held);
        match taken {
            Ok(()) if self.draining => {
                self.hand_on(held, Began::now(), Duration::ZERO, NODE_STOPS.to_owned());
            }
            Ok(()) => {
                let began = Began::now();
                if let Some(held) = self.unexpired(held, began) {
                    self.begin(held, permit, began);
                }
            }
            // It may have been removed or not. It must not be begun here: it may be begun elsewhere.
            Err(error) => self.let_go(&held, error.to_string()),
        }
        self.start_ready();
    }

    /// Has what was taken for good answer who asked last.
    pub(super) fn taken_for(&mut self, held: &mut Held) {
        if let Some((asked_last, deadline)) = self.taking.remove(&held.electron.id) {
            held.answer_to(&asked_last);
            held.deadline = deadline;
        }
    }

    /// Whether the same is here already, and is to be begun once at the most. Then it answers this copy.
    pub(super) fn is_begun_once(&mut self, copy: &Electron, deadline: Option<Instant>) -> bool {
        if !self.atom.options.is_at_most_once() {
            return false;
        }
        if let Some(begun) = self.begun.get_mut(&copy.id) {
            let held = begun.held_mut();
            let is_same = held.is_asked_by(copy);
            if is_same {
                held.answer_to(copy);
                held.extend(deadline);
                self.renew_limit(copy.id);
            }
            return is_same;
        }
        let Some((taken, until)) = self.taking.get_mut(&copy.id) else { return false };
        let is_same = taken.payload == copy.payload;
        if is_same {
            *taken = Arc::new(copy.clone());
            *until = later(*until, deadline);
        }
        is_same
    }

    /// Removes a second message of the same electron: the answer to the first is the answer.
    pub(super) fn drop_duplicate(&self, claim: Claim) {
        let link = Arc::clone(&self.asker.link);
        self.asked.push(Box::pin(async move {
            if let (Some(session), Ok(ticket)) = (link.session(), claim.ticket().await) {
                drop(link.settle(&session, vec![(ticket, Outcome::done(Vec::new()))]).await);
            }
            Step::Settled(Vec::new())
        }));
    }

    pub(super) fn let_go(&self, held: &Held, reason: String) {
        let (electron, attempt) = (held.electron.id, held.electron.attempts.saturating_add(1));
        tracing::warn!(atom = %self.atom.id, %electron, %reason, "not settled here");
        self.metrics.not_settled.increment(1);
        self.emit(|atom| EventKind::NotSettled { electron, atom, attempt, reason });
    }

    pub(super) fn begin(&mut self, held: Held, permit: Permit, began: Began) {
        let (electron, run) = (held.electron.id, RunId(self.next_run));
        let waits = Waits { electron, run, to: self.finish.clone() };
        let slot = Arc::new(Slot::new(permit).tells(waits));
        self.run_in(slot, held, None, began);
    }

    /// Runs an electron in a slot. `over` is for the parent that lent the permit.
    pub(super) fn run_in(
        &mut self,
        slot: Arc<Slot>,
        mut held: Held,
        over: Option<oneshot::Sender<()>>,
        began: Began,
    ) {
        held.on(Fact::Admitted);
        // A tick that is over while there was nothing to look after. Any other stays, or what comes and goes one
        // by one would put it off for ever.
        let nothing_to_look_after = self.begun.is_empty() && self.overdue.is_empty();
        if nothing_to_look_after && self.next_tick <= began.instant {
            self.next_tick = began.instant + TICK;
        }
        let (id, attempt) = (held.electron.id, held.electron.attempts.saturating_add(1));
        self.metrics.attempts.increment(1);
        if let Some(sent) = held.sent.take() {
            self.metrics.queue_wait.record(began.instant.saturating_duration_since(sent));
        }
        self.emit(|atom| EventKind::Started { electron: id, atom, attempt });
        let run = RunId(self.next_run);
        self.next_run += 1;
        let context = Context::new(self.asker.clone(), Arc::clone(&held.electron), slot)
            .of_kind(self.atom.kind)
            .until(held.deadline);
        let report = Report { electron: id, run, to: self.finish.clone(), result: None };
        let blocking = self.atom.options.is_blocking();
        let threads = &self.asker.node.threads;
        let run = Arc::clone(&self.atom.atom).start(context, blocking, threads, report);
        let limit = self.limit(&held, began.instant);
        if let Some((at, _)) = limit {
            self.look_after(id, at);
        }
        self.out += held.out();
        let (polls, told, listed) = (0, false, false);
        let running = Running { held, began, limit, run, polls, told, listed, over };
        self.begun.insert(id, Begun::Running(running));
    }

    /// When a run is stopped, and what for: its time limit, or its deadline.
    pub(super) fn limit(&self, held: &Held, now: Instant) -> Option<(Instant, FailureKind)> {
        let limit = held.electron.time_limit.or(self.atom.options.run_time_limit());
        let limit = limit.and_then(|limit| now.checked_add(limit));
        match (limit, held.deadline) {
            (Some(limit), Some(deadline)) if deadline < limit => {
                Some((deadline, FailureKind::Expired))
            }
            (Some(limit), _) => Some((limit, FailureKind::TimedOut)),
            (None, deadline) => deadline.map(|deadline| (deadline, FailureKind::Expired)),
        }
    }

    /// Sees to it that an electron is looked at on time. What is far off waits for a tick.
    pub(super) fn look_after(&mut self, electron: ElectronId, at: Instant) {
        if at <= self.next_tick {
            self.alarms.insert((at, electron));
        }
    }
}
