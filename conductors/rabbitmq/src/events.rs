//! The events of all nodes: a topic exchange for whoever listens, and a stream that keeps them for a while.
//!
//! A [`Monitor`](atomizer::Monitor) reads the stream, whether from its beginning or from now on: so what was kept and what
//! comes is one, and a connection that is lost leaves no gap. Other programs may bind a queue of their own to the
//! exchange: the routing key says how severe and of which node (`docs/events.md`).

mod reader;
mod writer;

use std::{collections::BTreeMap, fmt, time::Duration};

use async_trait::async_trait;
use atomizer::{EventLog, EventReader, EventWriter, NodeId, OpenError, Position, SendError};
use futures::{FutureExt as _, future::BoxFuture};
use lapin::types::{AMQPValue, ShortString};
use tokio::time::{Instant, sleep};

use self::{reader::Reader, writer::Writer};
use crate::{
    connect::{Address, Addresses, Patience},
    declare::Declarer,
    opened::Opened,
    plan::{Kind, Object},
    topology::Topology,
};

/// How long it may take until a stream can be read from that nobody can read yet: it has just been made, or its brokers have
/// just been started.
const REPLICA_MAX: Duration = Duration::from_secs(10);
const REPLICA_PAUSE: Duration = Duration::from_millis(250);

/// How much is kept, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Retention {
    pub(crate) bytes_max: u64,
    pub(crate) age_max: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        Self { bytes_max: 1 << 30, age_max: Duration::from_secs(7 * 24 * 60 * 60) }
    }
}

impl Retention {
    /// The size of one file, in bytes: a stream lets go of whole files only.
    fn segment_bytes(self) -> u64 {
        const MIN: u64 = 1 << 20;
        const MAX: u64 = 64 << 20;
        (self.bytes_max / 16).clamp(MIN, MAX)
    }
}

/// The events of a namespace.
#[derive(Clone)]
pub(crate) struct RabbitLog {
    pub(crate) addresses: Addresses,
    pub(crate) topology: Topology,
}

impl RabbitLog {
    /// Makes sure of what is needed.
    async fn make(&self, opened: &Opened) -> Result<(), OpenError> {
        let declarer = Declarer {
            connection: opened.connection.clone(),
            life: opened.life.clone(),
            mode: self.topology.mode,
        };
        let objects = self.topology.of_events();
        let making = self.topology.make_sure(&opened.connection, &objects);
        match declarer.make(making).await {
            Ok(()) => Ok(()),
            Err(SendError::Refused(reason)) => Err(OpenError::Misconfigured(reason)),
            Err(error) => Err(unreachable(error)),
        }
    }

    /// Tries each address until one is of use to the end: a broker that has just joined, say, has no replica to read.
    async fn open<T>(
        &self,
        who: &NodeId,
        purpose: &str,
        begin: impl Fn(Opened) -> BoxFuture<'static, Result<T, OpenError>> + Sync,
    ) -> Result<T, OpenError> {
        let begin = &begin;
        let open = |address: Address, patience: Patience| async move {
            begin(Opened::connect(&address, who, purpose, patience.connect).await?).await
        };
        self.addresses.try_each(open).await
    }
}

#[async_trait]
impl EventLog for RabbitLog {
    async fn writer(&self, node: &NodeId) -> Result<Box<dyn EventWriter>, OpenError> {
        let begin = |opened| {
            let log = self.clone();
            async move {
                log.make(&opened).await?;
                Writer::open(opened, log.topology.events()).await
            }
            .boxed()
        };
        Ok(Box::new(self.open(node, "tells events", begin).await?))
    }

    async fn reader(&self, from: Position) -> Result<Box<dyn EventReader>, OpenError> {
        let monitor = NodeId::unique("monitor").expect("it is made of letters");
        let begin = |opened| Reader::open(opened, self.clone(), monitor.clone(), from).boxed();
        let begun = Instant::now();
        loop {
            match self.open(&monitor, "reads events", begin).await {
                Err(OpenError::Unreachable(reason))
                    if lacks_a_replica(&reason) && begun.elapsed() < REPLICA_MAX =>
                {
                    sleep(REPLICA_PAUSE).await;
                }
                opened => return Ok(Box::new(opened?)),
            }
        }
    }
}

impl fmt::Debug for RabbitLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RabbitLog({} at {})", self.topology.events(), self.addresses)
    }
}

impl Topology {
    /// The name of the exchange for events, and of the stream behind it.
    pub(crate) fn events(&self) -> String {
        self.name("events")
    }

    /// What is needed for events, where they are kept.
    pub(crate) fn of_events(&self) -> Vec<Object> {
        let events = self.events();
        self.events.map_or_else(Vec::new, |retention| {
            vec![
                Object::queue(&events, stream(retention)),
                Object::exchange(&events, Kind::Topic),
                Object::binding(&events, &events, "#"),
            ]
        })
    }
}

fn stream(retention: Retention) -> BTreeMap<ShortString, AMQPValue> {
    let bytes = |bytes: u64| AMQPValue::LongLongInt(i64::try_from(bytes).unwrap_or(i64::MAX));
    let text = |text: &str| AMQPValue::LongString(text.into());
    BTreeMap::from([
        ("x-queue-type".into(), text("stream")),
        ("x-max-length-bytes".into(), bytes(retention.bytes_max)),
        ("x-max-age".into(), text(&format!("{}s", retention.age_max.as_secs().max(1)))),
        ("x-stream-max-segment-size-bytes".into(), bytes(retention.segment_bytes())),
    ])
}

/// Whether a broker says that it has nothing of the stream to read from (406, without a code of its own), or has just lost
/// it (541).
fn lacks_a_replica(reason: &str) -> bool {
    ["replica on the local node", "INTERNAL_ERROR"].iter().any(|said| reason.contains(said))
}

/// What a failure to begin means: it is tried again.
fn unreachable(error: impl fmt::Display) -> OpenError {
    OpenError::Unreachable(error.to_string())
}
