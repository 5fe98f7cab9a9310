//! What operators ask of a broker: what waits, what is there, what may be done.
//!
//! Nothing here makes anything that stays, but [`Operator::apply`].

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use atomizer::{AtomId, Census, NodeId, OpenError};
use futures::{StreamExt, future::join_all};
use lapin::{
    BasicProperties, Channel, Connection,
    options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions, QueueDeleteOptions},
    protocol::AMQPSoftError,
    types::{AMQPValue, FieldTable},
};
use tokio::time::{Instant, timeout};

use crate::{
    connect::{Address, Addresses, plain},
    declare::{differences, on_own_channel, refusal},
    life::REQUEST_TIMEOUT,
    opened::Opened,
    plan::{self, Object, Plan},
    topology::{self, Topology, milliseconds},
};

/// How long connecting to one address may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long what a killed process leaves of a trial may lie there.
const TRIAL_EXPIRES: Duration = Duration::from_secs(60);
/// How long a plan may take to be made: it is some hundred requests.
const APPLY_TIMEOUT: Duration = Duration::from_secs(120);

/// Looks at a broker, and makes what a namespace needs there.
///
/// It is a cheap handle: each operation opens a connection of its own, and closes it when it ends.
#[derive(Clone)]
pub struct Operator {
    addresses: Addresses,
    topology: Topology,
    operator: NodeId,
}

impl Operator {
    pub(crate) fn new(addresses: &Addresses, topology: &Topology) -> Self {
        let operator = NodeId::unique("operator").expect("it is made of letters");
        Self { addresses: addresses.clone(), topology: topology.clone(), operator }
    }

    /// Counts what waits in the queues of atoms, and who takes from them.
    ///
    /// # Errors
    /// [`OperatorError`] when the broker is not reached, or lost.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn census(&self, atoms: &[AtomId]) -> Result<Vec<Counted>, OperatorError> {
        let opened = self.open("counts").await?;
        let mut counted = Vec::with_capacity(atoms.len());
        for atom in atoms {
            let queue = self.topology.atom_queue(atom);
            let options = QueueDeclareOptions { passive: true, ..Default::default() };
            let ask = async |channel: &Channel| {
                channel.queue_declare(queue.as_str().into(), options, FieldTable::default()).await
            };
            let asking = async { Ok(on_own_channel(&opened.connection, ask).await) };
            counted.push(match bound(&opened, REQUEST_TIMEOUT, asking).await? {
                Ok(queue) => {
                    let (ready, subscribers) = (queue.message_count(), queue.consumer_count());
                    Counted::Queue(Census::new(ready.into(), subscribers.into()))
                }
                Err(error) => match refusal(&error) {
                    Some(AMQPSoftError::NOTFOUND) => Counted::NoQueue,
                    Some(AMQPSoftError::ACCESSREFUSED) => Counted::NotPermitted,
                    _ => return Err(judge(&error)),
                },
            });
        }
        opened.close().await;
        Ok(counted)
    }

    /// Compares what is there with a plan, object by object. Nothing is made or changed.
    ///
    /// Only who may declare an object learns whether its arguments are those of the plan; for others it is
    /// [`Found::There`]. Nobody can ask for bindings over AMQP 0-9-1: they are [`Found::Unknown`].
    ///
    /// # Errors
    /// [`OperatorError`] when the broker is not reached, or lost.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn check(&self, plan: &Plan) -> Result<Vec<(Object, Found)>, OperatorError> {
        let opened = self.open("compares").await?;
        let mut checked = Vec::with_capacity(plan.objects().len());
        for object in plan.objects() {
            let asking = async { Ok(compare(&opened.connection, object).await) };
            let found = bound(&opened, REQUEST_TIMEOUT, asking).await?;
            checked.push((object.clone(), found.map_err(|error| judge(&error))?));
        }
        opened.close().await;
        Ok(checked)
    }

    /// Makes everything in a plan that is not there. What is there with other arguments is used as it is when that is
    /// safe, and reported in the log.
    ///
    /// # Errors
    /// [`OperatorError::Refused`] when something may not be made, or is there and of no use as it is. What stands before
    /// it in the plan may have been made by then; calling again goes on.
    ///
    /// # Cancel safety
    /// Some may have been made.
    pub async fn apply(&self, plan: &Plan) -> Result<(), OperatorError> {
        let opened = self.open("declares").await?;
        let made = plan::make(&opened.connection, plan.objects());
        let made = bound(&opened, APPLY_TIMEOUT, made).await;
        opened.close().await;
        made
    }

    /// Connects to each address, all at once, and closes the connections again.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn probe(&self) -> Vec<Probe> {
        let probes = self.addresses.all().iter().map(|address| self.probe_one(address));
        join_all(probes).await
    }

    async fn probe_one(&self, address: &Address) -> Probe {
        let begun = Instant::now();
        let opened = Opened::connect(address, &self.operator, "looks", CONNECT_TIMEOUT).await;
        let took = begun.elapsed();
        let outcome = match opened {
            Ok(opened) => {
                let agreed = opened.connection.configuration();
                let heartbeat = agreed.heartbeat();
                let reached = Reached {
                    server: opened.server.to_string(),
                    version: opened.server.rabbitmq(),
                    heartbeat: Duration::from_secs(heartbeat.into()),
                    encrypted: address.tls.is_some(),
                };
                opened.close().await;
                Ok(reached)
            }
            Err(error) => Err(error),
        };
        Probe { address: address.to_string(), took, outcome }
    }

    /// Makes a queue as nodes make their inboxes, and removes it again.
    ///
    /// # Errors
    /// [`OperatorError::Refused`] when it may not be made.
    ///
    /// # Cancel safety
    /// What was made goes by itself within a minute.
    pub async fn try_declaring(&self) -> Result<(), OperatorError> {
        let opened = self.open("tries").await?;
        let queue = self.topology.inbox_queue(&self.operator);
        let trying = async |channel: &Channel| {
            let arguments = topology::inbox(TRIAL_EXPIRES);
            topology::declare(channel, &queue, arguments).await?;
            channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await
        };
        let trying = on_own_channel(&opened.connection, trying);
        let tried = bound(&opened, REQUEST_TIMEOUT, trying).await;
        opened.close().await;
        tried.map(drop)
    }

    /// Asks what time it is on the broker, in whole seconds: by two queues of this connection, from one of which a
    /// message expires into the other, with the time on it.
    ///
    /// # Errors
    /// [`OperatorError::Refused`] to those who may not make queues or not publish to the default exchange.
    ///
    /// # Cancel safety
    /// Safe: the queues go with the connection.
    pub async fn clock(&self) -> Result<SystemTime, OperatorError> {
        let opened = self.open("asks for the time").await?;
        let queue = self.topology.inbox_queue(&self.operator);
        let asking = on_own_channel(&opened.connection, async |channel: &Channel| {
            time_on(channel, &format!("{queue}.before"), &format!("{queue}.after")).await
        });
        let asked = bound(&opened, REQUEST_TIMEOUT, asking).await;
        opened.close().await;
        asked?.ok_or_else(|| OperatorError::Lost("the broker does not tell the time".to_owned()))
    }

    async fn open(&self, role: &str) -> Result<Opened, OperatorError> {
        let opened = Opened::open(&self.addresses, &self.operator, role).await;
        opened.map_err(OperatorError::Open)
    }
}

impl fmt::Debug for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Operator({})", self.addresses)
    }
}

/// What came of connecting to one address.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Probe {
    /// The address, without user and password.
    pub address: String,
    /// How long it took, the login included.
    pub took: Duration,
    /// Who is there, or why it is of no use.
    pub outcome: Result<Reached, OpenError>,
}

/// A broker that can be used.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Reached {
    /// Its product and version, in its own words.
    pub server: String,
    /// Major and minor version, where it is RabbitMQ.
    pub version: Option<(u32, u32)>,
    /// How often each side says that it is alive; zero is never.
    pub heartbeat: Duration,
    /// Whether the connection is encrypted.
    pub encrypted: bool,
}

/// What is known of the queue of an atom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Counted {
    /// There is one.
    Queue(Census),
    /// There is none.
    NoQueue,
    /// This user may not look: from RabbitMQ 4.2.6 on that takes some permission for the queue.
    NotPermitted,
}

/// What is there of one object of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Found {
    /// It is as planned.
    AsPlanned,
    /// It is there; whether it is as planned may not be asked.
    There,
    /// It is not there.
    Missing,
    /// It is there and not as planned, which does no harm.
    Differs(Vec<String>),
    /// It is there and of no use as it is; in the broker's words.
    Unsafe(String),
    /// Nobody can tell.
    Unknown,
}

/// Why a broker could not be looked at, or changed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperatorError {
    /// It was not reached.
    #[error(transparent)]
    Open(OpenError),
    /// It declined.
    #[error("refused: {0}")]
    Refused(String),
    /// It was lost meanwhile, or did not answer.
    #[error("lost: {0}")]
    Lost(String),
}

/// Awaits something of the broker, but not for ever.
async fn bound<T>(
    opened: &Opened,
    limit: Duration,
    asking: impl Future<Output = lapin::Result<T>>,
) -> Result<T, OperatorError> {
    let asked = opened.life.bound(limit, async { Ok(asking.await) }).await;
    let answer = asked.map_err(|error| OperatorError::Lost(error.to_string()))?;
    answer.map_err(|error| judge(&error))
}

fn judge(error: &lapin::Error) -> OperatorError {
    match refusal(error) {
        Some(_) => OperatorError::Refused(plain(error)),
        None => OperatorError::Lost(plain(error)),
    }
}

async fn compare(connection: &Connection, object: &Object) -> lapin::Result<Found> {
    if matches!(object, Object::Binding { .. }) {
        return Ok(Found::Unknown);
    }
    let look = async |channel: &Channel| object.look(channel).await;
    match on_own_channel(connection, look).await {
        Ok(()) => {}
        Err(error) => match refusal(&error) {
            Some(AMQPSoftError::NOTFOUND) => return Ok(Found::Missing),
            // Not even this may be asked.
            Some(AMQPSoftError::ACCESSREFUSED) => return Ok(Found::Unknown),
            _ => return Err(error),
        },
    }
    // To declare what is there changes nothing, and is refused where it is different.
    let compared = match object {
        Object::Queue { name, arguments, exact: false } => {
            differences(connection, name, arguments.as_map().clone()).await
        }
        _ => {
            let put = async |channel: &Channel| object.put(channel).await;
            on_own_channel(connection, put).await.map(|()| Vec::new())
        }
    };
    match compared {
        Ok(differences) if differences.is_empty() => Ok(Found::AsPlanned),
        Ok(differences) => Ok(Found::Differs(differences)),
        Err(error) => match refusal(&error) {
            Some(AMQPSoftError::PRECONDITIONFAILED) => Ok(Found::Unsafe(plain(&error))),
            Some(AMQPSoftError::ACCESSREFUSED) => Ok(Found::There),
            _ => Err(error),
        },
    }
}

/// Has a message expire from one queue into another, and reads when that was.
async fn time_on(
    channel: &Channel,
    before: &str,
    after: &str,
) -> lapin::Result<Option<SystemTime>> {
    let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
    channel.queue_declare(after.into(), options, FieldTable::default()).await?;
    let mut expiring = FieldTable::default();
    expiring.insert("x-message-ttl".into(), milliseconds(Duration::from_millis(1)));
    expiring.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("".into()));
    expiring.insert("x-dead-letter-routing-key".into(), AMQPValue::LongString(after.into()));
    channel.queue_declare(before.into(), options, expiring).await?;
    let (consume, none) = (BasicConsumeOptions::default(), FieldTable::default());
    let mut arrived = channel.basic_consume(after.into(), "clock".into(), consume, none).await?;
    let (publish, properties) = (BasicPublishOptions::default(), BasicProperties::default());
    drop(channel.basic_publish("".into(), before.into(), publish, b"", properties).await?.await?);
    let Ok(Some(arrived)) = timeout(REQUEST_TIMEOUT / 2, arrived.next()).await else {
        return Ok(None);
    };
    let arrived = arrived?;
    let headers = arrived.properties.headers().as_ref();
    let deaths = headers.and_then(|headers| headers.inner().get("x-death"));
    let Some(AMQPValue::FieldArray(deaths)) = deaths else { return Ok(None) };
    Ok(deaths.as_slice().iter().find_map(|death| match death {
        AMQPValue::FieldTable(death) => match death.inner().get("time") {
            Some(AMQPValue::Timestamp(seconds)) => {
                SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(*seconds))
            }
            _ => None,
        },
        _ => None,
    }))
}
