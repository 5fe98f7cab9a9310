//! One life of a connection to the queues.

use std::{
    fmt,
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use rustc_hash::FxHashMap;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until},
};

use super::{
    Memory,
    queues::{Broker, QueueName, Stored, check_size, result_address},
};
use crate::{
    Address, AtomId, Census, Delivery, Electron, Envelope, Epoch, Limits, Message, Outcome,
    Release, ReplyTo, ResultsId, SendError, Session, SessionError, SettleError, Source,
    Subscription, Ticket,
};

pub(super) struct MemorySession {
    broker: Arc<Broker>,
    limits: Limits,
    epoch: Epoch,
    lanes: Arc<Lanes>,
    ended: watch::Sender<Option<SessionError>>,
    reply_to: ReplyTo,
}

/// The subscriptions of a session. Its own allocation, because tickets refer to it and must not keep the
/// session alive.
#[derive(Default)]
struct Lanes {
    all: Mutex<Vec<Arc<Lane>>>,
}

/// One subscription, and what it has delivered.
struct Lane {
    broker: Arc<Broker>,
    queue: QueueName,
    window: usize,
    bell: Arc<Notify>,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    next_key: u64,
    by_key: FxHashMap<u64, Stored>,
    /// Those of them that no longer count against the window.
    parked: usize,
    ended: Option<SessionError>,
}

/// The highest bit of a key says that the delivery is parked.
const PARKED: u64 = 1 << 63;

impl Held {
    fn insert(&mut self, stored: Stored, parked: u64) -> u64 {
        let key = self.next_key | parked;
        self.next_key += 1;
        self.parked += usize::from(parked != 0);
        self.by_key.insert(key, stored);
        key
    }

    fn remove(&mut self, key: u64) -> Option<Stored> {
        let stored = self.by_key.remove(&key)?;
        self.parked -= usize::from(key & PARKED != 0);
        Some(stored)
    }
}

impl Lanes {
    fn get(&self, channel: u32) -> Option<Arc<Lane>> {
        self.lock().get(channel as usize).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Lane>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Release for Lanes {
    fn release(&self, channel: u32, key: u64) {
        if let Some(lane) = self.get(channel) {
            let stored = lane.lock().remove(key);
            lane.put_back(stored);
        }
    }
}

impl Lane {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts deliveries back in front of the queue, as they were but for the count.
    fn put_back(&self, stored: impl IntoIterator<Item = Stored>) {
        let mut broker = self.broker.lock();
        let queue = broker.queues.entry(self.queue.clone()).or_default();
        for mut stored in stored {
            stored.redeliveries += 1;
            queue.ready.push_front(stored);
        }
        queue.ring();
        drop(broker);
        self.bell.notify_one();
    }

    /// Is rung for no more.
    fn leave(&self) {
        if let Some(queue) = self.broker.lock().queues.get_mut(&self.queue) {
            queue.subscribers.retain(|bell| !Arc::ptr_eq(bell, &self.bell));
        }
    }

    fn end(&self, error: &SessionError) {
        let mut held = self.lock();
        held.ended.get_or_insert_with(|| error.clone());
        let mut stored: Vec<_> = held.by_key.drain().collect();
        held.parked = 0;
        drop(held);
        self.leave();
        stored.sort_unstable_by_key(|(key, _)| std::cmp::Reverse(*key));
        self.put_back(stored.into_iter().map(|(_, stored)| stored));
    }
}

impl MemorySession {
    pub(super) fn new(broker: Arc<Broker>, limits: Limits, reply_to: ReplyTo) -> Self {
        Self {
            broker,
            limits,
            epoch: Epoch::unique(),
            lanes: Arc::default(),
            ended: watch::Sender::new(None),
            reply_to,
        }
    }

    pub(super) fn end(&self, error: &SessionError) {
        // First this, then the lanes: who subscribes in between finds one or the other.
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(error.clone());
            first
        });
        for lane in self.lanes.lock().iter() {
            lane.end(error);
        }
    }

    fn check_open(&self) -> Result<(), SessionError> {
        self.ended.borrow().clone().map_or(Ok(()), Err)
    }

    /// Settles a batch under one lock. What must be dropped is left in `dropped`: a ticket that is dropped
    /// locks again.
    fn settle_all(
        &self,
        batch: Vec<(Ticket, Outcome)>,
        dropped: &mut Vec<Ticket>,
    ) -> Vec<Result<(), SettleError>> {
        let lanes = self.lanes.lock();
        let mut broker = self.broker.lock();
        let settle = |(ticket, outcome): (Ticket, Outcome)| {
            if ticket.epoch() != self.epoch {
                dropped.push(ticket);
                return Err(SettleError::Stale);
            }
            let emit = match outcome {
                Outcome::Done { emit, .. } => emit,
                Outcome::Take {} => Vec::new(),
                Outcome::Release {} => {
                    dropped.push(ticket);
                    return Ok(());
                }
            };
            let (channel, key) = ticket.take();
            let lane = lanes.get(channel as usize).ok_or(SettleError::Stale)?;
            let mut held = lane.lock();
            // Gone when the session has ended: it is on its way to someone else.
            let stored = held.remove(key).ok_or(SettleError::Stale)?;
            let put = |envelope| broker.put(envelope, self.limits).err();
            let failed: Vec<_> = emit.into_iter().filter_map(put).collect();
            if failed.is_empty() {
                lane.bell.notify_one();
                return Ok(());
            }
            let key = held.insert(stored, key & PARKED);
            let ticket = Ticket::new(self.epoch, channel, key, self.release());
            Err(SettleError::NotSafe { ticket, failed })
        };
        batch.into_iter().map(settle).collect()
    }

    fn release(&self) -> Arc<dyn Release> {
        Arc::clone(&self.lanes) as _
    }

    async fn send_one(&self, envelope: &Envelope) -> Result<(), SendError> {
        loop {
            if let Err(error) = self.check_open() {
                return Err(SendError::Unknown(error.to_string()));
            }
            let room = {
                let mut broker = self.broker.lock();
                match broker.queue(&envelope.to) {
                    // Made under the lock: it hears of whatever is taken out from here on.
                    Some(queue) if queue.len() >= Memory::QUEUE_LENGTH_MAX => {
                        Arc::clone(&queue.room).notified_owned()
                    }
                    _ => {
                        return broker
                            .put(envelope.clone(), self.limits)
                            .map_err(|(_, error)| error);
                    }
                }
            };
            tokio::select! {
                () = room => {}
                _ = self.ended() => {}
            }
        }
    }
}

#[async_trait]
impl Session for MemorySession {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn reply_to(&self) -> ReplyTo {
        self.reply_to.clone()
    }

    async fn subscribe(
        &self,
        source: Source,
        window: NonZeroUsize,
    ) -> Result<Box<dyn Subscription>, SessionError> {
        self.check_open()?;
        let queue = match source {
            Source::Atom(atom) => QueueName::Atom(atom),
            Source::Inbox => QueueName::Inbox(self.reply_to.clone()),
            Source::Results(id) => QueueName::Inbox(result_address(&id)),
        };
        let bell = Arc::new(Notify::new());
        let lane = Arc::new(Lane {
            broker: Arc::clone(&self.broker),
            queue: queue.clone(),
            window: window.get(),
            bell: Arc::clone(&bell),
            held: Mutex::default(),
        });
        let channel = {
            let mut lanes = self.lanes.lock();
            lanes.push(Arc::clone(&lane));
            u32::try_from(lanes.len() - 1).expect("fewer than 2^32 subscriptions")
        };
        self.broker.lock().queues.entry(queue).or_default().subscribers.push(bell);
        if let Err(error) = self.check_open() {
            lane.end(&error);
            return Err(error);
        }
        Ok(Box::new(MemorySubscription {
            lane,
            epoch: self.epoch,
            channel,
            lanes: Arc::clone(&self.lanes),
        }))
    }

    async fn send(&self, envelopes: &[Envelope]) -> Vec<Result<(), SendError>> {
        let mut results = Vec::with_capacity(envelopes.len());
        for envelope in envelopes {
            results.push(self.send_one(envelope).await);
        }
        results
    }

    async fn settle(&self, batch: Vec<(Ticket, Outcome)>) -> Vec<Result<(), SettleError>> {
        let mut dropped = Vec::new();
        let results = self.settle_all(batch, &mut dropped);
        drop(dropped);
        results
    }

    async fn park(&self, ticket: Ticket, changed: Arc<Electron>) -> Result<Ticket, SettleError> {
        if ticket.epoch() != self.epoch {
            return Err(SettleError::Stale);
        }
        let lane = self.lanes.get(ticket.channel()).ok_or(SettleError::Stale)?;
        let to = Address::Atom(changed.atom.clone());
        let changed = Message::Electron(changed);
        if let Err(error) = check_size(&changed, self.limits) {
            let failed = vec![(Envelope::new(to, changed), error)];
            return Err(SettleError::NotSafe { ticket, failed });
        }
        let (channel, key) = ticket.take();
        let key = {
            let mut held = lane.lock();
            let stored = held.remove(key).ok_or(SettleError::Stale)?;
            held.insert(Stored { message: changed, ..stored }, PARKED)
        };
        lane.bell.notify_one();
        Ok(Ticket::new(self.epoch, channel, key, self.release()))
    }

    async fn census(&self, atom: &AtomId) -> Result<Census, SessionError> {
        self.check_open()?;
        let broker = self.broker.lock();
        let queue = broker.queues.get(&QueueName::Atom(atom.clone()));
        Ok(queue.map_or(Census::new(0, 0), |queue| {
            Census::new(queue.len() as u64, queue.subscribers.len() as u64)
        }))
    }

    async fn make_results(&self, id: &ResultsId) -> Result<ReplyTo, SendError> {
        let address = result_address(id);
        self.broker.lock().queues.entry(QueueName::Inbox(address.clone())).or_default();
        Ok(address)
    }

    async fn ended(&self) -> SessionError {
        let mut ended = self.ended.subscribe();
        let error = ended.wait_for(Option::is_some).await.ok().and_then(|error| error.clone());
        error.unwrap_or(SessionError::Closed)
    }

    async fn close(&self) {
        self.end(&SessionError::Closed);
        self.broker.lock().queues.remove(&QueueName::Inbox(self.reply_to.clone()));
    }
}

impl Drop for MemorySession {
    fn drop(&mut self) {
        self.end(&SessionError::Closed);
    }
}

impl fmt::Debug for MemorySession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemorySession({:?})", self.epoch)
    }
}

struct MemorySubscription {
    lane: Arc<Lane>,
    epoch: Epoch,
    channel: u32,
    lanes: Arc<Lanes>,
}

impl MemorySubscription {
    /// Makes ready what is due, and lets the others look first: they have waited for the same moment, and
    /// whoever's timer is the first would have it each time.
    async fn ripen(&self) {
        if let Some(queue) = self.lane.broker.lock().queues.get_mut(&self.lane.queue) {
            queue.ripen();
            queue.ring();
        }
        tokio::task::yield_now().await;
    }

    /// Returns what is ready, or when something kept back will be.
    fn try_next(
        &self,
        max: NonZeroUsize,
    ) -> Result<Result<Vec<Delivery>, Option<Instant>>, SessionError> {
        // Both locks at once, queue before lane, so that nothing is in neither when the session ends.
        let mut broker = self.lane.broker.lock();
        let mut held = self.lane.lock();
        if let Some(error) = &held.ended {
            return Err(error.clone());
        }
        let Some(queue) = broker.queues.get_mut(&self.lane.queue) else {
            return Ok(Err(None));
        };
        let due = queue.ripen();
        let free = self.lane.window.saturating_sub(held.by_key.len() - held.parked);
        let count = max.get().min(free).min(queue.ready.len());
        if count == 0 {
            return Ok(Err(due));
        }
        let mut deliveries = Vec::with_capacity(count);
        let now = Instant::now();
        for stored in queue.ready.drain(..count) {
            let (message, redeliveries, since) =
                (stored.message.clone(), stored.redeliveries, stored.since);
            let key = held.insert(stored, 0);
            let lanes: Arc<dyn Release> = Arc::clone(&self.lanes) as _;
            let ticket = Ticket::new(self.epoch, self.channel, key, lanes);
            let delivery = Delivery::new(message, redeliveries, ticket);
            deliveries.push(delivery.waited(now.saturating_duration_since(since)));
        }
        queue.room.notify_waiters();
        Ok(Ok(deliveries))
    }
}

#[async_trait]
impl Subscription for MemorySubscription {
    async fn next(&mut self, max: NonZeroUsize) -> Result<Vec<Delivery>, SessionError> {
        loop {
            let due = match self.try_next(max)? {
                Ok(deliveries) => return Ok(deliveries),
                Err(due) => due,
            };
            let rung = self.lane.bell.notified();
            match due {
                Some(due) => tokio::select! {
                    () = rung => {}
                    () = sleep_until(due) => self.ripen().await,
                },
                None => rung.await,
            }
        }
    }

    async fn stop(&mut self) {
        self.lane.leave();
    }
}

impl Drop for MemorySubscription {
    fn drop(&mut self) {
        self.lane.leave();
    }
}
