//! The names and arguments of everything on the broker.

use std::{collections::BTreeMap, time::Duration};

use atomizer::{Address, AtomId, ConductorId, InvalidId, NodeId, SendError};
use lapin::{
    Channel, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};

/// How long an inbox outlives its node. In it lie the answers to a node that will not come back.
const INBOX_EXPIRES: Duration = Duration::from_secs(30 * 60);

/// The broker's own limit of deliveries, as a last guard only: far above anything the runtime allows.
/// Version 4 has 20 unless told otherwise, and drops what exceeds it.
const DELIVERY_LIMIT: i64 = 100_000;

/// The namespace, and what follows from it.
#[derive(Clone, Debug)]
pub(crate) struct Topology {
    namespace: String,
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
        Self { namespace: namespace.to_owned() }
    }

    pub(crate) fn try_new(namespace: &str) -> Result<Self, InvalidId> {
        // The same characters as in other names; shorter, so that whole queue names fit in 255 bytes.
        let short = if namespace.len() > Self::NAMESPACE_BYTES_MAX { "" } else { namespace };
        ConductorId::try_new(short).map(|_| Self::new(namespace))
    }

    pub(crate) fn atom_queue(&self, atom: &AtomId) -> String {
        format!("{}.{}", self.namespace, atom_key(atom))
    }

    pub(crate) fn inbox_queue(&self, node: &NodeId) -> String {
        format!("{}.inbox.{node}", self.namespace)
    }

    fn dead_queue(&self) -> String {
        format!("{}.{DEAD_KEY}", self.namespace)
    }

    pub(crate) fn route(&self, to: &Address) -> Result<Route, SendError> {
        let on_exchange = |key: String| Route { exchange: self.exchange(), key: key.into() };
        match to {
            Address::Atom(atom) => Ok(on_exchange(atom_key(atom))),
            Address::DeadLetter(_) => Ok(on_exchange(DEAD_KEY.to_owned())),
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

    /// Declares what every node needs: the exchange and the dead letters.
    pub(crate) async fn declare_base(&self, channel: &Channel) -> lapin::Result<()> {
        let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
        channel
            .exchange_declare(self.exchange(), ExchangeKind::Direct, options, FieldTable::default())
            .await?;
        self.declare_bound(channel, &self.dead_queue(), DEAD_KEY, quorum()).await
    }

    /// Declares the inbox of a node.
    pub(crate) async fn declare_inbox(
        &self,
        channel: &Channel,
        node: &NodeId,
    ) -> lapin::Result<()> {
        let mut inbox = quorum();
        let expires_ms = i64::try_from(INBOX_EXPIRES.as_millis()).unwrap_or(i64::MAX);
        inbox.insert("x-expires".into(), AMQPValue::LongLongInt(expires_ms));
        declare(channel, &self.inbox_queue(node), inbox).await
    }

    /// Declares the queue of one atom.
    pub(crate) async fn declare_atom(&self, channel: &Channel, atom: &AtomId) -> lapin::Result<()> {
        let mut arguments = quorum();
        let text = |text: &str| AMQPValue::LongString(text.into());
        arguments.insert("x-dead-letter-exchange".into(), text(&self.namespace));
        arguments.insert("x-dead-letter-routing-key".into(), text(DEAD_KEY));
        // Without these two the broker's dead-lettering may lose messages.
        arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
        arguments.insert("x-overflow".into(), text("reject-publish"));
        self.declare_bound(channel, &self.atom_queue(atom), &atom_key(atom), arguments).await
    }

    async fn declare_bound(
        &self,
        channel: &Channel,
        queue: &str,
        key: &str,
        arguments: BTreeMap<ShortString, AMQPValue>,
    ) -> lapin::Result<()> {
        declare(channel, queue, arguments).await?;
        let options = QueueBindOptions::default();
        channel
            .queue_bind(queue.into(), self.exchange(), key.into(), options, FieldTable::default())
            .await
    }
}

const DEAD_KEY: &str = "dead";

fn atom_key(atom: &AtomId) -> String {
    format!("atom.{atom}")
}

fn quorum() -> BTreeMap<ShortString, AMQPValue> {
    BTreeMap::from([
        ("x-queue-type".into(), AMQPValue::LongString("quorum".into())),
        ("x-delivery-limit".into(), AMQPValue::LongLongInt(DELIVERY_LIMIT)),
    ])
}

async fn declare(
    channel: &Channel,
    queue: &str,
    arguments: BTreeMap<ShortString, AMQPValue>,
) -> lapin::Result<()> {
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.into(), options, arguments.into()).await?;
    Ok(())
}
