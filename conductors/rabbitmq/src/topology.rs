//! The names and arguments of everything on the broker.
//!
//! `docs/topology.md` lists them, with the reason of each argument.
//!
//! A lease queue takes what is published to its exchange under the routing key of the atom, and leads what is
//! not held for 5 s back to the exchange for electrons, under that same key.

use std::{collections::BTreeMap, time::Duration};

use atomizer::{Address, AtomId, ConductorId, Epoch, InvalidId, NodeId, ResultsId, SendError};
use lapin::{
    Channel, Connection, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};

use crate::{
    declare::{declare_queue, found, look, on_own_channel},
    delay::{bind_queue, exchange},
};

/// How long an inbox outlives its node. In it lie the answers to a node that will not come back.
const INBOX_EXPIRES: Duration = Duration::from_secs(30 * 60);

/// How long a parked electron waits in its lease queue when its session is gone, or has yet to receive it.
/// While the session holds it, it does not run out.
const LEASE_TTL: Duration = Duration::from_secs(5);
/// How long a lease queue outlives its session. An expiring queue loses what it holds: by then all of it must
/// have gone back, to queues that may have been out of reach for a while.
const LEASE_EXPIRES: Duration = Duration::from_secs(2 * 60 * 60);
/// How long a parked electron may be held, where brokers let a queue say (from 3.12 on): as long as 32 bits
/// of milliseconds can tell.
const LEASE_HELD_MAX: Duration = Duration::from_millis(i32::MAX as u64);

/// The broker's own limit of deliveries, as a last guard only: far above anything the runtime allows.
/// Version 4 has 20 unless told otherwise, and drops what exceeds it.
const DELIVERY_LIMIT: i64 = 100_000;

/// Who makes the exchanges and queues of a namespace.
///
/// A node makes its inbox and its lease queues itself in any case: their names are its own. `docs/topology.md` lists
/// all objects, and the permissions that each mode needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum TopologyMode {
    /// Whoever needs one makes it. One that is there with other arguments is used when that is safe, and reported.
    #[default]
    Declare,
    /// They are there: a session looks for each that it needs, and names one that is missing. Bindings and
    /// arguments cannot be looked at.
    Passive,
    /// They are there, and nobody looks.
    None,
}

/// The namespace, and what follows from it.
#[derive(Clone, Debug)]
pub(crate) struct Topology {
    namespace: String,
    pub(crate) mode: TopologyMode,
}

/// Where to publish.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) exchange: ShortString,
    pub(crate) key: ShortString,
}

impl Topology {
    const NAMESPACE_BYTES_MAX: usize = 64;

    pub(crate) fn new(namespace: &str) -> Self {
        Self { namespace: namespace.to_owned(), mode: TopologyMode::default() }
    }

    pub(crate) fn try_new(namespace: &str) -> Result<Self, InvalidId> {
        // The same characters as in other names; shorter, so that whole queue names fit in 255 bytes.
        let short = if namespace.len() > Self::NAMESPACE_BYTES_MAX { "" } else { namespace };
        ConductorId::try_new(short).map(|_| Self::new(namespace))
    }

    pub(crate) fn atom_queue(&self, atom: &AtomId) -> String {
        format!("{}.{}", self.namespace, atom_key(atom))
    }

    /// The atom whose queue this is, if it is one.
    pub(crate) fn atom_of(&self, queue: &str) -> Option<AtomId> {
        let atom = queue.strip_prefix(&self.namespace)?.strip_prefix(".atom.")?;
        AtomId::try_new(atom).ok()
    }

    pub(crate) fn inbox_queue(&self, node: &NodeId) -> String {
        format!("{}.inbox.{node}", self.namespace)
    }

    pub(crate) fn results_queue(&self, id: &ResultsId) -> String {
        format!("{}.results.{id}", self.namespace)
    }

    /// The name of a queue that is like an inbox: of one session, which tries with it whether another inbox would do.
    pub(crate) fn trial_queue(&self, node: &NodeId, epoch: Epoch) -> String {
        format!("{}.{epoch:?}", self.inbox_queue(node))
    }

    /// The name of the lease queue of one session, and of the exchange before it.
    ///
    /// Of a session and not of a node: the broker may take a while to see that an earlier session of the node
    /// is gone, and would go on to deliver to it what this one parks.
    pub(crate) fn lease_queue(&self, node: &NodeId, epoch: Epoch) -> String {
        format!("{}.lease.{node}.{epoch:?}", self.namespace)
    }

    pub(crate) fn dead_queue(&self) -> String {
        self.name(DEAD_KEY)
    }

    /// The name of something of the whole namespace.
    pub(crate) fn name(&self, what: &str) -> String {
        format!("{}.{what}", self.namespace)
    }

    pub(crate) fn route(&self, to: &Address) -> Result<Route, SendError> {
        let on_exchange = |key: String| Route { exchange: self.exchange(), key: key.into() };
        match to {
            Address::Atom(atom) => Ok(on_exchange(atom_key(atom))),
            Address::DeadLetter(_) => Ok(on_exchange(DEAD_KEY.to_owned())),
            Address::Nodes => Ok(on_exchange(NODES_KEY.to_owned())),
            // The default exchange routes to any queue by its name: `reply_to` means the same to every
            // AMQP client.
            Address::Reply(reply_to) => match ShortString::try_new(reply_to.as_str()) {
                Ok(key) => Ok(Route { exchange: ShortString::default(), key }),
                Err(_) => Err(SendError::Unroutable(to.to_string())),
            },
            _ => Err(SendError::Unroutable(to.to_string())),
        }
    }

    fn exchange(&self) -> ShortString {
        self.namespace.as_str().into()
    }

    /// Makes sure of what every node needs: the exchange, the dead letters, and where delays come out.
    pub(crate) async fn declare_base(&self, connection: &Connection) -> lapin::Result<()> {
        let dead = self.dead_queue();
        match self.mode {
            TopologyMode::None => Ok(()),
            TopologyMode::Passive => {
                let (lost, due) = (self.lost(), self.due());
                let exchanges = [self.namespace.as_str(), &lost, &due];
                let look = async |channel: &Channel| look(channel, &exchanges, &[&dead]).await;
                on_own_channel(connection, look).await
            }
            TopologyMode::Declare => {
                declare_queue(connection, &dead, quorum()).await?;
                let declare = async |channel: &Channel| {
                    let direct = ExchangeKind::Direct;
                    exchange(channel, &self.namespace, direct, FieldTable::default()).await?;
                    bind_queue(channel, &dead, &self.namespace, DEAD_KEY).await?;
                    self.declare_due(channel).await
                };
                on_own_channel(connection, declare).await
            }
        }
    }

    /// Looks whether a node has an inbox.
    pub(crate) async fn is_inbox_there(
        &self,
        connection: &Connection,
        node: &NodeId,
    ) -> lapin::Result<bool> {
        let inbox = self.inbox_queue(node);
        let look = async |channel: &Channel| {
            let options = QueueDeclareOptions { passive: true, ..Default::default() };
            channel.queue_declare(inbox.as_str().into(), options, FieldTable::default()).await
        };
        Ok(found(on_own_channel(connection, look).await)?.is_some())
    }

    /// Declares the inbox of a node, or a queue that is like it.
    pub(crate) async fn declare_inbox(
        &self,
        connection: &Connection,
        name: &str,
    ) -> lapin::Result<()> {
        let mut inbox = quorum();
        inbox.insert("x-expires".into(), milliseconds(INBOX_EXPIRES));
        declare_queue(connection, name, inbox).await
    }

    /// Leads what is for all nodes to the inbox of one.
    pub(crate) async fn bind_inbox(
        &self,
        connection: &Connection,
        node: &NodeId,
    ) -> lapin::Result<()> {
        let inbox = self.inbox_queue(node);
        let bind =
            async |channel: &Channel| bind_queue(channel, &inbox, &self.namespace, NODES_KEY).await;
        on_own_channel(connection, bind).await
    }

    /// Makes sure of a result address. It is read by its name, so it is bound to nothing.
    pub(crate) async fn declare_results(
        &self,
        connection: &Connection,
        id: &ResultsId,
    ) -> lapin::Result<()> {
        let queue = self.results_queue(id);
        match self.mode {
            TopologyMode::None => Ok(()),
            TopologyMode::Passive => {
                let look = async |channel: &Channel| look(channel, &[], &[&queue]).await;
                on_own_channel(connection, look).await
            }
            TopologyMode::Declare => {
                let arguments = dead_lettering(&self.namespace, Some(DEAD_KEY));
                declare_queue(connection, &queue, arguments).await
            }
        }
    }

    /// Declares a lease queue and the exchange before it.
    ///
    /// The exchange brings everything to the queue, whatever its routing key. So the key can be that of the
    /// atom, and the broker keeps it when it gives back what has waited too long: one lease queue serves all
    /// atoms. The exchange goes with the queue.
    pub(crate) async fn declare_lease(&self, channel: &Channel, name: &str) -> lapin::Result<()> {
        let options =
            ExchangeDeclareOptions { durable: true, auto_delete: true, ..Default::default() };
        channel
            .exchange_declare(name.into(), ExchangeKind::Fanout, options, FieldTable::default())
            .await?;
        let mut lease = dead_lettering(&self.namespace, None);
        lease.insert("x-message-ttl".into(), milliseconds(LEASE_TTL));
        lease.insert("x-expires".into(), milliseconds(LEASE_EXPIRES));
        lease.insert("x-consumer-timeout".into(), milliseconds(LEASE_HELD_MAX));
        declare(channel, name, lease).await?;
        bind_queue(channel, name, name, "").await
    }

    /// Makes sure of the queue of one atom.
    pub(crate) async fn declare_atom(
        &self,
        connection: &Connection,
        atom: &AtomId,
    ) -> lapin::Result<()> {
        let queue = self.atom_queue(atom);
        match self.mode {
            TopologyMode::None => Ok(()),
            TopologyMode::Passive => {
                let look = async |channel: &Channel| look(channel, &[], &[&queue]).await;
                on_own_channel(connection, look).await
            }
            TopologyMode::Declare => {
                let arguments = dead_lettering(&self.namespace, Some(DEAD_KEY));
                declare_queue(connection, &queue, arguments).await?;
                let bind = async |channel: &Channel| {
                    bind_queue(channel, &queue, &self.namespace, &atom_key(atom)).await?;
                    self.bind_due(channel, atom).await
                };
                on_own_channel(connection, bind).await
            }
        }
    }
}

pub(crate) const DEAD_KEY: &str = "dead";
const NODES_KEY: &str = "nodes";

pub(crate) fn atom_key(atom: &AtomId) -> String {
    format!("atom.{atom}")
}

pub(crate) fn milliseconds(duration: Duration) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

fn quorum() -> BTreeMap<ShortString, AMQPValue> {
    BTreeMap::from([
        ("x-queue-type".into(), AMQPValue::LongString("quorum".into())),
        ("x-delivery-limit".into(), AMQPValue::LongLongInt(DELIVERY_LIMIT)),
    ])
}

/// A quorum queue that leads what it drops to an exchange: with this key, or each message with its own.
pub(crate) fn dead_lettering(
    exchange: &str,
    key: Option<&str>,
) -> BTreeMap<ShortString, AMQPValue> {
    let mut arguments = quorum();
    let text = |text: &str| AMQPValue::LongString(text.into());
    arguments.insert("x-dead-letter-exchange".into(), text(exchange));
    if let Some(key) = key {
        arguments.insert("x-dead-letter-routing-key".into(), text(key));
    }
    // Without these two the broker's dead-lettering may lose messages.
    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    arguments
}

pub(crate) async fn declare(
    channel: &Channel,
    queue: &str,
    arguments: BTreeMap<ShortString, AMQPValue>,
) -> lapin::Result<()> {
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.into(), options, arguments.into()).await?;
    Ok(())
}
