//! Runs the electrons of one atom from one conductor: receive, admit, run, settle.
//!
//! One task owns all state. Tickets stay here, outside the atoms' futures, so that a panic, an error and a
//! time limit all come back to the task that settles.

use std::{
    collections::VecDeque,
    num::NonZeroUsize,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use rustc_hash::FxHashMap;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    AtomId, Context, Delivery, Electron, ElectronId, EventKind, Message, Options, Source, Ticket,
    admission::{Lane, Permit, Priority, Slot},
    ask::Asker,
    clock,
    intake::{Intake, Taken},
    node::Stage,
    run::{Report, Run, RunResult, Start},
    settle::{Settled, Settlement, Settler, Verdict, settle},
};

/// An atom as a node knows it; shared by the workers of all its conductors.
#[derive(Clone)]
pub(crate) struct Registered {
    pub(crate) id: AtomId,
    pub(crate) atom: Arc<dyn Start>,
    pub(crate) options: Options,
    pub(crate) lane: Lane,
}

impl Registered {
    /// What a node holds of one atom's queue: what can run, and a little in hand so that the next is there
    /// when a permit comes free. More in hand would sit here while other nodes idle.
    fn window(&self) -> NonZeroUsize {
        const IN_HAND_MAX: usize = 64;
        let limit = self.options.concurrency_limit();
        NonZeroUsize::new(limit + limit.min(IN_HAND_MAX)).expect("a limit is at least 1")
    }
}

pub(crate) struct Worker {
    asker: Asker,
    atom: Registered,
    settler: Settler,
    intake: Intake,
    /// Received, not begun.
    ready: VecDeque<(Arc<Electron>, Ticket)>,
    /// A place in the queue for a permit, while something is ready and there was none.
    queued: Option<oneshot::Receiver<Permit>>,
    /// Each runs once, however often it is delivered.
    in_flight: FxHashMap<ElectronId, InFlight>,
    finished: mpsc::UnboundedReceiver<(ElectronId, RunResult)>,
    finish: mpsc::UnboundedSender<(ElectronId, RunResult)>,
    results: Vec<(ElectronId, RunResult)>,
    settling: FuturesUnordered<BoxFuture<'static, Settled>>,
    draining: bool,
}

struct InFlight {
    electron: Arc<Electron>,
    ticket: Ticket,
    /// Deliveries of the same electron that came while it ran: after its session was lost, or because it was
    /// sent twice. One run answers for all, each as it asks.
    adopted: Vec<(Arc<Electron>, Ticket)>,
    began: Began,
    _run: Run,
}

impl InFlight {
    fn adopt(&mut self, electron: Arc<Electron>, ticket: Ticket) {
        // What an earlier session delivered went back when it ended.
        let epoch = ticket.epoch();
        self.adopted.retain(|(_, held)| held.epoch() == epoch);
        if self.ticket.epoch() == epoch {
            self.adopted.push((electron, ticket));
        } else {
            (self.electron, self.ticket) = (electron, ticket);
        }
    }
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
}

/// How many runs are settled together at the most.
const BATCH_MAX: usize = 256;

/// What can happen next.
enum Step {
    Taken(Taken),
    Admitted(Permit),
    /// So many runs finished; they are in [`Worker::results`].
    Finished(usize),
    Settled(Settled),
    Reached(Stage),
}

impl Worker {
    pub(crate) fn new(asker: Asker, atom: Registered, tried: oneshot::Sender<()>) -> Self {
        let source = Source::Atom(atom.id.clone());
        let intake = Intake::new(&asker, source, atom.window(), tried);
        let settler = Settler { asker: asker.clone(), atom: atom.id.clone() };
        #[expect(clippy::disallowed_methods, reason = "each run in flight puts in one result")]
        let (finish, finished) = mpsc::unbounded_channel();
        Self {
            asker,
            atom,
            settler,
            intake,
            ready: VecDeque::new(),
            queued: None,
            in_flight: FxHashMap::default(),
            finished,
            finish,
            results: Vec::new(),
            settling: FuturesUnordered::new(),
            draining: false,
        }
    }

    /// Works until the node drains and all is settled, or until it aborts.
    pub(crate) async fn run(mut self) {
        let mut stage = self.asker.node.stage.clone();
        let mut next_stage = Stage::Draining;
        loop {
            if self.draining && self.in_flight.is_empty() && self.settling.is_empty() {
                return;
            }
            let reached = stage
                .wait_for(|now| *now >= next_stage)
                .map(|now| now.map_or(Stage::Aborting, |now| *now));
            match self.step(reached).await {
                Step::Taken(Taken::Deliveries(deliveries)) => self.on_deliveries(deliveries),
                Step::Taken(Taken::Lost) => self.ready.clear(),
                Step::Admitted(permit) => self.on_admitted(permit),
                Step::Finished(count) => self.on_finished(count),
                Step::Settled(settled) => self.on_settled(settled),
                Step::Reached(Stage::Draining | Stage::Cancelling) if !self.draining => {
                    next_stage = Stage::Aborting;
                    self.on_drain().await;
                }
                Step::Reached(_) => return self.abort(),
            }
        }
    }

    async fn step(&mut self, reached: impl Future<Output = Stage>) -> Step {
        let room = self.atom.window().get().saturating_sub(self.ready.len());
        let max = NonZeroUsize::new(room).filter(|_| !self.draining);
        tokio::select! {
            biased;
            stage = reached => Step::Reached(stage),
            Some(settled) = self.settling.next() => Step::Settled(settled),
            count = self.finished.recv_many(&mut self.results, BATCH_MAX) => Step::Finished(count),
            Ok(permit) = queued(self.queued.as_mut()) => Step::Admitted(permit),
            taken = take(&mut self.intake, max) => Step::Taken(taken),
        }
    }

    fn on_deliveries(&mut self, deliveries: Vec<Delivery>) {
        let mut unfit = Vec::new();
        for Delivery { message, redeliveries, ticket, .. } in deliveries {
            let electron = match message {
                Message::Electron(electron) => electron,
                other => {
                    unfit.push(self.settler.unreadable(ticket, other));
                    continue;
                }
            };
            let id = electron.id;
            self.emit(|atom| EventKind::Received { electron: id, atom, redeliveries });
            if electron.atom != self.atom.id {
                unfit.push(self.settler.misdirected(ticket, electron));
            } else if let Some(running) = self.in_flight.get_mut(&id) {
                running.adopt(electron, ticket);
            } else {
                self.ready.push_back((electron, ticket));
            }
        }
        self.settle(unfit);
        self.start_ready();
    }

    fn on_admitted(&mut self, permit: Permit) {
        self.queued = None;
        if let Some((electron, ticket)) = self.ready.pop_front() {
            self.start(electron, ticket, permit, Began::now());
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
        while let Some((electron, ticket)) = self.ready.pop_front() {
            let Some(permit) = admission.try_acquire(self.atom.lane) else {
                self.ready.push_front((electron, ticket));
                self.queued = Some(admission.acquire(self.atom.lane, Priority::Start));
                return;
            };
            self.start(electron, ticket, permit, began);
        }
    }

    fn start(&mut self, electron: Arc<Electron>, ticket: Ticket, permit: Permit, began: Began) {
        let (id, attempt) = (electron.id, electron.attempts + 1);
        if let Some(running) = self.in_flight.get_mut(&id) {
            return running.adopt(electron, ticket);
        }
        self.emit(|atom| EventKind::Started { electron: id, atom, attempt });
        let slot = Slot::new(permit);
        let context = Context::new(self.asker.clone(), Arc::clone(&electron), slot);
        let report = Report { electron: id, to: self.finish.clone() };
        let run = Arc::clone(&self.atom.atom).start(context, &self.atom.options, report);
        let in_flight = InFlight { electron, ticket, adopted: Vec::new(), began, _run: run };
        self.in_flight.insert(id, in_flight);
    }

    /// Settles all that has finished by now in one batch.
    fn on_finished(&mut self, count: usize) {
        let mut batch = Vec::with_capacity(count);
        let now = Instant::now();
        for (id, result) in self.results.drain(..) {
            let ran = self.in_flight.remove(&id).expect("each run reports once");
            let InFlight { electron, ticket, adopted, began, .. } = ran;
            let took = now.saturating_duration_since(began.instant);
            for (electron, ticket) in adopted {
                let result = result.clone();
                batch.push(self.settler.electron(ticket, electron, began.at, took, result));
            }
            batch.push(self.settler.electron(ticket, electron, began.at, took, result));
        }
        self.settle(batch);
        self.start_ready();
    }

    fn on_settled(&self, settled: Settled) {
        for (ending, result) in settled {
            match self.settler.decide(ending, result) {
                Verdict::Ended(ending) => {
                    ending.log(&self.atom.id);
                    self.emit(|atom| ending.into_event(atom));
                }
                Verdict::Again { settlement, after } => {
                    self.settling.push(settle(self.intake.session(), vec![settlement], after));
                }
            }
        }
    }

    fn settle(&self, batch: Vec<Settlement>) {
        if batch.is_empty() {
            return;
        }
        let mut settling = settle(self.intake.session(), batch, Duration::ZERO);
        // A conductor that need not wait is done by now.
        match (&mut settling).now_or_never() {
            Some(settled) => self.on_settled(settled),
            None => self.settling.push(settling),
        }
    }

    /// Takes no more, and gives back what has not begun.
    async fn on_drain(&mut self) {
        self.draining = true;
        self.queued = None;
        self.ready.clear();
        self.intake.stop().await;
    }

    /// What still runs is given back by being dropped.
    fn abort(self) {
        let electrons = self.in_flight.len();
        if electrons > 0 {
            tracing::warn!(atom = %self.atom.id, electrons, "aborts what did not stop, and gives it back");
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

/// Takes deliveries while there is room for some.
async fn take(intake: &mut Intake, max: Option<NonZeroUsize>) -> Taken {
    match max {
        Some(max) => intake.next(max).await,
        None => std::future::pending().await,
    }
}
