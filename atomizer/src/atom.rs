//! What users write: atoms.

use std::{future::Future, num::NonZeroUsize, time::Duration};

use serde::{Serialize, de::DeserializeOwned};

use crate::{AtomId, Context, Payload, Result};

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

/// What sort of atom it is. It tunes defaults and tells readers; it gates nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A leaf: one electron in, one result out.
    #[default]
    Atomic,
    /// Starts other electrons, and waits for their results or does not.
    Spawner,
}

/// How an atom is run. Made with [`Options::default`] and the methods below.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Options {
    concurrency: Option<NonZeroUsize>,
    time_limit: Option<Duration>,
    blocking: bool,
}

impl Options {
    /// The most instances of one atom that run at once on a node, unless the atom says otherwise.
    pub const CONCURRENCY_DEFAULT: usize = 256;

    /// The most that any limit may be: a larger one is taken for this.
    pub const CONCURRENCY_MAX: usize = 1_000_000;

    /// Limits how many run at once on a node.
    ///
    /// The default is [`Options::CONCURRENCY_DEFAULT`], and for [blocking](Self::blocking) atoms the
    /// number of cores.
    ///
    /// # Panics
    /// When `limit` is 0.
    pub fn concurrency(mut self, limit: usize) -> Self {
        self.concurrency = Some(NonZeroUsize::new(limit).expect("a limit of 0 would never run"));
        self
    }

    /// Limits how long one run may take; without it, and without one in the electron, it may run for ever.
    ///
    /// At the limit the future is dropped at its next `await`, and the asker is answered. An atom that never
    /// awaits is not stopped.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = Some(limit);
        self
    }

    /// Says that the atom computes or blocks: it runs on threads of their own, one per core by default.
    ///
    /// An atom that blocks and does not say so holds up other atoms. A run that blocks cannot be stopped from
    /// outside: neither a time limit nor the end of the node ends it before its next `await`.
    pub fn blocking(mut self) -> Self {
        self.blocking = true;
        self
    }

    pub(crate) fn concurrency_limit(&self) -> usize {
        match self.concurrency {
            Some(limit) => limit.get().min(Self::CONCURRENCY_MAX),
            None if self.blocking => cores(),
            None => Self::CONCURRENCY_DEFAULT,
        }
    }

    pub(crate) fn run_time_limit(&self) -> Option<Duration> {
        self.time_limit
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
    fn kind(&self) -> Kind;

    /// Returns how it is to be run.
    fn options(&self) -> Options;

    /// Does the job. See [`Atom::process`].
    ///
    /// # Cancel safety
    /// The future is dropped at an `await` when the time limit ends or the node stops.
    fn run(&self, cx: &Context, payload: &Payload) -> impl Future<Output = Result<Payload>> + Send;
}
