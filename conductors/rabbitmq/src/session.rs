//! One life of the connections to a broker.

use std::{
    collections::HashSet,
    fmt,
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use atomizer::{
    Address as To, AtomId, Census, Electron, Envelope, Epoch, Limits, Message, NodeId, OpenError,
    Outcome, ReplyTo, SendError, Session, SessionError, SettleError, Source, Subscription, Ticket,
};
use futures::future::join_all;
use lapin::{
    Channel, Connection, Consumer, ErrorKind,
    options::{BasicConsumeOptions, BasicQosOptions, ConfirmSelectOptions, QueueDeleteOptions},
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::FieldTable,
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};

use crate::{
    connect::{Address, Connected, plain},
    lane::{Command, LaneId, LaneSubscription, Lanes, Settler},
    life::{CLOSE_TIMEOUT, Life, REPLY_SUCCESS, close, watch_over},
    publisher::Publisher,
    topology::Topology,
};

/// How long the broker may take over one request that is no publish.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Two connections: a broker that is short of memory or disk stops reading from those that publish, and
/// acknowledgements must get through all the same.
pub(crate) struct RabbitSession {
    node: NodeId,
    topology: Topology,
    limits: Limits,
    epoch: Epoch,
    publishing: Arc<Connection>,
    consuming: Arc<Connection>,
    publisher: Publisher,
    lanes: Arc<Lanes>,
    life: Life,
    /// Atoms whose queue was declared through this session.
    declared: Mutex<HashSet<AtomId>>,
    tasks: Mutex<JoinSet<()>>,
}

impl RabbitSession {
    pub(crate) async fn open(
        address: &Address,
        topology: &Topology,
        limits: Limits,
        node: &NodeId,
    ) -> Result<Self, OpenError> {
        let publishing = address.connect(node, "publishes").await?;
        let consuming = address.connect(node, "consumes").await?;
        let setting_up = async {
            let channel = publishing.connection.create_channel().await?;
            topology.declare_base(&channel).await?;
            topology.declare_inbox(&channel, node).await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok(channel)
        };
        let channel = match timeout(REQUEST_TIMEOUT, setting_up).await {
            Ok(channel) => channel.map_err(|error| address.classify(&error))?,
            Err(_) => return Err(OpenError::Unreachable(format!("{address}: no answer in time"))),
        };
        let life = Life::new();
        let mut tasks = JoinSet::new();
        let (publisher, publish) = Publisher::new(channel, topology.clone(), limits, life.clone());
        tasks.spawn(publish);
        let mut watch = |Connected { connection, events }: Connected| {
            let connection = Arc::new(connection);
            tasks.spawn(watch_over(Arc::clone(&connection), events, life.clone()));
            connection
        };
        let (publishing, consuming) = (watch(publishing), watch(consuming));
        Ok(Self {
            node: node.clone(),
            topology: topology.clone(),
            limits,
            epoch: Epoch::unique(),
            publishing,
            consuming,
            publisher,
            lanes: Arc::default(),
            life,
            declared: Mutex::default(),
            tasks: Mutex::new(tasks),
        })
    }

    fn declared(&self) -> MutexGuard<'_, HashSet<AtomId>> {
        self.declared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that the queue of an atom is there. One that is there with other arguments is used as it is.
    ///
    /// Asked for on the consuming connection: the other one may be blocked.
    async fn declare_atom(&self, atom: &AtomId) -> Result<(), SendError> {
        let declaring = on_own_channel(&self.consuming, async |channel| {
            self.topology.declare_atom(channel, atom).await
        });
        let declared = match self.life.bound(REQUEST_TIMEOUT, async { Ok(declaring.await) }).await {
            Ok(declared) => declared,
            Err(error) => return Err(SendError::Unknown(error.to_string())),
        };
        if let Err(error) = declared {
            match refusal(&error) {
                Some(AMQPSoftError::PRECONDITIONFAILED) => {
                    tracing::warn!(%atom, reason = plain(&error), "a queue is used that is not as it should be");
                }
                Some(AMQPSoftError::ACCESSREFUSED) => {
                    return Err(SendError::Refused(plain(&error)));
                }
                _ => return Err(SendError::Unknown(plain(&error))),
            }
        }
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
                && let Err(error) = self.declare_atom(atom).await
            {
                refused.push((atom.clone(), error));
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
                self.declared().remove(atom);
                Err(SendError::NotTaken(format!("the queue of {queue} was deleted")))
            }
            (_, result) => result,
        }
    }

    async fn consume(
        &self,
        queue: &str,
        prefetch: u16,
    ) -> Result<(Channel, Consumer), SessionError> {
        let channel = self.life.bound(REQUEST_TIMEOUT, self.consuming.create_channel()).await?;
        let consuming = async {
            channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            let tag = self.node.as_str().into();
            channel.basic_consume(queue.into(), tag, options, FieldTable::default()).await
        };
        match self.life.bound(REQUEST_TIMEOUT, consuming).await {
            Ok(consumer) => Ok((channel, consumer)),
            Err(error) => {
                // A consumer that comes into being late must not hold what nobody will take from it.
                self.spawn(async move {
                    let closing = channel.close(REPLY_SUCCESS, "too late".into());
                    drop(timeout(REQUEST_TIMEOUT, closing).await);
                });
                Err(error)
            }
        }
    }

    /// Runs a task for as long as the session is there.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Hands a settlement to its lane; what comes back is where the result will be.
    fn settle_one(
        &self,
        ticket: Ticket,
        outcome: Outcome,
    ) -> Result<oneshot::Receiver<Result<(), SettleError>>, SettleError> {
        if ticket.epoch() != self.epoch {
            return Err(SettleError::Stale);
        }
        let (done, settled) = oneshot::channel();
        let emit = match outcome {
            Outcome::Done { emit, .. } => emit,
            Outcome::Take { .. } => Vec::new(),
            _ => {
                drop(ticket);
                drop(done.send(Ok(())));
                return Ok(settled);
            }
        };
        let (number, tag) = ticket.take();
        if self.lanes.command(number, Command::Settle { tag, emit, done }) {
            Ok(settled)
        } else {
            Err(SettleError::Stale)
        }
    }
}

/// The reply code, when a request was refused at the cost of its channel.
fn refusal(error: &lapin::Error) -> Option<AMQPSoftError> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(code) => Some(code.clone()),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

/// Runs a request on a channel of its own: one that is refused costs the channel (AMQP 0-9-1, 2.2.4).
async fn on_own_channel<T>(
    connection: &Connection,
    request: impl AsyncFnOnce(&Channel) -> lapin::Result<T>,
) -> lapin::Result<T> {
    let channel = connection.create_channel().await?;
    let result = request(&channel).await?;
    channel.close(REPLY_SUCCESS, "done".into()).await?;
    Ok(result)
}

#[async_trait]
impl Session for RabbitSession {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn reply_to(&self) -> ReplyTo {
        ReplyTo::new(self.topology.inbox_queue(&self.node))
    }

    async fn subscribe(
        &self,
        source: Source,
        window: NonZeroUsize,
    ) -> Result<Box<dyn Subscription>, SessionError> {
        let (queue, atom) = match source {
            Source::Atom(atom) => {
                self.declare_atom(&atom).await.map_err(SessionError::lost)?;
                (self.topology.atom_queue(&atom), Some(atom))
            }
            Source::Inbox => {
                // It may have been deleted, or have expired, since the session began.
                let declare = async |channel: &Channel| {
                    self.topology.declare_inbox(channel, &self.node).await
                };
                let declaring = on_own_channel(&self.consuming, declare);
                self.life.bound(REQUEST_TIMEOUT, declaring).await?;
                (self.topology.inbox_queue(&self.node), None)
            }
            other => return Err(SessionError::lost(format!("{other:?} is not supported"))),
        };
        let prefetch = u16::try_from(window.get()).unwrap_or(u16::MAX);
        let (channel, consumer) = self.consume(&queue, prefetch).await?;
        #[expect(clippy::disallowed_methods, reason = "bounded by the deliveries that are out")]
        let (command, commands) = mpsc::unbounded_channel();
        let number = self.lanes.add(command);
        let id = LaneId { epoch: self.epoch, number, lanes: Arc::clone(&self.lanes) };
        let (alive, settler_gone) = oneshot::channel();
        self.spawn(
            Settler {
                id: id.clone(),
                channel: channel.clone(),
                publisher: self.publisher.clone(),
                life: self.life.clone(),
                _alive: alive,
                commands,
            }
            .run(),
        );
        let life = self.life.clone();
        Ok(Box::new(LaneSubscription {
            id,
            channel,
            consumer,
            atom,
            life,
            settler_gone,
            ended: None,
        }))
    }

    async fn send(&self, envelopes: &[Envelope]) -> Vec<Result<(), SendError>> {
        let refused = self.declare_all(envelopes).await;
        let why_not = |envelope: &Envelope| match &envelope.to {
            To::Atom(atom) => {
                refused.iter().find(|(id, _)| id == atom).map(|(_, error)| error.clone())
            }
            _ => None,
        };
        let sendable: Vec<_> =
            envelopes.iter().filter(|envelope| why_not(envelope).is_none()).cloned().collect();
        let mut sent = self.publisher.publish(&sendable).await.into_iter();
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
        join_all(handed_over.into_iter().map(async |settled| {
            settled?.await.unwrap_or_else(|_| {
                Err(SettleError::Unknown(SessionError::lost("the channel ended")))
            })
        }))
        .await
    }

    async fn park(&self, ticket: Ticket, changed: Arc<Electron>) -> Result<Ticket, SettleError> {
        let failed = SendError::Refused("parking is not there yet".to_owned());
        let to = To::Atom(changed.atom.clone());
        let envelope = Envelope::new(to, Message::Electron(changed));
        Err(SettleError::NotSafe { ticket, failed: vec![(envelope, failed)] })
    }

    async fn census(&self, _atom: &AtomId) -> Result<Census, SessionError> {
        Err(SessionError::lost("a census is not there yet"))
    }

    async fn ended(&self) -> SessionError {
        self.life.ended().await
    }

    async fn close(&self) {
        self.life.end_with(SessionError::Closed);
        // Nobody reads it any more: this node is closing for good.
        let delete = async |channel: &Channel| {
            let inbox = self.topology.inbox_queue(&self.node);
            channel.queue_delete(inbox.as_str().into(), QueueDeleteOptions::default()).await
        };
        let deleted = timeout(CLOSE_TIMEOUT, on_own_channel(&self.publishing, delete)).await;
        if !matches!(deleted, Ok(Ok(_))) {
            tracing::debug!("the inbox was not deleted; it expires by itself");
        }
        for connection in [&self.consuming, &self.publishing] {
            close(connection).await;
        }
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}

impl fmt::Debug for RabbitSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RabbitSession({:?} of {})", self.epoch, self.node)
    }
}
