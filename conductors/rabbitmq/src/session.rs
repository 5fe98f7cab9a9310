//! One life of the connections to a broker.

mod consume;
mod inbox;

use std::{
    collections::HashSet,
    fmt,
    num::NonZeroUsize,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use atomizer::{
    Address as To, AtomId, Census, Electron, Envelope, Epoch, Limits, Message, NodeId, OpenError,
    Outcome, ReplyTo, ResultsId, SendError, Session, SessionError, SettleError, Source,
    Subscription, Ticket, wire::METADATA_BYTES_MAX,
};
use lapin::{
    Channel, Connection,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions},
    protocol::AMQPSoftError,
    types::FieldTable,
};
use tokio::{
    runtime::Handle,
    sync::{Mutex as AsyncMutex, mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};

use crate::{
    aside::{Aside, Suspects},
    connect::{Address, Connected, Patience, plain},
    convert::Writing,
    declare::{Declarer, NOT_MADE, found, on_own_channel, refusal},
    delay::Ladder,
    inbox::Inboxes,
    lane::{Command, LaneId, LaneSubscription, Lanes, Settler, Taking, Window, gathered_max},
    lease::{Held, Lease, Leases, PARKED_MAX, Receiver},
    life::{CLOSE_TIMEOUT, CloseWhenDropped, Life, REQUEST_TIMEOUT, close, watch_over},
    publisher::{Moves, Publisher, Via},
    quarantine::Quarantine,
    server::Server,
    topology::{Route, Topology, TopologyMode},
    watchdog::Watchdog,
};

/// How long what is for all nodes waits to be read, in milliseconds.
const TOLD_FOR_MS: &str = "60000";

/// What all sessions of a conductor are to be like.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) limits: Limits,
    /// How long a consumer may be brought nothing before the broker is asked.
    pub(crate) watchdog: Duration,
    pub(crate) moves: Moves,
    pub(crate) suspects: Suspects,
    pub(crate) quarantine: Quarantine,
    pub(crate) inboxes: Inboxes,
}

/// Two connections: a broker that is short of memory or disk stops reading from those that publish, and
/// acknowledgements must get through all the same.
pub(crate) struct RabbitSession {
    node: NodeId,
    address: Address,
    server: Server,
    topology: Topology,
    options: Options,
    epoch: Epoch,
    publishing: Arc<Connection>,
    consuming: Arc<Connection>,
    _close: [CloseWhenDropped; 2],
    declarer: Declarer,
    publisher: Publisher,
    lanes: Arc<Lanes>,
    leases: Arc<Leases>,
    /// The way to park, and the lane of what is parked, once something was.
    lease: AsyncMutex<Option<(Arc<Lease>, LaneId)>>,
    life: Life,
    /// Atoms whose queue was declared through this session.
    declared: Mutex<HashSet<AtomId>>,
    /// Held while queues are declared: a thousand sends at once are not to declare the same queue a thousand times.
    declaring: AsyncMutex<()>,
    /// Whether the inbox is to hear what is for all nodes: of those that take electrons.
    hears_all: AtomicBool,
    tasks: Mutex<JoinSet<()>>,
}

impl RabbitSession {
    pub(crate) async fn open(
        address: &Address,
        topology: &Topology,
        options: &Options,
        node: &NodeId,
        patience: Patience,
    ) -> Result<Self, OpenError> {
        let connect = |role| address.connect(node, role, patience.connect);
        let (publishing, consuming) = tokio::try_join!(connect("publishes"), connect("consumes"))?;
        let setting_up = async {
            topology.declare_base(&publishing.connection).await?;
            options.inboxes.make(topology, &publishing.connection, node).await?;
            let channel = publishing.connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok(channel)
        };
        let channel = match timeout(patience.set_up, setting_up).await {
            Ok(channel) => channel.map_err(|error| match refusal(&error) {
                Some(AMQPSoftError::NOTFOUND) if topology.mode == TopologyMode::Passive => {
                    OpenError::Misconfigured(format!("{address}: {}: {NOT_MADE}", plain(&error)))
                }
                _ => address.classify(&error),
            })?,
            Err(_) => return Err(address.silent(patience.set_up)),
        };
        let life = Life::new();
        let mut tasks = JoinSet::new();
        let server = publishing.server.clone();
        tracing::info!(%address, %server, "connected");
        let mut watch = |Connected { connection, events, .. }: Connected| {
            let connection = Arc::new(connection);
            tasks.spawn(watch_over(Arc::clone(&connection), events, life.clone()));
            connection
        };
        let (publishing, consuming) = (watch(publishing), watch(consuming));
        let close = [&publishing, &consuming].map(CloseWhenDropped::new);
        let (connection, mode) = (Arc::clone(&consuming), topology.mode);
        let declarer = Declarer { connection, life: life.clone(), mode };
        let ladder = Ladder::new(topology.clone(), declarer.clone());
        let aside = Aside::new(options.suspects.clone(), Arc::clone(&publishing), life.clone());
        let (publisher, publish) =
            Publisher::new(channel, aside, topology.clone(), ladder, options, life.clone());
        tasks.spawn(publish);
        Ok(Self {
            node: node.clone(),
            address: address.clone(),
            server,
            topology: topology.clone(),
            options: options.clone(),
            epoch: Epoch::unique(),
            publishing,
            consuming,
            _close: close,
            declarer,
            publisher,
            lanes: Arc::default(),
            leases: Leases::new(),
            lease: AsyncMutex::default(),
            life,
            declared: Mutex::default(),
            declaring: AsyncMutex::default(),
            hears_all: AtomicBool::new(false),
            tasks: Mutex::new(tasks),
        })
    }

    fn declared(&self) -> MutexGuard<'_, HashSet<AtomId>> {
        self.declared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that the queue of an atom is there.
    async fn declare_atom(&self, atom: &AtomId) -> Result<(), SendError> {
        self.declarer.make(self.topology.declare_atom(&self.consuming, atom)).await?;
        self.declared().insert(atom.clone());
        Ok(())
    }

    /// Makes sure that the queues of all these are there, asking the broker once per session. Returns why one
    /// is not.
    async fn declare_all(&self, envelopes: &[Envelope]) -> Vec<(AtomId, SendError)> {
        let mut refused = Vec::new();
        for envelope in envelopes {
            if let To::Atom(atom) = &envelope.to
                && !self.declared().contains(atom)
                && !refused.iter().any(|(refused, _)| refused == atom)
            {
                let _turn = self.declaring.lock().await;
                // Another may have done it meanwhile.
                if !self.declared().contains(atom)
                    // Boxed: it is large, and every send would have to have room for it.
                    && let Err(error) = Box::pin(self.declare_atom(atom)).await
                {
                    refused.push((atom.clone(), error));
                }
            }
        }
        refused
    }

    /// A queue that was there and takes nothing was deleted: it is declared again before the next try.
    fn forget_deleted(
        &self,
        envelope: &Envelope,
        result: Result<(), SendError>,
    ) -> Result<(), SendError> {
        match (&envelope.to, result) {
            (To::Atom(atom), Err(SendError::Unroutable(queue))) => {
                if self.topology.mode == TopologyMode::None {
                    return Err(SendError::Refused(format!("there is no queue of {queue}")));
                }
                self.declared().remove(atom);
                Err(SendError::NotTaken(format!("the queue of {queue} was deleted")))
            }
            (_, result) => result,
        }
    }

    /// Has the inbox hear what is for all nodes: a help that others do not rely on.
    async fn hear_all(&self) {
        let binding = self.topology.bind_inbox(&self.consuming, &self.node);
        if let Err(error) = self.life.bound(REQUEST_TIMEOUT, binding).await {
            tracing::warn!(%error, "what other nodes give up is not heard of here");
        }
    }

    /// Publishes what is for all nodes, over a channel of its own and unconfirmed: one inbox that takes nothing would
    /// be waited for. Who does not read it within a minute need not.
    async fn tell_all(&self, message: &Message) -> Result<(), SendError> {
        let Route { exchange, key } = self.topology.route(&To::Nodes)?;
        let mut writing = Writing::default();
        let body = message.write(&mut writing);
        let properties = writing.finish(METADATA_BYTES_MAX)?.with_expiration(TOLD_FOR_MS.into());
        let publish = async |channel: &Channel| {
            let options = BasicPublishOptions::default();
            channel.basic_publish(exchange, key, options, &body, properties).await?.await
        };
        let publishing =
            self.life.bound(REQUEST_TIMEOUT, on_own_channel(&self.publishing, publish));
        publishing.await.map(drop).map_err(|error| SendError::NotTaken(error.to_string()))
    }

    /// Runs a task for as long as the session is there.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn_on(&Handle::current(), task);
    }

    fn spawn_on(&self, runtime: &Handle, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(task, runtime);
    }

    /// Begins a lane: the task that settles what a channel delivers. Returns its id, and what resolves when
    /// the task has ended.
    fn add_lane(
        &self,
        channel: &Channel,
        queue: &str,
        gathered_max: usize,
        gone: Arc<AtomicU64>,
        parked: Option<Held>,
    ) -> (LaneId, oneshot::Receiver<()>) {
        #[expect(clippy::disallowed_methods, reason = "bounded by the deliveries that are out")]
        let (command, commands) = mpsc::unbounded_channel();
        let number = self.lanes.add(command);
        let id = LaneId { epoch: self.epoch, number, lanes: Arc::clone(&self.lanes) };
        let (alive, settler_gone) = oneshot::channel();
        let settler = Settler {
            id: id.clone(),
            channel: channel.clone(),
            queue: queue.to_owned(),
            gone,
            gathered_max,
            publisher: self.publisher.clone(),
            life: self.life.clone(),
            _alive: alive,
            commands,
            parked,
        };
        self.spawn(settler.run());
        (id, settler_gone)
    }

    /// Hands a settlement to its lane; what comes back is where the result will be.
    fn settle_one(
        &self,
        ticket: Ticket,
        outcome: Outcome,
    ) -> Result<oneshot::Receiver<Result<(), SettleError>>, SettleError> {
        match outcome {
            Outcome::Done { emit, .. } => self.hand_over(ticket, |key, done| {
                let via = Via::Address;
                Command::Settle { key, emit, via, done }
            }),
            Outcome::Take { .. } => self.hand_over(ticket, |key, done| Command::Take { key, done }),
            _ if ticket.epoch() != self.epoch => Err(SettleError::Stale),
            _ => {
                drop(ticket);
                let (done, settled) = oneshot::channel();
                drop(done.send(Ok(())));
                Ok(settled)
            }
        }
    }

    fn hand_over(
        &self,
        ticket: Ticket,
        command: impl FnOnce(u64, oneshot::Sender<Result<(), SettleError>>) -> Command,
    ) -> Result<oneshot::Receiver<Result<(), SettleError>>, SettleError> {
        if ticket.epoch() != self.epoch {
            return Err(SettleError::Stale);
        }
        let (done, settled) = oneshot::channel();
        let (number, key) = ticket.take();
        if self.lanes.command(number, command(key, done)) {
            Ok(settled)
        } else {
            Err(SettleError::Stale)
        }
    }

    /// Returns the way to park, and makes it when there is none, or when the last one was lost.
    async fn lease(&self) -> Result<Arc<Lease>, SendError> {
        let mut current = self.lease.lock().await;
        self.leases.check_open()?;
        if let Some((lease, _)) = current.as_ref().filter(|(lease, _)| !lease.has_ended()) {
            return Ok(Arc::clone(lease));
        }
        let name = self.topology.lease_queue(&self.node, self.epoch);
        let declare = async |channel: &Channel| self.topology.declare_lease(channel, &name).await;
        self.declarer.declare(declare).await?;
        let (channel, consumer) = self.consume(&name, PARKED_MAX).await.map_err(|failed| {
            let is_of_queue = failed.is_of_queue();
            let error = SessionError::from(failed);
            if is_of_queue {
                // That of the next session has another name.
                self.life.end_with(error.clone());
            }
            SendError::Unknown(error.to_string())
        })?;
        let lease = Lease::new(Arc::clone(&self.leases), &name);
        let held = Held::new(Arc::clone(&lease), self.limits().hold_max);
        let (id, settler_gone) = self.add_lane(&channel, &name, 1, Arc::default(), Some(held));
        *current = Some((Arc::clone(&lease), id.clone()));
        let (receiving, life) = (Arc::clone(&lease), self.life.clone());
        let receiver = Receiver { id, lease: receiving, channel, consumer, life, settler_gone };
        self.spawn(receiver.run());
        Ok(lease)
    }

    /// Gives back what is parked, and removes the lease queue if it is known to be empty. Otherwise the broker
    /// gives back the rest, and the queue expires.
    async fn close_lease(&self) {
        let closing = async {
            self.leases.close();
            let Some((lease, id)) = self.lease.lock().await.clone() else { return };
            self.lanes.command(id.number, Command::GiveBack);
            if !self.leases.emptied().await {
                tracing::debug!("the lease queue may hold something; it expires by itself");
                return;
            }
            delete(&self.consuming, lease.name()).await;
        };
        // With the session everything goes back without us.
        tokio::select! {
            () = closing => {}
            _ = self.life.ended() => {}
        }
    }
}

/// Deletes a queue, or leaves it to expire.
async fn delete(connection: &Connection, queue: &str) {
    let delete = async |channel: &Channel| {
        channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await
    };
    let deleted = timeout(CLOSE_TIMEOUT, on_own_channel(connection, delete)).await;
    if !matches!(deleted, Ok(Ok(_))) {
        tracing::debug!(queue, "a queue was not deleted; it expires by itself");
    }
}

fn channel_ended() -> SettleError {
    SettleError::Unknown(SessionError::lost("the channel ended"))
}

#[async_trait]
impl Session for RabbitSession {
    fn limits(&self) -> Limits {
        self.options.limits
    }

    fn reply_to(&self) -> ReplyTo {
        ReplyTo::new(self.topology.inbox_queue(&self.node))
    }

    async fn subscribe(
        &self,
        source: Source,
        window: NonZeroUsize,
    ) -> Result<Box<dyn Subscription>, SessionError> {
        let is_inbox = source == Source::Inbox;
        let is_results = matches!(source, Source::Results(_));
        let (queue, atom) = match source {
            Source::Atom(atom) => {
                self.declare_atom(&atom).await.map_err(SessionError::lost)?;
                if !self.hears_all.swap(true, Ordering::Relaxed) {
                    self.hear_all().await;
                }
                (self.topology.atom_queue(&atom), Some(atom))
            }
            Source::Inbox => {
                let inbox = self.topology.inbox_queue(&self.node);
                // It may have been deleted, or have expired, since the session began.
                let inboxes = &self.options.inboxes;
                let making = inboxes.make(&self.topology, &self.consuming, &self.node);
                self.life.bound(REQUEST_TIMEOUT, making).await?;
                if self.hears_all.load(Ordering::Relaxed) {
                    self.hear_all().await;
                }
                (inbox, None)
            }
            Source::Results(id) => {
                let making =
                    self.declarer.make(self.topology.declare_results(&self.consuming, &id));
                making.await.map_err(SessionError::lost)?;
                (self.topology.results_queue(&id), None)
            }
            other => return Err(SessionError::lost(format!("{other:?} is not supported"))),
        };
        let prefetch = u16::try_from(window.get()).unwrap_or(u16::MAX);
        let (channel, consumer) = match self.consume_safely(&queue, prefetch).await {
            Ok(consumed) => consumed,
            Err(failed) if is_inbox && failed.is_of_queue() => {
                return Err(self.inbox_failed(failed).await);
            }
            Err(failed) => return Err(failed.into()),
        };
        if is_inbox {
            self.options.inboxes.works(&self.node);
            for trial in self.options.inboxes.trials() {
                self.spawn(self.delete_trial(trial));
            }
        }
        let gone = Arc::<AtomicU64>::default();
        // Who reads outcomes waits for each to be removed.
        let gathered_max = if is_results { 1 } else { gathered_max(prefetch) };
        let (id, settler_gone) =
            self.add_lane(&channel, &queue, gathered_max, Arc::clone(&gone), None);
        // Told once: what is asked from now on is answered to the queue that is there.
        let consuming = Arc::clone(&self.consuming);
        let missed = is_inbox && self.options.inboxes.take_lost(&self.node);
        Ok(Box::new(LaneSubscription {
            taking: Taking { id, channel, consumer },
            atom,
            life: self.life.clone(),
            settler_gone,
            missed,
            window: Window { prefetch, delivered: 0, gone },
            watchdog: Watchdog::new(queue, consuming, self.life.clone(), self.options.watchdog),
            ended: None,
            is_over: false,
            runtime: Handle::current(),
        }))
    }

    async fn send(&self, envelopes: &[Envelope]) -> Vec<Result<(), SendError>> {
        if let [Envelope { to: To::Nodes, message, .. }] = envelopes {
            return vec![Box::pin(self.tell_all(message)).await];
        }
        let refused = self.declare_all(envelopes).await;
        if refused.is_empty() {
            let sent = self.publisher.publish(envelopes, &Via::Address).await;
            let sent = envelopes.iter().zip(sent);
            return sent.map(|(envelope, sent)| self.forget_deleted(envelope, sent)).collect();
        }
        let why_not = |envelope: &Envelope| match &envelope.to {
            To::Atom(atom) => {
                refused.iter().find(|(id, _)| id == atom).map(|(_, error)| error.clone())
            }
            _ => None,
        };
        let sendable: Vec<_> =
            envelopes.iter().filter(|envelope| why_not(envelope).is_none()).cloned().collect();
        let mut sent = self.publisher.publish(&sendable, &Via::Address).await.into_iter();
        let lost = || Err(SendError::Unknown("the session ended".to_owned()));
        (envelopes.iter())
            .map(|envelope| match why_not(envelope) {
                Some(error) => Err(error),
                None => self.forget_deleted(envelope, sent.next().unwrap_or_else(lost)),
            })
            .collect()
    }

    async fn settle(&self, batch: Vec<(Ticket, Outcome)>) -> Vec<Result<(), SettleError>> {
        let handed_over: Vec<_> =
            batch.into_iter().map(|(ticket, outcome)| self.settle_one(ticket, outcome)).collect();
        let mut results = Vec::with_capacity(handed_over.len());
        // One after the other: all are under way, and the last is there when any others would be.
        for settled in handed_over {
            results.push(match settled {
                Ok(settled) => settled.await.unwrap_or_else(|_| Err(channel_ended())),
                Err(error) => Err(error),
            });
        }
        results
    }

    async fn park(&self, ticket: Ticket, changed: Arc<Electron>) -> Result<Ticket, SettleError> {
        if ticket.epoch() != self.epoch {
            return Err(SettleError::Stale);
        }
        let atom = changed.atom.clone();
        let copy = Envelope::new(To::Atom(atom.clone()), Message::Electron(changed));
        let expecting = async {
            // The broker gives it back there.
            if !self.declared().contains(&atom) {
                self.declare_atom(&atom).await?;
            }
            self.lease().await?.expect(&copy)
        };
        let expected = match expecting.await {
            Ok(expected) => expected,
            Err(SendError::Unknown(reason)) => {
                return Err(SettleError::Unknown(SessionError::lost(reason)));
            }
            Err(error) => return Err(SettleError::NotSafe { ticket, failed: vec![(copy, error)] }),
        };
        let via = expected.via();
        let emit = vec![copy];
        let settle = |key, done| Command::Settle { key, emit, via, done };
        let settled = match self.hand_over(ticket, settle) {
            Ok(settled) => settled,
            Err(error) => return Err(expected.failed(error)),
        };
        let (parked, result) = oneshot::channel();
        // It goes on when this future is dropped: a copy that is under way must be met where it arrives.
        self.spawn(async move {
            let settled = settled.await.unwrap_or_else(|_| Err(channel_ended()));
            let result = match settled {
                Ok(()) => expected.arrival().await,
                Err(error) => Err(expected.failed(error)),
            };
            // When nobody waits any more, the ticket in it is dropped, and so gives the electron back.
            drop(parked.send(result));
        });
        result.await.unwrap_or_else(|_| Err(channel_ended()))
    }

    async fn make_results(&self, id: &ResultsId) -> Result<ReplyTo, SendError> {
        self.declarer.make(self.topology.declare_results(&self.consuming, id)).await?;
        Ok(ReplyTo::new(self.topology.results_queue(id)))
    }

    async fn census(&self, atom: &AtomId) -> Result<Census, SessionError> {
        let queue = self.topology.atom_queue(atom);
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let ask = async |channel: &Channel| {
            channel.queue_declare(queue.as_str().into(), options, FieldTable::default()).await
        };
        let asking = async {
            Ok(match found(on_own_channel(&self.consuming, ask).await)? {
                Some(queue) => {
                    Census::new(queue.message_count().into(), queue.consumer_count().into())
                }
                None => Census::new(0, 0),
            })
        };
        self.life.bound(REQUEST_TIMEOUT, asking).await
    }

    fn is_blocked(&self) -> bool {
        self.life.is_blocked()
    }

    async fn ended(&self) -> SessionError {
        self.life.ended().await
    }

    async fn close(&self) {
        self.close_lease().await;
        self.life.end_with(SessionError::Closed);
        // Nobody reads it any more: this node is closing for good.
        self.options.inboxes.take_lost(&self.node);
        delete(&self.publishing, &self.topology.inbox_queue(&self.node)).await;
        for trial in self.options.inboxes.trials() {
            delete(&self.publishing, &trial).await;
        }
        for connection in [&self.consuming, &self.publishing] {
            close(connection).await;
        }
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}

impl fmt::Debug for RabbitSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { epoch, node, server, address, .. } = self;
        write!(f, "RabbitSession({epoch:?} of {node}, {server} at {address})")
    }
}
