//! Events that are kept in memory.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use crate::{
    EventLog, EventReader, EventWriter, NodeId, OpenError, Pack, Position, Read, SessionError,
    clock,
};

/// The events of all nodes that share a [`Memory`](crate::Memory).
#[derive(Clone)]
pub(super) struct MemoryLog(Arc<Log>);

struct Log {
    kept: Mutex<Kept>,
    bytes_max: usize,
    age_max: Duration,
    /// The offset of what is kept next.
    next: watch::Sender<u64>,
}

#[derive(Default)]
struct Kept {
    packs: VecDeque<(SystemTime, Bytes)>,
    /// The offset of the first.
    first: u64,
    bytes: usize,
}

impl MemoryLog {
    pub(super) fn new(bytes_max: usize, age_max: Duration) -> Self {
        let (kept, next) = (Mutex::default(), watch::Sender::new(0));
        Self(Arc::new(Log { kept, bytes_max, age_max, next }))
    }
}

impl Log {
    fn append(&self, pack: Pack) {
        let (now, bytes) = (clock::now(), pack.into_bytes());
        let mut kept = self.lock();
        kept.bytes += bytes.len();
        kept.packs.push_back((now, bytes));
        let is_old = |at: SystemTime| now.duration_since(at).is_ok_and(|age| age > self.age_max);
        while let Some((at, bytes)) = kept.packs.front()
            && (kept.bytes > self.bytes_max || is_old(*at))
        {
            kept.bytes -= bytes.len();
            kept.packs.pop_front();
            kept.first += 1;
        }
        self.next.send_replace(kept.next());
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn next(&self) -> u64 {
        self.first + self.packs.len() as u64
    }

    fn offset(&self, from: Position) -> u64 {
        match from {
            Position::Now => self.next(),
            Position::Start => self.first,
            Position::Offset(offset) => offset.min(self.next()),
            Position::Time(time) => {
                self.first + self.packs.partition_point(|(at, _)| *at < time) as u64
            }
        }
    }

    /// Returns what is kept at an offset, or first after it.
    fn get(&self, offset: u64) -> Option<(u64, Bytes)> {
        let offset = offset.max(self.first);
        let (_, bytes) = self.packs.get(usize::try_from(offset - self.first).ok()?)?;
        Some((offset, bytes.clone()))
    }
}

#[async_trait]
impl EventLog for MemoryLog {
    async fn writer(&self, _node: &NodeId) -> Result<Box<dyn EventWriter>, OpenError> {
        Ok(Box::new(Writer { log: Arc::clone(&self.0), unreported: 0 }))
    }

    async fn reader(&self, from: Position) -> Result<Box<dyn EventReader>, OpenError> {
        let kept = self.0.lock();
        let (offset, caught_up_at) = (kept.offset(from), Some(kept.next()));
        drop(kept);
        let (log, next) = (Arc::clone(&self.0), self.0.next.subscribe());
        Ok(Box::new(Reader { log, next, offset, caught_up_at }))
    }
}

struct Writer {
    log: Arc<Log>,
    unreported: usize,
}

#[async_trait]
impl EventWriter for Writer {
    async fn append(&mut self, pack: Pack) -> Result<(), SessionError> {
        self.log.append(pack);
        self.unreported += 1;
        Ok(())
    }

    async fn kept(&mut self) -> Result<bool, SessionError> {
        let Some(left) = self.unreported.checked_sub(1) else {
            return std::future::pending().await;
        };
        self.unreported = left;
        Ok(true)
    }

    async fn close(self: Box<Self>) {}
}

struct Reader {
    log: Arc<Log>,
    next: watch::Receiver<u64>,
    offset: u64,
    /// Where what came before the reading ends, until that is reached.
    caught_up_at: Option<u64>,
}

#[async_trait]
impl EventReader for Reader {
    async fn next(&mut self) -> Result<Read, SessionError> {
        if let Some(next) = self.caught_up_at.take_if(|end| self.offset >= *end) {
            return Ok(Read::CaughtUp { next: Some(next) });
        }
        loop {
            let kept = self.log.lock().get(self.offset);
            if let Some((offset, bytes)) = kept {
                self.offset = offset + 1;
                return Ok(Read::Pack { offset, bytes });
            }
            // Its sender is in the log, which is here.
            drop(self.next.wait_for(|next| *next > self.offset).await);
        }
    }
}

impl fmt::Debug for MemoryLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryLog({} packs)", self.0.lock().packs.len())
    }
}
