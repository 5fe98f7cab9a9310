//! What users write: atoms.

use std::{future::Future, num::NonZeroUsize, time::Duration};

use serde::{Serialize, de::DeserializeOwned};

use crate::{AtomId, Context, Payload, Policy, Result};

/// A job: typed input in, typed output out, as an `async fn`.
///
/// ```
/// use atomizer::prelude::*;
///
/// struct Double;
///
/// impl Atom for Double {
///     const ID: &'static str = "double";
///     type Input = u64;
///     type Output = u64;
///
///     async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
///         input.checked_mul(2).ok_or_else(|| AtomError::msg("too large to double"))
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let atomizer = Atomizer::builder().conductor(Memory::new()).atom(Double).start().await?;
/// assert_eq!(atomizer.call::<Double>(21).await?, 42);
/// atomizer.drain().await?;
/// # Ok(())
/// # }
/// ```
pub trait Atom: Send + Sync + 'static {
    /// Names the atom, the same on every node: 1 to 128 of the characters `A-Z a-z 0-9 . _ : -`.
    const ID: &'static str;
    /// What sort of atom it is.
    const KIND: Kind = Kind::Atomic;
    /// What it takes, as JSON on the wire.
    type Input: Serialize + DeserializeOwned + Send + 'static;
    /// What it gives, as JSON on the wire.
    type Output: Serialize + DeserializeOwned + Send + 'static;

    /// Returns how it is to be run.
    fn options(&self) -> Options {
        Options::default()
    }

    /// Does the job.
    ///
    /// At least once: an electron whose node is lost runs again elsewhere.
    ///
    /// # Cancel safety
    /// The future is dropped at an `await` when the time limit ends or the node stops.
    fn process(
        &self,
        cx: &Context,
        input: Self::Input,
    ) -> impl Future<Output = Result<Self::Output>> + Send;
}

/// What sort of atom it is.
///
/// | | runs at once on a node | at its time limit | while it waits for others | may ask itself |
/// |---|---|---|---|---|
/// | `Atomic` | [256](Options::CONCURRENCY_DEFAULT), or as it says; blocking ones [a few more than there are cores](Options::blocking) | its slot is free at once | its slot is free | yes |
/// | `Spawner` | the same | the same | the same | yes |
/// | `Singleton` | 1, over all conductors | its slot waits for the true end | its slot is kept, the node's permit is free | no: [an error](crate::CallError::AsksItself) |
///
/// What is no electron's work, but runs from the node's start to its end, is a [`Resident`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A leaf: one electron in, one result out.
    #[default]
    Atomic,
    /// Starts other electrons, and waits for their results or does not. It tells readers; nothing depends on
    /// it.
    Spawner,
    /// Never runs twice at once on a node, so that it may keep state: one electron after the other, whichever
    /// conductors they come through. `process` takes `&self`, so the state is in a `Mutex` or an atomic; where a
    /// panic may leave it broken, [`Builder::atom_from`](crate::Builder::atom_from) makes it afresh.
    Singleton,
}

/// What runs from the start of a node to its end, once: a watcher, a schedule, a cache that is kept warm.
///
/// It is made anew each time it starts, so state lives as long as a run does. One that fails or panics is
/// started again, after a pause that grows from 100 ms to 30 s; one that returns `Ok` has done its work and is
/// not. It needs no permit, and no electron. A node that [drains](crate::Atomizer::drain) tells it through
/// [`Context::cancelled`] and waits for it; one that does not end is aborted with everything else.
///
/// ```
/// use std::time::Duration;
/// use atomizer::{Resident, prelude::*};
///
/// #[derive(Default)]
/// struct Heartbeat;
///
/// impl Resident for Heartbeat {
///     const ID: &'static str = "heartbeat";
///
///     async fn run(&self, cx: &Context) -> Result<()> {
///         loop {
///             tokio::select! {
///                 () = cx.cancelled() => return Ok(()),
///                 () = tokio::time::sleep(Duration::from_secs(1)) => println!("still here"),
///             }
///         }
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let builder = Atomizer::builder().conductor(Memory::new());
/// let atomizer = builder.resident(Heartbeat::default).start().await?;
/// atomizer.drain().await?;
/// # Ok(())
/// # }
/// ```
pub trait Resident: Send + Sync + 'static {
    /// Names it: as the id of an atom, and different from those of the node's atoms.
    const ID: &'static str;

    /// Runs until it is done or the node drains.
    ///
    /// The context is that of an electron of its own, new for each start: what it asks is asked anew.
    ///
    /// # Cancel safety
    /// The future is dropped at an `await` when the node stops and it did not end by itself.
    fn run(&self, cx: &Context) -> impl Future<Output = Result<()>> + Send;
}

/// How an atom is run. Made with [`Options::default`] and the methods below.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Options {
    concurrency: Option<NonZeroUsize>,
    prefetch: Option<NonZeroUsize>,
    time_limit: Option<Duration>,
    policy: Option<Policy>,
    blocking: bool,
    at_most_once: bool,
}

impl Options {
    /// The most instances of one atom that run at once on a node, unless the atom says otherwise.
    pub const CONCURRENCY_DEFAULT: usize = 256;

    /// The most that any limit may be: a larger one is taken for this.
    pub const CONCURRENCY_MAX: usize = 1_000_000;

    /// How many blocking runs there may be on so many cores: more than these. The thread of the next run is woken when
    /// the last has ended, and the system may wake it on a core that is busy: of two cores a fifth idled with 2, 4 % with 6.
    fn blocking_default(cores: usize) -> usize {
        const BEYOND_CORES_MAX: usize = 4;
        cores + BEYOND_CORES_MAX.min(2 * cores)
    }

    /// Limits how many run at once on a node.
    ///
    /// The default is [`Options::CONCURRENCY_DEFAULT`], and for [blocking](Self::blocking) atoms a
    /// few more than there are cores.
    ///
    /// # Panics
    /// When `limit` is 0.
    pub fn concurrency(mut self, limit: usize) -> Self {
        self.concurrency = Some(NonZeroUsize::new(limit).expect("a limit of 0 would never run"));
        self
    }

    /// Limits how many a node holds of each conductor's queue: those that run, and those that wait for a permit.
    ///
    /// The default is what can run, and as many again, up to 64, that are at hand when one ends. With less, fewer
    /// run; with more, some lie here while other nodes idle. What is [parked](crate::Session::park) is not counted:
    /// parents that wait, and what runs for long. What has ended is, until its acknowledgement is sent: over RabbitMQ
    /// after up to 2 ms.
    ///
    /// # Panics
    /// When `count` is 0.
    pub fn prefetch(mut self, count: usize) -> Self {
        self.prefetch = Some(NonZeroUsize::new(count).expect("a prefetch of 0 would never run"));
        self
    }

    /// Limits how long one run may take; without it, and without one in the electron, it may run for ever.
    ///
    /// At the limit the attempt has failed, whatever the run does: its slot is free, its asker is answered or
    /// the next attempt made, and its future is dropped at its next `await`. One that never awaits goes on
    /// until it ends by itself, and [too many of these](crate::Builder::stuck_max) end the node.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = Some(limit);
        self
    }

    /// Says what follows a failure, unless the electron does.
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = Some(policy);
        self
    }

    /// Says that no message may be begun twice, whatever happens: it is removed from its queue before it is begun.
    ///
    /// The price: an electron whose node is lost while it runs ends with it, and nobody is told. What the policy
    /// allows after a failure still holds: then it is known that the attempt has ended. A sender that does not know
    /// whether its send arrived sends again, under the same id, and so does a caller whose answers may be lost with its
    /// inbox: two messages, of which a node that has both at once begins one, but two nodes may begin one each, and
    /// so may one node when the first has ended.
    pub fn at_most_once(mut self) -> Self {
        self.at_most_once = true;
        self
    }

    /// Says that the atom computes or blocks: it runs on threads of their own, by default four more than there are
    /// cores (on a single core two more), so that none of these idles while one run ends and the next begins. They share
    /// the cores, and a time limit goes by the clock on the wall: what computes for long may want
    /// [a lower limit](Self::concurrency).
    ///
    /// An atom that blocks and does not say so holds up other atoms. A run that blocks cannot be stopped from
    /// outside: neither a time limit nor the end of the node ends it before its next `await`.
    pub fn blocking(mut self) -> Self {
        self.blocking = true;
        self
    }

    pub(crate) fn concurrency_limit(&self, kind: Kind) -> usize {
        match self.concurrency {
            _ if kind == Kind::Singleton => 1,
            Some(limit) => limit.get().min(Self::CONCURRENCY_MAX),
            None if self.blocking => Self::blocking_default(cores()),
            None => Self::CONCURRENCY_DEFAULT,
        }
    }

    /// What a node holds of one atom's queue: what can run, and a little in hand so that the next is there when a
    /// permit comes free. More in hand would sit here while other nodes idle.
    pub(crate) fn window(&self, kind: Kind) -> NonZeroUsize {
        const IN_HAND_MAX: usize = 64;
        self.prefetch.unwrap_or_else(|| {
            let limit = self.concurrency_limit(kind);
            NonZeroUsize::new(limit + limit.min(IN_HAND_MAX)).expect("a limit is at least 1")
        })
    }

    pub(crate) fn run_time_limit(&self) -> Option<Duration> {
        self.time_limit
    }

    pub(crate) fn run_policy(&self) -> Option<Policy> {
        self.policy
    }

    pub(crate) fn is_at_most_once(&self) -> bool {
        self.at_most_once
    }

    pub(crate) fn is_blocking(&self) -> bool {
        self.blocking
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// A job over bytes: for payloads other than JSON, and for code whose types are not known here.
///
/// Every [`Atom`] is one.
pub trait RawAtom: Send + Sync + 'static {
    /// Names the atom.
    fn id(&self) -> AtomId;

    /// Returns what sort of atom it is.
    fn kind(&self) -> Kind {
        Kind::default()
    }

    /// Returns how it is to be run.
    fn options(&self) -> Options {
        Options::default()
    }

    /// Does the job. See [`Atom::process`].
    ///
    /// # Cancel safety
    /// The future is dropped at an `await` when the time limit ends or the node stops.
    fn run(&self, cx: &Context, payload: &Payload) -> impl Future<Output = Result<Payload>> + Send;
}
