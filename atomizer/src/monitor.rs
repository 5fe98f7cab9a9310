//! Watching over a cluster: the events of all its nodes, from any process.

mod bookmark;
mod filter;
mod nodes;
mod story;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::future::BoxFuture;

use crate::{
    Conductor, ConductorId, Event, EventLog, EventReader, NodeId, OpenError, Position, Read,
    SessionError,
    link::{backoff, guard, next},
    pack::Opened,
};

pub use bookmark::{Bookmark, InvalidBookmark};
pub use filter::Filter;
pub use nodes::{NodeState, NodeStatus, Nodes};
pub use story::{Story, Whereabouts};

/// How long a log may take to be opened.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// Reads the events of all nodes of a conductor: those that are kept, and those that come.
///
/// It need not be a node, nor run where one does: it is given the same conductor as they are. Each event comes once, in
/// the order of its node; events of different nodes come about in the order of time.
///
/// ```
/// use std::time::Duration;
/// use atomizer::{AtomId, EventKind, Filter, Monitor, Position, Seen, Severity, prelude::*};
///
/// # struct Greet;
/// # impl Atom for Greet {
/// #     const ID: &'static str = "greet";
/// #     type Input = String;
/// #     type Output = String;
/// #     async fn process(&self, _cx: &Context, name: String) -> Result<String> { Ok(name) }
/// # }
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let memory = Memory::new().keep_events(1_000_000, Duration::from_secs(3600));
/// let atomizer = Atomizer::builder().conductor(memory.clone()).atom(Greet).start().await?;
/// atomizer.call::<Greet>("world".into()).await?;
/// atomizer.drain().await?;
///
/// let filter = Filter::new().severity(Severity::Info).atom(AtomId::of::<Greet>());
/// let mut events = Monitor::new(&memory)?.from(Position::Start).filter(filter).open().await?;
/// let Seen::Event(event) = events.next().await else { panic!("it is the first") };
/// assert!(matches!(event.kind, EventKind::Completed { .. }));
/// assert!(matches!(events.next().await, Seen::CaughtUp));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Monitor {
    log: Arc<dyn EventLog>,
    from: Position,
    after: Option<Bookmark>,
    filter: Filter,
}

impl Monitor {
    /// Watches over the nodes of a conductor, beginning now.
    ///
    /// # Errors
    /// [`MonitorError::NotKept`] where the conductor keeps no events.
    pub fn new(conductor: &impl Conductor) -> Result<Self, MonitorError> {
        let log = conductor
            .event_log()
            .ok_or_else(|| MonitorError::NotKept { conductor: conductor.id().clone() })?;
        Ok(Self { log, from: Position::Now, after: None, filter: Filter::new() })
    }

    /// Says where to begin; with what comes from now on unless told.
    #[must_use]
    pub fn from(mut self, position: Position) -> Self {
        self.from = position;
        self
    }

    /// Goes on where another monitor was, so that both together see each event once.
    #[must_use]
    pub fn after(mut self, bookmark: Bookmark) -> Self {
        self.after = Some(bookmark);
        self
    }

    /// Says which events are returned; all unless told.
    #[must_use]
    pub fn filter(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// Begins to read.
    ///
    /// # Errors
    /// [`MonitorError::Open`] when the log cannot be reached, or may not be read.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn open(self) -> Result<ClusterEvents, MonitorError> {
        let Self { log, from, after, filter } = self;
        let place = after.unwrap_or_default();
        let from = place.offset.map_or(from, Position::Offset);
        let reader = open(Arc::clone(&log), from).await?;
        Ok(ClusterEvents {
            log,
            filter,
            until: None,
            from,
            place,
            pack: None,
            reading: Reading::Open(reader),
            pauses: Box::new(backoff()),
            caught_up: false,
        })
    }
}

async fn open(log: Arc<dyn EventLog>, from: Position) -> Result<Box<dyn EventReader>, OpenError> {
    let opened = guard(OPEN_TIMEOUT, log.reader(from)).await;
    opened.unwrap_or_else(|fault| Err(OpenError::Unreachable(fault.to_string())))
}

/// What a [`Monitor`] sees.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Seen {
    /// Something happened.
    Event(Event),
    /// So many events of a node are not there: they were not kept, or are kept no more.
    Missed {
        /// The node.
        node: NodeId,
        /// How many of its events.
        events: u64,
    },
    /// All that was there when the reading began has been returned. Comes once, also over many connections.
    CaughtUp,
    /// The connection is lost. It is made anew by and by, and nothing is missed by that.
    Interrupted {
        /// Why.
        reason: String,
    },
}

/// The events of a cluster, as they come. Made by [`Monitor::open`].
pub struct ClusterEvents {
    log: Arc<dyn EventLog>,
    filter: Filter,
    /// What this node tells later than that is not read, nor what comes after it.
    until: Option<(NodeId, SystemTime)>,
    /// Where the next reader begins.
    from: Position,
    place: Bookmark,
    /// What is read at the moment.
    pack: Option<Opened>,
    reading: Reading,
    pauses: Box<dyn Iterator<Item = Duration> + Send>,
    caught_up: bool,
}

/// How the log is read. What is under way is kept here, not in a future that may be dropped: who looks for a second at a
/// time gets connected all the same.
enum Reading {
    Open(Box<dyn EventReader>),
    Opening(BoxFuture<'static, Result<Box<dyn EventReader>, OpenError>>),
}

impl ClusterEvents {
    /// Waits for what comes next.
    ///
    /// # Cancel safety
    /// Safe: nothing is lost.
    pub async fn next(&mut self) -> Seen {
        loop {
            if let Some(seen) = self.next_of_pack() {
                return seen;
            }
            let reader = match &mut self.reading {
                Reading::Open(reader) => reader,
                Reading::Opening(opening) => {
                    match opening.await {
                        Ok(reader) => self.reading = Reading::Open(reader),
                        Err(error) => {
                            tracing::debug!(%error, "events cannot be read for now");
                            self.reopen();
                        }
                    }
                    continue;
                }
            };
            let read = guard(None, reader.next()).await;
            match read.unwrap_or_else(|fault| Err(SessionError::lost(fault))) {
                Ok(Read::Pack { offset, bytes }) => {
                    self.pauses = Box::new(backoff());
                    self.begin(offset, bytes);
                    if let Some(missed) = self.missed() {
                        return missed;
                    }
                    if self.is_past() {
                        return Seen::CaughtUp;
                    }
                }
                Ok(Read::CaughtUp { next }) => {
                    if let Some(next) = next {
                        self.go_on_at(self.place.offset.map_or(next, |here| here.max(next)));
                    }
                    if !std::mem::replace(&mut self.caught_up, true) {
                        return Seen::CaughtUp;
                    }
                }
                Err(error) => {
                    self.reopen();
                    return Seen::Interrupted { reason: error.to_string() };
                }
            }
        }
    }

    /// Reads no further than to what a node tells of a later time. Then comes [`Seen::CaughtUp`], though it may have come.
    fn until(&mut self, node: &NodeId, time: SystemTime) {
        self.until = Some((node.clone(), time));
    }

    /// Returns where this is, for a monitor that goes on [after](Monitor::after) what was returned so far.
    #[must_use]
    pub fn bookmark(&self) -> Bookmark {
        self.place.clone()
    }

    /// Takes up a pack.
    fn begin(&mut self, offset: u64, bytes: bytes::Bytes) {
        self.go_on_at(offset);
        match Opened::open(bytes) {
            Ok(pack) => self.pack = Some(pack),
            Err(error) => {
                tracing::warn!(offset, %error, "something else is kept among the events");
                self.end();
            }
        }
    }

    /// Whether the pack begins later than is to be read.
    fn is_past(&self) -> bool {
        let (Some(pack), Some((node, until))) = (&self.pack, &self.until) else { return false };
        pack.node() == node && pack.at().is_some_and(|at| at > *until)
    }

    /// Returns how much is missing before the pack, if that can be told.
    fn missed(&mut self) -> Option<Seen> {
        let pack = self.pack.as_ref()?;
        let expected = self.place.expected(pack.node())?;
        let events = pack.first().checked_sub(expected)?;
        if events == 0 {
            return None;
        }
        let node = pack.node().clone();
        // It is told once, also when another goes on from here.
        self.place.advance(&node, pack.first(), pack.at());
        Some(Seen::Missed { node, events })
    }

    /// Returns the next event of the pack that is wanted.
    fn next_of_pack(&mut self) -> Option<Seen> {
        let Self { pack: Some(pack), place, filter, .. } = self else { return None };
        let expected = place.expected(pack.node()).unwrap_or(0);
        if !filter.may_fit(pack) {
            pack.skip();
        }
        while let Some((sequence, line)) = pack.next_line() {
            if sequence < expected || !filter.may_fit_line(&line) {
                continue;
            }
            let event = pack.event(sequence, &line);
            if filter.fits(&event) {
                place.advance(pack.node(), sequence + 1, Some(event.at));
                return Some(Seen::Event(event));
            }
        }
        self.end();
        None
    }

    /// Lets go of the pack: all of it has been returned.
    fn end(&mut self) {
        if let Some(pack) = self.pack.take() {
            self.place.advance(pack.node(), pack.end(), pack.began());
        }
        if let Some(offset) = self.place.offset {
            self.go_on_at(offset + 1);
        }
    }

    fn go_on_at(&mut self, offset: u64) {
        self.place.offset = Some(offset);
        self.from = Position::Offset(offset);
    }

    /// Begins to connect anew.
    fn reopen(&mut self) {
        let (log, from, pause) = (Arc::clone(&self.log), self.from, next(&mut self.pauses));
        self.reading = Reading::Opening(Box::pin(async move {
            tokio::time::sleep(pause).await;
            open(log, from).await
        }));
    }
}

impl fmt::Debug for ClusterEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterEvents")
            .field("log", &self.log)
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

/// Why a cluster cannot be watched.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MonitorError {
    /// The conductor keeps no events.
    #[error("{conductor} keeps no events")]
    NotKept {
        /// Which.
        conductor: ConductorId,
    },
    /// The events cannot be read.
    #[error("failed to read the events of the cluster")]
    Open(#[from] OpenError),
}
