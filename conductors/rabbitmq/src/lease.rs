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
//! A broker loses its patience with what is held for long. So what has been held for as long as the session may
//! hold anything is *renewed*: its copy is published to the lease queue once more, and the held one is
//! acknowledged when the new one is here. The ticket knows it by a number of ours, and means whichever of them is
//! held:
//!
//! | when | where it is | what the ticket means |
//! |---|---|---|
//! | before the renewal, and when it fails | in the lease queue, unacknowledged | that |
//! | until the new copy arrives | in the lease queue, unacknowledged; and ready, or on its way | the old one, and what is done with the ticket waits |
//! | from then on | in the lease queue, unacknowledged: the old one too, until its acknowledgement is there | the new one |
//! | when the session ends in between | in the lease queue, ready: both | nothing; it comes twice |
//!
//! A copy that does not arrive in time has gone back without us: then the electron comes a second time, while it
//! is held.
//!
//! A session gives back by publishing the copy to the queue of the atom, and acknowledging it once that is
//! confirmed. The broker would do it too (it leads what is rejected to the same place), but then nobody can
//! tell when the lease queue is empty: what it has yet to hand on is in none of its counts. And it must not be
//! deleted before: quorum queues refuse `if-empty` (seen with 3.10.8), and a deleted queue loses what it holds.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use atomizer::{Envelope, Message, SendError, SessionError, SettleError, Ticket};
use futures::StreamExt;
use lapin::{Channel, Consumer, message::Delivery, types::ShortString};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, timeout},
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

/// How many are renewed at a time, and each second at the least: what was parked at once is not published again at
/// once. All that can be parked takes four minutes.
const RENEWING_MAX: u16 = 256;
/// How long after a renewal that failed, or that there was no room for, the next is tried.
const RENEW_AGAIN_AFTER: Duration = Duration::from_secs(1);

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

    /// Makes room for a copy that is about to be published; some is kept for those that take the place of others.
    ///
    /// # Errors
    /// [`SendError::NotTaken`] when too many are parked, or the session is closing.
    fn enter(self: &Arc<Self>, copy: &Envelope, for_whom: &Waiter) -> Result<Parked, SendError> {
        let full = || SendError::NotTaken(format!("{PARKED_MAX} electrons are parked"));
        let kept = if matches!(for_whom, Waiter::Renewal(_)) { 0 } else { RENEWING_MAX.into() };
        if self.room.available_permits() <= kept {
            return Err(full());
        }
        let permit = Arc::clone(&self.room).try_acquire_owned().map_err(|_| full())?;
        // In this order: who closes waits for permits that are out, and lets nobody in after that.
        self.check_open()?;
        let leases = Arc::clone(self);
        let since = Instant::now();
        Ok(Parked { copy: copy.clone(), since, gone: false, leases, _permit: permit })
    }
}

/// A way to park: one consumer of the lease queue, and those who wait for what it brings.
#[derive(Debug)]
pub(crate) struct Lease {
    leases: Arc<Leases>,
    /// Of the queue, and of the exchange before it.
    name: ShortString,
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
    /// By which it is known when it is held.
    key: u64,
    waiter: Waiter,
}

/// Who waits for a copy.
#[derive(Debug)]
enum Waiter {
    /// Who parks.
    Ticket(oneshot::Sender<Ticket>),
    /// The settler, which holds an older copy by this key.
    Renewal(u64),
}

/// An electron in the lease queue. Unless it is said to be [gone](Self::gone), it may be there still when this
/// is dropped.
#[derive(Debug)]
pub(crate) struct Parked {
    copy: Envelope,
    /// When it became what it is.
    since: Instant,
    gone: bool,
    leases: Arc<Leases>,
    _permit: OwnedSemaphorePermit,
}

impl Parked {
    /// What to publish to give it back, or to renew it: with what is left of its deadline.
    fn copy(&self) -> Envelope {
        let mut copy = self.copy.clone();
        if let Message::Electron(electron) = &mut copy.message
            && let Some(deadline) = electron.deadline
        {
            let left = deadline.saturating_sub(self.since.elapsed());
            Arc::make_mut(electron).deadline = Some(left);
        }
        copy
    }

    /// Says that it is acknowledged, or was never published.
    pub(crate) fn gone(mut self) {
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
    pub(crate) fn new(leases: Arc<Leases>, name: &str) -> Arc<Self> {
        Arc::new(Self { leases, name: name.into(), awaited: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Awaited> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn name(&self) -> &str {
        self.name.as_str()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Prepares for a copy that is about to be published.
    ///
    /// # Errors
    /// [`SendError::NotTaken`] when too many are parked, or nothing can be any more.
    pub(crate) fn expect(self: &Arc<Self>, copy: &Envelope) -> Result<Expected, SendError> {
        let (arrived, arrival) = oneshot::channel();
        let mark = self.enter(copy, Waiter::Ticket(arrived))?;
        Ok(Expected { lease: Arc::clone(self), mark, arrival })
    }

    /// Returns the mark by which a copy is known when it arrives.
    fn enter(&self, copy: &Envelope, waiter: Waiter) -> Result<String, SendError> {
        let parked = self.leases.enter(copy, &waiter)?;
        let key = self.leases.next.fetch_add(1, Ordering::Relaxed);
        let mark = format!("{PARKED}.{key}");
        let mut awaited = self.lock();
        if awaited.ended {
            parked.gone();
            return Err(SendError::NotTaken("the lease queue was lost".to_owned()));
        }
        awaited.by_mark.insert(mark.clone(), Await { parked, key, waiter });
        Ok(mark)
    }

    /// Forgets a copy; false when it has arrived.
    fn forget(&self, mark: &str, never_sent: bool) -> bool {
        let Some(Await { parked, .. }) = self.lock().by_mark.remove(mark) else { return false };
        if never_sent {
            parked.gone();
        }
        true
    }

    fn via(&self, mark: &str) -> Via {
        Via::Lease { exchange: self.name.clone(), mark: mark.into() }
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
        self.lease.via(&self.mark)
    }

    /// Gives up a copy that was not published, or is not confirmed, and returns why.
    pub(crate) fn failed(self, error: SettleError) -> SettleError {
        let error = match error {
            SettleError::NotSafe { ticket, failed } => {
                let failed = failed.into_iter().map(|(copy, error)| (copy, no_lease(error)));
                SettleError::NotSafe { ticket, failed: failed.collect() }
            }
            error => error,
        };
        let never_sent = match &error {
            SettleError::NotSafe { failed, .. } => was_never_sent(failed),
            SettleError::Stale => true,
            _ => false,
        };
        self.lease.forget(&self.mark, never_sent);
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

pub(crate) fn was_never_sent(failed: &[(Envelope, SendError)]) -> bool {
    failed.iter().all(|(_, error)| matches!(error, SendError::TooLarge { .. }))
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
        self.lease.forget(&self.mark, false);
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
        let Some(Await { parked, key, waiter }) = awaited else {
            self.id.lanes.command(self.id.number, Command::Reject { tag });
            return;
        };
        match waiter {
            Waiter::Ticket(arrived) => {
                // In this order: whoever has the ticket may settle it at once.
                self.id.lanes.command(self.id.number, Command::Hold { key, tag, parked });
                // An error says that it came too late: the ticket is dropped, and so gives it back.
                drop(arrived.send(self.id.ticket(key)));
            }
            Waiter::Renewal(key) => {
                self.id.lanes.command(self.id.number, Command::Renewed { key, tag, parked });
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.id.lanes.remove(self.id.number);
        self.lease.end();
    }
}

/// What is parked, by the key in its ticket: kept by the task that settles it.
pub(crate) struct Held {
    lease: Arc<Lease>,
    renew_after: Duration,
    by_key: HashMap<u64, HeldOne>,
    /// When which of them is to be renewed.
    due: BTreeSet<(Instant, u64)>,
    /// How many are being renewed.
    renewing: u16,
    closing: bool,
}

struct HeldOne {
    /// Of the copy that is held.
    tag: u64,
    parked: Parked,
    state: State,
    due: Instant,
}

/// Who has to do with something parked.
enum State {
    /// The holder of its ticket.
    Out,
    /// The holder of its ticket, and it is being renewed.
    Renewing(Renewal),
    /// The settler.
    Settling,
    /// The settler, on behalf of nobody.
    GivingBack,
}

/// A new copy that is under way. There is never a second one.
struct Renewal {
    mark: String,
    /// When it became known to be in the lease queue. Until then it may take as long as a broker is blocked.
    confirmed: Option<Instant>,
    /// What is to be done once it is here.
    then: Option<Command>,
}

/// A copy to be published again.
pub(crate) struct Renew {
    pub(crate) key: u64,
    /// By which its result is told.
    pub(crate) mark: String,
    pub(crate) copy: Envelope,
    pub(crate) via: Via,
}

impl Held {
    pub(crate) fn new(lease: Arc<Lease>, renew_after: Duration) -> Self {
        Self {
            lease,
            renew_after,
            by_key: HashMap::new(),
            due: BTreeSet::new(),
            renewing: 0,
            closing: false,
        }
    }

    /// Returns the tag of the copy that is held.
    pub(crate) fn tag(&self, key: u64) -> Option<u64> {
        self.by_key.get(&key).map(|held| held.tag)
    }

    /// Takes in what has arrived. Returns what is to be given back at once.
    pub(crate) fn hold(&mut self, key: u64, tag: u64, parked: Parked) -> Option<(u64, Envelope)> {
        let due = Instant::now();
        self.by_key.insert(key, HeldOne { tag, parked, state: State::Out, due });
        self.renew_in(key, self.renew_after);
        if self.closing { self.give_back(key) } else { None }
    }

    /// Puts off what is to be done with something that is being renewed. Returns what is to be done now.
    pub(crate) fn put_off(&mut self, command: Command) -> Option<Command> {
        let (Command::Settle { key, .. } | Command::Take { key, .. } | Command::Release { key }) =
            &command
        else {
            return Some(command);
        };
        match self.by_key.get_mut(key).map(|held| &mut held.state) {
            Some(State::Renewing(Renewal { then: then @ None, .. })) => {
                *then = Some(command);
                None
            }
            _ => Some(command),
        }
    }

    fn begin(&mut self, key: u64, state: State) -> Option<&Parked> {
        let held = self.by_key.get_mut(&key)?;
        matches!(held.state, State::Out).then(|| {
            held.state = state;
            &held.parked
        })
    }

    /// Begins to settle; false when it has gone back already.
    pub(crate) fn settle(&mut self, key: u64) -> bool {
        self.begin(key, State::Settling).is_some()
    }

    /// Begins to give back; nothing when that or something else has begun already.
    pub(crate) fn give_back(&mut self, key: u64) -> Option<(u64, Envelope)> {
        let parked = self.begin(key, State::GivingBack)?;
        Some((key, parked.copy()))
    }

    /// Begins to give back everything, and what arrives later as soon as it does.
    pub(crate) fn give_back_all(&mut self) -> Vec<(u64, Envelope)> {
        self.closing = true;
        let keys: Vec<_> = self.by_key.keys().copied().collect();
        let now = |key| self.put_off(Command::Release { key }).and_then(|_| self.give_back(key));
        keys.into_iter().filter_map(now).collect()
    }

    /// Notes that a settlement was not safe; false when nobody is there to choose another outcome.
    pub(crate) fn not_safe(&mut self, key: u64) -> bool {
        match self.by_key.get_mut(&key) {
            Some(held) if matches!(held.state, State::Settling) => {
                held.state = State::Out;
                true
            }
            _ => false,
        }
    }

    /// Notes that it is acknowledged.
    pub(crate) fn gone(&mut self, key: u64) {
        if let Some(held) = self.remove(key) {
            held.parked.gone();
        }
    }

    /// Notes that it is to be rejected, and returns its tag. The broker does not say when it has handed it on.
    pub(crate) fn rejected(&mut self, key: u64) -> Option<u64> {
        self.remove(key).map(|held| held.tag)
    }

    fn remove(&mut self, key: u64) -> Option<HeldOne> {
        let held = self.by_key.remove(&key)?;
        self.due.remove(&(held.due, key));
        Some(held)
    }

    fn renew_in(&mut self, key: u64, wait: Duration) {
        let Some(held) = self.by_key.get_mut(&key) else { return };
        self.due.remove(&(held.due, key));
        if let Some(due) = Instant::now().checked_add(wait) {
            held.due = due;
            self.due.insert((due, key));
        }
    }

    /// When something is to be renewed, or looked after.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    /// Begins to renew what is due. Returns what waited for a renewal that has come to nothing, too.
    pub(crate) fn renew(&mut self) -> (Vec<Renew>, Vec<Command>) {
        let (mut copies, mut put_off) = (Vec::new(), Vec::new());
        let now = Instant::now();
        while let Some(&(_, key)) = self.due.first().filter(|(due, _)| *due <= now) {
            // Also to look again at what cannot be renewed now.
            self.renew_in(key, RENEW_AGAIN_AFTER);
            let Some(held) = self.by_key.get_mut(&key) else { continue };
            match &held.state {
                State::Renewing(Renewal { mark, confirmed: Some(confirmed), .. })
                    if *confirmed + ARRIVAL_TIMEOUT <= now =>
                {
                    let mark = mark.clone();
                    put_off.extend(self.not_renewed(key, &mark, false));
                }
                State::Out if self.renewing < RENEWING_MAX && !self.closing => {
                    let copy = held.parked.copy();
                    // Without room for it there is some later.
                    let Ok(mark) = self.lease.enter(&copy, Waiter::Renewal(key)) else { continue };
                    let via = self.lease.via(&mark);
                    let renewal = Renewal { mark: mark.clone(), confirmed: None, then: None };
                    held.state = State::Renewing(renewal);
                    self.renewing += 1;
                    copies.push(Renew { key, mark, copy, via });
                }
                _ => {}
            }
        }
        (copies, put_off)
    }

    /// Takes the new copy in place of the old one. Returns the tag of the old one, which is to be acknowledged,
    /// and what waited for this.
    pub(crate) fn renewed(&mut self, key: u64, tag: u64, parked: Parked) -> Option<Replaced> {
        let held = self.by_key.get_mut(&key)?;
        let State::Renewing(renewal) = std::mem::replace(&mut held.state, State::Out) else {
            unreachable!("whatever else is done with it waits")
        };
        let tag = std::mem::replace(&mut held.tag, tag);
        let parked = std::mem::replace(&mut held.parked, parked);
        self.renewing -= 1;
        self.renew_in(key, self.renew_after);
        Some(Replaced { tag, parked, then: renewal.then })
    }

    /// Notes that a new copy is in the lease queue, if it has not arrived already.
    pub(crate) fn renewal_confirmed(&mut self, key: u64, mark: &str) {
        if let Some(renewal) = self.renewal(key, mark) {
            renewal.confirmed = Some(Instant::now());
        }
    }

    /// Gives up a renewal for now, unless the new copy has arrived. Returns what waited for it.
    pub(crate) fn not_renewed(
        &mut self,
        key: u64,
        mark: &str,
        never_sent: bool,
    ) -> Option<Command> {
        self.renewal(key, mark)?;
        if !self.lease.forget(mark, never_sent) {
            return None;
        }
        let then = self.renewal(key, mark)?.then.take();
        self.by_key.get_mut(&key)?.state = State::Out;
        self.renewing -= 1;
        then
    }

    /// The renewal that is under way, if it is the one of this mark: the news of an earlier one may come late.
    fn renewal(&mut self, key: u64, mark: &str) -> Option<&mut Renewal> {
        match &mut self.by_key.get_mut(&key)?.state {
            State::Renewing(renewal) if renewal.mark == mark => Some(renewal),
            _ => None,
        }
    }
}

/// A copy in whose place another is held.
pub(crate) struct Replaced {
    pub(crate) tag: u64,
    pub(crate) parked: Parked,
    pub(crate) then: Option<Command>,
}

#[cfg(test)]
mod tests {
    use atomizer::{Address, AtomId, Electron, Payload};
    use tokio::time::advance;

    use super::*;

    const RENEW_AFTER: Duration = Duration::from_secs(10);
    const KEY: u64 = 7;

    /// Something parked with so much time left, and by whom it is held.
    fn held(deadline: Duration) -> (Arc<Lease>, Held) {
        let mut electron = Electron::new(AtomId::from_static("parked"), Payload::json("1"));
        electron.deadline = Some(deadline);
        let copy = Envelope::new(Address::Atom(electron.atom.clone()), electron.into());
        let lease = Lease::new(Leases::new(), "lease");
        let parked = lease.leases.enter(&copy, &Waiter::Renewal(KEY)).unwrap();
        let mut held = Held::new(Arc::clone(&lease), RENEW_AFTER);
        assert!(held.hold(KEY, 1, parked).is_none());
        (lease, held)
    }

    fn left(copy: &Envelope) -> Duration {
        let Message::Electron(electron) = &copy.message else { panic!("{copy:?}") };
        electron.deadline.unwrap()
    }

    /// The new copy is here.
    fn arrive(lease: &Lease, held: &mut Held, tag: u64) {
        let awaited = lease.lock().by_mark.drain().next().unwrap().1;
        assert!(held.renewed(KEY, tag, awaited.parked).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_renewed_and_given_back_has_the_time_left_that_it_has() {
        let (lease, mut held) = held(Duration::from_secs(60));
        for (tag, seconds) in [(2, 50), (3, 40)] {
            advance(RENEW_AFTER).await;
            let (copies, _) = held.renew();
            assert_eq!(left(&copies[0].copy), Duration::from_secs(seconds));
            arrive(&lease, &mut held, tag);
        }
        advance(Duration::from_secs(5)).await;
        let (_, copy) = held.give_back(KEY).unwrap();
        assert_eq!(left(&copy), Duration::from_secs(35));
    }

    #[tokio::test(start_paused = true)]
    async fn no_second_copy_is_under_way_while_the_broker_is_blocked() {
        let (lease, mut held) = held(Duration::MAX);
        advance(RENEW_AFTER).await;
        let first = held.renew().0.remove(0);
        for _ in 0..1000 {
            advance(RENEW_AGAIN_AFTER).await;
            assert!(held.renew().0.is_empty());
        }
        held.renewal_confirmed(KEY, &first.mark);
        advance(ARRIVAL_TIMEOUT - RENEW_AGAIN_AFTER).await;
        assert!(held.renew().0.is_empty());
        // It has gone back meanwhile.
        advance(RENEW_AGAIN_AFTER).await;
        assert!(held.renew().0.is_empty());
        advance(RENEW_AGAIN_AFTER).await;
        assert_eq!(held.renew().0.len(), 1);
        assert_eq!(lease.lock().by_mark.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn late_news_of_a_renewal_do_not_speak_of_the_next() {
        let (lease, mut held) = held(Duration::MAX);
        advance(RENEW_AFTER).await;
        let first = held.renew().0.remove(0);
        arrive(&lease, &mut held, 2);
        advance(RENEW_AFTER).await;
        let second = held.renew().0.remove(0);
        held.renewal_confirmed(KEY, &first.mark);
        advance(2 * ARRIVAL_TIMEOUT).await;
        assert!(held.renew().0.is_empty(), "the second is not confirmed");
        assert!(held.put_off(Command::Release { key: KEY }).is_none());
        assert!(held.not_renewed(KEY, &first.mark, false).is_none());
        assert!(held.not_renewed(KEY, &second.mark, false).is_some(), "it waited for the second");
    }
}
