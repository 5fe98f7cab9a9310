//! One consumer on a channel of its own, and the task that settles what it delivered.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use atomizer::{
    AtomId, Delivery, Envelope, Epoch, Message, Release, SendError, SessionError, SettleError,
    Subscription, Ticket,
};
use futures::{
    FutureExt, StreamExt, future::BoxFuture, future::join_all, stream::FuturesUnordered,
};
use lapin::{
    Channel, Consumer,
    options::{BasicAckOptions, BasicCancelOptions, BasicGetOptions, BasicNackOptions},
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
    time::{Instant, sleep, sleep_until},
};

use crate::{
    acks::Acks,
    connect::plain,
    convert::{Arrived, redeliveries},
    lease::{Held, Parked, Renew, Replaced, was_never_sent},
    life::{Life, REQUEST_TIMEOUT},
    publisher::{Publisher, Via},
    watchdog::Watchdog,
};

/// How long cancelling a consumer may take.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);
/// The same where nobody waits for it: a queue without a leader may be about to get one.
const UNHURRIED_CANCEL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an acknowledgement may take to be written.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an acknowledgement waits for others: a group costs the broker as much as one of those that are in it, a
/// write to its log, which what is published next had to wait for. Runs that end at about the same time do not end
/// in order, so holes mostly close within it, too. Not longer: what is gathered when a session ends comes again.
const GATHERED_WITHIN: Duration = Duration::from_millis(2);
/// How long a channel stays open behind its last acknowledgement.
const LINGER: Duration = Duration::from_secs(1);
/// How many wait at the most, in a window that is large enough.
const GATHERED_MAX: usize = 64;
/// How many commands are carried out before acknowledgements are sent.
const COMMANDS_MAX: usize = 256;
/// How many settlements a RabbitMQ channel hands to a quorum queue before it waits for one to be carried out
/// (`quorum_commands_soft_limit`).
const PENDING_MAX: usize = 32;

/// What a settler is asked to do with one delivery, named by the key in its ticket: its tag, or a number of ours for
/// what is parked.
pub(crate) enum Command {
    /// Makes these safe, then acknowledges.
    Settle { key: u64, emit: Vec<Envelope>, via: Via, done: Done },
    /// Acknowledges; done when the broker has carried it out.
    Take { key: u64, done: Done },
    /// Gives it back to the queue that it came from; what is parked, to that of its atom.
    Release { key: u64 },
    /// Holds what came through the lease queue.
    Hold { key: u64, tag: u64, parked: Parked },
    /// Holds this copy in place of the one that it renews.
    Renewed { key: u64, tag: u64, parked: Parked },
    /// Has the broker give back what came through the lease queue.
    Reject { tag: u64 },
    /// Gives back all that is parked, now and from now on.
    GiveBack,
    /// Ends the lane once so many deliveries are settled or given back: there will be no more.
    Stopped { delivered: u64 },
}

/// Where the result of one settlement goes.
type Done = oneshot::Sender<Result<(), SettleError>>;

/// Where the commands of one lane go. There are never more than deliveries out, and what follows from them, so
/// the window bounds them.
pub(crate) type Commands = mpsc::UnboundedSender<Command>;

/// The ways to the tasks that settle, by the number in the ticket.
#[derive(Debug, Default)]
pub(crate) struct Lanes(Mutex<LanesByNumber>);

#[derive(Debug, Default)]
struct LanesByNumber {
    next: u32,
    lanes: HashMap<u32, Commands>,
}

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, LanesByNumber> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, lane: Commands) -> u32 {
        let mut lanes = self.lock();
        let number = lanes.next;
        lanes.next += 1;
        lanes.lanes.insert(number, lane);
        number
    }

    /// Ends a lane whose channel is gone: its tickets are stale from now on.
    pub(crate) fn remove(&self, number: u32) {
        drop(self.lock().lanes.remove(&number));
    }

    /// Hands a command over; false when the lane has ended.
    pub(crate) fn command(&self, number: u32, command: Command) -> bool {
        self.lock().lanes.get(&number).is_some_and(|lane| lane.send(command).is_ok())
    }
}

impl Release for Lanes {
    fn release(&self, channel: u32, key: u64) {
        // A lane that has ended has nothing out: the broker took it back with the channel.
        self.command(channel, Command::Release { key });
    }
}

/// Which lane, in which session: what a ticket says.
#[derive(Clone)]
pub(crate) struct LaneId {
    pub(crate) epoch: Epoch,
    pub(crate) number: u32,
    pub(crate) lanes: Arc<Lanes>,
}

impl LaneId {
    pub(crate) fn ticket(&self, key: u64) -> Ticket {
        let lanes: Arc<dyn Release> = Arc::clone(&self.lanes) as _;
        Ticket::new(self.epoch, self.number, key, lanes)
    }
}

/// Settles what one channel delivered. Ends with the channel or the session.
pub(crate) struct Settler {
    pub(crate) id: LaneId,
    pub(crate) channel: Channel,
    pub(crate) queue: String,
    /// How many deliveries are settled or given back.
    pub(crate) gone: Arc<AtomicU64>,
    /// How many acknowledgements wait for others at the most.
    pub(crate) gathered_max: usize,
    pub(crate) publisher: Publisher,
    pub(crate) life: Life,
    /// Dropped when it ends, which ends the subscription.
    pub(crate) _alive: oneshot::Sender<()>,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
    /// What is parked, when this is the lane of the lease queue.
    pub(crate) parked: Option<Held>,
}

/// What was published for a delivery.
struct Published {
    key: u64,
    /// What of it is not safe.
    failed: Vec<(Envelope, SendError)>,
    /// Whether it was parked, which somebody waits for: a full window has no room before it is. It is not gathered.
    parked: bool,
    done: Done,
}

/// What a settler has under way.
#[derive(Default)]
struct Work {
    acks: Acks,
    /// How many settlements were sent since the queue answered last.
    unanswered: usize,
    publishing: FuturesUnordered<BoxFuture<'static, Published>>,
    /// When the acknowledgements are sent that wait for others.
    flush_at: Option<Instant>,
    /// Done when the acknowledgements are sent.
    settled: Vec<(u64, Done)>,
    /// Done when they are carried out.
    taken: Vec<(u64, Done)>,
    /// By their marks.
    renewing: FuturesUnordered<BoxFuture<'static, (String, Published)>>,
    /// Copies that are gone when the acknowledgements are sent.
    replaced: Vec<Parked>,
    /// How many deliveries there were in all, once there will be no more.
    delivered: Option<u64>,
}

impl Work {
    /// The channel is gone: what it had delivered comes again.
    fn lost(self, error: &SessionError) {
        tracing::debug!(%error, "a channel was lost while acknowledging");
        for (_, done) in self.settled.into_iter().chain(self.taken) {
            drop(done.send(Err(SettleError::Unknown(error.clone()))));
        }
    }
}

impl Settler {
    pub(crate) async fn run(mut self) {
        let acks = Acks::counting(Arc::clone(&self.gone));
        let mut work = Work { acks, ..Work::default() };
        let mut commands = Vec::new();
        loop {
            tokio::select! {
                count = self.commands.recv_many(&mut commands, COMMANDS_MAX) => {
                    if count == 0 {
                        return self.end(work).await;
                    }
                }
                Some(published) = work.publishing.next() => self.published(published, &mut work),
                Some((mark, published)) = work.renewing.next() => self.renewal_published(&mark, &published),
                () = due(self.parked.as_ref().and_then(Held::next_due)) => self.renew(&work),
                () = due(work.flush_at) => {}
            }
            while let Some(Some(published)) = work.publishing.next().now_or_never() {
                self.published(published, &mut work);
            }
            for command in commands.drain(..) {
                if let Err(error) = self.carry_out(command, &mut work).await {
                    return work.lost(&error);
                }
            }
            if let Err(error) = self.finish(&mut work).await {
                return work.lost(&error);
            }
            if self.is_done(&work) {
                self.id.lanes.remove(self.id.number);
                // What was sent may not be carried out yet, and would be undone with the channel.
                tokio::select! {
                    () = sleep(LINGER) => {}
                    _ = self.life.ended() => {}
                }
                return;
            }
        }
    }

    /// Whether all that was ever delivered is settled, and the broker told.
    fn is_done(&self, work: &Work) -> bool {
        let is_gone = |delivered| self.gone.load(Ordering::Relaxed) >= delivered;
        work.delivered.is_some_and(is_gone) && work.acks.untold() == 0
    }

    /// Sends what is still gathered: the channel may live on when its consumer has ended.
    async fn end(&mut self, mut work: Work) {
        while let Some(Some(published)) = work.publishing.next().now_or_never() {
            self.published(published, &mut work);
        }
        work.flush_at = Some(Instant::now());
        if let Err(error) = self.finish(&mut work).await {
            work.lost(&error);
        }
    }

    async fn carry_out(&mut self, command: Command, work: &mut Work) -> Result<(), SessionError> {
        let command = match &mut self.parked {
            Some(held) => held.put_off(command),
            None => Some(command),
        };
        let Some(command) = command else { return Ok(()) };
        match command {
            Command::Settle { key, done, .. } | Command::Take { key, done }
                if !self.may_settle(key) =>
            {
                drop(done.send(Err(SettleError::Stale)));
            }
            Command::Settle { key, emit, done, .. } if emit.is_empty() => {
                self.remove(key, work);
                work.settled.push((key, done));
            }
            Command::Settle { key, emit, via, done } => self.publish(key, emit, via, done, work),
            Command::Take { key, done } => {
                self.remove(key, work);
                work.taken.push((key, done));
            }
            Command::Release { key } => match &mut self.parked {
                None => {
                    work.acks.returned(key);
                    self.negative(key, true, work).await?;
                }
                Some(parked) => {
                    let copy = parked.give_back(key);
                    self.give_back(copy, work);
                }
            },
            Command::Hold { key, tag, parked } => {
                let copy = self.parked.as_mut().and_then(|held| held.hold(key, tag, parked));
                self.give_back(copy, work);
            }
            Command::Renewed { key, tag, parked } => {
                let replaced = self.parked.as_mut().and_then(|held| held.renewed(key, tag, parked));
                if let Some(Replaced { tag, parked, then }) = replaced {
                    work.acks.acknowledge(tag);
                    work.replaced.push(parked);
                    self.again(then);
                }
            }
            Command::Reject { tag } => {
                work.acks.returned(tag);
                self.negative(tag, false, work).await?;
            }
            Command::Stopped { delivered } => work.delivered = Some(delivered),
            Command::GiveBack => {
                let copies = self.parked.as_mut().map(Held::give_back_all);
                self.give_back(copies.into_iter().flatten(), work);
            }
        }
        Ok(())
    }

    /// What is parked may have been given back already, while its ticket was still out.
    fn may_settle(&mut self, key: u64) -> bool {
        self.parked.as_mut().is_none_or(|parked| parked.settle(key))
    }

    /// Notes that a delivery is to be acknowledged.
    fn remove(&self, key: u64, work: &mut Work) {
        let tag = self.parked.as_ref().map_or(Some(key), |parked| parked.tag(key));
        if let Some(tag) = tag {
            work.acks.acknowledge(tag);
        }
    }

    /// Carries out what waited for a renewal.
    fn again(&self, put_off: impl IntoIterator<Item = Command>) {
        for command in put_off {
            // Where the lane has ended, whoever waits for the result is told by its end.
            self.id.lanes.command(self.id.number, command);
        }
    }

    /// Publishes copies of what has been held for long.
    fn renew(&mut self, work: &Work) {
        let Some((copies, put_off)) = self.parked.as_mut().map(Held::renew) else { return };
        self.again(put_off);
        for Renew { key, mark, copy, via } in copies {
            // Nobody waits for the result: what counts is that the copy arrives.
            let (done, _) = oneshot::channel();
            let publishing = publish(self.publisher.clone(), key, vec![copy], via, done);
            work.renewing.push(Box::pin(async move { (mark, publishing.await) }));
        }
    }

    fn renewal_published(&mut self, mark: &str, &Published { key, ref failed, .. }: &Published) {
        let Some(held) = &mut self.parked else { return };
        let Some((_, error)) = failed.first() else { return held.renewal_confirmed(key, mark) };
        tracing::warn!(%error, "a parked electron is not renewed yet");
        let put_off = held.not_renewed(key, mark, was_never_sent(failed));
        self.again(put_off);
    }

    fn publish(&self, key: u64, emit: Vec<Envelope>, via: Via, done: Done, work: &Work) {
        work.publishing.push(Box::pin(publish(self.publisher.clone(), key, emit, via, done)));
    }

    /// Publishes copies to the queues of their atoms, to be acknowledged once they are safe there.
    fn give_back(&self, copies: impl IntoIterator<Item = (u64, Envelope)>, work: &Work) {
        for (key, copy) in copies {
            // Nobody waits for the result.
            let (done, _) = oneshot::channel();
            self.publish(key, vec![copy], Via::Back, done, work);
        }
    }

    fn published(&mut self, published: Published, work: &mut Work) {
        let Published { key, failed, parked, done } = published;
        if failed.is_empty() {
            self.remove(key, work);
            if parked {
                work.flush_at = Some(Instant::now());
            }
            work.settled.push((key, done));
        } else if failed.iter().any(|(_, error)| matches!(error, SendError::Unknown(_))) {
            // The session is ending, or ends now: the delivery comes again, and there is nothing more to decide.
            self.life.end("it is not known what became of a message".to_owned());
            let unknown = SessionError::lost("an answer is not known to have arrived");
            drop(done.send(Err(SettleError::Unknown(unknown))));
        } else if self.parked.as_mut().is_none_or(|parked| parked.not_safe(key)) {
            let not_safe = SettleError::NotSafe { ticket: self.id.ticket(key), failed };
            // When nobody waits for it, the ticket in it is dropped, and so releases the delivery.
            drop(done.send(Err(not_safe)));
        } else if let Some(tag) = self.parked.as_mut().and_then(|parked| parked.rejected(key)) {
            let reason = failed.first().map(|(_, error)| error.to_string());
            tracing::warn!(reason, "a parked electron is left to the broker to give back");
            self.again([Command::Reject { tag }]);
        }
    }

    async fn negative(&self, tag: u64, requeue: bool, work: &mut Work) -> Result<(), SessionError> {
        work.unanswered += 1;
        let options = BasicNackOptions { requeue, ..Default::default() };
        self.life.bound(WRITE_TIMEOUT, self.channel.basic_nack(tag, options)).await
    }

    /// Sends the acknowledgements, and tells those who wait for them.
    async fn finish(&mut self, work: &mut Work) -> Result<(), SessionError> {
        self.acknowledge(work).await?;
        work.replaced.drain(..).for_each(Parked::gone);
        let acks = &work.acks;
        self.tell(work.settled.extract_if(.., |(key, _)| acks.is_told(*key)));
        if !work.taken.is_empty() {
            self.barrier(work).await?;
            self.tell(work.taken.drain(..));
        }
        Ok(())
    }

    fn tell(&mut self, settled: impl Iterator<Item = (u64, Done)>) {
        for (key, done) in settled {
            if let Some(parked) = &mut self.parked {
                parked.gone(key);
            }
            // An error says that nobody waits for the result any more.
            drop(done.send(Ok(())));
        }
    }

    /// Acknowledges in groups what is gathered by now.
    async fn acknowledge(&self, work: &mut Work) -> Result<(), SessionError> {
        if work.acks.untold() == 0 {
            work.flush_at = None;
            return Ok(());
        }
        let flush_at = *work.flush_at.get_or_insert_with(|| Instant::now() + GATHERED_WITHIN);
        // What is taken is waited for.
        let is_due = !work.taken.is_empty() || flush_at <= Instant::now();
        let is_much = |acks: &Acks| acks.untold() >= self.gathered_max;
        let mut acks = Vec::new();
        if is_due || is_much(&work.acks) {
            acks.extend(work.acks.take_group());
        }
        // What is above a hole costs one each.
        if is_due || is_much(&work.acks) {
            acks.extend(work.acks.take_singles());
        }
        if work.acks.untold() == 0 {
            work.flush_at = None;
        }
        work.unanswered += acks.len();
        let sent = acks.into_iter().map(|ack| {
            let options = BasicAckOptions { multiple: ack.multiple };
            self.channel.basic_ack(ack.tag, options)
        });
        let sent = async { join_all(sent).await.into_iter().collect() };
        self.life.bound(WRITE_TIMEOUT, sent).await
    }

    /// Waits until the queue has carried out the settlements that were sent on this channel: they are in its log on
    /// most of its members, and neither a lost connection nor a crash undoes them.
    ///
    /// Acknowledgements are not answered, and an answer of the channel itself (`basic.qos`, a passive declaration)
    /// says nothing: the channel hands a settlement to the queue and goes on. `basic.get` is a command in the log
    /// of a quorum queue as well, behind what the channel handed over before, and is answered once it is carried
    /// out. Beyond [`PENDING_MAX`] settlements the channel keeps the rest until it hears that the first ones are
    /// carried out. It hears that before it has the answer to the first command, so the second is behind all.
    /// Only a queue that changes its leader meanwhile may carry out a command before what was sent ahead of it.
    ///
    /// What it brings goes back at once. A consumer would be a command as well, but would be brought more, and what
    /// is on its way to one that is cancelled goes back, too.
    async fn barrier(&self, work: &mut Work) -> Result<(), SessionError> {
        let commands = if work.unanswered > PENDING_MAX { 2 } else { 1 };
        for _ in 0..commands {
            let queue = self.queue.as_str().into();
            let getting = self.channel.basic_get(queue, BasicGetOptions::default());
            let brought = self.life.bound(REQUEST_TIMEOUT, getting).await?;
            work.unanswered = 0;
            if let Some(brought) = brought {
                work.acks.not_ours(brought.delivery_tag);
                self.negative(brought.delivery_tag, true, work).await?;
            }
        }
        Ok(())
    }
}

/// How many acknowledgements wait for others, in a window of so many deliveries: the broker brings no more than fit
/// into what is left of it. None wait where there is one at a time.
pub(crate) fn gathered_max(prefetch: u16) -> usize {
    usize::from(prefetch / 2).clamp(1, GATHERED_MAX)
}

/// Waits for a moment, or for ever.
async fn due(at: Option<Instant>) {
    match at {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

async fn publish(
    publisher: Publisher,
    key: u64,
    emit: Vec<Envelope>,
    via: Via,
    done: Done,
) -> Published {
    let results = publisher.publish(&emit, &via).await;
    let failed = emit.into_iter().zip(results);
    let failed =
        failed.filter_map(|(envelope, result)| result.err().map(|error| (envelope, error)));
    let parked = matches!(via, Via::Lease { .. });
    Published { key, failed: failed.collect(), parked, done }
}

/// What of its window a consumer uses.
pub(crate) struct Window {
    pub(crate) prefetch: u16,
    /// How many there were in all.
    pub(crate) delivered: u64,
    pub(crate) gone: Arc<AtomicU64>,
}

impl Window {
    fn has_room(&self) -> bool {
        let gone = self.gone.load(Ordering::Relaxed);
        self.delivered.saturating_sub(gone) < u64::from(self.prefetch)
    }
}

/// A consumer and its lane.
#[derive(Clone)]
pub(crate) struct Taking {
    pub(crate) id: LaneId,
    pub(crate) channel: Channel,
    pub(crate) consumer: Consumer,
}

impl Taking {
    /// Cancels the consumer, gives back what was brought and not handed out, and has the lane end with the last of what
    /// was handed out: so many. An error says that the consumer may be there still.
    async fn stop(
        &mut self,
        mut delivered: u64,
        life: &Life,
        limit: Duration,
    ) -> Result<(), SessionError> {
        let tag = self.consumer.tag();
        let cancelled = self.channel.basic_cancel(tag, BasicCancelOptions::default());
        life.bound(limit, cancelled).await?;
        while let Some(Some(Ok(delivery))) = self.consumer.next().now_or_never() {
            delivered += 1;
            drop(self.id.ticket(delivery.delivery_tag));
        }
        self.id.lanes.command(self.id.number, Command::Stopped { delivered });
        Ok(())
    }
}

/// A consumer, seen by who takes from it.
pub(crate) struct LaneSubscription {
    /// Whether what was sent before it may be lost.
    pub(crate) missed: bool,
    pub(crate) window: Window,
    pub(crate) watchdog: Watchdog,
    pub(crate) taking: Taking,
    /// Whose queue it is; none for the inbox.
    pub(crate) atom: Option<AtomId>,
    pub(crate) life: Life,
    /// Resolves when the settler has ended.
    pub(crate) settler_gone: oneshot::Receiver<()>,
    /// Why there will be no more, when that is known already.
    pub(crate) ended: Option<SessionError>,
    /// Whether nothing is to be given back when it is dropped.
    pub(crate) is_over: bool,
    /// Where it is given back.
    pub(crate) runtime: Handle,
}

impl Drop for LaneSubscription {
    /// The lane lives on for what was handed out, and would keep the rest.
    fn drop(&mut self) {
        if !self.is_over {
            let (mut taking, life) = (self.taking.clone(), self.life.clone());
            let delivered = self.window.delivered;
            self.runtime.spawn(async move {
                taking.stop(delivered, &life, UNHURRIED_CANCEL_TIMEOUT).await
            });
        }
    }
}

/// What the end of a consumer means.
fn why(ended: Option<lapin::Result<lapin::message::Delivery>>) -> SessionError {
    match ended {
        Some(Err(error)) => SessionError::lost(plain(&error)),
        Some(Ok(_)) | None => SessionError::lost("the broker ended the subscription"),
    }
}

impl LaneSubscription {
    /// Ends the lane: its tickets are stale from now on, and its settler ends.
    fn lost(&mut self, error: SessionError) -> SessionError {
        self.taking.id.lanes.remove(self.taking.id.number);
        self.is_over = true;
        self.ended = Some(error.clone());
        error
    }

    fn delivery(&mut self, delivery: lapin::message::Delivery) -> Delivery {
        self.window.delivered += 1;
        let ticket = self.taking.id.ticket(delivery.delivery_tag);
        let redeliveries = redeliveries(&delivery.properties, delivery.redelivered);
        let parts = Arrived(&delivery.properties);
        let message = Message::read(&parts, delivery.data.into(), self.atom.as_ref());
        Delivery::new(message, redeliveries, ticket).sent_at(parts.sent_at())
    }
}

#[async_trait]
impl Subscription for LaneSubscription {
    async fn next(&mut self, max: NonZeroUsize) -> Result<Vec<Delivery>, SessionError> {
        if let Some(error) = self.ended.take() {
            return Err(self.lost(error));
        }
        let window = &self.window;
        // One of the two connections may be well when the session has ended.
        let first = tokio::select! {
            biased;
            first = self.taking.consumer.next() => match first {
                Some(Ok(delivery)) => self.delivery(delivery),
                ended => return Err(self.lost(why(ended))),
            },
            _ = &mut self.settler_gone => {
                return Err(self.lost(SessionError::lost("the channel takes no acknowledgements")));
            }
            error = self.life.ended() => return Err(self.lost(error)),
            error = self.watchdog.bite(|| window.has_room()) => return Err(self.lost(error)),
        };
        self.watchdog.feed();
        let mut deliveries = vec![first];
        while deliveries.len() < max.get() {
            match self.taking.consumer.next().now_or_never() {
                None => break,
                Some(Some(Ok(delivery))) => deliveries.push(self.delivery(delivery)),
                // The consumer says only once that it has ended: kept for the next call.
                Some(ended) => {
                    self.ended = Some(why(ended));
                    break;
                }
            }
        }
        Ok(deliveries)
    }

    fn may_have_missed(&self) -> bool {
        self.missed
    }

    async fn stop(&mut self) {
        if !self.is_over {
            let stopped = self.taking.stop(self.window.delivered, &self.life, CANCEL_TIMEOUT).await;
            self.is_over = stopped.is_ok();
        }
    }
}
