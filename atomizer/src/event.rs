//! What happens on a node, as a stream that anyone may watch and nobody waits for.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::{AtomId, ConductorId, ElectronId, Failure, NodeId, clock};

/// How many events a subscriber may lag behind before it loses the oldest.
pub(crate) const BACKLOG: usize = 4096;

/// One thing that happened. It prints as one line, and travels as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Event {
    /// Which of its node's events it is, counted from 0. A gap says that events were missed.
    ///
    /// Events are made while somebody watches; who begins to watch later begins at a later number.
    pub sequence: u64,
    /// When, by the node's clock. As JSON: RFC 3339, UTC.
    #[serde(with = "rfc3339")]
    pub at: SystemTime,
    /// Where.
    pub node: NodeId,
    /// Through which conductor, where one is concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conductor: Option<ConductorId>,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

impl Event {
    /// Returns the electron that it is about.
    #[must_use]
    pub fn electron(&self) -> Option<ElectronId> {
        self.kind.subject().0
    }

    /// Returns the atom that it is about.
    #[must_use]
    pub fn atom(&self) -> Option<&AtomId> {
        self.kind.subject().1
    }

    /// Returns which attempt it is about, counted from 1.
    #[must_use]
    pub fn attempt(&self) -> Option<u32> {
        self.kind.subject().2
    }
}

/// The things that happen.
///
/// As JSON the field `event` names the kind in snake case, and durations are whole microseconds in fields whose
/// names end in `_us`: `{"sequence":7,"at":"2026-11-21T12:00:00.000000Z","node":"agent-0badcafe",
/// "conductor":"memory","event":"completed","electron":"01932c07-e8f1-7a3b-9c4d-5e6f70819203","atom":"double",
/// "attempt":1,"took_us":250,"unclaimed":null}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventKind {
    /// A conductor has a session.
    SessionOpened,
    /// A session could not be opened; it is tried again.
    OpenFailed {
        /// Why.
        error: String,
        /// How long the node waits before it tries again.
        #[serde(with = "micros", rename = "retry_in_us")]
        retry_in: Duration,
    },
    /// A session ended by a fault; the next is being opened.
    SessionLost {
        /// Why.
        error: String,
    },
    /// A conductor is given up; the others go on.
    ConductorGone {
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
    /// An electron arrived. One that runs [inline](crate::Builder::waiting_max) comes from its parent, and does not.
    Received {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt comes next.
        attempt: u32,
        /// How often it was delivered before.
        redeliveries: u32,
    },
    /// An electron arrived that this node works on already, or has just finished: one run answers both.
    Adopted {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt is under way, or comes next.
        attempt: u32,
    },
    /// An electron that takes long was parked: it takes up no place in a window, and may be held for ever.
    Parked {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt is under way, or comes next.
        attempt: u32,
    },
    /// An electron that was delivered before is to begin, alone, and this is written into it.
    Suspected {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt comes next.
        attempt: u32,
        /// The number of its starts under suspicion, this one included.
        lives: u32,
    },
    /// An electron began to run.
    Started {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt.
        attempt: u32,
    },
    /// A run holds its thread without yielding: an atom that blocks and does not say so.
    Blocking {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt.
        attempt: u32,
    },
    /// A run that was told to stop at its time limit still goes on.
    Stuck {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt.
        attempt: u32,
        /// For how long.
        #[serde(with = "micros", rename = "overdue_us")]
        overdue: Duration,
    },
    /// An attempt failed, and the next is made here.
    Retried {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt failed.
        attempt: u32,
        /// How.
        failure: Failure,
        /// How long the node waits before it tries again.
        #[serde(with = "micros", rename = "wait_us")]
        wait: Duration,
    },
    /// An attempt failed, and the electron is back in the queue for the next.
    Requeued {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt failed.
        attempt: u32,
        /// How.
        failure: Failure,
        /// How long it waits before it is delivered.
        #[serde(with = "micros", rename = "wait_us")]
        wait: Duration,
    },
    /// The electron is back in the queue, and no attempt is counted: its atom gave it back, it is for another
    /// node than the one that failed it, or this node stops.
    HandedOn {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt comes next.
        attempt: u32,
        /// Why.
        reason: String,
    },
    /// An electron ended well, and its answer (if one was asked for) is safe.
    Completed {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt.
        attempt: u32,
        /// How long it ran.
        #[serde(with = "micros", rename = "took_us")]
        took: Duration,
        /// Why its asker could not be told: it is gone for good, or the node may not answer it.
        unclaimed: Option<String>,
    },
    /// An electron ended in failure, and its answer or dead letter is safe.
    Failed {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt was the last.
        attempt: u32,
        /// How.
        failure: Failure,
        /// True when it is among the dead letters.
        dead: bool,
        /// Why its asker could not be told: it is gone for good, or the node may not answer it.
        unclaimed: Option<String>,
    },
    /// A message that cannot be read was put with the dead letters.
    Unreadable {
        /// In whose queue it was.
        atom: AtomId,
        /// What is wrong with it.
        reason: String,
    },
    /// An electron was not settled here, so it is delivered again, here or elsewhere. (One that is to run at most
    /// once may have left its queue, and then it is not. One that ran [inline](crate::Builder::waiting_max) was given up
    /// by its parent, which asks it again should it begin anew.)
    NotSettled {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt.
        attempt: u32,
        /// Why.
        reason: String,
    },
    /// Answers may have been lost with the queue that they were in, so what is not answered was asked again, under
    /// the same ids.
    AskedAgain {
        /// How many electrons.
        electrons: usize,
    },
    /// An answer came that nobody waits for (any more): a duplicate, or its call was dropped.
    AnswerDropped {
        /// Whose answer.
        electron: ElectronId,
    },
    /// After a panic the atom's shared instance was made afresh.
    Renewed {
        /// The atom.
        atom: AtomId,
    },
    /// A resident began to run.
    ResidentStarted {
        /// Its atom.
        atom: AtomId,
        /// Which start.
        attempt: u32,
    },
    /// A resident failed, and is started again.
    ResidentFailed {
        /// Its atom.
        atom: AtomId,
        /// Which start.
        attempt: u32,
        /// How.
        failure: Failure,
        /// How long the node waits before it starts it again.
        #[serde(with = "micros", rename = "wait_us")]
        wait: Duration,
    },
    /// A resident ended of its own accord, or because the node drains.
    ResidentEnded {
        /// Its atom.
        atom: AtomId,
        /// Which start.
        attempt: u32,
    },
    /// The node cannot go on.
    Critical {
        /// Why: the report that [`Atomizer::run`](crate::Atomizer::run) returns.
        error: String,
    },
    /// The node takes no more electrons and finishes what runs.
    Draining,
    /// The time to drain is over; what runs is told to stop.
    Cancelling,
    /// What did not stop is aborted; its electrons are delivered again elsewhere.
    Aborting,
    /// The node has stopped.
    Stopped,
    /// Something that a later version knows.
    #[serde(other)]
    Other,
}

impl EventKind {
    /// Returns which electron, atom and attempt it is about.
    fn subject(&self) -> (Option<ElectronId>, Option<&AtomId>, Option<u32>) {
        match self {
            Self::Received { electron, atom, attempt, .. }
            | Self::Adopted { electron, atom, attempt }
            | Self::Parked { electron, atom, attempt }
            | Self::Suspected { electron, atom, attempt, .. }
            | Self::Started { electron, atom, attempt }
            | Self::Blocking { electron, atom, attempt }
            | Self::Stuck { electron, atom, attempt, .. }
            | Self::Retried { electron, atom, attempt, .. }
            | Self::Requeued { electron, atom, attempt, .. }
            | Self::HandedOn { electron, atom, attempt, .. }
            | Self::Completed { electron, atom, attempt, .. }
            | Self::Failed { electron, atom, attempt, .. }
            | Self::NotSettled { electron, atom, attempt, .. } => {
                (Some(*electron), Some(atom), Some(*attempt))
            }
            Self::ResidentStarted { atom, attempt }
            | Self::ResidentFailed { atom, attempt, .. }
            | Self::ResidentEnded { atom, attempt } => (None, Some(atom), Some(*attempt)),
            Self::Unreadable { atom, .. } | Self::Renewed { atom } => (None, Some(atom), None),
            Self::Subscribed { atom } | Self::SubscriptionLost { atom, .. } => {
                (None, atom.as_ref(), None)
            }
            Self::AnswerDropped { electron } => (Some(*electron), None, None),
            Self::SessionOpened
            | Self::OpenFailed { .. }
            | Self::SessionLost { .. }
            | Self::ConductorGone { .. }
            | Self::AskedAgain { .. }
            | Self::Critical { .. }
            | Self::Draining
            | Self::Cancelling
            | Self::Aborting
            | Self::Stopped
            | Self::Other => (None, None, None),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = format!("{} {}", humantime::format_rfc3339_millis(self.at), self.node);
        if let Some(conductor) = &self.conductor {
            line.push(' ');
            line.push_str(conductor.as_str());
        }
        // Texts of others may have more lines than one; an event has one.
        let kind = self.kind.to_string().replace(['\n', '\r'], " ");
        write!(f, "{line} {kind}")
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
            Self::ConductorGone { error } => write!(f, "conductor given up: {error}"),
            Self::Subscribed { atom: Some(atom) } => write!(f, "takes {atom}"),
            Self::Subscribed { atom: None } => f.write_str("takes answers"),
            Self::SubscriptionLost { atom, error } => {
                let source = atom.as_ref().map_or("the inbox", AtomId::as_str);
                write!(f, "subscription to {source} lost: {error}")
            }
            Self::AskedAgain { electrons } => {
                write!(f, "asks again for {electrons} answers that may be lost")
            }
            Self::AnswerDropped { electron } => {
                write!(f, "dropped an answer nobody waits for: {electron}")
            }
            Self::Unreadable { atom, reason } => {
                write!(f, "unreadable message for {atom}: {reason}")
            }
            Self::Renewed { atom } => write!(f, "made {atom} afresh"),
            Self::ResidentStarted { atom, attempt } => {
                write!(f, "resident {atom} began, start {attempt}")
            }
            Self::ResidentFailed { atom, failure, wait, .. } => {
                write!(f, "resident {atom} failed: {failure}; starts again in {wait:.1?}")
            }
            Self::ResidentEnded { atom, .. } => write!(f, "resident {atom} ended"),
            Self::Critical { error } => write!(f, "critical: {error}"),
            Self::Draining => f.write_str("draining"),
            Self::Cancelling => f.write_str("cancelling"),
            Self::Aborting => f.write_str("aborting"),
            Self::Stopped => f.write_str("stopped"),
            Self::Other => f.write_str("something that a later version knows"),
            of_an_electron => of_an_electron.fmt_electron(f),
        }
    }
}

impl EventKind {
    fn fmt_electron(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(electron), Some(atom), Some(attempt)) = self.subject() else { return Ok(()) };
        let id = format_args!("{atom} {electron}");
        let nth = format_args!("attempt {attempt}");
        match self {
            Self::Received { redeliveries: 0, .. } => write!(f, "received {id}, {nth} is next"),
            Self::Received { redeliveries, .. } => {
                write!(f, "received {id} again, redelivery {redeliveries}, {nth} is next")
            }
            Self::Adopted { .. } => {
                write!(f, "received {id} again, which is here or has just ended, {nth}")
            }
            Self::Parked { .. } => write!(f, "parked {id}, {nth}"),
            Self::Suspected { lives, .. } => {
                write!(f, "suspects {id}, life {lives}, {nth} is next")
            }
            Self::Started { .. } => write!(f, "started {id}, {nth}"),
            Self::Blocking { .. } => write!(f, "{id}, {nth}, blocks its thread"),
            Self::Stuck { overdue, .. } => {
                write!(f, "{id}, {nth}, does not stop, {overdue:.1?} after its time limit")
            }
            Self::Retried { failure, wait, .. } => {
                write!(f, "retries {id} in {wait:.1?} after {failure}")
            }
            Self::Requeued { failure, wait, .. } => {
                write!(f, "requeued {id} for {wait:.1?} after {failure}")
            }
            Self::HandedOn { reason, .. } => write!(f, "handed on {id}: {reason}"),
            Self::Completed { took, unclaimed, .. } => {
                write!(f, "completed {id} in {took:.1?}, {nth}{}", claim(unclaimed.as_ref()))
            }
            Self::Failed { failure, dead, unclaimed, .. } => {
                let dead = if *dead { " (dead letter)" } else { "" };
                write!(f, "failed {id}: {failure}{dead}{}", claim(unclaimed.as_ref()))
            }
            Self::NotSettled { reason, .. } => write!(f, "not settled here: {id}: {reason}"),
            _ => Ok(()),
        }
    }
}

fn claim(unclaimed: Option<&String>) -> String {
    unclaimed.map(|reason| format!(" (unclaimed: {reason})")).unwrap_or_default()
}

/// Points in time as text.
mod rfc3339 {
    use std::time::SystemTime;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(
        at: &SystemTime,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_rfc3339_micros(*at))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<SystemTime, D::Error> {
        humantime::parse_rfc3339(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// Durations as whole microseconds.
mod micros {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(
        duration: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_micros)
    }
}

/// Where a node's events go in. Never waits; costs next to nothing while nobody watches.
#[derive(Debug)]
pub(crate) struct Events {
    node: NodeId,
    tx: broadcast::Sender<Event>,
    /// Kept beside the channel's own count, which takes a lock to read.
    watching: Arc<AtomicUsize>,
    /// The next number. Held while sending, so that events stand in the order of their numbers.
    sequence: Mutex<u64>,
}

impl Events {
    pub(crate) fn new(node: NodeId) -> Self {
        Self {
            node,
            tx: broadcast::Sender::new(BACKLOG),
            watching: Arc::default(),
            sequence: Mutex::default(),
        }
    }

    /// Publishes what `kind` makes, if anyone watches.
    pub(crate) fn emit(&self, conductor: Option<&ConductorId>, kind: impl FnOnce() -> EventKind) {
        if self.watching.load(Ordering::Relaxed) == 0 {
            return;
        }
        let (node, conductor, kind) = (self.node.clone(), conductor.cloned(), kind());
        let mut next = self.sequence.lock().unwrap_or_else(PoisonError::into_inner);
        let sequence = *next;
        *next += 1;
        // An error says that the last watcher has just left.
        drop(self.tx.send(Event { sequence, at: clock::now(), node, conductor, kind }));
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
