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
    declare::{declare_queue, found, on_own_channel},
    events::Retention,
    plan::{self, Kind, Object, bind_queue},
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
    /// None where events are not kept.
    pub(crate) events: Option<Retention>,
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
        Self {
            namespace: namespace.to_owned(),
            mode: TopologyMode::default(),
            events: Some(Retention::default()),
        }
    }

    /// The same of another namespace.
    pub(crate) fn renamed(self, namespace: &str) -> Result<Self, InvalidId> {
        // The same characters as in other names; shorter, so that whole queue names fit in 255 bytes.
        let short = if namespace.len() > Self::NAMESPACE_BYTES_MAX { "" } else { namespace };
        ConductorId::try_new(short).map(|_| Self { namespace: namespace.to_owned(), ..self })
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
        self.make_sure(connection, &self.base()).await
    }

    /// What every node needs.
    pub(crate) fn base(&self) -> Vec<Object> {
        let dead = self.dead_queue();
        let mut base = vec![
            Object::queue(&dead, quorum()),
            Object::exchange(&self.namespace, Kind::Direct),
            Object::binding(&self.namespace, &dead, DEAD_KEY),
        ];
        base.extend(self.where_delays_end());
        base
    }

    /// Makes objects, or looks for them, as the mode has it.
    pub(crate) async fn make_sure(
        &self,
        connection: &Connection,
        objects: &[Object],
    ) -> lapin::Result<()> {
        match self.mode {
            TopologyMode::None => Ok(()),
            TopologyMode::Passive => plan::look(connection, objects).await,
            TopologyMode::Declare => plan::make(connection, objects).await,
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
        declare_queue(connection, name, inbox(INBOX_EXPIRES)).await
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
        self.make_sure(connection, &self.of_results(id)).await
    }

    /// What a result address needs.
    pub(crate) fn of_results(&self, id: &ResultsId) -> Vec<Object> {
        let arguments = dead_lettering(&self.namespace, Some(DEAD_KEY));
        vec![Object::queue(&self.results_queue(id), arguments)]
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
        self.make_sure(connection, &self.of_atom(atom)).await
    }

    /// What an atom needs.
    pub(crate) fn of_atom(&self, atom: &AtomId) -> Vec<Object> {
        let queue = self.atom_queue(atom);
        vec![
            Object::queue(&queue, dead_lettering(&self.namespace, Some(DEAD_KEY))),
            Object::binding(&self.namespace, &queue, &atom_key(atom)),
            self.when_due(atom),
        ]
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

/// A quorum queue that goes by itself when nobody has used it for so long.
pub(crate) fn inbox(expires: Duration) -> BTreeMap<ShortString, AMQPValue> {
    let mut inbox = quorum();
    inbox.insert("x-expires".into(), milliseconds(expires));
    inbox
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
