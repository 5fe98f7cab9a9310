//! Dead letters: listed, shown, sent back, purged.
//!
//! Each operation has connections of its own, and goes through the queue once ([`walk`]). What it does not
//! remove it gives back.

mod back;
mod clearing;
mod copy;
mod listing;
mod publish;
mod walk;

use std::{
    fmt,
    num::{NonZeroU32, NonZeroUsize},
    time::Duration,
};

use atomizer::{
    AtomId, CauseKey, Census, DeadLetter, LetterId, Limits, NodeId, OpenError, Payload,
};
use lapin::{Channel, options::QueueDeclareOptions, protocol::AMQPSoftError, types::FieldTable};

pub use clearing::Clearing;
pub use listing::Listing;

use crate::{
    connect::{Addresses, plain},
    declare::{on_own_channel, refusal},
    life::REQUEST_TIMEOUT,
    opened::Opened,
    topology::Topology,
};

/// The dead letters of a namespace: a queue that every node writes to and nobody empties by himself.
///
/// It is a cheap handle: each operation opens connections of its own, and closes them when it ends. So one
/// that lost its connection is simply called again.
///
/// **Several at once**, people or programs: what one operation holds no other sees, nor do nodes care. Nothing
/// is lost or doubled by it, but each sees only a part; [`census`](Self::census) says whether others take from
/// the queue.
#[derive(Clone)]
pub struct DeadLetters {
    addresses: Addresses,
    topology: Topology,
    limits: Limits,
    operator: NodeId,
}

impl DeadLetters {
    pub(crate) fn new(addresses: &Addresses, topology: &Topology, limits: Limits) -> Self {
        let operator = NodeId::unique("operator").expect("it is made of letters");
        Self { addresses: addresses.clone(), topology: topology.clone(), limits, operator }
    }

    /// Counts the letters that are ready, and who takes from the queue right now.
    ///
    /// What others hold is not among them: the broker does not tell how many these are. A queue that is not
    /// there has none.
    ///
    /// # Errors
    /// [`DeadLettersError`] when the broker is not reached.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn census(&self) -> Result<Census, DeadLettersError> {
        let opened = self.open("counts").await?;
        let queue = self.topology.dead_queue();
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let ask = async |channel: &Channel| {
            channel.queue_declare(queue.as_str().into(), options, FieldTable::default()).await
        };
        let asking = async { Ok(on_own_channel(&opened.connection, ask).await) };
        let none = Progress::default();
        let census = match opened.life.bound(REQUEST_TIMEOUT, asking).await {
            Ok(Ok(queue)) => {
                Census::new(queue.message_count().into(), queue.consumer_count().into())
            }
            Ok(Err(error)) if refusal(&error) == Some(AMQPSoftError::NOTFOUND) => Census::new(0, 0),
            Ok(Err(error)) => return Err(DeadLettersError::interrupted(none, plain(&error))),
            Err(error) => return Err(DeadLettersError::interrupted(none, error)),
        };
        opened.close().await;
        Ok(census)
    }

    /// Lists the letters of a selection, oldest first, without their messages. They stay where they are.
    ///
    /// It ends when all that were ready at its beginning were seen. Until it ends, or is
    /// [closed](Listing::close) or dropped, it holds what it has seen, and no other operation sees that.
    ///
    /// Must be called within a tokio runtime.
    pub fn list(&self, selection: Selection) -> Listing {
        Listing::start(self.clone(), selection, false)
    }

    /// Lists the letters of a selection, with their messages. They stay where they are.
    pub fn list_whole(&self, selection: Selection) -> Listing {
        Listing::start(self.clone(), selection, true)
    }

    /// Returns one letter with its message and the whole history; none when there is none of that name, or when
    /// another operation holds it.
    ///
    /// # Errors
    /// [`DeadLettersError`] when the broker is not reached, or lost meanwhile.
    ///
    /// # Cancel safety
    /// Safe: the letter stays where it is.
    pub async fn show(&self, id: LetterId) -> Result<Option<DeadLetter>, DeadLettersError> {
        let mut listing = self.list_whole(Selection::id(id));
        let letter = listing.next().await.transpose()?;
        listing.close().await;
        Ok(letter)
    }

    /// Sends the electrons of a selection back to the queues of their atoms.
    ///
    /// Each is [as new](DeadLetter::revive). It is published, confirmed, and only then removed from the dead
    /// letters, in windows: see [`Requeue`]. What fails again while this goes on is not sent back twice.
    /// What cannot be sent back (it is no electron, its queue takes nothing) stays, and is counted as refused.
    ///
    /// Must be called within a tokio runtime.
    pub fn requeue(&self, selection: Selection, options: Requeue) -> Clearing {
        Clearing::requeue(self.clone(), selection, options, None)
    }

    /// Sends one electron back to the queue of its atom, with another payload.
    ///
    /// Must be called within a tokio runtime.
    pub fn requeue_edited(&self, id: LetterId, payload: Payload) -> Clearing {
        Clearing::requeue(self.clone(), Selection::id(id), Requeue::default(), Some(payload))
    }

    /// Removes the letters of a selection for good: those that were ready when it began.
    ///
    /// Must be called within a tokio runtime.
    pub fn purge(&self, selection: Selection) -> Clearing {
        Clearing::purge(self.clone(), selection)
    }

    /// Opens a connection.
    async fn open(&self, role: &str) -> Result<Opened, DeadLettersError> {
        let opened = Opened::open(&self.addresses, &self.operator, role).await;
        opened.map_err(DeadLettersError::Open)
    }
}

impl fmt::Debug for DeadLetters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeadLetters({} of {})", self.topology.dead_queue(), self.addresses)
    }
}

/// Which letters: all, or those that fit everything that is said.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    id: Option<LetterId>,
    atom: Option<AtomId>,
    cause: Option<CauseKey>,
}

impl Selection {
    /// Selects all letters.
    #[must_use]
    pub fn all() -> Self {
        Self::default()
    }

    /// Selects one letter. Where several have the same name it is the oldest.
    #[must_use]
    pub fn id(id: impl Into<LetterId>) -> Self {
        Self { id: Some(id.into()), ..Self::default() }
    }

    /// Narrows it to the letters of an atom.
    #[must_use]
    pub fn atom(mut self, atom: AtomId) -> Self {
        self.atom = Some(atom);
        self
    }

    /// Narrows it to those that died alike: see [`Cause::key`](atomizer::Cause::key).
    #[must_use]
    pub fn cause(mut self, cause: CauseKey) -> Self {
        self.cause = Some(cause);
        self
    }

    fn fits(&self, letter: &DeadLetter) -> bool {
        self.id.is_none_or(|id| id == letter.id)
            && self.atom.as_ref().is_none_or(|atom| Some(atom) == letter.atom.as_ref())
            && self.cause.is_none_or(|cause| cause == letter.cause().key())
    }

    /// Whether it is complete with the first that fits.
    fn is_one(&self) -> bool {
        self.id.is_some()
    }
}

/// How letters are sent back: how fast, and how many at a time.
#[derive(Clone, Copy, Debug)]
pub struct Requeue {
    interval: Option<Duration>,
    window: NonZeroUsize,
}

impl Requeue {
    /// How many are on their way at a time unless told otherwise.
    pub const WINDOW: NonZeroUsize = NonZeroUsize::new(64).expect("it is not zero");

    /// Sends back at most so many electrons in so long a time, evenly: 100 in a second, 1 in a minute. Without
    /// it they go as fast as the broker takes them.
    #[must_use]
    pub fn rate(mut self, electrons: NonZeroU32, per: Duration) -> Self {
        self.interval = Some(per / electrons.get());
        self
    }

    /// Sets how many are on their way at a time: the most that a process that is killed may have sent back
    /// without having removed them, so that they are sent back again, under the same ids.
    #[must_use]
    pub fn window(mut self, window: NonZeroUsize) -> Self {
        self.window = window;
        self
    }
}

impl Default for Requeue {
    fn default() -> Self {
        Self { interval: None, window: Self::WINDOW }
    }
}

/// How far an operation has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// How many letters there are to look at, those that are done included; 0 until that is known.
    pub total: u64,
    /// How many were listed, sent back, or purged.
    pub done: u64,
    /// How many were looked at that are not of the selection, or that died again meanwhile.
    pub kept: u64,
    /// How many are of the selection and could not be sent back.
    pub refused: u64,
}

/// Why dead letters cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeadLettersError {
    /// The broker was not reached: nothing was done.
    #[error("failed to reach the dead letters")]
    Open(#[source] OpenError),
    /// The broker was lost, or declined, before the end. Nothing is lost: what was not done is there still.
    #[error("{}: {reason}", how_far(progress))]
    Interrupted {
        /// How far it came.
        progress: Progress,
        /// What happened.
        reason: String,
    },
}

fn how_far(progress: &Progress) -> String {
    match progress.done {
        0 => "nothing was done".to_owned(),
        done => format!("interrupted when {done} letters were done"),
    }
}

impl DeadLettersError {
    fn interrupted(progress: Progress, reason: impl fmt::Display) -> Self {
        Self::Interrupted { progress, reason: reason.to_string() }
    }
}
