//! The second seam: where the events of all nodes are kept for a while, and read from.
//!
//! It is apart from [`Session`](crate::Session), with connections of its own, for two reasons: nothing that happens to
//! events may hold up or end what carries electrons, and who watches need not be a node.
//!
//! Packs are kept *at least once* and in the order of each node; [`Monitor`](crate::Monitor) leaves out what it has seen
//! by the numbers of the events, so that it returns each once.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{NodeId, OpenError, Pack, SessionError};

/// Keeps the events of the nodes of a conductor; got from [`Conductor::event_log`](crate::Conductor::event_log).
#[async_trait]
pub trait EventLog: fmt::Debug + Send + Sync + 'static {
    /// Begins to write.
    ///
    /// # Errors
    /// [`OpenError`]: it is tried again in any case, for what is refused today may be permitted tomorrow.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind that would not end by itself.
    async fn writer(&self, node: &NodeId) -> Result<Box<dyn EventWriter>, OpenError>;

    /// Begins to read. What is kept already comes first, then [`Read::CaughtUp`] once, and then what comes after that.
    ///
    /// # Errors
    /// [`OpenError`].
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind that would not end by itself.
    async fn reader(&self, from: Position) -> Result<Box<dyn EventReader>, OpenError>;
}

/// Writes to an [`EventLog`]. After an error it is of no use any more.
///
/// How long a step may take is for the writer to say: nobody else limits it. A broker that takes nothing for now is waited for.
#[async_trait]
pub trait EventWriter: Send {
    /// Hands over a pack, without waiting for it to be kept.
    ///
    /// # Errors
    /// [`SessionError`] when the connection is lost.
    ///
    /// # Cancel safety
    /// None: dropping the future leaves unknown whether it was handed over.
    async fn append(&mut self, pack: Pack) -> Result<(), SessionError>;

    /// Waits until the oldest pack that was handed over and not yet reported is kept, or declined: false says that it is not
    /// kept, and that another try would not end otherwise. For ever when there is none.
    ///
    /// # Errors
    /// [`SessionError`] when that is not known, of this pack or of any that was handed over.
    ///
    /// # Cancel safety
    /// Safe.
    async fn kept(&mut self) -> Result<bool, SessionError>;

    /// Ends in order: all that was handed over has been reported.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the rest to the other side's own clean-up.
    async fn close(self: Box<Self>);
}

/// Reads from an [`EventLog`]. After an error it is of no use any more.
#[async_trait]
pub trait EventReader: Send {
    /// Waits for what comes next.
    ///
    /// # Errors
    /// [`SessionError`] when the connection is lost.
    ///
    /// # Cancel safety
    /// Safe: no pack is lost.
    async fn next(&mut self) -> Result<Read, SessionError>;
}

const _: Option<&dyn EventLog> = None;
const _: Option<&dyn EventWriter> = None;
const _: Option<&dyn EventReader> = None;

/// What is read from an [`EventLog`].
#[derive(Clone, Debug)]
pub enum Read {
    /// A pack, as it was kept.
    Pack {
        /// Where it is. Later ones have higher offsets.
        offset: u64,
        /// Its [bytes](Pack::into_bytes).
        bytes: Bytes,
    },
    /// All that was kept when the reading began has been read.
    CaughtUp {
        /// The offset that comes next, or one before it; none where that is not known.
        next: Option<u64>,
    },
}

/// Where reading begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Position {
    /// With what comes from now on.
    #[default]
    Now,
    /// With the oldest that is kept.
    Start,
    /// With the first pack that was kept at this time or later, by the clock of who keeps it. Some earlier ones may come
    /// before it.
    Time(SystemTime),
    /// With the pack that has this offset, or the oldest after it.
    Offset(u64),
}

impl Position {
    /// The position so long ago, by the clock of this machine.
    #[must_use]
    pub fn ago(duration: Duration) -> Self {
        crate::clock::now().checked_sub(duration).map_or(Self::Start, Self::Time)
    }
}

impl FromStr for Position {
    type Err = InvalidPosition;

    /// Parses `now`, `start`, a time as in `2026-11-21T12:00:00Z`, how long ago as in `10m` or `2h 30m`, or an offset as in
    /// `@1234`.
    fn from_str(text: &str) -> Result<Self, InvalidPosition> {
        let invalid = || InvalidPosition(text.chars().take(64).collect());
        match text {
            "now" => return Ok(Self::Now),
            "start" => return Ok(Self::Start),
            _ => {}
        }
        if let Some(offset) = text.strip_prefix('@') {
            return offset.parse().map(Self::Offset).map_err(|_| invalid());
        }
        if let Ok(ago) = humantime::parse_duration(text) {
            return Ok(Self::ago(ago));
        }
        humantime::parse_rfc3339_weak(text).map(Self::Time).map_err(|_| invalid())
    }
}

/// Says that a text names no position.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no position: expected `now`, `start`, how long ago (`10m`), a time (`2026-11-21T12:00:00Z`) or an offset \
     (`@1234`)"
)]
pub struct InvalidPosition(String);
