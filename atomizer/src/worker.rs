//! Runs the electrons of one atom from one conductor: receive, admit, run, settle.
//!
//! One task owns all state, and moves each electron along its [life](crate::life). Tickets stay here, outside
//! the atoms' futures, so that a panic, an error and a time limit all come back to the task that settles.
//!
//! This file has the loop. What follows from each step is in the files beside it, in the order of a life:
//! [`arrive`], [`begin`], [`leave`], and [`time`] for what comes by itself; [`park`] for what takes long, [`inline`] for
//! what comes from a parent instead of the queue, [`ended`] for what comes again after its end.

mod arrive;
mod begin;
mod ended;
mod held;
mod inline;
mod leave;
mod park;
mod time;

use std::{
    collections::{BTreeSet, VecDeque},
    num::NonZeroUsize,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use rustc_hash::FxHashMap;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, Sleep, sleep_until, timeout},
};

use self::{
    ended::Ended,
    held::{Began, Begun, Held, Overdue, Running},
};
use crate::{
    AtomId, Electron, ElectronId, EventKind, Failure, FailureKind, Kind, Options, Policy,
    SettleError, Source,
    admission::{Lane, Permit},
    ask::Asker,
    inline::{Handed, Handing},
    intake::{Intake, Taken},
    life::{Fact, State},
    metrics::OfAtom,
    node::Stage,
    run::{Reported, RunId, Start, What},
    settle::{Settled, Settler},
};

/// An atom as a node knows it; shared by the workers of all its conductors.
#[derive(Clone)]
pub(crate) struct Registered {
    pub(crate) id: AtomId,
    pub(crate) kind: Kind,
    pub(crate) atom: Arc<dyn Start>,
    pub(crate) options: Options,
    /// What is held of each conductor's queue.
    pub(crate) window: NonZeroUsize,
    pub(crate) lane: Lane,
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
    /// Failed here last, while it is found out who else serves the atom.
    avoiding: Vec<Held>,
    /// How often in a row that could not be told.
    census_errors: u32,
    /// On their way to be this node's for good, by who asked last, and until when it is wanted.
    taking: FxHashMap<ElectronId, (Arc<Electron>, Option<Instant>)>,
    /// The way of the first suspect to its turn.
    turn: Option<BoxFuture<'static, Step>>,
    /// Begun here: it runs, or waits for its next attempt. Each once, however often it is delivered.
    begun: FxHashMap<ElectronId, Begun>,
    ended: Ended,
    /// How many of their deliveries count against the window.
    out: usize,
    /// Runs that waited for something when they were looked at last, the oldest first; some have ended since.
    parents: VecDeque<(ElectronId, RunId)>,
    /// How many deliveries are being parked.
    parking: usize,
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
    /// Children that are to run inline.
    handed: mpsc::UnboundedReceiver<Handed>,
    hand: mpsc::UnboundedSender<Handed>,
    /// What a conductor was asked and has not answered.
    asked: FuturesUnordered<BoxFuture<'static, Step>>,
    /// Tells when children are given up.
    cancels: watch::Receiver<u64>,
    draining: bool,
    metrics: OfAtom,
}

/// How many runs are settled together at the most.
const BATCH_MAX: usize = 256;
/// How often a worker looks after what runs. A run that holds its thread for so long is told of, and so is one that
/// goes on for so long after it was given up.
const TICK: Duration = Duration::from_secs(1);
/// A run that goes on for so long after it was given up counts towards [`Rules::stuck_max`](crate::node::Rules).
const STUCK_AFTER: Duration = Duration::from_secs(5);
/// How long the last settlements may take when a node aborts.
const ABORT_GRACE: Duration = Duration::from_secs(2);
/// How long parents may take to let go of their children when a node aborts.
const LET_GO_GRACE: Duration = Duration::from_millis(500);
const EXPIRED: &str = "its deadline passed before it was begun";
const GIVEN_UP: &str = "who asked gave it up";
const NODE_STOPS: &str = "its node stops";
/// A suspect that has run for so long lets the next one begin: what kills its node does so soon.
const ALONE_MAX: Duration = Duration::from_secs(5);

/// What can happen next.
enum Step {
    Taken(Taken),
    Admitted(Permit),
    /// So many runs finished; they are in [`Worker::reports`].
    Finished(usize),
    Handed(Handed),
    Settled(Settled),
    /// A suspect's turn has come, and that is written; or its ticket is no good any more.
    Written(Option<(Held, Permit)>),
    /// Whether another node serves the atom, if that can be told.
    Served(Option<bool>),
    /// An electron is this run's for good; or it is not known to be.
    TakenForGood {
        held: Held,
        permit: Permit,
        taken: Result<(), SettleError>,
    },
    /// A delivery of this electron is parked, or not.
    Parked(ElectronId),
    Alarm,
    /// Some children are given up.
    Cancelled,
    Reached(Stage),
}

impl Worker {
    pub(crate) fn new(asker: Asker, atom: Registered, tried: oneshot::Sender<()>) -> Self {
        let source = Source::Atom(atom.id.clone());
        let intake = Intake::new(&asker, source, atom.window, tried);
        let settler = Settler { asker: asker.clone(), atom: atom.id.clone() };
        #[expect(clippy::disallowed_methods, reason = "each run in flight puts in one report")]
        let (finish, finished) = mpsc::unbounded_channel();
        #[expect(
            clippy::disallowed_methods,
            reason = "each permit puts in one child at a time, and each child one word that it is not wanted"
        )]
        let (hand, handed) = mpsc::unbounded_channel();
        let next_tick = Instant::now() + TICK;
        let cancels = asker.node.cancelled.told();
        let metrics = OfAtom::new(&atom.id, asker.link.id());
        Self {
            metrics,
            asker,
            atom,
            settler,
            intake,
            ready: VecDeque::new(),
            queued: None,
            suspects: VecDeque::new(),
            avoiding: Vec::new(),
            census_errors: 0,
            taking: FxHashMap::default(),
            turn: None,
            begun: FxHashMap::default(),
            ended: Ended::default(),
            out: 0,
            parents: VecDeque::new(),
            parking: 0,
            overdue: FxHashMap::default(),
            next_run: 0,
            alarms: BTreeSet::new(),
            next_tick,
            alarm: Box::pin(sleep_until(next_tick)),
            finished,
            finish,
            reports: Vec::new(),
            handed,
            hand,
            asked: FuturesUnordered::new(),
            cancels,
            draining: false,
        }
    }

    /// Returns where parents hand children to this worker.
    pub(crate) fn handing(&self) -> Handing {
        Handing { lane: self.atom.lane, to: self.hand.clone() }
    }

    /// Works until the node drains and all is settled, or until it aborts.
    pub(crate) async fn run(mut self) {
        let mut stage = self.asker.node.stage.clone();
        let mut next_stage = Stage::Draining;
        loop {
            if self.draining && self.begun.is_empty() && self.asked.is_empty() {
                return;
            }
            self.park_parents();
            let reached = stage
                .wait_for(|now| *now >= next_stage)
                .map(|now| now.map_or(Stage::Aborting, |now| *now));
            self.metrics.in_flight.set(self.begun.len());
            self.metrics.waiting.set(self.not_begun());
            match self.step(reached).await {
                Step::Taken(Taken::Deliveries(deliveries)) => self.on_deliveries(deliveries),
                Step::Taken(Taken::Lost) => self.on_lost(),
                // What is sent to an atom stays until it is settled.
                Step::Taken(Taken::Missed) => {}
                Step::Admitted(permit) => self.on_admitted(permit),
                Step::Finished(count) => self.on_finished(count),
                Step::Handed(handed) => self.on_handed(handed),
                Step::Settled(settled) => self.on_settled(settled),
                Step::Written(begins) => self.on_written(begins),
                Step::Served(elsewhere) => self.on_served(elsewhere),
                Step::TakenForGood { held, permit, taken } => {
                    self.on_taken_for_good(held, permit, taken);
                }
                Step::Parked(electron) => self.on_parked(electron),
                Step::Alarm => self.on_alarm(Instant::now()),
                Step::Cancelled => self.on_cancelled(Instant::now()),
                Step::Reached(Stage::Draining | Stage::Cancelling) if !self.draining => {
                    next_stage = Stage::Aborting;
                    self.on_drain().await;
                }
                Step::Reached(_) => return self.abort().await,
            }
        }
    }

    async fn step(&mut self, reached: impl Future<Output = Stage>) -> Step {
        let room = self.atom.window.get().saturating_sub(self.not_begun());
        let max = NonZeroUsize::new(room).filter(|_| !self.draining);
        let alarmed = self.set_alarm();
        tokio::select! {
            biased;
            stage = reached => Step::Reached(stage),
            Some(step) = self.asked.next() => step,
            count = self.finished.recv_many(&mut self.reports, BATCH_MAX) => Step::Finished(count),
            Some(handed) = self.handed.recv() => Step::Handed(handed),
            () = &mut self.alarm, if alarmed => Step::Alarm,
            Ok(()) = self.cancels.changed() => Step::Cancelled,
            Ok(permit) = queued(self.queued.as_mut()) => Step::Admitted(permit),
            step = turn(self.turn.as_mut()) => step,
            taken = take(&mut self.intake, max) => Step::Taken(taken),
        }
    }

    /// How many electrons are received and not begun.
    fn not_begun(&self) -> usize {
        self.ready.len() + self.suspects.len() + self.avoiding.len()
    }

    /// Sets the alarm to whatever comes first; false when there is nothing to look after.
    fn set_alarm(&mut self) -> bool {
        let idle = self.begun.is_empty() && self.overdue.is_empty();
        let busy = !(idle && self.ready.is_empty() && self.suspects.is_empty());
        if !busy && self.alarms.is_empty() {
            return false;
        }
        let first = self.alarms.first().map_or(self.next_tick, |(at, _)| self.next_tick.min(*at));
        if self.alarm.deadline() != first {
            self.alarm.as_mut().reset(first);
        }
        true
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

    /// What came through a session that is gone comes again. What runs goes on.
    fn on_lost(&mut self) {
        // What ended and was not settled comes again, too, and may ask its children anew.
        let cancelled = &self.asker.node.cancelled;
        cancelled.end_round(cancelled.round());
        // But for what was taken for good: that never comes again.
        let stays =
            |held: &Held| held.ticket.is_none() || held.state.next(Fact::Lost) != Some(State::Gone);
        self.ready.retain(stays);
        self.suspects.clear();
        self.avoiding.clear();
        self.turn = None;
        self.begun.retain(|_, begun| {
            let (Begun::Running(Running { held, .. }) | Begun::Pausing { held, .. }) = begun;
            stays(held)
        });
        self.out = self.begun.values_mut().map(|begun| begun.held_mut().out()).sum();
    }

    /// Takes no more, and gives back what has not begun.
    async fn on_drain(&mut self) {
        self.draining = true;
        self.queued = None;
        self.suspects.clear();
        self.avoiding.clear();
        self.turn = None;
        let (taken, ready): (Vec<_>, Vec<_>) =
            self.ready.drain(..).partition(|held| held.ticket.is_none());
        drop(ready);
        let pausing: Vec<_> = (self.begun)
            .extract_if(|_, begun| matches!(begun, Begun::Pausing { .. }))
            .map(|(_, begun)| begun)
            .collect();
        self.out = self.begun.values_mut().map(|begun| begun.held_mut().out()).sum();
        let now = Instant::now();
        for begun in pausing {
            if let Begun::Pausing { mut held, failure, until } = begun {
                held.on(Fact::Draining);
                self.requeue(held, Began::now(), failure, until.saturating_duration_since(now));
            }
        }
        for held in taken {
            self.hand_on(held, Began::now(), Duration::ZERO, NODE_STOPS.to_owned());
        }
        self.intake.stop().await;
    }

    /// What still runs is given back by being dropped; but what was taken for good has to be answered.
    async fn abort(mut self) {
        let electrons = self.begun.len();
        if electrons > 0 {
            tracing::warn!(atom = %self.atom.id, electrons, "aborts what did not stop, and gives it back");
        }
        let (mut batch, mut parents) = (Vec::new(), Vec::new());
        for (_, mut begun) in std::mem::take(&mut self.begun) {
            if let Begun::Running(running) = &mut begun {
                if running.run.slot.is_waiting() {
                    parents.push(running.run.id);
                }
                running.run.abort();
            }
            let (Begun::Running(Running { held, .. }) | Begun::Pausing { held, .. }) = begun;
            // What was handed over ends with its parent, which comes again and asks it again.
            if held.ticket.is_none() && !held.inline {
                let failure = Failure::new(FailureKind::Error, "its node stopped before it ended");
                let failure = self.stamp(failure, &held.electron);
                batch.extend(self.fail(held, Began::now(), &failure, true));
            }
        }
        self.settle(batch);
        let rest = async {
            while let Some(step) = self.asked.next().await {
                match step {
                    Step::Settled(settled) => self.on_settled(settled),
                    Step::TakenForGood { mut held, taken: Ok(()), .. } => {
                        self.taken_for(&mut held);
                        self.hand_on(held, Began::now(), Duration::ZERO, NODE_STOPS.to_owned());
                    }
                    _ => {}
                }
            }
        };
        // An error says that a conductor does not answer: the rest ends with the session.
        drop(timeout(ABORT_GRACE, rest).await);
        // An error says that one does not stop.
        drop(timeout(LET_GO_GRACE, self.end_of(parents)).await);
    }

    /// Waits until these runs have ended. With its end a run gives up its children.
    async fn end_of(&mut self, mut runs: Vec<RunId>) {
        while !runs.is_empty() {
            let Some(Reported { run, what, .. }) = self.finished.recv().await else { return };
            if matches!(what, What::Ended(_)) {
                runs.retain(|waited_for| *waited_for != run);
            }
        }
    }

    fn emit(&self, kind: impl FnOnce(AtomId) -> EventKind) {
        let Asker { node, link } = &self.asker;
        node.events.emit(Some(link.id()), || kind(self.atom.id.clone()));
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
