//! What happens on a node, as a stream that anyone may watch and nobody waits for.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::sync::broadcast;

use crate::{AtomId, ConductorId, ElectronId, Failure, NodeId, clock};

/// How many events a subscriber may lag behind before it loses the oldest.
pub(crate) const BACKLOG: usize = 4096;

/// One thing that happened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Event {
    /// When, by the node's clock.
    pub at: SystemTime,
    /// Where.
    pub node: NodeId,
    /// Through which conductor, where one is concerned.
    pub conductor: Option<ConductorId>,
    /// What.
    pub kind: EventKind,
}

/// The things that happen.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum EventKind {
    /// A conductor has a session.
    SessionOpened,
    /// A session could not be opened; it is tried again.
    OpenFailed {
        /// Why.
        error: String,
        /// How long the node waits before it tries again.
        retry_in: Duration,
    },
    /// A session ended by a fault; the next is being opened.
    SessionLost {
        /// Why.
        error: String,
    },
    /// The node receives the electrons of an atom, or its answers.
    Subscribed {
        /// The atom; none for the inbox.
        atom: Option<AtomId>,
    },
    /// A subscription ended by a fault, or could not be made; it is tried again.
    SubscriptionLost {
        /// The atom; none for the inbox.
        atom: Option<AtomId>,
        /// Why.
        error: String,
    },
    /// An electron arrived.
    Received {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// How often it was delivered before.
        redeliveries: u32,
    },
    /// An electron began to run.
    Started {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt, counted from 1.
        attempt: u32,
    },
    /// An electron ended well, and its answer (if one was asked for) is safe.
    Completed {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// How long it ran.
        took: Duration,
        /// True when the asker was gone for good.
        unclaimed: bool,
    },
    /// An electron ended in failure, and its answer or dead letter is safe.
    Failed {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// How.
        failure: Failure,
        /// True when the asker was gone for good.
        unclaimed: bool,
    },
    /// A message that cannot be read was put with the dead letters.
    Unreadable {
        /// In whose queue it was.
        atom: AtomId,
        /// What is wrong with it.
        reason: String,
    },
    /// An electron was not settled here, so it is delivered again, here or elsewhere.
    NotSettled {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Why.
        reason: String,
    },
    /// An answer came that nobody waits for (any more): a duplicate, or its call was dropped.
    AnswerDropped {
        /// Whose answer.
        electron: ElectronId,
    },
    /// The node takes no more electrons and finishes what runs.
    Draining,
    /// The time to drain is over; what runs is told to stop.
    Cancelling,
    /// What did not stop is aborted; its electrons are delivered again elsewhere.
    Aborting,
    /// The node has stopped.
    Stopped,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", humantime::format_rfc3339_millis(self.at), self.node)?;
        if let Some(conductor) = &self.conductor {
            write!(f, " {conductor}")?;
        }
        write!(f, " {}", self.kind)
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SessionOpened => f.write_str("session opened"),
            Self::OpenFailed { error, retry_in } => {
                write!(f, "failed to open a session: {error}; next try in {retry_in:.1?}")
            }
            Self::SessionLost { error } => write!(f, "session lost: {error}"),
            Self::Subscribed { atom: Some(atom) } => write!(f, "takes {atom}"),
            Self::Subscribed { atom: None } => f.write_str("takes answers"),
            Self::SubscriptionLost { atom: Some(atom), error } => {
                write!(f, "subscription to {atom} lost: {error}")
            }
            Self::SubscriptionLost { atom: None, error } => {
                write!(f, "subscription to the inbox lost: {error}")
            }
            Self::Received { electron, atom, redeliveries: 0 } => {
                write!(f, "received {atom} {electron}")
            }
            Self::Received { electron, atom, redeliveries } => {
                write!(f, "received {atom} {electron} again, redelivery {redeliveries}")
            }
            Self::Started { electron, atom, attempt } => {
                write!(f, "started {atom} {electron}, attempt {attempt}")
            }
            Self::Completed { electron, atom, took, unclaimed } => {
                write!(f, "completed {atom} {electron} in {took:.1?}{}", claim(*unclaimed))
            }
            Self::Failed { electron, atom, failure, unclaimed } => {
                write!(f, "failed {atom} {electron}: {failure}{}", claim(*unclaimed))
            }
            Self::Unreadable { atom, reason } => {
                write!(f, "unreadable message for {atom}: {reason}")
            }
            Self::NotSettled { electron, atom, reason } => {
                write!(f, "not settled here: {atom} {electron}: {reason}")
            }
            Self::AnswerDropped { electron } => {
                write!(f, "dropped an answer nobody waits for: {electron}")
            }
            Self::Draining => f.write_str("draining"),
            Self::Cancelling => f.write_str("cancelling"),
            Self::Aborting => f.write_str("aborting"),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

fn claim(unclaimed: bool) -> &'static str {
    if unclaimed { " (unclaimed)" } else { "" }
}

/// Where a node's events go in. Never waits; costs next to nothing while nobody watches.
#[derive(Debug)]
pub(crate) struct Events {
    node: NodeId,
    tx: broadcast::Sender<Event>,
    /// Kept beside the channel's own count, which takes a lock to read.
    watching: Arc<AtomicUsize>,
}

impl Events {
    pub(crate) fn new(node: NodeId) -> Self {
        Self { node, tx: broadcast::Sender::new(BACKLOG), watching: Arc::default() }
    }

    /// Publishes what `kind` makes, if anyone watches.
    pub(crate) fn emit(&self, conductor: Option<&ConductorId>, kind: impl FnOnce() -> EventKind) {
        if self.watching.load(Ordering::Relaxed) == 0 {
            return;
        }
        let event = Event {
            at: clock::now(),
            node: self.node.clone(),
            conductor: conductor.cloned(),
            kind: kind(),
        };
        // An error says that the last watcher has just left.
        drop(self.tx.send(event));
    }

    pub(crate) fn subscribe(&self) -> EventStream {
        self.watching.fetch_add(1, Ordering::Relaxed);
        EventStream { rx: self.tx.subscribe(), watching: Arc::clone(&self.watching) }
    }
}

/// A view of a node's events, from when it was made on.
///
/// A subscriber that does not keep up loses the oldest events and is told how many; it slows nobody.
#[derive(Debug)]
pub struct EventStream {
    rx: broadcast::Receiver<Event>,
    watching: Arc<AtomicUsize>,
}

impl EventStream {
    /// Waits for the next event. `None` when the node is gone.
    ///
    /// # Errors
    /// [`Missed`] when events were lost because this subscriber was slow; the next call goes on after them.
    ///
    /// # Cancel safety
    /// Safe: no event is lost.
    pub async fn next(&mut self) -> Option<Result<Event, Missed>> {
        match self.rx.recv().await {
            Ok(event) => Some(Ok(event)),
            Err(broadcast::error::RecvError::Lagged(events)) => Some(Err(Missed { events })),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.watching.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Says how many events a slow subscriber lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{events} events were missed")]
#[non_exhaustive]
pub struct Missed {
    /// How many.
    pub events: u64,
}
