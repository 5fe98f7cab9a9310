//! Where events go in, and come out within the process.

use std::sync::{
    Arc, Mutex, OnceLock, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use ::metrics::Counter;
use tokio::sync::broadcast;

use super::{Event, EventKind, Gather};
use crate::{ConductorId, NodeId, clock, metrics, pack};

/// How many events a subscriber may lag behind before it loses the oldest.
pub(crate) const BACKLOG: usize = 4096;

/// Where a node's events go in. Never waits; costs next to nothing while nobody watches.
#[derive(Debug)]
pub(crate) struct Events {
    node: NodeId,
    tx: broadcast::Sender<Event>,
    /// Kept beside the channel's own count, which takes a lock to read.
    watching: Arc<AtomicUsize>,
    /// Counts what watchers missed.
    lost: Counter,
    /// Held while sending, so that events stand in the order of their numbers.
    last: Mutex<Last>,
    /// What is kept, for each conductor that keeps events.
    gathers: OnceLock<Box<[Arc<Gather>]>>,
}

#[derive(Debug, Default)]
struct Last {
    /// The next number.
    sequence: u64,
    /// An event as it is kept: here so that its memory is used again.
    line: Vec<u8>,
}

impl Events {
    pub(crate) fn new(node: NodeId) -> Self {
        Self {
            node,
            tx: broadcast::Sender::new(BACKLOG),
            watching: Arc::default(),
            lost: metrics::events_missed(),
            last: Mutex::default(),
            gathers: OnceLock::new(),
        }
    }

    /// Says where events are kept, before the first of them.
    pub(crate) fn keep(&self, gathers: Box<[Arc<Gather>]>) {
        if !gathers.is_empty() {
            self.gathers.get_or_init(|| gathers);
        }
    }

    fn gathers(&self) -> &[Arc<Gather>] {
        self.gathers.get().map_or(&[], |gathers| gathers)
    }

    /// Publishes what `kind` makes, if anyone watches.
    pub(crate) fn emit(&self, conductor: Option<&ConductorId>, kind: impl FnOnce() -> EventKind) {
        let gathers = self.gathers();
        if self.watching.load(Ordering::Relaxed) == 0 && gathers.is_empty() {
            return;
        }
        let kind = kind();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        for gather in gathers {
            let events = gather.take_lost();
            if events > 0 {
                self.put_out(&mut last, Some(gather.conductor()), EventKind::EventsLost { events });
            }
        }
        self.put_out(&mut last, conductor, kind);
    }

    fn put_out(&self, last: &mut Last, conductor: Option<&ConductorId>, kind: EventKind) {
        let Last { sequence, line } = last;
        let (node, conductor) = (self.node.clone(), conductor.cloned());
        let event = Event { sequence: *sequence, at: clock::now(), node, conductor, kind };
        *sequence += 1;
        let gathers = self.gathers();
        if !gathers.is_empty() {
            line.clear();
            pack::Line::write(&event, line);
            let severity = event.kind.severity();
            for gather in gathers {
                gather.push(&event, line, severity);
            }
        }
        if self.watching.load(Ordering::Relaxed) > 0 {
            // An error says that the last watcher has just left.
            drop(self.tx.send(event));
        }
    }

    pub(crate) fn subscribe(&self) -> EventStream {
        self.watching.fetch_add(1, Ordering::Relaxed);
        let (rx, watching) = (self.tx.subscribe(), Arc::clone(&self.watching));
        EventStream { rx, watching, lost: self.lost.clone() }
    }
}

/// A view of a node's events, from when it was made on.
///
/// A subscriber that does not keep up loses the oldest events and is told how many; it slows nobody.
#[derive(Debug)]
pub struct EventStream {
    rx: broadcast::Receiver<Event>,
    watching: Arc<AtomicUsize>,
    lost: Counter,
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
            Err(broadcast::error::RecvError::Lagged(events)) => {
                self.lost.increment(events);
                Some(Err(Missed { events }))
            }
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
