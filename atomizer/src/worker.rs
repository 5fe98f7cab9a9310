//! Runs the electrons of one atom from one conductor: receive, admit, run, settle.
//!
//! One task owns all state, and moves each electron along its [life](crate::life). Tickets stay here, outside
//! the atoms' futures, so that a panic, an error and a time limit all come back to the task that settles.

use std::{
    collections::{BTreeSet, VecDeque},
    num::NonZeroUsize,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use rustc_hash::FxHashMap;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::{Instant, Sleep, sleep, sleep_until},
};

use crate::{
    AtomId, Context, Delivery, Electron, ElectronId, EventKind, Failure, FailureKind, Kind,
    Message, Options, Outcome, Policy, SettleError, Source, Ticket,
    admission::{Lane, Permit, Priority, Slot},
    ask::Asker,
    clock,
    error::{Directive, Failed},
    intake::{Intake, Taken},
    life::{Arrival, Attempt, Fact, Leave, State},
    link::SharedSession,
    node::Stage,
    run::{Report, Reported, Run, RunId, RunResult, Start},
    settle::{Settled, Settlement, Settler, Spent, Verdict, Why, put_back, settle},
};

/// An atom as a node knows it; shared by the workers of all its conductors.
#[derive(Clone)]
pub(crate) struct Registered {
    pub(crate) id: AtomId,
    pub(crate) kind: Kind,
    pub(crate) atom: Arc<dyn Start>,
    pub(crate) options: Options,
    pub(crate) lane: Lane,
}

impl Registered {
    /// What a node holds of one atom's queue: what can run, and a little in hand so that the next is there
    /// when a permit comes free. More in hand would sit here while other nodes idle.
    fn window(&self) -> NonZeroUsize {
        const IN_HAND_MAX: usize = 64;
        let limit = self.options.concurrency_limit(self.kind);
        NonZeroUsize::new(limit + limit.min(IN_HAND_MAX)).expect("a limit is at least 1")
    }
}

pub(crate) struct Worker {
    asker: Asker,
    atom: Registered,
    settler: Settler,
    intake: Intake,
    /// Received, not begun.
    ready: VecDeque<Held>,
    /// A place in the queue for a permit, while something is ready and there was none.
    queued: Option<oneshot::Receiver<Permit>>,
    /// Delivered before, and not begun.
    suspects: VecDeque<Held>,
    /// The way of the first suspect to its turn.
    turn: Option<BoxFuture<'static, Step>>,
    /// Begun here: it runs, or waits for its next attempt. Each once, however often it is delivered.
    begun: FxHashMap<ElectronId, Begun>,
    /// Given up at their time limit, and not ended yet.
    overdue: FxHashMap<RunId, Overdue>,
    next_run: u64,
    /// When to look after whom. What is farther off than a tick is put in at a tick.
    alarms: BTreeSet<(Instant, ElectronId)>,
    next_tick: Instant,
    alarm: Pin<Box<Sleep>>,
    finished: mpsc::UnboundedReceiver<Reported>,
    finish: mpsc::UnboundedSender<Reported>,
    reports: Vec<Reported>,
    /// What a conductor was asked and has not answered.
    asked: FuturesUnordered<BoxFuture<'static, Step>>,
    draining: bool,
}

/// An electron, with the right and the duty to settle it.
struct Held {
    electron: Arc<Electron>,
    state: State,
    /// None once it was taken for good: at most once.
    ticket: Option<Ticket>,
    /// Deliveries of the same electron that came while it was here: after its session was lost, or because it
    /// was sent twice. One run answers for all, each as it asks.
    adopted: Vec<(Arc<Electron>, Ticket)>,
    /// When nobody wants it any more.
    deadline: Option<Instant>,
    /// Its turn as a suspect.
    alone: Option<OwnedSemaphorePermit>,
}

impl Held {
    fn adopt(&mut self, electron: Arc<Electron>, ticket: Ticket) {
        // What an earlier session delivered went back when it ended.
        let epoch = ticket.epoch();
        self.adopted.retain(|(_, held)| held.epoch() == epoch);
        match &mut self.ticket {
            Some(held) if held.epoch() != epoch => *held = ticket,
            _ => self.adopted.push((electron, ticket)),
        }
    }

    /// Moves on in its life.
    fn on(&mut self, fact: Fact) -> State {
        let next = self.state.next(fact);
        self.state = next.unwrap_or_else(|| unreachable!("{fact:?} in {:?}", self.state));
        self.state
    }

    fn left(&self, now: Instant) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(now))
    }

    /// Each delivery, to be settled.
    fn deliveries(self) -> impl Iterator<Item = (Arc<Electron>, Option<Ticket>)> {
        let adopted = self.adopted.into_iter().map(|(electron, ticket)| (electron, Some(ticket)));
        adopted.chain([(self.electron, self.ticket)])
    }

    fn is_expired(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }
}

enum Begun {
    Running(Running),
    Pausing { held: Held, failure: Failure, until: Instant },
}

struct Running {
    held: Held,
    began: Began,
    /// When it is stopped, and what for.
    limit: Option<(Instant, FailureKind)>,
    run: Run,
    /// How often it had been polled at the last tick.
    polls: u32,
    told: bool,
}

struct Overdue {
    electron: ElectronId,
    attempt: u32,
    since: Instant,
    told: bool,
    _run: Run,
}

/// A moment on both clocks: one to tell people, one to measure with.
#[derive(Clone, Copy)]
struct Began {
    at: SystemTime,
    instant: Instant,
}

impl Began {
    fn now() -> Self {
        Self { at: clock::now(), instant: Instant::now() }
    }

    fn spent(self, now: Instant) -> Spent {
        Spent { at: self.at, took: now.saturating_duration_since(self.instant) }
    }
}

/// How many runs are settled together at the most.
const BATCH_MAX: usize = 256;
/// How often a worker looks after what runs. A run that holds its thread for so long is told of, and one that
/// goes on for so long after it was given up counts as stuck.
const TICK: Duration = Duration::from_secs(1);
/// A suspect that has run for so long lets the next one begin: what kills its node does so soon.
const ALONE_MAX: Duration = Duration::from_secs(5);

/// What can happen next.
enum Step {
    Taken(Taken),
    Admitted(Permit),
    /// So many runs finished; they are in [`Worker::reports`].
    Finished(usize),
    Settled(Settled),
    /// A suspect's turn has come, and that is written; or its ticket is no good any more.
    Written(Option<Held>),
    /// Whether another node serves the atom.
    Served(Held, bool),
    /// An electron is this run's for good; or it is not known to be.
    TakenForGood {
        held: Held,
        permit: Permit,
        taken: Result<(), SettleError>,
    },
    Alarm,
    Reached(Stage),
}

impl Worker {
    pub(crate) fn new(asker: Asker, atom: Registered, tried: oneshot::Sender<()>) -> Self {
        let source = Source::Atom(atom.id.clone());
        let intake = Intake::new(&asker, source, atom.window(), tried);
        let settler = Settler { asker: asker.clone(), atom: atom.id.clone() };
        #[expect(clippy::disallowed_methods, reason = "each run in flight puts in one report")]
        let (finish, finished) = mpsc::unbounded_channel();
        let next_tick = Instant::now() + TICK;
        Self {
            asker,
            atom,
            settler,
            intake,
            ready: VecDeque::new(),
            queued: None,
            suspects: VecDeque::new(),
            turn: None,
            begun: FxHashMap::default(),
            overdue: FxHashMap::default(),
            next_run: 0,
            alarms: BTreeSet::new(),
            next_tick,
            alarm: Box::pin(sleep_until(next_tick)),
            finished,
            finish,
            reports: Vec::new(),
            asked: FuturesUnordered::new(),
            draining: false,
        }
    }

    /// Works until the node drains and all is settled, or until it aborts.
    pub(crate) async fn run(mut self) {
        let mut stage = self.asker.node.stage.clone();
        let mut next_stage = Stage::Draining;
        loop {
            if self.draining && self.begun.is_empty() && self.asked.is_empty() {
                return;
            }
            let reached = stage
                .wait_for(|now| *now >= next_stage)
                .map(|now| now.map_or(Stage::Aborting, |now| *now));
            match self.step(reached).await {
                Step::Taken(Taken::Deliveries(deliveries)) => self.on_deliveries(deliveries),
                Step::Taken(Taken::Lost) => self.on_lost(),
                Step::Admitted(permit) => self.on_admitted(permit),
                Step::Finished(count) => self.on_finished(count),
                Step::Settled(settled) => self.on_settled(settled),
                Step::Written(held) => self.on_written(held),
                Step::Served(held, elsewhere) => self.on_served(held, elsewhere),
                Step::TakenForGood { held, permit, taken } => {
                    self.on_taken_for_good(held, permit, taken);
                }
                Step::Alarm => self.on_alarm(Instant::now()),
                Step::Reached(Stage::Draining | Stage::Cancelling) if !self.draining => {
                    next_stage = Stage::Aborting;
                    self.on_drain().await;
                }
                Step::Reached(_) => return self.abort(),
            }
        }
    }

    async fn step(&mut self, reached: impl Future<Output = Stage>) -> Step {
        let waiting = self.ready.len() + self.suspects.len();
        let room = self.atom.window().get().saturating_sub(waiting);
        let max = NonZeroUsize::new(room).filter(|_| !self.draining);
        let alarmed = self.set_alarm();
        tokio::select! {
            biased;
            stage = reached => Step::Reached(stage),
            Some(step) = self.asked.next() => step,
            count = self.finished.recv_many(&mut self.reports, BATCH_MAX) => Step::Finished(count),
            () = &mut self.alarm, if alarmed => Step::Alarm,
            Ok(permit) = queued(self.queued.as_mut()) => Step::Admitted(permit),
            step = turn(self.turn.as_mut()) => step,
            taken = take(&mut self.intake, max) => Step::Taken(taken),
        }
    }

    /// Sets the alarm to whatever comes first; false when there is nothing to look after.
    fn set_alarm(&mut self) -> bool {
        let busy = !(self.begun.is_empty() && self.overdue.is_empty());
        if !busy && self.alarms.is_empty() {
            return false;
        }
        let first = self.alarms.first().map_or(self.next_tick, |(at, _)| self.next_tick.min(*at));
        if self.alarm.deadline() != first {
            self.alarm.as_mut().reset(first);
        }
        true
    }

    fn on_deliveries(&mut self, deliveries: Vec<Delivery>) {
        let mut unfit = Vec::new();
        let now = Instant::now();
        for Delivery { message, redeliveries, waited, ticket } in deliveries {
            let electron = match message {
                Message::Electron(electron) => electron,
                other => {
                    unfit.push(self.settler.unreadable(ticket, other));
                    continue;
                }
            };
            let (id, attempt) = (electron.id, electron.attempts.saturating_add(1));
            self.emit(|atom| EventKind::Received { electron: id, atom, attempt, redeliveries });
            if let Some(begun) = self.begun.get_mut(&id).filter(|_| electron.atom == self.atom.id) {
                let (Begun::Running(Running { held, .. }) | Begun::Pausing { held, .. }) = begun;
                held.adopt(electron, ticket);
                self.emit(|atom| EventKind::Adopted { electron: id, atom, attempt });
                continue;
            }
            // Counted from here, and not beyond what the clock can tell.
            let left = electron.deadline.map(|deadline| deadline.saturating_sub(waited));
            let deadline = left.and_then(|left| now.checked_add(left));
            let (ticket, adopted) = (Some(ticket), Vec::new());
            let state = State::Gone;
            let held = Held { electron, state, ticket, adopted, deadline, alone: None };
            self.arrive(held, redeliveries, now, &mut unfit);
        }
        self.settle(unfit);
        self.start_ready();
    }

    fn arrive(
        &mut self,
        mut held: Held,
        redeliveries: u32,
        now: Instant,
        unfit: &mut Vec<Settlement>,
    ) {
        let electron = &held.electron;
        let arrival = Arrival {
            misdirected: electron.atom != self.atom.id,
            expired: held.is_expired(now),
            asked: electron.reply_to.is_some(),
            // What is done at most once is taken for good before it begins: what comes again was not begun.
            suspect: redeliveries > 0 && !self.atom.options.is_at_most_once(),
            lives: electron.lives,
            lives_max: self.asker.node.rules.lives_max,
            failed_here: self.failed_here(electron),
            passes: electron.passes,
        };
        held.state = State::arrive(&arrival);
        match held.state {
            State::Ready => self.ready.push_back(held),
            State::Suspect => {
                self.suspects.push_back(held);
                self.next_suspect();
            }
            State::Avoiding { .. } => self.ask_who_serves(held),
            State::Leaving(Leave::Failed { dead }) => {
                let failure = self.unfit(&held.electron, &arrival);
                unfit.extend(self.fail(held, Began::now(), &failure, dead));
            }
            state => unreachable!("nothing arrives in {state:?}"),
        }
    }

    /// Why an electron is not begun.
    fn unfit(&self, electron: &Electron, arrival: &Arrival) -> Failure {
        let (kind, message) = if arrival.misdirected {
            let message = format!("{} is not {}, whose queue this is", electron.atom, self.atom.id);
            (FailureKind::UnknownAtom, message)
        } else if arrival.expired {
            (FailureKind::Expired, "its deadline passed before it was begun".to_owned())
        } else {
            let lives = electron.lives;
            let message =
                format!("its node was lost each of the {lives} times that it was begun alone");
            (FailureKind::Killer, message)
        };
        self.stamp(Failure::new(kind, message), electron)
    }

    /// Says where and in which attempt a failure happened.
    fn stamp(&self, mut failure: Failure, electron: &Electron) -> Failure {
        failure.node = Some(self.asker.node.id.clone());
        failure.attempt = electron.attempts.saturating_add(1);
        failure
    }

    fn policy(&self, electron: &Electron) -> Policy {
        let rules = &self.asker.node.rules;
        electron.policy.or(self.atom.options.run_policy()).unwrap_or(rules.policy)
    }

    /// Whether this node failed it last, and put it back for another.
    fn failed_here(&self, electron: &Electron) -> bool {
        let last = electron.history.last();
        last.is_some_and(|last| {
            last.node.as_ref() == Some(&self.asker.node.id)
                && (last.kind == FailureKind::GivenBack
                    || self.policy(electron).was_requeued(electron.attempts))
        })
    }

    /// Finds out whether another node serves the atom. Not to know is to suppose so, and to ask again later.
    fn ask_who_serves(&self, held: Held) {
        let (session, link) = (self.intake.session(), Arc::clone(&self.asker.link));
        let atom = self.atom.id.clone();
        let asking = async move {
            let elsewhere = match session {
                Some(session) => match link.ask(&session, session.census(&atom)).await {
                    Ok(Ok(census)) => census.subscribers > 1,
                    Ok(Err(_)) | Err(_) => true,
                },
                None => true,
            };
            Step::Served(held, elsewhere)
        };
        self.asked.push(Box::pin(asking));
    }

    fn on_served(&mut self, mut held: Held, elsewhere: bool) {
        let passes = held.electron.passes;
        match held.on(Fact::Served { elsewhere, passes }) {
            State::Leaving(Leave::HandedOn(wait)) => {
                let reason = "it failed here last, and another node serves its atom".to_owned();
                self.hand_on(held, Began::now(), wait, reason);
            }
            // Released by being dropped.
            _ if self.draining => {}
            State::Suspect => {
                self.suspects.push_back(held);
                self.next_suspect();
            }
            _ => {
                self.ready.push_back(held);
                self.start_ready();
            }
        }
    }

    /// Sends the first suspect on its way to its turn, if none is.
    fn next_suspect(&mut self) {
        if self.turn.is_some() || self.draining {
            return;
        }
        let Some(held) = self.suspects.pop_front() else { return };
        let (asker, session) = (self.asker.clone(), self.intake.session());
        self.turn =
            Some(Box::pin(async move { Step::Written(write_life(asker, session, held).await) }));
    }

    fn on_written(&mut self, held: Option<Held>) {
        self.turn = None;
        if let Some(mut held) = held {
            held.on(Fact::Written);
            let electron = &held.electron;
            let (id, attempt, lives) = (electron.id, electron.attempts + 1, electron.lives);
            self.emit(|atom| EventKind::Suspected { electron: id, atom, attempt, lives });
            self.ready.push_front(held);
            self.start_ready();
        }
        self.next_suspect();
    }

    /// What came through a session that is gone comes again. What runs goes on.
    fn on_lost(&mut self) {
        // But for what was taken for good: that never comes again.
        let stays =
            |held: &Held| held.ticket.is_none() || held.state.next(Fact::Lost) != Some(State::Gone);
        self.ready.retain(stays);
        self.suspects.clear();
        self.turn = None;
        self.begun.retain(|_, begun| {
            let (Begun::Running(Running { held, .. }) | Begun::Pausing { held, .. }) = begun;
            stays(held)
        });
    }

    fn on_admitted(&mut self, permit: Permit) {
        self.queued = None;
        if let Some(held) = self.ready.pop_front() {
            self.start(held, permit, Began::now());
        }
        self.start_ready();
    }

    /// Starts what there are permits for, and queues for one more when something is left.
    fn start_ready(&mut self) {
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

    fn start(&mut self, mut held: Held, permit: Permit, began: Began) {
        let id = held.electron.id;
        if let Some(begun) = self.begun.get_mut(&id) {
            let (Begun::Running(Running { held: first, .. }) | Begun::Pausing { held: first, .. }) =
                begun;
            if let Some(ticket) = held.ticket {
                first.adopt(held.electron, ticket);
            }
            return;
        }
        if held.is_expired(began.instant) {
            let failure =
                Failure::new(FailureKind::Expired, "its deadline passed before it was begun");
            let failure = self.stamp(failure, &held.electron);
            let asked = held.electron.reply_to.is_some();
            let dead =
                held.on(Fact::Expired { asked }) == State::Leaving(Leave::Failed { dead: true });
            let batch = self.fail(held, began, &failure, dead);
            return self.settle(batch);
        }
        if self.atom.options.is_at_most_once() && held.ticket.is_some() {
            return self.take_for_good(held, permit);
        }
        self.begin(held, permit, began);
    }

    /// Removes an electron from its queue before it is begun, so that it can never be begun again.
    fn take_for_good(&self, mut held: Held, permit: Permit) {
        let (session, link) = (self.intake.session(), Arc::clone(&self.asker.link));
        let ticket = held.ticket.take().expect("it was looked at");
        self.asked.push(Box::pin(async move {
            let taken = match session {
                Some(session) => {
                    let batch = vec![(ticket, Outcome::take())];
                    link.settle(&session, batch).await.pop().unwrap_or(Ok(()))
                }
                None => Err(SettleError::Stale),
            };
            Step::TakenForGood { held, permit, taken }
        }));
    }

    fn on_taken_for_good(&mut self, held: Held, permit: Permit, taken: Result<(), SettleError>) {
        match taken {
            Ok(()) => self.begin(held, permit, Began::now()),
            // It may have been removed or not. It must not be begun here: it may be begun elsewhere.
            Err(error) => self.let_go(&held, error.to_string()),
        }
        self.start_ready();
    }

    fn let_go(&self, held: &Held, reason: String) {
        let (electron, attempt) = (held.electron.id, held.electron.attempts.saturating_add(1));
        tracing::warn!(atom = %self.atom.id, %electron, %reason, "not settled here");
        self.emit(|atom| EventKind::NotSettled { electron, atom, attempt, reason });
    }

    fn begin(&mut self, mut held: Held, permit: Permit, began: Began) {
        held.on(Fact::Admitted);
        if self.begun.is_empty() {
            self.next_tick = self.next_tick.max(began.instant + TICK);
        }
        let (id, attempt) = (held.electron.id, held.electron.attempts.saturating_add(1));
        self.emit(|atom| EventKind::Started { electron: id, atom, attempt });
        let slot = Arc::new(Slot::new(permit));
        let context = Context::new(self.asker.clone(), Arc::clone(&held.electron), slot)
            .of_kind(self.atom.kind)
            .until(held.deadline);
        let run = RunId(self.next_run);
        self.next_run += 1;
        let report = Report { electron: id, run, to: self.finish.clone(), result: None };
        let blocking = self.atom.options.is_blocking();
        let threads = &self.asker.node.threads;
        let run = Arc::clone(&self.atom.atom).start(context, blocking, threads, report);
        let limit = self.limit(&held, began.instant);
        if let Some((at, _)) = limit {
            self.look_after(id, at);
        }
        let running = Running { held, began, limit, run, polls: 0, told: false };
        self.begun.insert(id, Begun::Running(running));
    }

    /// When a run is stopped, and what for: its time limit, or its deadline.
    fn limit(&self, held: &Held, now: Instant) -> Option<(Instant, FailureKind)> {
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
    fn look_after(&mut self, electron: ElectronId, at: Instant) {
        if at <= self.next_tick {
            self.alarms.insert((at, electron));
        }
    }

    /// Settles all that has finished by now in one batch.
    fn on_finished(&mut self, count: usize) {
        let mut batch = Vec::with_capacity(count);
        let mut reports = std::mem::take(&mut self.reports);
        for Reported { electron, run, result } in reports.drain(..) {
            match self.take_running(electron, run) {
                Some(running) => self.finish(running, result, &mut batch),
                None => self.ended_late(run),
            }
        }
        self.reports = reports;
        self.settle(batch);
        self.start_ready();
    }

    /// Takes a run out of the table, if it is still the one that counts.
    fn take_running(&mut self, electron: ElectronId, run: RunId) -> Option<Running> {
        let Some(Begun::Running(running)) = self.begun.get(&electron) else { return None };
        if running.run.id != run {
            return None;
        }
        if let Some((at, _)) = running.limit {
            self.alarms.remove(&(at, electron));
        }
        match self.begun.remove(&electron) {
            Some(Begun::Running(running)) => Some(running),
            _ => None,
        }
    }

    /// A run that was given up has ended after all.
    fn ended_late(&mut self, run: RunId) {
        if self.overdue.remove(&run).is_some_and(|overdue| overdue.told) {
            self.asker.node.uncount_stuck();
        }
    }

    fn finish(&mut self, running: Running, result: Option<RunResult>, batch: &mut Vec<Settlement>) {
        let Running { mut held, began, .. } = running;
        match result {
            Some(Ok(output)) => {
                held.on(Fact::Succeeded);
                let spent = began.spent(Instant::now());
                for (electron, ticket) in held.deliveries() {
                    batch.push(self.settler.done(ticket, electron, spent, output.clone()));
                }
            }
            Some(Err(failed)) => self.after_failure(held, began, failed, batch),
            None => self
                .let_go(&held, "its run was dropped: the runtime of the atoms has stopped".into()),
        }
    }

    fn after_failure(
        &mut self,
        mut held: Held,
        began: Began,
        failed: Failed,
        batch: &mut Vec<Settlement>,
    ) {
        let Failed { failure, then } = failed;
        let now = Instant::now();
        let electron = &held.electron;
        let failure = self.stamp(failure, electron);
        let attempt = Attempt {
            electron: electron.id,
            failures: failure.attempt,
            kind: failure.kind,
            then,
            policy: self.policy(electron),
            asked: electron.reply_to.is_some(),
            passes: electron.passes,
            left: held.left(now),
            delay_max: self.asker.link.limits().delay_max,
            draining: self.draining,
        };
        held.alone = None;
        held.state = State::after_failure(&attempt);
        match held.state {
            State::Pausing(wait) => self.pause(held, failure, wait),
            State::Leaving(Leave::HandedOn(wait)) if then == Directive::GiveBack => {
                let mut electron = Electron::clone(&held.electron);
                let reason = failure.to_string();
                electron.remember(failure);
                held.electron = Arc::new(electron);
                self.hand_on(held, began, wait, reason);
            }
            State::Leaving(Leave::HandedOn(wait)) => self.requeue(held, began, failure, wait),
            State::Leaving(Leave::Failed { dead }) => {
                batch.extend(self.fail(held, began, &failure, dead));
            }
            state => unreachable!("a failure does not lead to {state:?}"),
        }
    }

    /// Answers all deliveries of an electron with a failure.
    fn fail(&self, held: Held, began: Began, failure: &Failure, dead: bool) -> Vec<Settlement> {
        let spent = began.spent(Instant::now());
        let failed = |(electron, ticket)| {
            self.settler.failed(ticket, electron, spent, failure.clone(), dead)
        };
        held.deliveries().map(failed).collect()
    }

    /// Waits here for the next attempt.
    fn pause(&mut self, mut held: Held, failure: Failure, wait: Duration) {
        let id = held.electron.id;
        let (attempt, why) = (failure.attempt, failure.clone());
        tracing::warn!(atom = %self.atom.id, electron = %id, %failure, ?wait, "failed, and is tried again");
        self.emit(|atom| EventKind::Retried { electron: id, atom, attempt, failure: why, wait });
        let mut electron = Electron::clone(&held.electron);
        electron.attempts = attempt;
        electron.remember(failure.clone());
        held.electron = Arc::new(electron);
        let until = Instant::now() + wait;
        self.begun.insert(id, Begun::Pausing { held, failure, until });
        self.alarms.insert((until, id));
    }

    /// Puts an electron back, its failed attempt counted.
    fn requeue(&self, held: Held, began: Began, failure: Failure, wait: Duration) {
        self.put_back(held, began, wait, &Why::Failed { failure, wait });
    }

    /// Puts an electron back, no attempt counted.
    fn hand_on(&self, held: Held, began: Began, wait: Duration, reason: String) {
        self.put_back(held, began, wait, &Why::Untried(reason));
    }

    fn put_back(&self, held: Held, began: Began, wait: Duration, why: &Why) {
        let now = Instant::now();
        let (spent, deadline) = (began.spent(now), held.left(now));
        let (delay, rest) = self.delay(wait);
        let batch = held.deliveries().map(|(electron, ticket)| {
            let mut copy = Electron::clone(&electron);
            copy.deadline = deadline;
            match why {
                Why::Untried(_) => copy.passes = copy.passes.saturating_add(1),
                Why::Failed { failure, .. } => {
                    copy.attempts = failure.attempt;
                    // A pause that the drain cut short has put it in already.
                    if copy.history.last() != Some(failure) {
                        copy.remember(failure.clone());
                    }
                }
            }
            put_back(ticket, electron, spent, copy, delay, why)
        });
        let batch = batch.collect();
        self.settle_after(rest, batch);
    }

    /// Parts a wait into what the conductor does and what is waited out here.
    fn delay(&self, wait: Duration) -> (Duration, Duration) {
        if wait <= self.asker.link.limits().delay_max {
            (wait, Duration::ZERO)
        } else {
            (Duration::ZERO, wait)
        }
    }

    /// Settles after a wait, which a node that drains does not wait out.
    fn settle_after(&self, wait: Duration, batch: Vec<Settlement>) {
        let (asker, session) = (self.asker.clone(), self.intake.session());
        self.asked.push(Box::pin(async move {
            tokio::select! {
                () = sleep(wait) => {}
                () = asker.node.reached(Stage::Draining) => {}
            }
            Step::Settled(settle(asker, session, batch).await)
        }));
    }

    fn on_settled(&self, settled: Settled) {
        for (ending, result) in settled {
            match self.settler.decide(ending, result) {
                Verdict::Ended(ending) => {
                    ending.log(&self.atom.id);
                    self.emit(|atom| ending.into_event(atom));
                }
                Verdict::Again { settlement, after } => {
                    let (asker, session) = (self.asker.clone(), self.intake.session());
                    self.asked.push(Box::pin(async move {
                        sleep(after).await;
                        Step::Settled(settle(asker, session, vec![settlement]).await)
                    }));
                }
            }
        }
    }

    fn settle(&self, batch: Vec<Settlement>) {
        if batch.is_empty() {
            return;
        }
        let mut settling = Box::pin(settle(self.asker.clone(), self.intake.session(), batch));
        // A conductor that need not wait is done by now.
        match (&mut settling).now_or_never() {
            Some(settled) => self.on_settled(settled),
            None => self.asked.push(Box::pin(settling.map(Step::Settled))),
        }
    }

    fn on_alarm(&mut self, now: Instant) {
        while let Some(&(at, electron)) = self.alarms.first().filter(|(at, _)| *at <= now) {
            self.alarms.remove(&(at, electron));
            self.look_at(electron, now);
        }
        if self.next_tick <= now {
            self.next_tick = now + TICK;
            self.on_tick(now);
        }
        self.start_ready();
    }

    /// Stops a run whose time is over, or begins the next attempt.
    fn look_at(&mut self, electron: ElectronId, now: Instant) {
        match self.begun.get(&electron) {
            Some(Begun::Running(Running { limit: Some((at, kind)), run, .. })) if *at <= now => {
                let (run, kind) = (run.id, *kind);
                if let Some(running) = self.take_running(electron, run) {
                    self.give_up(running, kind, now);
                }
            }
            Some(Begun::Pausing { until, .. }) if *until <= now => {
                if let Some(Begun::Pausing { mut held, .. }) = self.begun.remove(&electron) {
                    held.on(Fact::Rested);
                    self.ready.push_back(held);
                }
            }
            _ => {}
        }
    }

    /// Ends a run for everyone but itself: its slot is free, and its asker is answered, whether it stops or not.
    /// The slot of a singleton waits for the true end.
    fn give_up(&mut self, running: Running, kind: FailureKind, now: Instant) {
        let Running { held, began, limit, mut run, .. } = running;
        let message = match limit {
            Some((at, FailureKind::TimedOut)) => {
                let limit = humantime::format_duration(at.saturating_duration_since(began.instant));
                format!("did not finish within {limit}")
            }
            _ => "its deadline passed while it ran".to_owned(),
        };
        if self.atom.kind != Kind::Singleton {
            run.slot.revoke();
        }
        let (electron, attempt) = (held.electron.id, held.electron.attempts.saturating_add(1));
        run.abort();
        let id = run.id;
        self.overdue.insert(id, Overdue { electron, attempt, since: now, told: false, _run: run });
        let mut batch = Vec::new();
        self.after_failure(held, began, Failed::new(kind, message), &mut batch);
        self.settle(batch);
    }

    fn on_tick(&mut self, now: Instant) {
        let next_tick = self.next_tick;
        let mut blocking = Vec::new();
        for (id, begun) in &mut self.begun {
            let Begun::Running(running) = begun else { continue };
            if let Some((at, _)) = running.limit.filter(|(at, _)| *at <= next_tick) {
                self.alarms.insert((at, *id));
            }
            if now.saturating_duration_since(running.began.instant) >= ALONE_MAX {
                running.held.alone = None;
            }
            let polls = running.run.slot.polls();
            let in_one_poll = polls % 2 == 1 && polls == running.polls;
            running.polls = polls;
            if in_one_poll && !self.atom.options.is_blocking() && !running.told {
                running.told = true;
                blocking.push((*id, running.held.electron.attempts.saturating_add(1)));
            }
        }
        for (electron, attempt) in blocking {
            tracing::warn!(atom = %self.atom.id, %electron, "blocks its thread; is `Options::blocking` missing?");
            self.emit(|atom| EventKind::Blocking { electron, atom, attempt });
        }
        self.tell_of_overdue(now);
    }

    fn tell_of_overdue(&mut self, now: Instant) {
        let mut stuck = Vec::new();
        for overdue in self.overdue.values_mut() {
            let overdue_for = now.saturating_duration_since(overdue.since);
            if !overdue.told && overdue_for >= TICK {
                overdue.told = true;
                stuck.push((overdue.electron, overdue.attempt, overdue_for));
            }
        }
        for (electron, attempt, overdue) in stuck {
            tracing::warn!(atom = %self.atom.id, %electron, "does not stop after its time limit");
            self.emit(|atom| EventKind::Stuck { electron, atom, attempt, overdue });
            self.asker.node.count_stuck(&format!("{} {electron}", self.atom.id));
        }
    }

    /// Takes no more, and gives back what has not begun.
    async fn on_drain(&mut self) {
        self.draining = true;
        self.queued = None;
        self.suspects.clear();
        self.turn = None;
        let (taken, ready): (Vec<_>, Vec<_>) =
            self.ready.drain(..).partition(|held| held.ticket.is_none());
        drop(ready);
        let pausing: Vec<_> = (self.begun)
            .extract_if(|_, begun| matches!(begun, Begun::Pausing { .. }))
            .map(|(_, begun)| begun)
            .collect();
        let now = Instant::now();
        for begun in pausing {
            if let Begun::Pausing { mut held, failure, until } = begun {
                held.on(Fact::Draining);
                self.requeue(held, Began::now(), failure, until.saturating_duration_since(now));
            }
        }
        for held in taken {
            self.hand_on(held, Began::now(), Duration::ZERO, "its node stops".to_owned());
        }
        self.intake.stop().await;
    }

    /// What still runs is given back by being dropped.
    fn abort(self) {
        let electrons = self.begun.len();
        if electrons > 0 {
            tracing::warn!(atom = %self.atom.id, electrons, "aborts what did not stop, and gives it back");
        }
    }

    fn emit(&self, kind: impl FnOnce(AtomId) -> EventKind) {
        let Asker { node, link } = &self.asker;
        node.events.emit(Some(link.id()), || kind(self.atom.id.clone()));
    }
}

/// Waits for a suspect's turn, and writes into the electron that it is begun under suspicion once more: the
/// number must be there before the electron can take this node down.
async fn write_life(asker: Asker, session: Option<SharedSession>, mut held: Held) -> Option<Held> {
    let turn = Arc::clone(&asker.node.suspects).acquire_owned().await.ok()?;
    let session = session?;
    let mut electron = Electron::clone(&held.electron);
    electron.lives = electron.lives.saturating_add(1);
    electron.deadline = held.left(Instant::now());
    let electron = Arc::new(electron);
    let ticket = held.ticket.take()?;
    let parking = session.park(ticket, Arc::clone(&electron));
    match asker.link.ask(&session, parking).await {
        Ok(Ok(ticket)) => Some(Held { electron, ticket: Some(ticket), alone: Some(turn), ..held }),
        Ok(Err(error)) => {
            tracing::warn!(electron = %electron.id, %error, "failed to write into a suspect; it comes again");
            // With the error its ticket is given back. Without a pause that would be a hot loop.
            sleep(TICK).await;
            drop(error);
            None
        }
        Err(_) => None,
    }
}

async fn queued(
    place: Option<&mut oneshot::Receiver<Permit>>,
) -> Result<Permit, oneshot::error::RecvError> {
    match place {
        Some(place) => place.await,
        None => std::future::pending().await,
    }
}

async fn turn(turn: Option<&mut BoxFuture<'static, Step>>) -> Step {
    match turn {
        Some(turn) => turn.await,
        None => std::future::pending().await,
    }
}

/// Takes deliveries while there is room for some.
async fn take(intake: &mut Intake, max: Option<NonZeroUsize>) -> Taken {
    match max {
        Some(max) => intake.next(max).await,
        None => std::future::pending().await,
    }
}
