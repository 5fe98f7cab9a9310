//! Events as they are kept: many in one message.
//!
//! `docs/events.md` is the description for programs in other languages.

use std::time::SystemTime;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{ConductorId, Event, EventKind, NodeId, Severity, event::rfc3339};

/// The version of the form. What can be read as before keeps it: fields and kinds may be added.
const VERSION: u32 = 1;
/// How long a pack is at the most, unless it is a single event that is longer.
const BYTES_MAX: usize = 64 * 1024;

/// Events of one node, one after the other, as one message.
///
/// The first line of its [bytes](Self::into_bytes) is about the pack, each other is an event, all of them as JSON. Within
/// the process that sends it, it says beside that what a log may sort packs by.
#[derive(Clone, Debug)]
pub struct Pack {
    node: NodeId,
    severity: Severity,
    text: Vec<u8>,
}

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    version: u32,
    node: NodeId,
    /// The number of the first event; those after it have the next ones.
    first: u64,
}

/// One event, without what the first line says of all.
#[derive(Serialize)]
pub(crate) struct Line<'a> {
    #[serde(with = "rfc3339")]
    at: SystemTime,
    #[serde(skip_serializing_if = "Option::is_none")]
    conductor: Option<&'a ConductorId>,
    #[serde(flatten)]
    kind: &'a EventKind,
}

#[derive(Deserialize)]
struct OwnedLine {
    #[serde(with = "rfc3339")]
    at: SystemTime,
    #[serde(default)]
    conductor: Option<ConductorId>,
    #[serde(flatten)]
    kind: EventKind,
}

impl<'a> Line<'a> {
    /// Writes an event as a line, its end included.
    pub(crate) fn write(event: &'a Event, text: &mut Vec<u8>) {
        let Event { at, conductor, kind, .. } = event;
        let line = Self { at: *at, conductor: conductor.as_ref(), kind };
        // To write into memory does not fail, nor does an event that is made of names, numbers and texts.
        if serde_json::to_writer(&mut *text, &line).is_ok() {
            text.push(b'\n');
        }
    }
}

impl Pack {
    /// Begins a pack.
    pub(crate) fn begin(node: &NodeId, first: u64) -> Self {
        let header = Header { version: VERSION, node: node.clone(), first };
        let mut text = Vec::with_capacity(1024);
        if serde_json::to_writer(&mut text, &header).is_ok() {
            text.push(b'\n');
        }
        Self { node: node.clone(), severity: Severity::Debug, text }
    }

    /// Makes a pack without events, for logs that find out by it how far they have been read.
    #[must_use]
    pub fn mark(monitor: &NodeId) -> Self {
        Self::begin(monitor, 0)
    }

    pub(crate) fn push(&mut self, line: &[u8], severity: Severity) {
        self.text.extend_from_slice(line);
        self.severity = self.severity.max(severity);
    }

    pub(crate) fn has_room_for(&self, line: &[u8]) -> bool {
        self.text.len() + line.len() <= BYTES_MAX
    }

    pub(crate) fn len(&self) -> usize {
        self.text.len()
    }

    /// Returns how many events there are in it.
    pub(crate) fn events(&self) -> u64 {
        // One line is about the pack.
        memchr::memchr_iter(b'\n', &self.text).count().saturating_sub(1) as u64
    }

    /// Returns whose events they are.
    #[must_use]
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// Returns the highest severity of its events.
    #[must_use]
    pub fn severity(&self) -> Severity {
        self.severity
    }

    /// Returns it as it is kept.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        self.text.into()
    }
}

/// A pack that was read: its events are read one by one, those that nobody asks for not at all.
#[derive(Debug)]
pub(crate) struct Opened {
    header: Header,
    bytes: Bytes,
    /// Where the first line of an event begins.
    events_at: usize,
    /// Where the next line begins.
    at: usize,
    /// The number of the next event.
    sequence: u64,
}

/// Why a pack cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PackError {
    #[error("no events of Atomizer: {0}")]
    Header(serde_json::Error),
    #[error("events of version {0}, which this program does not know")]
    Version(u32),
}

impl Opened {
    pub(crate) fn open(bytes: Bytes) -> Result<Self, PackError> {
        let end = line_end(&bytes, 0);
        let header: Header = serde_json::from_slice(&bytes[..end]).map_err(PackError::Header)?;
        if header.version > VERSION {
            return Err(PackError::Version(header.version));
        }
        Ok(Self { sequence: header.first, events_at: end, at: end, header, bytes })
    }

    pub(crate) fn node(&self) -> &NodeId {
        &self.header.node
    }

    /// Returns the number of its first event.
    pub(crate) fn first(&self) -> u64 {
        self.header.first
    }

    /// Returns the number that comes after its last event, once all lines were taken.
    pub(crate) fn end(&self) -> u64 {
        self.sequence
    }

    /// Returns when the first event happened of those that are not taken yet.
    pub(crate) fn at(&self) -> Option<SystemTime> {
        self.time_of_line(self.at)
    }

    /// Returns when its first event happened.
    pub(crate) fn began(&self) -> Option<SystemTime> {
        self.time_of_line(self.events_at)
    }

    fn time_of_line(&self, from: usize) -> Option<SystemTime> {
        #[derive(Deserialize)]
        struct At {
            #[serde(with = "rfc3339")]
            at: SystemTime,
        }
        let line = &self.bytes[from..line_end(&self.bytes, from)];
        serde_json::from_slice(line).ok().map(|At { at }| at)
    }

    /// Returns what is not taken yet, unread.
    pub(crate) fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }

    /// Takes all lines without reading them.
    pub(crate) fn skip(&mut self) {
        self.sequence += memchr::memchr_iter(b'\n', self.rest()).count() as u64;
        self.at = self.bytes.len();
    }

    /// Takes the next line, unread, with the number of its event.
    pub(crate) fn next_line(&mut self) -> Option<(u64, Bytes)> {
        let from = self.at;
        if from >= self.bytes.len() {
            return None;
        }
        self.at = line_end(&self.bytes, from);
        self.sequence += 1;
        Some((self.sequence - 1, self.bytes.slice(from..self.at)))
    }

    /// Reads a line. One that cannot be read is of a kind that a later version knows.
    pub(crate) fn event(&self, sequence: u64, line: &[u8]) -> Event {
        let node = self.node().clone();
        match serde_json::from_slice(line) {
            Ok(OwnedLine { at, conductor, kind }) => Event { sequence, at, node, conductor, kind },
            Err(error) => {
                tracing::debug!(%node, sequence, %error, "an event that cannot be read");
                let (at, kind) = (SystemTime::UNIX_EPOCH, EventKind::Other);
                Event { sequence, at, node, conductor: None, kind }
            }
        }
    }
}

/// Returns where the line that begins at `from` ends, its end included.
fn line_end(bytes: &[u8], from: usize) -> usize {
    memchr::memchr(b'\n', &bytes[from..]).map_or(bytes.len(), |at| from + at + 1)
}
