//! What happens on a node, as a stream that anyone may watch and nobody waits for.

mod gather;
mod json;
mod stream;
mod text;

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::{AtomId, ConductorId, ElectronId, Failure, NodeId, Presence};
pub(crate) use json::{micros, rfc3339};

pub(crate) use gather::Gather;
pub(crate) use stream::Events;
pub use stream::{EventStream, Missed};

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

    /// Returns the electron whose run sent the one that it is about.
    #[must_use]
    pub fn parent(&self) -> Option<ElectronId> {
        match self.kind {
            EventKind::Sent { parent, .. } => parent,
            _ => None,
        }
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
    /// An electron is on its way to its queue: asked, or sent. Whether it is safe there is told by what follows, and to
    /// who sent it.
    Sent {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// The electron whose run sent it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        parent: Option<ElectronId>,
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
    /// A run tells how far it has come; see [`Context::progress`](crate::Context::progress).
    Progress {
        /// The electron.
        electron: ElectronId,
        /// Its atom.
        atom: AtomId,
        /// Which attempt.
        attempt: u32,
        /// How much is done, in whatever the atom counts.
        done: u64,
        /// How much there is, where that is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        total: Option<u64>,
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
    /// The node is there: told every [few seconds](crate::Presence::PERIOD) where events are kept.
    Alive(Box<Presence>),
    /// Events were not kept: more came than the [log](crate::EventLog) of this conductor could take. Watchers within
    /// the process have seen them.
    EventsLost {
        /// How many.
        events: u64,
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

/// How much an event matters to who watches over a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// A step on the way of each electron, and signs of life.
    Debug,
    /// An end that is well, and the life of a node.
    Info,
    /// Something went wrong and is being made good.
    Warning,
    /// Something ended badly, or somebody has to act.
    Error,
}

impl Severity {
    /// All, the least first.
    pub const ALL: [Self; 4] = [Self::Debug, Self::Info, Self::Warning, Self::Error];

    /// Returns its name: `debug`, `info`, `warning`, `error`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

impl EventKind {
    /// The names of all kinds that this version knows.
    pub const NAMES: &[&str] = &[
        "session_opened",
        "open_failed",
        "session_lost",
        "conductor_gone",
        "subscribed",
        "subscription_lost",
        "sent",
        "received",
        "adopted",
        "parked",
        "suspected",
        "started",
        "progress",
        "blocking",
        "stuck",
        "retried",
        "requeued",
        "handed_on",
        "completed",
        "failed",
        "unreadable",
        "not_settled",
        "asked_again",
        "answer_dropped",
        "renewed",
        "resident_started",
        "resident_failed",
        "resident_ended",
        "alive",
        "events_lost",
        "critical",
        "draining",
        "cancelling",
        "aborting",
        "stopped",
    ];

    /// Returns its name, as the field `event` of the JSON form has it: `completed`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::SessionOpened => "session_opened",
            Self::OpenFailed { .. } => "open_failed",
            Self::SessionLost { .. } => "session_lost",
            Self::ConductorGone { .. } => "conductor_gone",
            Self::Subscribed { .. } => "subscribed",
            Self::SubscriptionLost { .. } => "subscription_lost",
            Self::Sent { .. } => "sent",
            Self::Received { .. } => "received",
            Self::Adopted { .. } => "adopted",
            Self::Parked { .. } => "parked",
            Self::Suspected { .. } => "suspected",
            Self::Started { .. } => "started",
            Self::Progress { .. } => "progress",
            Self::Blocking { .. } => "blocking",
            Self::Stuck { .. } => "stuck",
            Self::Retried { .. } => "retried",
            Self::Requeued { .. } => "requeued",
            Self::HandedOn { .. } => "handed_on",
            Self::Completed { .. } => "completed",
            Self::Failed { .. } => "failed",
            Self::Unreadable { .. } => "unreadable",
            Self::NotSettled { .. } => "not_settled",
            Self::AskedAgain { .. } => "asked_again",
            Self::AnswerDropped { .. } => "answer_dropped",
            Self::Renewed { .. } => "renewed",
            Self::ResidentStarted { .. } => "resident_started",
            Self::ResidentFailed { .. } => "resident_failed",
            Self::ResidentEnded { .. } => "resident_ended",
            Self::Alive(_) => "alive",
            Self::EventsLost { .. } => "events_lost",
            Self::Critical { .. } => "critical",
            Self::Draining => "draining",
            Self::Cancelling => "cancelling",
            Self::Aborting => "aborting",
            Self::Stopped => "stopped",
            Self::Other => "other",
        }
    }

    /// Returns how much it matters.
    #[must_use]
    pub fn severity(&self) -> Severity {
        match self {
            Self::Sent { .. }
            | Self::Received { .. }
            | Self::Adopted { .. }
            | Self::Parked { .. }
            | Self::Started { .. }
            | Self::Progress { .. }
            | Self::Subscribed { .. }
            | Self::AnswerDropped { .. }
            | Self::Alive(_)
            | Self::Other => Severity::Debug,
            Self::SessionOpened
            | Self::HandedOn { .. }
            | Self::Completed { .. }
            | Self::Renewed { .. }
            | Self::ResidentStarted { .. }
            | Self::ResidentEnded { .. }
            | Self::Draining
            | Self::Cancelling
            | Self::Stopped => Severity::Info,
            Self::OpenFailed { .. }
            | Self::SessionLost { .. }
            | Self::SubscriptionLost { .. }
            | Self::Suspected { .. }
            | Self::Blocking { .. }
            | Self::Retried { .. }
            | Self::Requeued { .. }
            | Self::NotSettled { .. }
            | Self::AskedAgain { .. }
            | Self::EventsLost { .. }
            | Self::Aborting => Severity::Warning,
            Self::ConductorGone { .. }
            | Self::Stuck { .. }
            | Self::Failed { .. }
            | Self::Unreadable { .. }
            | Self::ResidentFailed { .. }
            | Self::Critical { .. } => Severity::Error,
        }
    }

    /// Returns which electron, atom and attempt it is about.
    fn subject(&self) -> (Option<ElectronId>, Option<&AtomId>, Option<u32>) {
        match self {
            Self::Received { electron, atom, attempt, .. }
            | Self::Adopted { electron, atom, attempt }
            | Self::Parked { electron, atom, attempt }
            | Self::Suspected { electron, atom, attempt, .. }
            | Self::Started { electron, atom, attempt }
            | Self::Progress { electron, atom, attempt, .. }
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
            Self::Sent { electron, atom, .. } => (Some(*electron), Some(atom), None),
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
            | Self::Alive(_)
            | Self::EventsLost { .. }
            | Self::Critical { .. }
            | Self::Draining
            | Self::Cancelling
            | Self::Aborting
            | Self::Stopped
            | Self::Other => (None, None, None),
        }
    }
}
