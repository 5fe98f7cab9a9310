//! The handle that users hold, and the task that supervises a node.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::future::join_all;
use rustc_hash::FxHashMap;
use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    Atom, AtomId, Builder, Call, CallError, ConductorId, Electron, ElectronId, EventKind,
    EventStream, Health, Kind, NodeId, Payload, ReplyTo, Results, ResultsId, SendError,
    ask::Asker,
    erased,
    event::Gather,
    inbox,
    link::{GaveUp, Link},
    node::{Node, Stage},
    publish::{self, Keeping},
    resident,
    worker::{Registered, Worker},
};

/// How long what runs may take to heed that it is to stop, before it is aborted.
const CANCEL_GRACE: Duration = Duration::from_secs(1);
/// How long closing the sessions may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a node that stops tells others which children are not wanted any more.
const TELL_TIMEOUT: Duration = Duration::from_secs(1);

/// A running node. Clones are handles to the same node.
///
/// When the last handle is dropped the node stops at once, and what ran is given back; [`drain`](Self::drain)
/// finishes it first.
#[derive(Clone)]
pub struct Atomizer {
    node: Arc<Node>,
    links: Arc<[Arc<Link>]>,
    drain_timeout: Duration,
    /// How long what runs may still take; set once draining is wanted. The supervisor also notices when the
    /// last sender is gone.
    drain: watch::Sender<Option<Duration>>,
    ended: watch::Receiver<Option<Result<(), NodeError>>>,
}

impl Atomizer {
    /// Begins to describe a node.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Returns the id of this node.
    #[must_use]
    pub fn node(&self) -> &NodeId {
        &self.node.id
    }

    /// Subscribes to what happens on this node from now on.
    #[must_use]
    pub fn events(&self) -> EventStream {
        self.node.events.subscribe()
    }

    /// Returns a view of how this node fares, for who watches it from outside.
    #[must_use]
    pub fn health(&self) -> Health {
        Health::new(
            self.node.id.clone(),
            self.node.stage.clone(),
            self.ended.clone(),
            Arc::downgrade(&self.links),
        )
    }

    /// Asks an atom, wherever it runs, and waits for its output.
    ///
    /// # Errors
    /// On awaiting: [`CallError`].
    ///
    /// # Cancel safety
    /// Dropping the call gives up the answer, not the electron.
    #[expect(clippy::needless_pass_by_value, reason = "callers write `call::<Double>(21)`")]
    pub fn call<A: Atom>(&self, input: A::Input) -> Call<'static, A::Output> {
        let electron = (erased::encode(&input).map_err(CallError::Encode))
            .map(|payload| Electron::new(AtomId::of::<A>(), payload));
        Call::new(self.asker(), None, electron, erased::decode)
    }

    /// Asks an atom that this program need not know, by id and with bytes.
    ///
    /// # Errors
    /// On awaiting: [`CallError`].
    ///
    /// # Cancel safety
    /// Dropping the call gives up the answer, not the electron.
    pub fn call_raw(&self, atom: AtomId, payload: Payload) -> Call<'static, Payload> {
        let electron = Ok(Electron::new(atom, payload));
        Call::new(self.asker(), None, electron, |payload| Ok(payload.clone()))
    }

    /// Sends an electron that nobody waits for. When this returns it is safe.
    ///
    /// # Errors
    /// [`CallError::NotSent`] when that is not known within 30 s; it carries the id under which the electron
    /// may be [sent again](Self::send_electron).
    ///
    /// # Cancel safety
    /// Dropping the future leaves unknown whether the electron was sent.
    pub async fn send<A: Atom>(&self, input: A::Input) -> Result<ElectronId, CallError> {
        let payload = erased::encode(&input).map_err(CallError::Encode)?;
        let electron = Electron::new(AtomId::of::<A>(), payload);
        self.asker().send_bounded(electron, Duration::ZERO).await
    }

    /// Sends an electron that nobody waits for, to be begun when `delay` is over and not before. When this
    /// returns it is safe; what carries it keeps the time, so it outlives this node.
    ///
    /// # Errors
    /// As [`send`](Self::send), with [`SendError::Refused`](crate::SendError::Refused) in it when the conductor
    /// cannot keep electrons back for so long ([`Limits::delay_max`](crate::Limits::delay_max)).
    ///
    /// # Cancel safety
    /// As [`send`](Self::send).
    pub async fn send_after<A: Atom>(
        &self,
        delay: Duration,
        input: A::Input,
    ) -> Result<ElectronId, CallError> {
        let payload = erased::encode(&input).map_err(CallError::Encode)?;
        let electron = Electron::new(AtomId::of::<A>(), payload);
        self.asker().send_bounded(electron, delay).await
    }

    /// Makes sure of a result address, and returns it: an electron whose [`reply_to`](Electron::reply_to) it is has its
    /// outcome sent there, to wait until somebody [reads](Self::results) it.
    ///
    /// # Errors
    /// [`SendError`] when it is not known within 30 s to be there; [`SendError::Refused`] where the conductor has none.
    ///
    /// # Cancel safety
    /// Safe: it is made or not.
    pub async fn result_address(&self, id: &ResultsId) -> Result<ReplyTo, SendError> {
        self.asker().result_address(id).await
    }

    /// Reads the outcomes that are sent to a result address, whoever asked, and makes it if there is none.
    #[must_use]
    pub fn results(&self, id: ResultsId) -> Results {
        Results::new(self.asker(), id)
    }

    /// Sends an electron as it is, under its own id. When this returns it is safe.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    ///
    /// # Cancel safety
    /// As [`send`](Self::send).
    pub async fn send_electron(&self, electron: Electron) -> Result<ElectronId, CallError> {
        self.asker().send_bounded(electron, Duration::ZERO).await
    }

    /// Sends an electron as it is, under its own id, to be begun when `delay` is over and not before.
    ///
    /// # Errors
    /// As [`send_after`](Self::send_after).
    ///
    /// # Cancel safety
    /// As [`send`](Self::send).
    pub async fn send_electron_after(
        &self,
        delay: Duration,
        electron: Electron,
    ) -> Result<ElectronId, CallError> {
        self.asker().send_bounded(electron, delay).await
    }

    /// Takes no more electrons, finishes what runs, gives back the rest, and closes.
    ///
    /// What still runs at the end of the drain time-out is [told to stop](crate::Context::cancelled), and
    /// aborted a second later.
    ///
    /// # Errors
    /// [`NodeError`] when the node had failed.
    ///
    /// # Cancel safety
    /// Dropping the future does not stop the draining.
    pub async fn drain(&self) -> Result<(), NodeError> {
        self.drain_within(self.drain_timeout).await
    }

    /// Serves until SIGTERM or ctrl-c, then drains. A second signal cuts the draining short.
    ///
    /// # Errors
    /// [`NodeError`] when the node failed: a program should say so and exit with a code other than 0, by
    /// `std::process::exit`. To return from `main` is not enough when a run never yields: the end of its runtime,
    /// too, waits for it.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the node running.
    pub async fn run(&self) -> Result<(), NodeError> {
        let mut signals = Signals::listen()?;
        tokio::select! {
            ended = self.ended() => return ended,
            signal = signals.next() => tracing::info!("{signal}: draining"),
        }
        tokio::select! {
            ended = self.drain() => ended,
            signal = signals.next() => {
                tracing::info!("{signal} again: stopping now");
                self.drain_within(Duration::ZERO).await
            }
        }
    }

    async fn drain_within(&self, limit: Duration) -> Result<(), NodeError> {
        self.drain.send_replace(Some(limit));
        self.ended().await
    }

    async fn ended(&self) -> Result<(), NodeError> {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or(Ok(())),
            Err(_) => Err(NodeError::Supervisor("the supervisor is gone".into())),
        }
    }

    fn asker(&self) -> Asker {
        Asker { node: Arc::clone(&self.node), link: Arc::clone(&self.links[0]) }
    }
}

impl fmt::Debug for Atomizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Atomizer")
            .field("node", &self.node.id)
            .field("links", &self.links)
            .finish_non_exhaustive()
    }
}

/// Owns all tasks of a node.
pub(crate) struct Supervisor {
    node: Arc<Node>,
    /// Through which residents ask.
    first: Arc<Link>,
    stage: watch::Sender<Stage>,
    workers: JoinSet<()>,
    residents: JoinSet<()>,
    inboxes: JoinSet<()>,
    links: JoinSet<Option<GaveUp>>,
    /// What keeps the events, and says that the node is there.
    tellers: JoinSet<()>,
    gathers: Vec<Arc<Gather>>,
    drain_wanted: watch::Receiver<Option<Duration>>,
    drain_timeout: Duration,
    ended: watch::Sender<Option<Result<(), NodeError>>>,
}

impl Supervisor {
    /// Starts the tasks of a node whose links are open. There is at least one. The future resolves when each
    /// subscription was made, or refused for the first time.
    pub(crate) fn new(
        node: Node,
        stage: watch::Sender<Stage>,
        links: Vec<Arc<Link>>,
        atoms: &[Registered],
        keepings: Vec<Keeping>,
        drain_timeout: Duration,
    ) -> (Atomizer, Self, impl Future<Output = ()> + Send + use<>) {
        let node = Arc::new(node);
        let (drain, drain_wanted) = watch::channel(None);
        let (ended_tx, ended) = watch::channel(None);
        let mut supervisor = Self {
            node: Arc::clone(&node),
            first: Arc::clone(&links[0]),
            stage,
            workers: JoinSet::new(),
            residents: JoinSet::new(),
            inboxes: JoinSet::new(),
            links: JoinSet::new(),
            tellers: JoinSet::new(),
            gathers: Vec::new(),
            drain_wanted,
            drain_timeout,
            ended: ended_tx,
        };
        let mut tried = Vec::new();
        for link in &links {
            supervisor.add(link, atoms, &mut tried);
        }
        supervisor.tell(atoms, keepings);
        let atomizer = Atomizer { node, links: links.into(), drain_timeout, drain, ended };
        // Each is told by being dropped.
        (atomizer, supervisor, async { drop(join_all(tried).await) })
    }

    /// Starts what asks of its own accord.
    pub(crate) fn start(&mut self, residents: Vec<resident::Registered>) {
        for resident in residents {
            let asker = Asker { node: Arc::clone(&self.node), link: Arc::clone(&self.first) };
            self.residents.spawn(resident::run(asker, resident));
        }
    }

    /// Brings the events to where they are kept.
    fn tell(&mut self, atoms: &[Registered], keepings: Vec<Keeping>) {
        if keepings.is_empty() {
            return;
        }
        let atoms = atoms.iter().map(|atom| (atom.id.clone(), atom.lane)).collect();
        self.tellers.spawn(publish::announce(Arc::clone(&self.node), atoms));
        for keeping in keepings {
            self.gathers.push(Arc::clone(&keeping.gather));
            self.tellers.spawn(publish::run(Arc::clone(&self.node), keeping));
        }
    }

    fn add(
        &mut self,
        link: &Arc<Link>,
        atoms: &[Registered],
        tried: &mut Vec<oneshot::Receiver<()>>,
    ) {
        let mut try_to_subscribe = || {
            let (tx, rx) = oneshot::channel();
            tried.push(rx);
            tx
        };
        let asker = Asker { node: Arc::clone(&self.node), link: Arc::clone(link) };
        let mut handings = FxHashMap::default();
        for atom in atoms {
            let worker = Worker::new(asker.clone(), atom.clone(), try_to_subscribe());
            if atom.kind != Kind::Singleton {
                handings.insert(atom.id.clone(), worker.handing());
            }
            self.workers.spawn(worker.run());
        }
        link.set_handings(handings);
        let (link, node) = (Arc::clone(link), Arc::clone(&self.node));
        self.links.spawn(async move { link.run(&node).await });
        self.inboxes.spawn(inbox::run(asker, try_to_subscribe()));
    }

    /// Runs the node to its end, whatever that is.
    pub(crate) async fn run(mut self) {
        let result = self.serve().await;
        self.ended.send_replace(Some(result));
    }

    async fn serve(&mut self) -> Result<(), NodeError> {
        let result = tokio::select! {
            limit = drain_limit(&mut self.drain_wanted) => {
                self.drain(limit).await;
                Ok(())
            }
            report = self.node.critical.raised() => {
                self.report(&report);
                self.drain(self.drain_timeout).await;
                Err(report)
            }
            report = failed(&mut self.workers, &mut self.residents, &mut self.inboxes, &mut self.links) => {
                self.report(&report);
                Err(report)
            }
        };
        self.enter(Stage::Aborting, || EventKind::Aborting);
        self.residents.shutdown().await;
        self.workers.join_all_caught().await;
        // An error says that nobody hears of it in time.
        drop(timeout(TELL_TIMEOUT, self.node.cancelled.sent()).await);
        self.inboxes.shutdown().await;
        self.stage.send_replace(Stage::Closing);
        self.node.pending.close();
        if timeout(CLOSE_TIMEOUT, self.links.join_all_caught()).await.is_err() {
            tracing::warn!(
                "sessions did not close within {CLOSE_TIMEOUT:?}; left to end by themselves"
            );
            self.links.shutdown().await;
        }
        self.node.events.emit(None, || EventKind::Stopped);
        for gather in &self.gathers {
            gather.close();
        }
        if timeout(TELL_TIMEOUT, self.tellers.join_all_caught()).await.is_err() {
            tracing::debug!("the last events were not kept within {TELL_TIMEOUT:?}");
        }
        result
    }

    fn report(&self, report: &NodeError) {
        tracing::error!(%report, "the node fails");
        self.node.events.emit(None, || EventKind::Critical { error: report.to_string() });
    }

    async fn drain(&mut self, limit: Duration) {
        self.enter(Stage::Draining, || EventKind::Draining);
        let workers = &mut self.workers;
        let residents = &mut self.residents;
        tokio::select! {
            _ = async { tokio::join!(workers.join_all_caught(), residents.join_all_caught()) } => return,
            () = drained_too_long(limit, &mut self.drain_wanted) => {}
        }
        self.enter(Stage::Cancelling, || EventKind::Cancelling);
        let rest = async {
            tokio::join!(self.workers.join_all_caught(), self.residents.join_all_caught())
        };
        // An error says that some did not stop: they are aborted next.
        drop(timeout(CANCEL_GRACE, rest).await);
    }

    fn enter(&self, stage: Stage, event: impl FnOnce() -> EventKind) {
        if stage == Stage::Aborting && self.workers.is_empty() && self.residents.is_empty() {
            return;
        }
        tracing::debug!(?stage, "entered");
        self.stage.send_replace(stage);
        self.node.events.emit(None, event);
    }
}

/// Waits until draining is wanted, and returns how long it may take.
async fn drain_limit(wanted: &mut watch::Receiver<Option<Duration>>) -> Duration {
    match wanted.wait_for(Option::is_some).await {
        Ok(limit) => limit.unwrap_or_default(),
        // Every handle is gone: nobody waits for what runs.
        Err(_) => Duration::ZERO,
    }
}

/// Waits for the end of `limit`, or of a shorter one that is wanted meanwhile.
async fn drained_too_long(limit: Duration, wanted: &mut watch::Receiver<Option<Duration>>) {
    let hurried = async {
        wanted.wait_for(|now| now.is_some_and(|now| now < limit)).await.map_or((), |_| ())
    };
    tokio::select! {
        () = sleep(limit) => {}
        () = hurried => {}
    }
}

/// Waits until the node cannot go on: its last conductor is given up, or a task ends that should not.
async fn failed(
    workers: &mut JoinSet<()>,
    residents: &mut JoinSet<()>,
    inboxes: &mut JoinSet<()>,
    links: &mut JoinSet<Option<GaveUp>>,
) -> NodeError {
    loop {
        let ended = tokio::select! {
            Some(ended) = workers.join_next() => ended,
            Some(ended) = inboxes.join_next() => ended,
            Some(ended) = residents.join_next() => match ended {
                // A resident may be done.
                Ok(()) => continue,
                failed => failed,
            },
            Some(ended) = links.join_next() => match ended {
                // Of several conductors, one that fails fails alone.
                Ok(Some(_)) if !links.is_empty() => continue,
                Ok(Some(GaveUp { conductor, error, failures, since })) => {
                    return NodeError::ConductorsGone {
                        conductor,
                        error: error.into(),
                        failures,
                        since,
                    };
                }
                ended => ended.map(drop),
            },
        };
        let reason =
            ended.map_or_else(|error| error.to_string(), |()| "a task ended early".to_owned());
        return NodeError::Supervisor(reason.into());
    }
}

trait JoinAllCaught {
    /// Waits for all tasks; a panic in one was reported when it happened.
    fn join_all_caught(&mut self) -> impl Future<Output = ()> + Send;
}

impl<T: Send + 'static> JoinAllCaught for JoinSet<T> {
    async fn join_all_caught(&mut self) {
        while self.join_next().await.is_some() {}
    }
}

/// Why a node failed: the critical failures.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The last conductor is given up: it was gone for [too long](Builder::give_up_after), or panicked too often.
    #[error(
        "the last conductor, {conductor}, is given up: {error} (gone since {}, {failures} tries since then)",
        humantime::format_rfc3339_seconds(*since)
    )]
    ConductorsGone {
        /// Which.
        conductor: ConductorId,
        /// What the last try came to.
        error: Arc<str>,
        /// How often it was tried since.
        failures: u32,
        /// Since when it is gone.
        since: SystemTime,
    },
    /// So many runs do not stop at their time limit that they may hold all threads.
    #[error(
        "stuck runs: {stuck} hold their threads after their time limit, and {stuck_max} are too many; the last is {last}"
    )]
    Stuck {
        /// How many.
        stuck: usize,
        /// How many are [too many](Builder::stuck_max).
        stuck_max: usize,
        /// The atom and the electron of the last one.
        last: Arc<str>,
    },
    /// A part of the runtime itself failed: a defect in Atomizer.
    #[error("the runtime failed: {0}")]
    Supervisor(Arc<str>),
    /// Signals cannot be listened to.
    #[error("failed to listen to signals: {0}")]
    Signals(Arc<str>),
}

/// SIGTERM and ctrl-c.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    #[cfg(unix)]
    fn listen() -> Result<Self, NodeError> {
        use tokio::signal::unix::{SignalKind, signal};

        let listen =
            |kind| signal(kind).map_err(|error| NodeError::Signals(error.to_string().into()));
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    #[cfg(unix)]
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "ctrl-c",
        }
    }

    #[cfg(not(unix))]
    fn listen() -> Result<Self, NodeError> {
        Ok(Self {})
    }

    #[cfg(not(unix))]
    async fn next(&mut self) -> &'static str {
        match tokio::signal::ctrl_c().await {
            Ok(()) => "ctrl-c",
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Memory, Policy, admission::Admission, event::Events, home::Threads, node::Rules};

    /// No way is known to make a part of the runtime fail from outside; so one is put in that does.
    #[tokio::test(start_paused = true)]
    async fn a_part_of_the_runtime_that_fails_ends_the_node_with_a_report() {
        let id = NodeId::unique("failing").unwrap();
        let events = Events::new(id.clone());
        let mut watched = events.subscribe();
        let (stage_tx, stage) = watch::channel(Stage::Running);
        let rules = Rules { policy: Policy::fail(), lives_max: 5, stuck_max: 1, waiting_max: 1 };
        let node = Node::new(id, Admission::new(1), events, stage, Threads::here(), rules);
        let link =
            Arc::new(Link::new(ConductorId::from_static("memory"), Arc::new(Memory::new()), None));
        link.open_first(&node, None).await.unwrap();
        let (atomizer, mut supervisor, _) =
            Supervisor::new(node, stage_tx, vec![link], &[], Vec::new(), Duration::ZERO);
        supervisor.workers.spawn(async { panic!("a defect") });
        let (report, ()) = tokio::join!(atomizer.run(), supervisor.run());
        let Err(NodeError::Supervisor(reason)) = report else { panic!("it fails: {report:?}") };
        assert!(reason.contains("a defect"), "{reason}");
        let critical = async {
            while let Some(event) = watched.next().await {
                if matches!(event.unwrap().kind, EventKind::Critical { .. }) {
                    return true;
                }
            }
            false
        };
        assert!(critical.await, "it is told");
    }
}
