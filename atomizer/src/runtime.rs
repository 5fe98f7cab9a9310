//! The handle that users hold, and the task that supervises a node.

use std::{fmt, sync::Arc, time::Duration};

use futures::future::join_all;
use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    Atom, AtomId, Builder, Call, CallError, Electron, ElectronId, EventKind, EventStream, NodeId,
    Payload, SendError,
    ask::Asker,
    erased, inbox,
    link::Link,
    node::{Node, Stage},
    worker::{Registered, Worker},
};

/// How long what runs may take to heed that it is to stop, before it is aborted.
const CANCEL_GRACE: Duration = Duration::from_secs(1);
/// How long closing the sessions may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

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

    /// Asks an atom, wherever it runs, and waits for its output.
    ///
    /// # Errors
    /// On awaiting: [`CallError`].
    ///
    /// # Cancel safety
    /// Dropping the call gives up the answer, not the electron.
    #[expect(clippy::needless_pass_by_value, reason = "callers write `call::<Double>(21)`")]
    pub fn call<A: Atom>(&self, input: A::Input) -> Call<'static, A::Output> {
        let electron =
            erased::encode(&input).map(|payload| Electron::new(AtomId::of::<A>(), payload));
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
        self.send_electron(Electron::new(AtomId::of::<A>(), payload)).await
    }

    /// Sends an electron as it is, under its own id. When this returns it is safe.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    ///
    /// # Cancel safety
    /// As [`send`](Self::send).
    pub async fn send_electron(&self, mut electron: Electron) -> Result<ElectronId, CallError> {
        const SEND_TIMEOUT: Duration = Duration::from_secs(30);
        electron.sender = Some(self.node.id.clone());
        let id = electron.id;
        let asker = self.asker();
        let sending = timeout(SEND_TIMEOUT, asker.send(electron.into()));
        let sent = sending.await.unwrap_or_else(|_| {
            let reason = format!("no confirmation within {SEND_TIMEOUT:?}");
            Err(SendError::Unknown(reason))
        });
        sent.map_err(|source| CallError::NotSent { id, source })?;
        Ok(id)
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
    /// [`NodeError`] when the node failed.
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

    /// Starts a node whose links are open. There is at least one. Returns when each subscription was made, or
    /// refused for the first time.
    #[expect(
        clippy::disallowed_methods,
        reason = "the root of a node's tasks; all others are in its sets"
    )]
    pub(crate) async fn spawn(
        node: Node,
        stage: watch::Sender<Stage>,
        links: Vec<Arc<Link>>,
        atoms: &[Registered],
        drain_timeout: Duration,
    ) -> Self {
        let node = Arc::new(node);
        let (drain, drain_wanted) = watch::channel(None);
        let (ended_tx, ended) = watch::channel(None);
        let mut supervisor = Supervisor {
            node: Arc::clone(&node),
            stage,
            workers: JoinSet::new(),
            inboxes: JoinSet::new(),
            links: JoinSet::new(),
            drain_wanted,
        };
        let mut tried = Vec::new();
        for link in &links {
            supervisor.add(link, atoms, &mut tried);
        }
        tokio::spawn(async move {
            let result = supervisor.run().await;
            ended_tx.send_replace(Some(result));
        });
        // Each is told by being dropped.
        drop(join_all(tried).await);
        Self { node, links: links.into(), drain_timeout, drain, ended }
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
struct Supervisor {
    node: Arc<Node>,
    stage: watch::Sender<Stage>,
    workers: JoinSet<()>,
    inboxes: JoinSet<()>,
    links: JoinSet<()>,
    drain_wanted: watch::Receiver<Option<Duration>>,
}

impl Supervisor {
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
        for atom in atoms {
            self.workers.spawn(Worker::new(asker.clone(), atom.clone(), try_to_subscribe()).run());
        }
        let (link, node) = (Arc::clone(link), Arc::clone(&self.node));
        self.links.spawn(async move { link.run(&node).await });
        self.inboxes.spawn(inbox::run(asker, try_to_subscribe()));
    }

    async fn run(mut self) -> Result<(), NodeError> {
        let result = tokio::select! {
            limit = drain_limit(&mut self.drain_wanted) => {
                self.drain(limit).await;
                Ok(())
            }
            // These run until they are told to stop: one that ends has panicked.
            error = first_failure([&mut self.workers, &mut self.inboxes, &mut self.links]) => {
                tracing::error!(%error, "the node fails");
                Err(error)
            }
        };
        self.enter(Stage::Aborting, || EventKind::Aborting);
        self.workers.join_all_caught().await;
        self.stage.send_replace(Stage::Closing);
        self.inboxes.shutdown().await;
        self.node.pending.close();
        if timeout(CLOSE_TIMEOUT, self.links.join_all_caught()).await.is_err() {
            tracing::warn!(
                "sessions did not close within {CLOSE_TIMEOUT:?}; left to end by themselves"
            );
            self.links.shutdown().await;
        }
        self.node.events.emit(None, || EventKind::Stopped);
        result
    }

    async fn drain(&mut self, limit: Duration) {
        self.enter(Stage::Draining, || EventKind::Draining);
        tokio::select! {
            () = self.workers.join_all_caught() => return,
            () = drained_too_long(limit, &mut self.drain_wanted) => {}
        }
        self.enter(Stage::Cancelling, || EventKind::Cancelling);
        // An error says that some did not stop: they are aborted next.
        drop(timeout(CANCEL_GRACE, self.workers.join_all_caught()).await);
    }

    fn enter(&self, stage: Stage, event: impl FnOnce() -> EventKind) {
        if stage == Stage::Aborting && self.workers.is_empty() {
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

/// Waits until a task of these sets ends, which none should.
async fn first_failure(sets: [&mut JoinSet<()>; 3]) -> NodeError {
    let [workers, inboxes, links] = sets;
    let ended = tokio::select! {
        Some(ended) = workers.join_next() => ended,
        Some(ended) = inboxes.join_next() => ended,
        Some(ended) = links.join_next() => ended,
    };
    let reason = ended.map_or_else(|error| error.to_string(), |()| "a task ended early".to_owned());
    NodeError::Supervisor(reason.into())
}

trait JoinAllCaught {
    /// Waits for all tasks; a panic in one was reported when it happened.
    fn join_all_caught(&mut self) -> impl Future<Output = ()> + Send;
}

impl JoinAllCaught for JoinSet<()> {
    async fn join_all_caught(&mut self) {
        while self.join_next().await.is_some() {}
    }
}

/// Why a node failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
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
