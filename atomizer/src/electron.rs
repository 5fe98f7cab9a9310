//! What travels: electrons, their answers, and what cannot be read.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{AtomId, Cancel, ElectronId, Failure, NodeId, Policy, Properties, ReplyTo, wire::Wire};

/// Anything a conductor carries. Cloning is cheap.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Message {
    /// A job.
    Electron(Arc<Electron>),
    /// The outcome of a job, on its way to who asked.
    Answer(Arc<Properties>),
    /// That some children are not wanted any more.
    Cancel(Arc<Cancel>),
    /// Something whose metadata this version cannot read; kept whole, so that it can be set aside.
    Unreadable(Arc<Unreadable>),
}

impl From<Electron> for Message {
    fn from(electron: Electron) -> Self {
        Self::Electron(Arc::new(electron))
    }
}

impl From<Cancel> for Message {
    fn from(cancel: Cancel) -> Self {
        Self::Cancel(Arc::new(cancel))
    }
}

impl From<Properties> for Message {
    fn from(properties: Properties) -> Self {
        Self::Answer(Arc::new(properties))
    }
}

/// One job message: which atom, with what input, and how to treat it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Electron {
    /// The same through every redelivery and attempt. A sender that gives none (no Atomizer) has a new one made
    /// at each delivery.
    pub id: ElectronId,
    /// The code it is for.
    pub atom: AtomId,
    /// The input.
    pub payload: Payload,
    /// Where the answer goes; without it nobody waits for one.
    pub reply_to: Option<ReplyTo>,
    /// What the asker wants to find in the answer, where that is not the id.
    pub correlation_id: Option<String>,
    /// The node that sent it.
    pub sender: Option<NodeId>,
    /// The electron that spawned it.
    pub parent: Option<Parent>,
    /// What follows a failure; none leaves it to the atom, and then to the node.
    pub policy: Option<Policy>,
    /// Attempts that have failed so far.
    pub attempts: u32,
    /// Starts under suspicion so far: of an electron that was delivered before and may be what ended its node.
    pub lives: u32,
    /// How often it was handed on untried: given back by its atom, or avoiding the node that failed it.
    pub passes: u32,
    /// How long one attempt may run; none leaves it to the atom.
    pub time_limit: Option<Duration>,
    /// How long anyone wants it, counted from when it was sent. After that it is not begun, and not gone on
    /// with.
    pub deadline: Option<Duration>,
    /// How earlier attempts failed, oldest first: the first and the last [`Electron::HISTORY_HALF`].
    pub history: Vec<Failure>,
    /// Headers this version does not know, such as `traceparent`; they travel on unchanged.
    pub extra: Extra,
}

impl Electron {
    /// How many of the first failures are kept in the history, and how many of the last.
    pub const HISTORY_HALF: usize = 8;

    /// Makes an electron with a fresh id that nobody waits for.
    #[must_use]
    pub fn new(atom: AtomId, payload: Payload) -> Self {
        Self::with_id(ElectronId::new(), atom, payload)
    }

    /// Makes an electron with a given id that nobody waits for.
    #[must_use]
    pub fn with_id(id: ElectronId, atom: AtomId, payload: Payload) -> Self {
        Self {
            id,
            atom,
            payload,
            reply_to: None,
            correlation_id: None,
            sender: None,
            parent: None,
            policy: None,
            attempts: 0,
            lives: 0,
            passes: 0,
            time_limit: None,
            deadline: None,
            history: Vec::new(),
            extra: Extra::new(),
        }
    }

    /// Adds to the history; what is neither among the first nor the last is forgotten.
    pub(crate) fn remember(&mut self, failure: Failure) {
        if self.history.len() >= 2 * Self::HISTORY_HALF {
            self.history.remove(Self::HISTORY_HALF);
        }
        self.history.push(failure);
    }
}

/// Says whose child an electron is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Parent {
    /// The electron that spawned it.
    pub id: ElectronId,
    /// Which of the parent's children it is, counted from 0.
    pub index: u64,
    /// The round of its node when the run that asked began. A round ends when a run fails, is stopped or lets go of a
    /// child, and when a session is lost: so what is given up, and its answer, is told from what a later run of the same
    /// parent on that node asks under the same id.
    pub round: u64,
    /// How often the parent had failed or been handed on before it asked. A later life of it, after its node was lost,
    /// asks in the same try; another try may want to know anew.
    pub tries: u32,
    /// How often the parent had been begun under suspicion, for its node was lost: then what has just been put out for an
    /// earlier life of it is as good.
    pub lives: u32,
}

impl Parent {
    /// Says whose child it is, and which.
    #[must_use]
    pub fn new(id: ElectronId, index: u64) -> Self {
        Self { id, index, round: 0, tries: 0, lives: 0 }
    }

    /// Says in which round of its node it was asked.
    #[must_use]
    pub fn round(mut self, round: u64) -> Self {
        self.round = round;
        self
    }

    /// Says how often the parent had failed or been handed on before.
    #[must_use]
    pub fn tries(mut self, tries: u32) -> Self {
        self.tries = tries;
        self
    }

    /// Says how often the parent had been begun under suspicion.
    #[must_use]
    pub fn lives(mut self, lives: u32) -> Self {
        self.lives = lives;
        self
    }
}

/// Headers kept for others: any JSON value by name.
pub type Extra = BTreeMap<String, serde_json::Value>;

/// Bytes and what they are. Cloning shares the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Payload {
    /// The media type, such as `application/json`.
    pub content_type: ContentType,
    /// The bytes as they travel, neither wrapped nor encoded.
    pub body: Bytes,
}

impl Payload {
    /// Wraps bytes of a media type, such as `application/x-protobuf`.
    #[must_use]
    pub fn new(content_type: impl Into<ContentType>, body: impl Into<Bytes>) -> Self {
        Self { content_type: content_type.into(), body: body.into() }
    }

    /// Wraps bytes that are a JSON document.
    #[must_use]
    pub fn json(body: impl Into<Bytes>) -> Self {
        Self { content_type: ContentType::Json, body: body.into() }
    }

    /// Wraps bytes of no stated type.
    #[must_use]
    pub fn bytes(body: impl Into<Bytes>) -> Self {
        Self { content_type: ContentType::Bytes, body: body.into() }
    }
}

impl fmt::Debug for Payload {
    /// Shows type and length only: payloads may be large or secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of {}", self.body.len(), self.content_type.as_str())
    }
}

/// Names what a payload's bytes are, as a media type.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ContentType {
    /// `application/json`.
    Json,
    /// `application/octet-stream`.
    Bytes,
    /// Any other media type.
    Other(String),
}

impl ContentType {
    /// Returns the media type.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Json => "application/json",
            Self::Bytes => "application/octet-stream",
            Self::Other(text) => text,
        }
    }
}

impl From<&str> for ContentType {
    fn from(text: &str) -> Self {
        match text {
            "application/json" => Self::Json,
            "application/octet-stream" => Self::Bytes,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// A message as it came, with what is wrong with it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Unreadable {
    /// Everything that arrived.
    pub wire: Wire,
    /// What could not be read.
    pub reason: String,
}
