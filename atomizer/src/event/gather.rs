//! Events on their way to where they are kept: gathered into packs, within bounds.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use ::metrics::Counter;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until, timeout_at},
};

use super::{Event, Severity};
use crate::{ConductorId, NodeId, Pack, metrics};

/// How long an event waits for others to share its pack.
const LATE_MAX: Duration = Duration::from_millis(100);
/// How much may wait while the log takes nothing. What comes beyond it is lost, and counted.
const GATHERED_BYTES_MAX: usize = 8 * 1024 * 1024;

/// What one conductor's log is to be given.
#[derive(Debug)]
pub(crate) struct Gather {
    node: NodeId,
    conductor: ConductorId,
    gathered: Mutex<Gathered>,
    /// Counts what is lost.
    lost: Counter,
    /// Rung when the first event of a pack is there, a pack is full, or all is over.
    bell: Notify,
}

#[derive(Debug, Default)]
struct Gathered {
    full: VecDeque<Pack>,
    open: Option<Open>,
    /// Of all that is full.
    bytes: usize,
    lost: u64,
    closed: bool,
}

/// A pack that others may join.
#[derive(Debug)]
struct Open {
    pack: Pack,
    since: Instant,
}

impl Gather {
    pub(crate) fn new(node: NodeId, conductor: ConductorId) -> Self {
        let lost = metrics::events_not_kept(&conductor);
        Self { node, conductor, gathered: Mutex::default(), lost, bell: Notify::new() }
    }

    pub(super) fn conductor(&self) -> &ConductorId {
        &self.conductor
    }

    /// Returns how many events were lost since this was last asked, once there is room to say so.
    pub(super) fn take_lost(&self) -> u64 {
        let mut gathered = self.lock();
        if gathered.bytes < GATHERED_BYTES_MAX / 2 { std::mem::take(&mut gathered.lost) } else { 0 }
    }

    /// Adds an event, `line` being its form in a pack.
    pub(super) fn push(&self, event: &Event, line: &[u8], severity: Severity) {
        let mut gathered = self.lock();
        let gathered = &mut *gathered;
        if gathered.closed {
            return;
        }
        if gathered.bytes >= GATHERED_BYTES_MAX {
            gathered.lost += 1;
            self.lost.increment(1);
            // The numbers of a pack have no gap.
            gathered.seal();
            return;
        }
        if gathered.open.as_ref().is_some_and(|open| !open.pack.has_room_for(line)) {
            gathered.seal();
            self.bell.notify_one();
        }
        match &mut gathered.open {
            Some(open) => open.pack.push(line, severity),
            None => {
                let mut pack = Pack::begin(&self.node, event.sequence);
                pack.push(line, severity);
                gathered.open = Some(Open { pack, since: Instant::now() });
                self.bell.notify_one();
            }
        }
    }

    /// Takes note of a pack that the log declined.
    pub(crate) fn declined(&self, pack: &Pack) {
        let events = pack.events();
        self.lock().lost += events;
        self.lost.increment(events);
    }

    /// Says that nothing comes any more.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.bell.notify_one();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Waits for the next pack: a full one, or what there is after [`LATE_MAX`]. None when there will be no more.
    ///
    /// Cancel safe: what it takes it returns at once. For one task only.
    pub(crate) async fn next(&self) -> Option<Pack> {
        loop {
            let ready_at = {
                let mut gathered = self.lock();
                if let Some(pack) = gathered.full.pop_front() {
                    gathered.bytes -= pack.len();
                    return Some(pack);
                }
                let is_ready = |open: &mut Open| open.since.elapsed() >= LATE_MAX;
                let closed = gathered.closed;
                if let Some(open) = gathered.open.take_if(|open| closed || is_ready(open)) {
                    return Some(open.pack);
                }
                if closed {
                    return None;
                }
                gathered.open.as_ref().map(|open| open.since + LATE_MAX)
            };
            match ready_at {
                // An error says that it is time.
                Some(at) => drop(timeout_at(at, self.bell.notified()).await),
                None => self.bell.notified().await,
            }
        }
    }

    /// Waits for a moment, or less when all is over: the log cannot be written.
    pub(crate) async fn pause(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while !self.lock().closed && Instant::now() < until {
            tokio::select! {
                () = sleep_until(until) => {}
                () = self.bell.notified() => {}
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Gathered> {
        // A panic cannot leave more behind than a pack without its last line.
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gathered {
    fn seal(&mut self) {
        if let Some(Open { pack, .. }) = self.open.take() {
            self.bytes += pack.len();
            self.full.push_back(pack);
        }
    }
}
