//! The form of messages outside a process: some properties, some headers, the payload as it is.
//!
//! A conductor that leaves the process writes [`Message`]s to its own form of these parts, a [`Writer`], and reads
//! them from it, as [`Parts`]; or it has them taken apart into a [`Wire`], and moves that by its own means.
//! `docs/wire.md` is the reference; the golden vectors in the tests of this module hold it still.

use std::{
    borrow::Cow,
    fmt::{self, Display},
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    AtomId, Cancel, ContentType, Electron, ElectronId, Extra, Failure, Message, NodeId, Parent,
    Payload, Properties, ReplyTo, Unreadable,
};

/// The version of the format that is written, and the newest that is read.
pub const VERSION: u32 = 1;

/// The most that properties and headers of one message may take together, in bytes.
///
/// RabbitMQ cannot split headers over frames (AMQP 0-9-1, 4.2.6.1): they must stay far below a frame.
pub const METADATA_BYTES_MAX: usize = 16 * 1024;

/// The `type` of an electron.
pub const ELECTRON: &str = "electron";
/// The `type` of an answer.
pub const ANSWER: &str = "answer";
/// The `type` of a message that says which children are not wanted any more.
pub const CANCEL: &str = "cancel";

/// Header names. All values are text.
pub mod header {
    /// What all names of ours begin with.
    pub const PREFIX: &str = "atomizer-";
    /// The version of the format; absent means 1.
    pub const VERSION: &str = "atomizer-version";
    /// The atom an electron is for, or that answers.
    pub const ATOM: &str = "atomizer-atom";
    /// The node that sent an electron.
    pub const SENDER: &str = "atomizer-sender";
    /// The id of the electron that spawned this one.
    pub const PARENT: &str = "atomizer-parent";
    /// Which child of its parent it is, counted from 0.
    pub const INDEX: &str = "atomizer-index";
    /// The round of its sender when the run that asked began (electron), or up to which of these rounds the children
    /// are meant (cancel); absent means 0.
    pub const ROUND: &str = "atomizer-round";
    /// How often the parent had failed or been handed on before it asked; absent means 0.
    pub const TRIES: &str = "atomizer-tries";
    /// How often the parent had been begun under suspicion; absent means 0.
    pub const PARENT_LIVES: &str = "atomizer-parent-lives";
    /// Attempts failed so far (electron), or which attempt answers, counted from 1 (answer).
    pub const ATTEMPT: &str = "atomizer-attempt";
    /// Starts under suspicion so far.
    pub const LIVES: &str = "atomizer-lives";
    /// How often it was handed on untried.
    pub const PASSES: &str = "atomizer-passes";
    /// What follows a failure: a JSON object.
    pub const POLICY: &str = "atomizer-policy";
    /// How long one attempt may run, in milliseconds.
    pub const TIME_LIMIT_MS: &str = "atomizer-time-limit-ms";
    /// How long anyone wants it, in milliseconds, counted from when it was sent.
    pub const DEADLINE_MS: &str = "atomizer-deadline-ms";
    /// How earlier attempts failed: a JSON array, oldest first.
    pub const HISTORY: &str = "atomizer-history";
    /// The electron that an answer is about.
    pub const ELECTRON: &str = "atomizer-electron";
    /// `ok`, or `failed` when the body is a failure as JSON.
    pub const STATUS: &str = "atomizer-status";
    /// The node that answers.
    pub const NODE: &str = "atomizer-node";
    /// When the attempt began: RFC 3339, UTC.
    pub const STARTED_AT: &str = "atomizer-started-at";
    /// In a dead letter that could not be read: why.
    pub const UNREADABLE: &str = "atomizer-unreadable";
    /// What the names begin with that are written to dead letters only. They go when a letter is sent back.
    pub const DEAD_PREFIX: &str = "atomizer-dead-";
    /// In a dead letter: when it became one. RFC 3339, UTC.
    pub const DEAD_AT: &str = "atomizer-dead-at";
    /// In a dead letter that could not be read: the atom in whose queue it was.
    pub const DEAD_ATOM: &str = "atomizer-dead-atom";
    /// In a dead letter that the broker made and that was written anew since: the broker's word for why.
    pub const DEAD_REASON: &str = "atomizer-dead-reason";
    /// In such a letter: the queue it was moved from.
    pub const DEAD_QUEUE: &str = "atomizer-dead-queue";
    /// In a dead letter that was written anew: who did.
    pub const DEAD_WALK: &str = "atomizer-dead-walk";
    /// How long the attempt took, in microseconds.
    pub const DURATION_US: &str = "atomizer-duration-us";
}

const STATUS_OK: &str = "ok";
const STATUS_FAILED: &str = "failed";

/// A time as headers have it: RFC 3339, UTC, to the millisecond.
#[must_use]
pub fn timestamp(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}

/// A message in parts that any carrier of headers and bytes can move.
#[derive(Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Wire {
    /// [`ELECTRON`] or [`ANSWER`]; absent means an electron.
    pub kind: Option<String>,
    /// The electron's id; absent in answers, and in electrons of senders that know nothing of ids.
    pub id: Option<String>,
    /// What an asker recognises its answer by.
    pub correlation_id: Option<String>,
    /// Where the answer goes.
    pub reply_to: Option<String>,
    /// The media type of the body; absent means JSON.
    pub content_type: Option<String>,
    /// Ours by the names in [`header`], and all others.
    pub headers: Extra,
    /// The payload, as it is.
    pub body: Bytes,
}

impl fmt::Debug for Wire {
    /// Shows the length of the body only: it may be large or secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire")
            .field("kind", &self.kind)
            .field("id", &self.id)
            .field("headers", &self.headers)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

impl Wire {
    /// Returns how many bytes properties and headers take, to be held against [`METADATA_BYTES_MAX`].
    #[must_use]
    pub fn metadata_bytes(&self) -> usize {
        let properties =
            [&self.kind, &self.id, &self.correlation_id, &self.reply_to, &self.content_type];
        let properties: usize = properties.into_iter().flatten().map(String::len).sum();
        let headers: usize = (self.headers.iter())
            .map(|(name, value)| match value {
                Value::String(text) => name.len() + text.len(),
                other => name.len() + other.to_string().len(),
            })
            .sum();
        properties + headers
    }

    /// Writes all but the body to another form.
    pub fn write(&self, to: &mut impl Writer) {
        for (property, value) in [
            (Property::Kind, &self.kind),
            (Property::Id, &self.id),
            (Property::CorrelationId, &self.correlation_id),
            (Property::ReplyTo, &self.reply_to),
            (Property::ContentType, &self.content_type),
        ] {
            if let Some(value) = value {
                to.put_property(property, value.into());
            }
        }
        for (name, value) in &self.headers {
            to.put_extra(name, value);
        }
    }
}

/// What a message has beside its headers and its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property {
    /// See [`Wire::kind`]; the others likewise.
    Kind,
    /// See [`Wire::id`].
    Id,
    /// See [`Wire::correlation_id`].
    CorrelationId,
    /// See [`Wire::reply_to`].
    ReplyTo,
    /// See [`Wire::content_type`].
    ContentType,
}

/// A carrier's own form of a message, to which it is [written](Message::write) part by part.
///
/// The kind comes before all else, if there is one, and the headers last. One of a name that was there is put in the
/// place of that.
pub trait Writer {
    /// Takes a property.
    fn put_property(&mut self, property: Property, value: Cow<'_, str>);
    /// Takes one of our headers; see [`header`](mod@header).
    fn put_header(&mut self, name: &'static str, value: Cow<'_, str>);
    /// Takes a header of others, or of a message that was taken apart.
    fn put_extra(&mut self, name: &str, value: &Value);
}

impl Writer for Wire {
    fn put_property(&mut self, property: Property, value: Cow<'_, str>) {
        let part = match property {
            Property::Kind => &mut self.kind,
            Property::Id => &mut self.id,
            Property::CorrelationId => &mut self.correlation_id,
            Property::ReplyTo => &mut self.reply_to,
            Property::ContentType => &mut self.content_type,
        };
        *part = Some(value.into_owned());
    }

    fn put_header(&mut self, name: &'static str, value: Cow<'_, str>) {
        self.headers.insert(name.to_owned(), value.into_owned().into());
    }

    fn put_extra(&mut self, name: &str, value: &Value) {
        self.headers.insert(name.to_owned(), value.clone());
    }
}

/// A message as its carrier has it, to be [read](Message::read) in place: most of it is looked at and not kept.
pub trait Parts {
    /// See [`Wire::kind`]; the next four likewise.
    fn kind(&self) -> Option<&str>;
    /// See [`Wire::id`].
    fn id(&self) -> Option<&str>;
    /// See [`Wire::correlation_id`].
    fn correlation_id(&self) -> Option<&str>;
    /// See [`Wire::reply_to`].
    fn reply_to(&self) -> Option<&str>;
    /// See [`Wire::content_type`].
    fn content_type(&self) -> Option<&str>;
    /// Returns a header, if it is there.
    ///
    /// # Errors
    /// What it is, when it is [no text](text).
    fn header(&self, name: &str) -> Option<Result<Cow<'_, str>, String>>;
    /// Returns the headers that are to be kept, but for those with these names.
    fn headers_but(&self, names: &[&str]) -> Extra;
    /// Returns everything, for a message that cannot be read.
    fn to_wire(&self, body: Bytes) -> Wire {
        let text = |text: Option<&str>| text.map(ToOwned::to_owned);
        Wire {
            kind: text(self.kind()),
            id: text(self.id()),
            correlation_id: text(self.correlation_id()),
            reply_to: text(self.reply_to()),
            content_type: text(self.content_type()),
            headers: self.headers_but(&[]),
            body,
        }
    }
}

impl Parts for Wire {
    fn kind(&self) -> Option<&str> {
        self.kind.as_deref()
    }

    fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    fn correlation_id(&self) -> Option<&str> {
        self.correlation_id.as_deref()
    }

    fn reply_to(&self) -> Option<&str> {
        self.reply_to.as_deref()
    }

    fn content_type(&self) -> Option<&str> {
        self.content_type.as_deref()
    }

    fn header(&self, name: &str) -> Option<Result<Cow<'_, str>, String>> {
        self.headers.get(name).map(text)
    }

    fn headers_but(&self, names: &[&str]) -> Extra {
        let kept = self.headers.iter().filter(|(name, _)| !names.contains(&name.as_str()));
        kept.map(|(name, value)| (name.clone(), value.clone())).collect()
    }
}

/// Returns the text of a header. Some clients send numbers as numbers.
///
/// # Errors
/// What it is, when it is neither.
pub fn text(value: &Value) -> Result<Cow<'_, str>, String> {
    match value {
        Value::String(text) => Ok(text.as_str().into()),
        Value::Number(number) => Ok(number.to_string().into()),
        other => Err(other.to_string()),
    }
}

/// Reads a header as it is.
fn read_text<'a>(parts: &'a impl Parts, name: &str) -> Result<Option<Cow<'a, str>>, String> {
    let text = parts.header(name).transpose();
    text.map_err(|other| format!("header {name} is {other}, not text"))
}

fn read<T: FromStr<Err: Display>>(parts: &impl Parts, name: &str) -> Result<Option<T>, String> {
    read_text(parts, name)?.map(|text| parse(name, &text)).transpose()
}

fn read_json<T: DeserializeOwned>(parts: &impl Parts, name: &str) -> Result<Option<T>, String> {
    let Some(json) = read_text(parts, name)? else { return Ok(None) };
    serde_json::from_str(&json).map(Some).map_err(|error| format!("{name}: {error}"))
}

/// Takes what was read; an error when it was not there.
fn require<T>(name: &str, read: Option<T>) -> Result<T, String> {
    read.ok_or_else(|| format!("header {name} is missing"))
}

fn atom_id(text: Cow<'_, str>) -> Result<AtomId, String> {
    AtomId::try_new(text).map_err(|error| error.to_string())
}

fn node_id(text: Cow<'_, str>) -> Result<NodeId, String> {
    NodeId::try_new(text).map_err(|error| error.to_string())
}

fn parse<T: FromStr<Err: Display>>(name: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|error| format!("{name}: {error}"))
}

impl From<&Message> for Wire {
    fn from(message: &Message) -> Self {
        let mut wire = Self::default();
        wire.body = message.write(&mut wire);
        wire
    }
}

fn write_electron(electron: &Electron, to: &mut impl Writer) -> Bytes {
    to.put_property(Property::Kind, ELECTRON.into());
    to.put_property(Property::Id, electron.id.to_string().into());
    if let Some(id) = &electron.correlation_id {
        to.put_property(Property::CorrelationId, id.into());
    }
    if let Some(reply_to) = &electron.reply_to {
        to.put_property(Property::ReplyTo, reply_to.as_str().into());
    }
    to.put_property(Property::ContentType, electron.payload.content_type.as_str().into());
    for (name, value) in &electron.extra {
        to.put_extra(name, value);
    }
    to.put_header(header::ATOM, electron.atom.as_str().into());
    if let Some(sender) = &electron.sender {
        to.put_header(header::SENDER, sender.as_str().into());
    }
    if let Some(parent) = &electron.parent {
        to.put_header(header::PARENT, parent.id.to_string().into());
        to.put_header(header::INDEX, parent.index.to_string().into());
        write_count(header::ROUND, parent.round, to);
        write_count(header::TRIES, parent.tries, to);
        write_count(header::PARENT_LIVES, parent.lives, to);
    }
    write_count(header::ATTEMPT, electron.attempts, to);
    write_count(header::LIVES, electron.lives, to);
    write_count(header::PASSES, electron.passes, to);
    if let Some(policy) = &electron.policy {
        let policy = serde_json::to_string(policy).expect("a policy is plain data");
        to.put_header(header::POLICY, policy.into());
    }
    if let Some(limit) = electron.time_limit {
        // A limit below a millisecond must not become none at all.
        to.put_header(header::TIME_LIMIT_MS, milliseconds(limit).max(1).to_string().into());
    }
    if let Some(deadline) = electron.deadline {
        to.put_header(header::DEADLINE_MS, milliseconds(deadline).to_string().into());
    }
    if !electron.history.is_empty() {
        to.put_header(header::HISTORY, history(&electron.history).into());
    }
    electron.payload.body.clone()
}

/// Writes a header that means 0 when it is absent.
fn write_count(name: &'static str, count: impl Into<u64>, to: &mut impl Writer) {
    let count = count.into();
    if count > 0 {
        to.put_header(name, count.to_string().into());
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What the history may take of [`METADATA_BYTES_MAX`].
const HISTORY_BYTES_MAX: usize = 12 * 1024;

/// The history as JSON. When it is too long its messages are cut, all to the same length.
fn history(failures: &[Failure]) -> String {
    let mut failures = Cow::from(failures);
    let mut message_bytes_max = Failure::MESSAGE_BYTES_MAX;
    loop {
        let json = serde_json::to_string(&*failures).expect("failures are plain data");
        if json.len() <= HISTORY_BYTES_MAX || message_bytes_max < 8 {
            return json;
        }
        message_bytes_max /= 2;
        for failure in failures.to_mut() {
            failure.cut(message_bytes_max);
        }
    }
}

fn write_answer(properties: &Properties, to: &mut impl Writer) -> Bytes {
    to.put_property(Property::Kind, ANSWER.into());
    let electron = properties.electron.to_string();
    let own = properties.correlation_id.as_deref();
    to.put_property(Property::CorrelationId, own.unwrap_or(&electron).into());
    let (content_type, body) = match &properties.outcome {
        Ok(payload) => (payload.content_type.as_str(), payload.body.clone()),
        Err(failure) => {
            let body = serde_json::to_vec(failure).expect("a failure is plain data");
            (ContentType::Json.as_str(), body.into())
        }
    };
    to.put_property(Property::ContentType, content_type.into());
    if own.is_some() {
        to.put_header(header::ELECTRON, electron.into());
    }
    to.put_header(header::ATOM, properties.atom.as_str().into());
    to.put_header(header::NODE, properties.node.as_str().into());
    if properties.outcome.is_err() {
        to.put_header(header::STATUS, STATUS_FAILED.into());
    }
    if properties.attempt != 1 {
        to.put_header(header::ATTEMPT, properties.attempt.to_string().into());
    }
    let started_at = humantime::format_rfc3339_micros(properties.started_at);
    to.put_header(header::STARTED_AT, started_at.to_string().into());
    to.put_header(header::DURATION_US, properties.duration.as_micros().to_string().into());
    body
}

fn write_cancel(cancel: &Cancel, to: &mut impl Writer) -> Bytes {
    to.put_property(Property::Kind, CANCEL.into());
    to.put_property(Property::ContentType, ContentType::Json.as_str().into());
    to.put_header(header::SENDER, cancel.sender.as_str().into());
    write_count(header::ROUND, cancel.round, to);
    serde_json::to_vec(&cancel.electrons).expect("ids are plain data").into()
}

impl Message {
    /// Reads a message; what cannot be read comes back [whole](Message::Unreadable).
    ///
    /// `queue` is the atom whose queue it was found in: senders that are not Atomizer need not name it.
    #[must_use]
    pub fn read(parts: &impl Parts, body: Bytes, queue: Option<&AtomId>) -> Self {
        let read = match parts.kind() {
            None | Some(ELECTRON) => decode_electron(parts, &body, queue).map(Self::from),
            Some(ANSWER) => decode_answer(parts, &body).map(Self::from),
            Some(CANCEL) => decode_cancel(parts, &body).map(Self::from),
            Some(other) => Err(format!("unknown type {other:?}")),
        };
        read.unwrap_or_else(|reason| {
            Self::Unreadable(Arc::new(Unreadable { wire: parts.to_wire(body), reason }))
        })
    }

    /// Writes all but the body, and returns that.
    pub fn write(&self, to: &mut impl Writer) -> Bytes {
        match self {
            Self::Electron(electron) => write_electron(electron, to),
            Self::Answer(properties) => write_answer(properties, to),
            Self::Cancel(cancel) => write_cancel(cancel, to),
            Self::Unreadable(unreadable) => {
                unreadable.wire.write(to);
                unreadable.wire.body.clone()
            }
        }
    }

    /// Reads a message that was taken apart; see [`read`](Self::read).
    #[must_use]
    pub fn from_wire(wire: &Wire, queue: Option<&AtomId>) -> Self {
        Self::read(wire, wire.body.clone(), queue)
    }
}

fn check_version(parts: &impl Parts) -> Result<(), String> {
    match read::<u32>(parts, header::VERSION)? {
        Some(version) if version > VERSION => {
            Err(format!("version {version} is newer than {VERSION}, the newest known here"))
        }
        _ => Ok(()),
    }
}

/// What is read of an electron's headers; the others are not ours.
const OF_ELECTRON: [&str; 15] = [
    header::VERSION,
    header::ATOM,
    header::SENDER,
    header::PARENT,
    header::INDEX,
    header::ROUND,
    header::TRIES,
    header::PARENT_LIVES,
    header::ATTEMPT,
    header::LIVES,
    header::PASSES,
    header::POLICY,
    header::TIME_LIMIT_MS,
    header::DEADLINE_MS,
    header::HISTORY,
];

fn decode_electron(
    parts: &impl Parts,
    body: &Bytes,
    queue: Option<&AtomId>,
) -> Result<Electron, String> {
    check_version(parts)?;
    let atom = match (read_text(parts, header::ATOM)?, queue) {
        (Some(atom), Some(queue)) if atom == queue.as_str() => queue.clone(),
        (Some(atom), _) => atom_id(atom)?,
        (None, queue) => require(header::ATOM, queue.cloned())?,
    };
    let id = match parts.id() {
        Some(id) => parse("id", id)?,
        None => ElectronId::new(),
    };
    let index = read(parts, header::INDEX)?.unwrap_or(0);
    let round = read(parts, header::ROUND)?.unwrap_or(0);
    let tries = read(parts, header::TRIES)?.unwrap_or(0);
    let lives = read(parts, header::PARENT_LIVES)?.unwrap_or(0);
    Ok(Electron {
        id,
        atom,
        reply_to: parts.reply_to().map(ReplyTo::new),
        correlation_id: parts.correlation_id().map(ToOwned::to_owned),
        sender: read_text(parts, header::SENDER)?.map(node_id).transpose()?,
        parent: read(parts, header::PARENT)?.map(|id| Parent { id, index, round, tries, lives }),
        policy: read_json(parts, header::POLICY)?,
        attempts: read(parts, header::ATTEMPT)?.unwrap_or(0),
        lives: read(parts, header::LIVES)?.unwrap_or(0),
        passes: read(parts, header::PASSES)?.unwrap_or(0),
        time_limit: read(parts, header::TIME_LIMIT_MS)?.map(Duration::from_millis),
        deadline: read(parts, header::DEADLINE_MS)?.map(Duration::from_millis),
        history: read_json(parts, header::HISTORY)?.unwrap_or_default(),
        payload: payload(parts.content_type(), body.clone()),
        extra: parts.headers_but(&OF_ELECTRON),
    })
}

fn decode_cancel(parts: &impl Parts, body: &Bytes) -> Result<Cancel, String> {
    check_version(parts)?;
    let sender = node_id(require(header::SENDER, read_text(parts, header::SENDER)?)?)?;
    let round = read(parts, header::ROUND)?.unwrap_or(0);
    let electrons = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    Ok(Cancel::new(sender, round, electrons))
}

fn decode_answer(parts: &impl Parts, body: &Bytes) -> Result<Properties, String> {
    check_version(parts)?;
    let required = |name: &str| require(name, read_text(parts, name)?);
    let outcome = match read_text(parts, header::STATUS)?.as_deref() {
        None | Some(STATUS_OK) => Ok(payload(parts.content_type(), body.clone())),
        Some(STATUS_FAILED) => {
            let failure: Failure =
                serde_json::from_slice(body).map_err(|error| error.to_string())?;
            Err(failure)
        }
        Some(other) => return Err(format!("unknown status {other:?}")),
    };
    let started_at = humantime::parse_rfc3339(&required(header::STARTED_AT)?)
        .map_err(|error| format!("{}: {error}", header::STARTED_AT))?;
    let electron: ElectronId = match (read(parts, header::ELECTRON)?, parts.correlation_id()) {
        (Some(electron), _) => electron,
        (None, Some(id)) => parse("correlation_id", id)?,
        (None, None) => return Err(format!("header {} is missing", header::ELECTRON)),
    };
    let own = parts.correlation_id().filter(|id| *id != electron.to_string());
    Ok(Properties {
        electron,
        correlation_id: own.map(ToOwned::to_owned),
        atom: atom_id(required(header::ATOM)?)?,
        node: node_id(required(header::NODE)?)?,
        attempt: read(parts, header::ATTEMPT)?.unwrap_or(1),
        started_at,
        duration: Duration::from_micros(parse(
            header::DURATION_US,
            &required(header::DURATION_US)?,
        )?),
        outcome,
    })
}

fn payload(content_type: Option<&str>, body: Bytes) -> Payload {
    Payload { content_type: content_type.map_or(ContentType::Json, ContentType::from), body }
}

#[cfg(test)]
mod tests;
