//! Parked electrons: held by their session through a queue of its own, outside of any window.
//!
//! A delivery is parked by moving it. Its changed form is published to the *lease queue* of the session and
//! confirmed, then the old form is acknowledged; the session itself takes the copy from there and holds it. At
//! every moment one of the two is in a queue:
//!
//! | when | where it is | who gives it back |
//! |---|---|---|
//! | before the confirm | in the queue of its atom, unacknowledged | the broker, with the connection |
//! | until the copy arrives | in the lease queue, ready | the broker, when its time there is up |
//! | while it is held | in the lease queue, unacknowledged | whoever drops the ticket |
//! | when the session is gone | in the lease queue, ready again | the broker, at once or when its time is up |
//!
//! A session gives back by publishing the copy to the queue of the atom, and acknowledging it once that is
//! confirmed. The broker would do it too (it leads what is rejected to the same place), but then nobody can
//! tell when the lease queue is empty: what it has yet to hand on is in none of its counts. And it must not be
//! deleted before: quorum queues refuse `if-empty` (seen with 3.10.8), and a deleted queue loses what it holds.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use atomizer::{Envelope, SendError, SessionError, SettleError, Ticket};
use futures::StreamExt;
use lapin::{Channel, Consumer, message::Delivery, types::ShortString};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::timeout,
};

use crate::{
    convert::PARKED,
    lane::{Command, LaneId},
    life::{CLOSE_TIMEOUT, Life, REPLY_SUCCESS, REQUEST_TIMEOUT},
    publisher::Via,
};

/// How many electrons one session can hold: the largest window that AMQP knows, short of none at all.
pub(crate) const PARKED_MAX: u16 = u16::MAX;

/// How long a confirmed copy may take to arrive. Longer than its time in the lease queue: then it has gone back.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(30);

/// What is known of the copies in the lease queue of a session.
#[derive(Debug)]
pub(crate) struct Leases {
    /// A permit for each copy that may be there.
    room: Arc<Semaphore>,
    /// Whether there may be copies of which nothing is known any more.
    unknown: AtomicBool,
    closing: AtomicBool,
    /// Numbers all copies of the session: a second consumer may be brought what the first one left.
    next: AtomicU64,
}

impl Leases {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            room: Arc::new(Semaphore::new(usize::from(PARKED_MAX))),
            unknown: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            next: AtomicU64::new(0),
        })
    }

    /// From now on nothing is parked any more.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    pub(crate) fn check_open(&self) -> Result<(), SendError> {
        let closing = self.closing.load(Ordering::SeqCst);
        if closing { Err(SendError::NotTaken("the session is closing".to_owned())) } else { Ok(()) }
    }

    /// Waits a while until nothing is in the lease queue; false when that is not known.
    pub(crate) async fn emptied(&self) -> bool {
        let all = self.room.acquire_many(u32::from(PARKED_MAX));
        let emptied = matches!(timeout(CLOSE_TIMEOUT, all).await, Ok(Ok(_)));
        emptied && !self.unknown.load(Ordering::SeqCst)
    }

    /// Makes room for a copy that is about to be published.
    ///
    /// # Errors
    /// [`SendError::NotTaken`] when too many are parked, or the session is closing.
    fn enter(self: &Arc<Self>, copy: &Envelope) -> Result<Parked, SendError> {
        let full = |_| SendError::NotTaken(format!("{PARKED_MAX} electrons are parked"));
        let permit = Arc::clone(&self.room).try_acquire_owned().map_err(full)?;
        // In this order: who closes waits for permits that are out, and lets nobody in after that.
        self.check_open()?;
        let leases = Arc::clone(self);
        Ok(Parked { copy: copy.clone(), gone: false, leases, _permit: permit })
    }
}

/// A way to park: one consumer of the lease queue, and those who wait for what it brings.
#[derive(Debug)]
pub(crate) struct Lease {
    leases: Arc<Leases>,
    /// Of the queue, and of the exchange before it.
    name: ShortString,
    number: u32,
    awaited: Mutex<Awaited>,
}

#[derive(Debug, Default)]
struct Awaited {
    by_mark: HashMap<String, Await>,
    ended: bool,
}

/// A copy that is to come, and who waits for it.
#[derive(Debug)]
struct Await {
    parked: Parked,
    arrived: oneshot::Sender<Ticket>,
}

/// An electron in the lease queue. Unless it is said to be [gone](Self::gone), it may be there still when this
/// is dropped.
#[derive(Debug)]
pub(crate) struct Parked {
    /// What to publish to give it back.
    copy: Envelope,
    gone: bool,
    leases: Arc<Leases>,
    _permit: OwnedSemaphorePermit,
}

impl Parked {
    /// Says that it is acknowledged, or was never published.
    fn gone(mut self) {
        self.gone = true;
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        // Before the permit is returned: with the last of them, the queue passes for empty.
        if !self.gone {
            self.leases.unknown.store(true, Ordering::SeqCst);
        }
    }
}

impl Lease {
    pub(crate) fn new(leases: Arc<Leases>, name: &str, number: u32) -> Arc<Self> {
        Arc::new(Self { leases, name: name.into(), number, awaited: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Awaited> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn name(&self) -> &str {
        self.name.as_str()
    }

    /// The lane of what is parked.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Prepares for a copy that is about to be published.
    ///
    /// # Errors
    /// [`SendError::NotTaken`] when too many are parked, or nothing can be any more.
    pub(crate) fn expect(self: &Arc<Self>, copy: &Envelope) -> Result<Expected, SendError> {
        let parked = self.leases.enter(copy)?;
        let (arrived, arrival) = oneshot::channel();
        let mark = format!("{PARKED}.{}", self.leases.next.fetch_add(1, Ordering::Relaxed));
        let mut awaited = self.lock();
        if awaited.ended {
            parked.gone();
            return Err(SendError::NotTaken("the lease queue was lost".to_owned()));
        }
        awaited.by_mark.insert(mark.clone(), Await { parked, arrived });
        drop(awaited);
        Ok(Expected { lease: Arc::clone(self), mark, arrival })
    }

    /// Nothing comes any more.
    fn end(&self) {
        let mut awaited = self.lock();
        awaited.ended = true;
        awaited.by_mark.clear();
    }
}

/// A copy that is waited for. Whoever drops this before it has arrived leaves it to the broker to give back,
/// which may take the broker minutes: its dead lettering is the last resort.
pub(crate) struct Expected {
    lease: Arc<Lease>,
    mark: String,
    arrival: oneshot::Receiver<Ticket>,
}

impl Expected {
    /// How to publish it.
    pub(crate) fn via(&self) -> Via {
        Via::Lease { exchange: self.lease.name.clone(), mark: self.mark.as_str().into() }
    }

    /// Gives up a copy that was not published, or is not confirmed, and returns why.
    pub(crate) fn failed(self, error: SettleError) -> SettleError {
        let too_large = |error: &SendError| matches!(error, SendError::TooLarge { .. });
        let error = match error {
            SettleError::NotSafe { ticket, failed } => {
                let failed = failed.into_iter().map(|(copy, error)| (copy, no_lease(error)));
                SettleError::NotSafe { ticket, failed: failed.collect() }
            }
            error => error,
        };
        let never_sent = match &error {
            SettleError::NotSafe { failed, .. } => failed.iter().all(|(_, error)| too_large(error)),
            SettleError::Stale => true,
            _ => false,
        };
        if never_sent
            && let Some(Await { parked, .. }) = self.lease.lock().by_mark.remove(&self.mark)
        {
            parked.gone();
        }
        error
    }

    /// Waits for a copy that is confirmed.
    ///
    /// # Errors
    /// [`SettleError::Unknown`] when it does not come: it goes back without us.
    pub(crate) async fn arrival(mut self) -> Result<Ticket, SettleError> {
        let lost = |reason: &str| SettleError::Unknown(SessionError::lost(reason));
        match timeout(ARRIVAL_TIMEOUT, &mut self.arrival).await {
            Ok(arrived) => arrived.map_err(|_| lost("the lease queue was lost")),
            Err(_) => Err(lost("a parked electron did not arrive in time")),
        }
    }
}

/// That there is no lease queue says nothing about who asked: the next try makes one.
fn no_lease(error: SendError) -> SendError {
    match error {
        SendError::Unroutable(_) => SendError::NotTaken("the lease queue was deleted".to_owned()),
        error => error,
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        drop(self.lease.lock().by_mark.remove(&self.mark));
    }
}

/// Takes copies from the lease queue, and hands their tickets to who waits.
pub(crate) struct Receiver {
    pub(crate) id: LaneId,
    pub(crate) lease: Arc<Lease>,
    pub(crate) channel: Channel,
    pub(crate) consumer: Consumer,
    pub(crate) life: Life,
    /// Resolves when the settler has ended.
    pub(crate) settler_gone: oneshot::Receiver<()>,
}

impl Receiver {
    pub(crate) async fn run(mut self) {
        loop {
            tokio::select! {
                next = self.consumer.next() => match next {
                    Some(Ok(delivery)) => self.arrived(&delivery),
                    _ => break,
                },
                _ = &mut self.settler_gone => break,
                _ = self.life.ended() => break,
            }
        }
        // What it holds goes back at once, and not only with the connection.
        let channel = self.channel.clone();
        drop(self);
        drop(timeout(REQUEST_TIMEOUT, channel.close(REPLY_SUCCESS, "ended".into())).await);
    }

    fn arrived(&self, delivery: &Delivery) {
        let tag = delivery.delivery_tag;
        let mark = delivery.properties.app_id().as_ref().map_or("", ShortString::as_str);
        let awaited = self.lease.lock().by_mark.remove(mark);
        let Some(Await { parked, arrived }) = awaited else {
            self.id.lanes.command(self.id.number, Command::Reject { tag });
            return;
        };
        // In this order: whoever has the ticket may settle it at once.
        self.id.lanes.command(self.id.number, Command::Hold { tag, parked });
        // An error says that it came too late, as its time was up: the ticket is dropped, and so gives it back.
        drop(arrived.send(self.id.ticket(tag)));
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.id.lanes.remove(self.id.number);
        self.lease.end();
    }
}

/// What is parked, by its delivery tag: kept by the task that settles it.
#[derive(Default)]
pub(crate) struct Held {
    by_tag: HashMap<u64, (Parked, State)>,
    closing: bool,
}

/// Who has to do with something parked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The holder of its ticket.
    Out,
    /// The settler.
    Settling,
    /// The settler, on behalf of nobody.
    GivingBack,
}

impl Held {
    /// Takes in what has arrived. Returns what is to be given back at once.
    pub(crate) fn hold(&mut self, tag: u64, parked: Parked) -> Option<(u64, Envelope)> {
        self.by_tag.insert(tag, (parked, State::Out));
        if self.closing { self.give_back(tag) } else { None }
    }

    fn change(&mut self, tag: u64, from: State, to: State) -> Option<&Parked> {
        let (parked, state) = self.by_tag.get_mut(&tag)?;
        (*state == from).then(|| {
            *state = to;
            &*parked
        })
    }

    /// Begins to settle; false when it has gone back already.
    pub(crate) fn settle(&mut self, tag: u64) -> bool {
        self.change(tag, State::Out, State::Settling).is_some()
    }

    /// Begins to give back; nothing when that or something else has begun already.
    pub(crate) fn give_back(&mut self, tag: u64) -> Option<(u64, Envelope)> {
        let parked = self.change(tag, State::Out, State::GivingBack)?;
        Some((tag, parked.copy.clone()))
    }

    /// Begins to give back everything, and what arrives later as soon as it does.
    pub(crate) fn give_back_all(&mut self) -> Vec<(u64, Envelope)> {
        self.closing = true;
        let tags: Vec<_> = self.by_tag.keys().copied().collect();
        tags.into_iter().filter_map(|tag| self.give_back(tag)).collect()
    }

    /// Notes that a settlement was not safe; false when nobody is there to choose another outcome.
    pub(crate) fn not_safe(&mut self, tag: u64) -> bool {
        self.change(tag, State::Settling, State::Out).is_some()
    }

    /// Notes that it is acknowledged.
    pub(crate) fn gone(&mut self, tag: u64) {
        if let Some((parked, _)) = self.by_tag.remove(&tag) {
            parked.gone();
        }
    }

    /// Notes that it is rejected. The broker does not say when it has handed it on.
    pub(crate) fn rejected(&mut self, tag: u64) {
        drop(self.by_tag.remove(&tag));
    }
}
