//! Carries Atomizer's electrons over RabbitMQ.
//!
//! One quorum queue per atom, publisher confirms on everything, persistent and `mandatory` messages, and an
//! electron is acknowledged only after its answer is confirmed.
//!
//! ```no_run
//! # use atomizer::prelude::*;
//! use atomizer_rabbitmq::RabbitMq;
//!
//! # async fn start() -> Result<(), Box<dyn std::error::Error>> {
//! let atomizer = Atomizer::builder()
//!     .conductor(RabbitMq::from_url("amqp://guest:guest@localhost:5672/")?)
//!     .start()
//!     .await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What it makes on the broker
//!
//! Everything is named after the [namespace](RabbitMq::namespace), `atomizer` by default:
//!
//! - the exchange `<namespace>`, to which all electrons are published;
//! - `<namespace>.atom.<atom id>`, the queue of one atom;
//! - `<namespace>.dead`, the dead letters;
//! - `<namespace>.inbox.<node id>`, where a node is answered; it expires 30 min after the node;
//! - `<namespace>.results.<name>`, a result address;
//! - `<namespace>.lease.<node id>.<session>`, what one session has parked; given back within 5 s of its end;
//! - `<namespace>.events`, an exchange and a stream: what happens on all nodes, for 7 days or 1 GiB;
//! - `<namespace>.delay.5` to `.31`, `.due` and `.lost`, where delays are waited out.
//!
//! All queues but that stream are quorum queues. `docs/topology.md` has every object with its arguments and their reasons, and the least
//! permissions of who sends, who works and who operates. [`RabbitMq::topology`] says who makes them.
//!
//! What is parked is published to its lease queue again before the broker loses its patience with what is held
//! ([`RabbitMq::hold_max`]). What was parked carries `atomizer/parked` in the property `app_id`, by which it is known
//! as delivered before; any other message has the node there that it is from.
//!
//! Any AMQP 0-9-1 client can ask an atom: publish JSON to the exchange with routing key `atom.<atom id>`,
//! and name a queue in `reply_to`.
//!
//! # What it logs
//!
//! No secret and no payload. The client beneath it, lapin, logs messages that the broker returns with all
//! that is in them: filter its target `lapin::returned_messages` out.

mod acks;
mod aside;
mod clock;
mod connect;
mod convert;
mod dead;
mod declare;
mod delay;
mod events;
mod inbox;
mod lane;
mod lease;
mod life;
mod opened;
mod operate;
mod plan;
mod publisher;
mod quarantine;
mod returns;
mod server;
mod session;
mod socket;
#[cfg(feature = "tls")]
mod tls;
#[cfg(not(feature = "tls"))]
#[path = "no_tls.rs"]
mod tls;
mod topology;
mod url;
mod watchdog;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use atomizer::{
    AtomId, Conductor, ConductorId, EventLog, InvalidId, Limits, NodeId, OpenError, ResultsId,
    Session,
};

pub use dead::{Clearing, DeadLetters, DeadLettersError, Listing, Progress, Requeue, Selection};
pub use operate::{Counted, Found, Operator, OperatorError, Probe, Reached};
pub use plan::{Argument, Arguments, Destination, Kind as ExchangeKind, Object, Plan};
pub use topology::TopologyMode;
pub use url::UrlError;

use aside::Suspects;
use connect::{Address, Addresses};
use events::{RabbitLog, Retention};
use inbox::Inboxes;
use publisher::Moves;
use quarantine::Quarantine;
use session::{Options, RabbitSession};
use topology::Topology;

/// A RabbitMQ broker to carry electrons.
#[derive(Clone)]
pub struct RabbitMq {
    id: ConductorId,
    addresses: Addresses,
    topology: Topology,
    options: Options,
}

impl RabbitMq {
    /// The longest payload unless told otherwise: 16 MiB, which RabbitMQ 4 takes by default.
    pub const PAYLOAD_BYTES_MAX: usize = 16 * 1024 * 1024;

    /// How long a delivery may be held unless told otherwise: 10 min, a third of what brokers grant by default.
    pub const HOLD_MAX: Duration = Duration::from_secs(10 * 60);

    /// Describes a broker by its URL: `amqp://user:password@host:port/vhost`. It is RabbitMQ 3.10 or later.
    ///
    /// What is left out is `guest`, `guest`, 5672 (5671 with TLS) and the virtual host `/`. The query may have
    /// `heartbeat` in seconds; 10 by default.
    ///
    /// The nodes of a cluster stand side by side, separated by commas: `amqp://user:password@a,b:5673,[::1]/vhost`.
    /// User, password, virtual host and query are those of all. A session has one of them, at random the first
    /// time; the next session begins with the one after it, and tries each once before there is a pause. One
    /// that is silent is given up after 2 s, or 5 s more when it is silent once it is connected (a single one after 5 s
    /// and 10 s, and so are several when all were too slow).
    ///
    /// `amqps://` is TLS, with the feature `tls` of this crate. The broker's certificate is always verified, against
    /// the system's authorities, or those in the file that the query names as `cacertfile`, and for the name of
    /// the host, or `server_name_indication`. A certificate to be shown is named by `certfile` and `keyfile`. All
    /// files are PEM, and read anew for each connection, so that what is renewed is used.
    ///
    /// # Errors
    /// [`UrlError`] when it is no such URL. The password is never part of an error.
    pub fn from_url(url: &str) -> Result<Self, UrlError> {
        Ok(Self {
            id: ConductorId::from_static("rabbitmq"),
            addresses: Addresses::parse(url)?,
            topology: Topology::new("atomizer"),
            options: Options {
                limits: Limits::new(Self::PAYLOAD_BYTES_MAX)
                    .delay_max(delay::DELAY_MAX)
                    .hold_max(Self::HOLD_MAX),
                watchdog: watchdog::PERIOD_DEFAULT,
                moves: Moves::default(),
                suspects: Suspects::default(),
                quarantine: Quarantine::default(),
                inboxes: Inboxes::default(),
            },
        })
    }

    /// Sets what the names of exchange and queues begin with. Nodes of different namespaces never meet.
    ///
    /// # Errors
    /// [`InvalidId`] unless it is 1 to 64 of the characters `A-Z a-z 0-9 . _ : -`.
    pub fn namespace(mut self, namespace: &str) -> Result<Self, InvalidId> {
        self.topology = self.topology.renamed(namespace)?;
        Ok(self)
    }

    /// Sets how many bytes of events are kept, and for how long; 1 GiB and 7 days unless told otherwise, whichever comes
    /// first. The broker lets go of a sixteenth at a time.
    ///
    /// It holds for who makes the stream: one that is there stays as it is.
    #[must_use]
    pub fn events_kept(mut self, bytes_max: u64, age_max: Duration) -> Self {
        self.topology.events = Some(Retention { bytes_max, age_max });
        self
    }

    /// Keeps no events: nodes with this conductor tell theirs to nobody outside of their process.
    #[must_use]
    pub fn without_events(mut self) -> Self {
        self.topology.events = None;
        self
    }

    /// Sets who makes the exchanges and queues; whoever needs them by default.
    #[must_use]
    pub fn topology(mut self, mode: TopologyMode) -> Self {
        self.topology.mode = mode;
        self
    }

    /// Sets the longest payload, in bytes; at most the broker's `max_message_size`.
    #[must_use]
    pub fn payload_bytes_max(mut self, bytes: usize) -> Self {
        self.options.limits.payload_bytes_max = bytes;
        self
    }

    /// Sets how long a subscription that has room may be brought nothing before the broker is asked whether there
    /// is something; 10 s by default.
    ///
    /// When there is, twice in a row, the subscription is made anew: the worker does not look alive and consume
    /// nothing. It costs the broker one request for each idle subscription and period.
    #[must_use]
    pub fn watchdog(mut self, period: Duration) -> Self {
        self.options.watchdog = period;
        self
    }

    /// Returns the dead letters of the namespace: to list, to send back, to purge.
    #[must_use]
    pub fn dead_letters(&self) -> DeadLetters {
        DeadLetters::new(&self.addresses, &self.topology, self.options.limits)
    }

    /// Returns what looks at the broker, and makes what the namespace needs there.
    #[must_use]
    pub fn operator(&self) -> Operator {
        Operator::new(&self.addresses, &self.topology)
    }

    /// Returns what the namespace needs on its broker for these atoms and result addresses: the same that nodes make.
    /// What is sent for later needs [`Plan::delays`] as well.
    pub fn topology_plan(&self, atoms: &[AtomId], results: &[ResultsId]) -> Plan {
        Plan::new(&self.topology, atoms, results)
    }

    /// Sets how long a delivery may be held before it is parked, renewed or given back; [`RabbitMq::HOLD_MAX`] unless
    /// told otherwise.
    ///
    /// A broker takes back what is held longer than its `consumer_timeout` (30 min by default), and closes the
    /// channel over it. A node looks once a second, and moving what is held takes its time: keep this to a third
    /// of the broker's at the most.
    #[must_use]
    pub fn hold_max(mut self, hold_max: Duration) -> Self {
        self.options.limits.hold_max = hold_max;
        self
    }
}

impl fmt::Debug for RabbitMq {
    /// Writes the URL without user and password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RabbitMq({})", self.addresses)
    }
}

impl fmt::Display for RabbitMq {
    /// Writes the URL without user and password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.addresses.fmt(f)
    }
}

#[async_trait]
impl Conductor for RabbitMq {
    fn id(&self) -> &ConductorId {
        &self.id
    }

    async fn open(&self, node: &NodeId) -> Result<Arc<dyn Session>, OpenError> {
        let Self { addresses, topology, options, .. } = self;
        let open = |address: Address, patience| async move {
            RabbitSession::open(&address, topology, options, node, patience).await
        };
        Ok(Arc::new(addresses.try_each(open).await?))
    }

    fn event_log(&self) -> Option<Arc<dyn EventLog>> {
        self.topology.events?;
        let (addresses, topology) = (self.addresses.apart(), self.topology.clone());
        Some(Arc::new(RabbitLog { addresses, topology }))
    }
}
