//! The seam between the runtime and whatever carries messages.
//!
//! Everything hangs on one primitive: [`Session::settle`] *makes these envelopes safe, then removes the
//! electron*. An answer, a dead letter, a copy to be tried again are all just envelopes.
//!
//! | | `settle(Done { emit })` | `Release`, or a dropped ticket |
//! |---|---|---|
//! | RabbitMQ | publish all, await the confirms, acknowledge | negative acknowledgement with requeue |
//! | memory, embedded store | one lock, or one transaction | put back at the front |
//! | HTTP gateway | one POST with the lease token | POST, or the lease runs out |
//! | Kafka | one transaction: produce and commit offsets | produce a copy, commit |
//!
//! Whoever writes a conductor runs the tests of `atomizer-conformance` against it: they are the contract,
//! and the docs here are its prose.

use std::{
    fmt,
    num::NonZeroUsize,
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use uuid::Uuid;

use crate::{AtomId, ConductorId, Electron, EventLog, Message, NodeId, ReplyTo, ResultsId};

/// Carries electrons and answers: a description such as a URL and options.
///
/// Making one does no input or output, so whatever it talks to may be down.
#[async_trait]
pub trait Conductor: fmt::Debug + Send + Sync + 'static {
    /// Names it within its node.
    fn id(&self) -> &ConductorId;

    /// Connects: begins one life of a connection.
    ///
    /// Whoever opens again for the same node gets the same [`reply_to`](Session::reply_to), and the answers
    /// that arrived there in between.
    ///
    /// # Errors
    /// [`OpenError::Unreachable`] may pass by waiting; the others do not.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind that would not end by itself.
    async fn open(&self, node: &NodeId) -> Result<Arc<dyn Session>, OpenError>;

    /// Returns where the events of its nodes are kept; none where they are not.
    fn event_log(&self) -> Option<Arc<dyn EventLog>> {
        None
    }
}

/// One life of a connection. A fault ends it; the runtime opens the next.
///
/// When the last reference is dropped without [`close`](Self::close), it ends as if its node had died: all
/// that it holds is delivered again.
#[async_trait]
pub trait Session: fmt::Debug + Send + Sync + 'static {
    /// Returns what it can carry.
    fn limits(&self) -> Limits;

    /// Returns where this node is answered: the same for each session of a node.
    fn reply_to(&self) -> ReplyTo;

    /// Begins to receive. `window` bounds what is delivered and not yet settled.
    ///
    /// Subscribing to [`Source::Atom`] makes its queue when there is none.
    ///
    /// # Errors
    /// [`SessionError`] when the subscription is refused or the session has ended.
    async fn subscribe(
        &self,
        source: Source,
        window: NonZeroUsize,
    ) -> Result<Box<dyn Subscription>, SessionError>;

    /// Makes envelopes safe: `Ok` means confirmed by a quorum, committed, or (in memory) held until exit.
    ///
    /// The results stand in the order of the envelopes. An envelope to an atom makes the queue when there is
    /// none, so that the electron waits for the first node that has the atom. Waits while there is no room.
    ///
    /// # Cancel safety
    /// Dropping the future leaves unknown which envelopes were sent. Sending them again under the same ids
    /// is always right.
    async fn send(&self, envelopes: &[Envelope]) -> Vec<Result<(), SendError>>;

    /// Settles deliveries: for each, makes what it emits safe, then removes it from its queue.
    ///
    /// `Ok` means that the envelopes are safe and the removal was *sent*: a redelivery may still come. The
    /// results stand in the order of the batch. What a settlement emits is not held back by a full queue,
    /// or a full queue whose atoms emit into it would stand still.
    ///
    /// # Cancel safety
    /// The tickets are handed over before the first `await`: dropping the future undoes nothing, and only
    /// the results are lost.
    async fn settle(&self, batch: Vec<(Ticket, Outcome)>) -> Vec<Result<(), SettleError>>;

    /// Holds a delivery on, changed: the new form is made safe, then the old one is removed.
    ///
    /// From then on it is held for as long as the session lives, whatever [`Limits::hold_max`] is, and no longer
    /// counts against the window it came through. When it is given back (its new ticket is dropped, or the session ends) it goes, as it was
    /// changed, to the queue of its atom, and counts as delivered before.
    ///
    /// # Errors
    /// [`SettleError`]: as in settling. With [`SettleError::NotSafe`] the old ticket is still good.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the delivery in one form or the other, and gives it back.
    async fn park(&self, ticket: Ticket, changed: Arc<Electron>) -> Result<Ticket, SettleError>;

    /// Counts what waits in the queue of an atom, and who takes from it.
    ///
    /// # Errors
    /// [`SessionError`] when the session has ended, or cannot tell.
    ///
    /// # Cancel safety
    /// Safe.
    async fn census(&self, atom: &AtomId) -> Result<Census, SessionError>;

    /// Makes a result address, if there is none of that name: what is sent there waits until it is read from
    /// [`Source::Results`].
    ///
    /// # Errors
    /// [`SendError`] when it is not known to be there; [`SendError::Refused`] where there are no such addresses.
    ///
    /// # Cancel safety
    /// Safe: it is made or not.
    async fn make_results(&self, id: &ResultsId) -> Result<ReplyTo, SendError> {
        Err(SendError::Refused(format!("there are no result addresses here, such as {id}")))
    }

    /// Returns whether the other side says that it takes nothing for now, as a broker does that is short of memory
    /// or disk.
    ///
    /// What takes long meanwhile is no fault of the session: it is waited for.
    fn is_blocked(&self) -> bool {
        false
    }

    /// Waits until the session has ended, and says why.
    ///
    /// # Cancel safety
    /// Safe.
    async fn ended(&self) -> SessionError;

    /// Ends the session in order: what is not settled is delivered again, the node's inbox is removed.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the rest to the other side's own clean-up.
    async fn close(&self);
}

/// A stream of deliveries.
#[async_trait]
pub trait Subscription: Send {
    /// Waits for deliveries: at least one, at most `max`, and never more than the window has room for.
    ///
    /// # Errors
    /// [`SessionError`] when the subscription has ended; its unsettled deliveries come again, to whoever
    /// subscribes, and their tickets are stale.
    ///
    /// # Cancel safety
    /// Safe: no delivery is lost.
    async fn next(&mut self, max: NonZeroUsize) -> Result<Vec<Delivery>, SessionError>;

    /// Returns whether something that was sent to where this takes from may have been lost before it was taken: an
    /// inbox that was not there any more, and is made anew.
    ///
    /// What the node has asked is asked again then, under the same ids.
    fn may_have_missed(&self) -> bool {
        false
    }

    /// Takes no more. What [`next`](Self::next) has not handed out goes back; tickets stay valid. Dropping it does
    /// the same, soon.
    async fn stop(&mut self);
}

const _: Option<&dyn Conductor> = None;
const _: Option<&dyn Session> = None;
const _: Option<&dyn Subscription> = None;

/// What to receive.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// The electrons of one atom, shared with every other subscriber.
    Atom(AtomId),
    /// What is sent to this node: the answers to what it asked.
    Inbox,
    /// What is sent to a result address, shared with every other subscriber.
    Results(ResultsId),
}

/// What a session can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// The longest payload, in bytes.
    pub payload_bytes_max: usize,
    /// The longest [delay](Envelope::delay). Longer ones are waited out before sending.
    pub delay_max: Duration,
    /// How long a delivery may be held as it was delivered, before it is to be [parked](Session::park), settled or
    /// given back. `Duration::MAX`: for as long as the session lives.
    pub hold_max: Duration,
}

impl Limits {
    /// Makes limits with the longest payload in bytes, no delays, and deliveries that may be held for ever.
    #[must_use]
    pub fn new(payload_bytes_max: usize) -> Self {
        Self { payload_bytes_max, delay_max: Duration::ZERO, hold_max: Duration::MAX }
    }

    /// Sets the longest delay.
    #[must_use]
    pub fn delay_max(mut self, delay_max: Duration) -> Self {
        self.delay_max = delay_max;
        self
    }

    /// Sets how long a delivery may be held as it was delivered.
    #[must_use]
    pub fn hold_max(mut self, hold_max: Duration) -> Self {
        self.hold_max = hold_max;
        self
    }
}

/// What there is at the queue of an atom, at some moment not long ago.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Census {
    /// How many electrons wait, those that are kept back included as far as the conductor knows.
    pub ready: u64,
    /// How many subscriptions take from it, this session's own included.
    pub subscribers: u64,
}

impl Census {
    /// Puts a census together; for conductors.
    #[must_use]
    pub fn new(ready: u64, subscribers: u64) -> Self {
        Self { ready, subscribers }
    }
}

/// One message as received, with the right and the duty to settle it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Delivery {
    /// What came.
    pub message: Message,
    /// How often it was delivered before, as far as the conductor knows.
    pub redeliveries: u32,
    /// How long it has waited since it was first sent, as far as the conductor knows: zero where it does not.
    pub waited: Duration,
    /// When it was sent, or was due if it had a delay, by the clock of who sent it: to the second, where the conductor knows.
    ///
    /// It is for people and metrics. Two machines' clocks differ, so nothing ends because of it.
    pub sent_at: Option<SystemTime>,
    /// Its key for [`Session::settle`].
    pub ticket: Ticket,
}

impl Delivery {
    /// Puts a delivery together; for conductors.
    #[must_use]
    pub fn new(message: Message, redeliveries: u32, ticket: Ticket) -> Self {
        Self { message, redeliveries, waited: Duration::ZERO, sent_at: None, ticket }
    }

    /// Says when it was sent, or was due, by the clock of who sent it.
    #[must_use]
    pub fn sent_at(mut self, at: impl Into<Option<SystemTime>>) -> Self {
        self.sent_at = at.into();
        self
    }

    /// Says how long it has waited since it was sent.
    #[must_use]
    pub fn waited(mut self, waited: Duration) -> Self {
        self.waited = waited;
        self
    }
}

/// The right to settle one delivery, once: it cannot be cloned, and settling takes it.
///
/// A ticket that is dropped releases its delivery, without blocking. It is good only for the session (and
/// within it the channel) that it came from; anywhere else it is [stale](SettleError::Stale).
pub struct Ticket {
    epoch: Epoch,
    channel: u32,
    key: u64,
    release: Option<Arc<dyn Release>>,
}

impl Ticket {
    /// Makes a ticket; for conductors. `channel` and `key` mean whatever the session takes them for.
    #[must_use]
    pub fn new(epoch: Epoch, channel: u32, key: u64, release: Arc<dyn Release>) -> Self {
        Self { epoch, channel, key, release: Some(release) }
    }

    /// Returns the life of the session that it is good for.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Returns which part of the session it is of, as the session numbers them.
    #[must_use]
    pub fn channel(&self) -> u32 {
        self.channel
    }

    /// Returns which delivery of its channel it is, as the session numbers them.
    #[must_use]
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Takes the ticket: dropping it no longer releases. Returns the channel and the key.
    #[must_use]
    pub fn take(mut self) -> (u32, u64) {
        self.release = None;
        (self.channel, self.key)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(release) = self.release.take() {
            let (channel, key) = (self.channel, self.key);
            // A conductor that panics here must not take a whole node with it: the end of its session gives
            // everything back.
            let released = AssertUnwindSafe(|| release.release(channel, key));
            if std::panic::catch_unwind(released).is_err() {
                tracing::error!(ticket = ?self, "a conductor panicked while it took a delivery back");
            }
        }
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ticket({:?}/{}/{})", self.epoch, self.channel, self.key)
    }
}

/// Takes back deliveries whose tickets are dropped; for conductors.
pub trait Release: Send + Sync {
    /// Releases one delivery. Must not block, and does nothing when the channel is gone.
    fn release(&self, channel: u32, key: u64);
}

/// Tells one life of a session from all others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Epoch(u64);

impl Epoch {
    /// Makes one that no other session has.
    #[must_use]
    pub fn unique() -> Self {
        Self(Uuid::new_v4().as_u64_pair().1)
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// What becomes of a delivery.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// It is finished: make these safe, then remove it.
    #[non_exhaustive]
    Done {
        /// What must be safe first.
        emit: Vec<Envelope>,
    },
    /// It is removed before the work begins, and nothing brings it back: work that is to be done at most once.
    /// `Ok` says that the removal is carried out, not only sent.
    #[non_exhaustive]
    Take {},
    /// It goes back as it was, for anyone.
    #[non_exhaustive]
    Release {},
}

impl Outcome {
    /// Finishes a delivery once these are safe.
    #[must_use]
    pub fn done(emit: Vec<Envelope>) -> Self {
        Self::Done { emit }
    }

    /// Removes a delivery for good.
    #[must_use]
    pub fn take() -> Self {
        Self::Take {}
    }

    /// Gives a delivery back.
    #[must_use]
    pub fn release() -> Self {
        Self::Release {}
    }
}

/// A message and where it goes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Envelope {
    /// Where it goes.
    pub to: Address,
    /// How long it is kept back before it is delivered, at most [`Limits::delay_max`].
    pub delay: Duration,
    /// What goes there.
    pub message: Message,
}

impl Envelope {
    /// Puts an envelope together.
    #[must_use]
    pub fn new(to: Address, message: Message) -> Self {
        Self { to, delay: Duration::ZERO, message }
    }

    /// Keeps it back for so long before it is delivered.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }
}

/// Where an envelope goes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// To any one node that has the atom.
    Atom(AtomId),
    /// To who asked.
    Reply(ReplyTo),
    /// To the dead letters, on behalf of this atom.
    DeadLetter(AtomId),
    /// To the inbox of every node that takes electrons at the moment: a help to all, that nobody relies on. Where
    /// there is no such address it is [refused](SendError::Refused).
    Nodes,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Atom(atom) => write!(f, "atom {atom}"),
            Self::Reply(reply_to) => write!(f, "reply address {reply_to}"),
            Self::DeadLetter(atom) => write!(f, "dead letters of {atom}"),
            Self::Nodes => f.write_str("all nodes"),
        }
    }
}

/// Why a session could not be opened.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Nothing answers there; waiting may help.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// It answers, and refuses: a wrong login, a virtual host that does not exist.
    #[error("refused: {0}")]
    Refused(String),
    /// It answers, and is not what the configuration says.
    #[error("misconfigured: {0}")]
    Misconfigured(String),
}

/// Why a session or subscription ended.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// It was closed in order.
    #[error("closed")]
    Closed,
    /// It was lost.
    #[error("{0}")]
    Lost(Arc<str>),
}

impl SessionError {
    /// Says how it was lost.
    #[must_use]
    pub fn lost(reason: impl fmt::Display) -> Self {
        Self::Lost(reason.to_string().into())
    }
}

/// Why an envelope is not known to be safe.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// Nothing is there to take it: the asker is gone.
    #[error("there is no {0}")]
    Unroutable(String),
    /// It is larger than is carried; it was not sent.
    #[error("{bytes} bytes are more than the {bytes_max} that can be carried")]
    TooLarge {
        /// How long it is.
        bytes: usize,
        /// How long it may be.
        bytes_max: usize,
    },
    /// It is refused for good: this program may not send there.
    #[error("refused: {0}")]
    Refused(String),
    /// It was not taken this time; the same may be tried again.
    #[error("not taken: {0}")]
    NotTaken(String),
    /// It may have arrived or not; sending it again under the same id is right.
    #[error("not known to have arrived: {0}")]
    Unknown(String),
}

impl SendError {
    /// Whether another try would end the same way.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::TooLarge { .. } | Self::Refused(_))
    }
}

/// Why a delivery was not settled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettleError {
    /// Some of what it emits could not be made safe. The rest is safe, and the ticket comes back so that
    /// another outcome can be chosen.
    #[error("{} could not be made safe", failed.len())]
    NotSafe {
        /// To settle it after all.
        ticket: Ticket,
        /// What is not safe, each with its reason.
        failed: Vec<(Envelope, SendError)>,
    },
    /// The ticket is of another session or channel; its delivery has gone back already.
    #[error("the ticket is stale")]
    Stale,
    /// The session ended meanwhile; the delivery comes again unless it was removed.
    #[error("not known whether it was settled: {0}")]
    Unknown(SessionError),
}
