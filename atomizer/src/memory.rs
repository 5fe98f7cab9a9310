//! The in-process conductor: queues in memory, shared by all that clone it.

mod log;
mod queues;
mod session;

use std::{
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use async_trait::async_trait;

use self::{
    log::MemoryLog,
    queues::{Broker, QueueName},
    session::MemorySession,
};
use crate::{
    Conductor, ConductorId, DeadLetter, EventLog, Limits, Message, NodeId, OpenError, ReplyTo,
    Session, SessionError, wire::Wire,
};

/// Carries electrons within one process: nothing to install, and nothing outlives the process.
///
/// Clones share the same queues, so that several nodes of one process work together. Within the process it
/// keeps every promise: what a session has not settled when it ends is delivered again.
#[derive(Clone)]
pub struct Memory {
    id: ConductorId,
    broker: Arc<Broker>,
    limits: Limits,
    events: Option<MemoryLog>,
}

impl Memory {
    /// How many messages wait in one queue before [`Session::send`] waits for room.
    pub const QUEUE_LENGTH_MAX: usize = 65_536;
    /// The longest payload: 16 MiB, as RabbitMQ 4 has it.
    pub const PAYLOAD_BYTES_MAX: usize = 16 * 1024 * 1024;

    /// Makes empty queues.
    #[must_use]
    pub fn new() -> Self {
        Self {
            id: ConductorId::from_static("memory"),
            broker: Arc::default(),
            limits: Limits::new(Self::PAYLOAD_BYTES_MAX).delay_max(Duration::MAX),
            events: None,
        }
    }

    /// Keeps the events of all nodes on these queues, for a [`Monitor`](crate::Monitor): the latest that are `bytes_max`
    /// bytes together, and no older than `age_max`.
    ///
    /// Without it they are not kept: it costs each electron about as much as all else in memory does.
    #[must_use]
    pub fn keep_events(mut self, bytes_max: usize, age_max: Duration) -> Self {
        self.events = Some(MemoryLog::new(bytes_max, age_max));
        self
    }

    /// Sets the longest payload, in bytes.
    #[must_use]
    pub fn payload_bytes_max(mut self, bytes: usize) -> Self {
        self.limits.payload_bytes_max = bytes;
        self
    }

    /// Ends every session by a fault, as a broker that is killed would; for tests.
    pub fn cut(&self) {
        let sessions: Vec<_> = self.broker.lock().sessions.drain(..).collect();
        for session in sessions.iter().filter_map(Weak::upgrade) {
            session.end(&SessionError::lost("cut"));
        }
    }

    /// Returns what is known of all dead letters, oldest first. They stay where they are.
    #[must_use]
    pub fn dead_letters(&self) -> Vec<DeadLetter> {
        let broker = self.broker.lock();
        let dead = broker.queues.get(&QueueName::Dead).map(|queue| &queue.ready);
        let wires = dead.into_iter().flatten().map(|stored| Wire::from(&stored.message));
        wires.map(|wire| DeadLetter::from_wire(&wire, None)).collect()
    }

    /// Takes all dead letters out, oldest first.
    #[must_use]
    pub fn take_dead_letters(&self) -> Vec<Message> {
        let mut broker = self.broker.lock();
        let dead = broker.queues.remove(&QueueName::Dead).map(|queue| queue.ready);
        dead.into_iter().flatten().map(|stored| stored.message).collect()
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({})", self.id)
    }
}

#[async_trait]
impl Conductor for Memory {
    fn id(&self) -> &ConductorId {
        &self.id
    }

    async fn open(&self, node: &NodeId) -> Result<Arc<dyn Session>, OpenError> {
        let reply_to = ReplyTo::new(node.as_str());
        let broker = Arc::clone(&self.broker);
        let session = Arc::new(MemorySession::new(broker, self.limits, reply_to.clone()));
        let mut broker = self.broker.lock();
        broker.queues.entry(QueueName::Inbox(reply_to)).or_default();
        broker.sessions.retain(|session| session.strong_count() > 0);
        broker.sessions.push(Arc::downgrade(&session));
        Ok(session)
    }

    fn event_log(&self) -> Option<Arc<dyn EventLog>> {
        let events = self.events.clone()?;
        Some(Arc::new(events))
    }
}
