//! What is needed on a broker, as data: what is declared, looked for, shown and compared are the same objects.

use std::{collections::BTreeMap, fmt};

use atomizer::{AtomId, ResultsId};
use lapin::{
    Channel, Connection, ExchangeKind,
    options::{ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    protocol::AMQPSoftError,
    types::{AMQPValue, FieldTable, ShortString},
};

use crate::{
    connect::plain,
    declare::{declare_queue, on_own_channel, refusal},
    topology::{self, Topology},
};

/// What a namespace needs on its broker for some atoms and result addresses, in the order in which it can be made.
///
/// What nodes make for themselves (inboxes, lease queues) is not in it, and what delays need only when it is
/// [asked for](Self::delays). `docs/topology.md` has the reasons.
#[derive(Clone, Debug)]
#[must_use]
pub struct Plan {
    topology: Topology,
    objects: Vec<Object>,
}

impl Plan {
    pub(crate) fn new(topology: &Topology, atoms: &[AtomId], results: &[ResultsId]) -> Self {
        let mut objects = topology.base();
        objects.extend(atoms.iter().flat_map(|atom| topology.of_atom(atom)));
        objects.extend(results.iter().flat_map(|id| topology.of_results(id)));
        objects.extend(topology.of_events());
        Self { topology: topology.clone(), objects }
    }

    /// Adds what delays need: those of electrons that are sent for later, and of policies that wait for more than 10 s.
    pub fn delays(mut self) -> Self {
        self.objects.extend(self.topology.ladder().flatten());
        self
    }

    /// Returns everything that is in it.
    #[must_use]
    pub fn objects(&self) -> &[Object] {
        &self.objects
    }
}

/// One thing on a broker; all are durable.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Object {
    /// An exchange.
    Exchange {
        /// Its name.
        name: String,
        /// How it routes.
        kind: Kind,
        /// What it is declared with.
        arguments: Arguments,
    },
    /// A queue.
    Queue {
        /// Its name.
        name: String,
        /// What it is declared with, its type among it.
        arguments: Arguments,
        /// Whether it does its work only as it is here: another's limits, say, would do no harm.
        exact: bool,
    },
    /// What leads messages from an exchange to a queue or to another exchange.
    Binding {
        /// The exchange that they come from.
        source: String,
        /// Where they go.
        destination: String,
        /// What that is.
        to: Destination,
        /// Their routing key, or the pattern of it.
        key: String,
    },
}

/// How an exchange routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// By the routing key as it is.
    Direct,
    /// By patterns of the routing key.
    Topic,
    /// To all.
    Fanout,
}

/// Where a binding leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Destination {
    /// To a queue.
    Queue,
    /// To an exchange.
    Exchange,
}

/// What an exchange or a queue is declared with, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Arguments(BTreeMap<ShortString, AMQPValue>);

/// The value of one argument.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Argument {
    /// A text.
    Text(String),
    /// A whole number.
    Number(i64),
}

impl Arguments {
    /// Returns each with its name, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Argument)> {
        self.0.iter().map(|(name, value)| {
            let value = match value {
                AMQPValue::LongString(text) => Argument::Text(text.to_string()),
                AMQPValue::LongLongInt(number) => Argument::Number(*number),
                other => Argument::Text(format!("{other:?}")),
            };
            (name.as_str(), value)
        })
    }

    fn table(&self) -> FieldTable {
        self.0.clone().into()
    }

    pub(crate) fn as_map(&self) -> &BTreeMap<ShortString, AMQPValue> {
        &self.0
    }
}

impl fmt::Display for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Number(number) => number.fmt(f),
        }
    }
}

impl Kind {
    /// Returns the broker's word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Topic => "topic",
            Self::Fanout => "fanout",
        }
    }
}

impl Destination {
    /// Returns the broker's word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Exchange => "exchange",
        }
    }
}

impl Object {
    pub(crate) fn exchange(name: &str, kind: Kind) -> Self {
        Self::Exchange { name: name.to_owned(), kind, arguments: Arguments::default() }
    }

    /// An exchange that leads what it has no way for to another.
    pub(crate) fn exchange_or_else(name: &str, kind: Kind, otherwise: &str) -> Self {
        let otherwise = AMQPValue::LongString(otherwise.into());
        let arguments = Arguments(BTreeMap::from([("alternate-exchange".into(), otherwise)]));
        Self::Exchange { name: name.to_owned(), kind, arguments }
    }

    pub(crate) fn queue(name: &str, arguments: BTreeMap<ShortString, AMQPValue>) -> Self {
        Self::Queue { name: name.to_owned(), arguments: Arguments(arguments), exact: false }
    }

    pub(crate) fn exact_queue(name: &str, arguments: BTreeMap<ShortString, AMQPValue>) -> Self {
        Self::Queue { name: name.to_owned(), arguments: Arguments(arguments), exact: true }
    }

    pub(crate) fn binding(source: &str, queue: &str, key: &str) -> Self {
        let (source, destination) = (source.to_owned(), queue.to_owned());
        Self::Binding { source, destination, to: Destination::Queue, key: key.to_owned() }
    }

    /// A binding from one exchange to another.
    pub(crate) fn passage(source: &str, exchange: &str, key: &str) -> Self {
        let (source, destination) = (source.to_owned(), exchange.to_owned());
        Self::Binding { source, destination, to: Destination::Exchange, key: key.to_owned() }
    }

    /// Makes it, or is refused where it is there and different.
    pub(crate) async fn put(&self, channel: &Channel) -> lapin::Result<()> {
        match self {
            Self::Exchange { name, kind, arguments } => {
                exchange(channel, name, *kind, false, arguments.table()).await
            }
            Self::Queue { name, arguments, .. } => {
                topology::declare(channel, name, arguments.0.clone()).await
            }
            Self::Binding { source, destination, to: Destination::Queue, key } => {
                bind_queue(channel, destination, source, key).await
            }
            Self::Binding { source, destination, to: Destination::Exchange, key } => {
                let (source, destination) = (source.as_str().into(), destination.as_str().into());
                let (options, none) = (ExchangeBindOptions::default(), FieldTable::default());
                channel.exchange_bind(destination, source, key.as_str().into(), options, none).await
            }
        }
    }

    /// Looks for an exchange or a queue; the error names one that is missing. A binding cannot be looked for.
    pub(crate) async fn look(&self, channel: &Channel) -> lapin::Result<()> {
        match self {
            Self::Exchange { name, kind, .. } => {
                exchange(channel, name, *kind, true, FieldTable::default()).await
            }
            Self::Queue { name, .. } => {
                let options = QueueDeclareOptions { passive: true, ..Default::default() };
                let none = FieldTable::default();
                channel.queue_declare(name.as_str().into(), options, none).await.map(drop)
            }
            Self::Binding { .. } => Ok(()),
        }
    }
}

/// Makes objects. A queue that is there with other arguments is used as it is when that is safe, and reported.
pub(crate) async fn make(connection: &Connection, objects: &[Object]) -> lapin::Result<()> {
    for object in objects {
        if let Object::Queue { name, arguments, exact: false } = object {
            declare_queue(connection, name, arguments.0.clone()).await?;
        }
    }
    let put = async |channel: &Channel| {
        for object in objects {
            if !matches!(object, Object::Queue { exact: false, .. }) {
                object.put(channel).await?;
            }
        }
        Ok(())
    };
    on_own_channel(connection, put).await
}

/// Looks for exchanges and queues; the error names the first that is missing.
///
/// From 4.2.6 on a broker lets nobody look at what he has no permission for. That says nothing of whether it is there, and
/// who needs none may do without: so it is left to those who may look.
pub(crate) async fn look(connection: &Connection, objects: &[Object]) -> lapin::Result<()> {
    let is_exchange = |object: &&Object| matches!(object, Object::Exchange { .. });
    let (exchanges, others): (Vec<_>, Vec<_>) = objects.iter().partition(is_exchange);
    for object in exchanges.into_iter().chain(others) {
        let look = async |channel: &Channel| object.look(channel).await;
        match on_own_channel(connection, look).await {
            Err(error) if refusal(&error) == Some(AMQPSoftError::ACCESSREFUSED) => {
                tracing::debug!(?object, reason = plain(&error), "not looked at; it may be there");
            }
            looked => looked?,
        }
    }
    Ok(())
}

async fn exchange(
    channel: &Channel,
    name: &str,
    kind: Kind,
    passive: bool,
    arguments: FieldTable,
) -> lapin::Result<()> {
    let kind = match kind {
        Kind::Direct => ExchangeKind::Direct,
        Kind::Topic => ExchangeKind::Topic,
        Kind::Fanout => ExchangeKind::Fanout,
    };
    let options = ExchangeDeclareOptions { durable: true, passive, ..Default::default() };
    channel.exchange_declare(name.into(), kind, options, arguments).await
}

/// Leads what an exchange takes under a key to a queue.
pub(crate) async fn bind_queue(
    channel: &Channel,
    queue: &str,
    exchange: &str,
    key: &str,
) -> lapin::Result<()> {
    let options = QueueBindOptions::default();
    channel
        .queue_bind(queue.into(), exchange.into(), key.into(), options, FieldTable::default())
        .await
}
