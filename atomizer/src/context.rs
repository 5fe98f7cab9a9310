//! What an atom may ask of the runtime while it runs.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::Stream;
use tokio::time::Instant;

use crate::{
    Atom, AtomId, Call, CallError, Electron, ElectronId, Failure, FanOut, Group, Kind, NodeId,
    Parent, Payload, admission::Slot, ask::Asker, erased, node::Stage,
};

/// One run of one electron, as its atom sees it.
pub struct Context {
    pub(crate) asker: Asker,
    pub(crate) slot: Arc<Slot>,
    electron: Arc<Electron>,
    kind: Kind,
    /// When nobody wants the outcome any more.
    deadline: Option<Instant>,
    /// When it is to stop.
    stop_at: Stage,
    /// Which index the next child gets. An atom that asks in the same order each time asks the same children
    /// again in a second life.
    next_child: AtomicU64,
}

impl Context {
    pub(crate) fn new(asker: Asker, electron: Arc<Electron>, slot: Arc<Slot>) -> Self {
        let (kind, stop_at) = (Kind::Atomic, Stage::Cancelling);
        Self { asker, slot, electron, kind, deadline: None, stop_at, next_child: AtomicU64::new(0) }
    }

    /// The context of a resident: it runs without a permit, and is to stop when the node drains.
    pub(crate) fn of_resident(asker: Asker, electron: Arc<Electron>) -> Self {
        let slot = Arc::new(Slot::unlimited());
        Self { stop_at: Stage::Draining, ..Self::new(asker, electron, slot) }
    }

    pub(crate) fn of_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    pub(crate) fn until(mut self, deadline: Option<Instant>) -> Self {
        self.deadline = deadline;
        self
    }

    /// Returns the electron that is being worked on.
    #[must_use]
    pub fn electron(&self) -> &Electron {
        &self.electron
    }

    /// Returns the node that runs it.
    #[must_use]
    pub fn node(&self) -> &NodeId {
        &self.asker.node.id
    }

    /// Returns which attempt this is, counted from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.electron.attempts.saturating_add(1)
    }

    /// Returns how earlier attempts failed, oldest first: the first and the last eight. That it was
    /// [given back](crate::FailureKind::GivenBack) is among them, though that is no attempt.
    #[must_use]
    pub fn history(&self) -> &[Failure] {
        &self.electron.history
    }

    /// Waits until the node wants this run to stop: a resident when the node drains, others when the time to
    /// drain is over. A run that does not stop is aborted soon after.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn cancelled(&self) {
        self.asker.node.reached(self.stop_at).await;
    }

    /// Asks another atom, anywhere in the cluster, and waits for its output without holding up a slot.
    ///
    /// # Errors
    /// On awaiting: [`CallError`](crate::CallError).
    ///
    /// # Cancel safety
    /// Dropping the call gives up the answer, not the child.
    #[expect(clippy::needless_pass_by_value, reason = "callers write `call::<Double>(21)`")]
    pub fn call<A: Atom>(&self, input: A::Input) -> Call<'_, A::Output> {
        let electron = (erased::encode(&input).map_err(CallError::Encode))
            .and_then(|payload| self.next_child(AtomId::of::<A>(), payload));
        Call::new(self.asker.clone(), Some(&self.slot), electron, erased::decode)
    }

    /// Asks an atom that this program need not know, by id and with bytes.
    ///
    /// # Errors
    /// On awaiting: [`CallError`](crate::CallError).
    ///
    /// # Cancel safety
    /// Dropping the call gives up the answer, not the child.
    pub fn call_raw(&self, atom: AtomId, payload: Payload) -> Call<'_, Payload> {
        let electron = self.next_child(atom, payload);
        Call::new(self.asker.clone(), Some(&self.slot), electron, |payload| Ok(payload.clone()))
    }

    /// Sends an electron that nobody waits for, at once: whether this run succeeds or not. When this returns it
    /// is safe.
    ///
    /// It is a child all the same: a second life of this run sends it again under the same id.
    ///
    /// # Errors
    /// [`CallError::NotSent`] when that is not known within 30 s, and [`CallError::Encode`].
    ///
    /// # Cancel safety
    /// Dropping the future leaves unknown whether the electron was sent.
    pub async fn spawn_now<A: Atom>(&self, input: A::Input) -> Result<ElectronId, CallError> {
        let payload = erased::encode(&input).map_err(CallError::Encode)?;
        let mut child = self.next_child(AtomId::of::<A>(), payload)?;
        // Nobody waits for it, so nobody stops waiting.
        child.deadline = None;
        self.asker.send_bounded(child, Duration::ZERO).await
    }

    /// Asks one atom for each input, a window of them at a time, and combines what comes back.
    ///
    /// ```
    /// # use atomizer::prelude::*;
    /// # struct Square;
    /// # impl Atom for Square {
    /// #     const ID: &'static str = "square";
    /// #     type Input = u64;
    /// #     type Output = u64;
    /// #     async fn process(&self, _cx: &Context, input: u64) -> Result<u64> { Ok(input * input) }
    /// # }
    /// struct SumOfSquares;
    ///
    /// impl Atom for SumOfSquares {
    ///     const ID: &'static str = "sum-of-squares";
    ///     const KIND: Kind = Kind::Spawner;
    ///     type Input = u64;
    ///     type Output = u64;
    ///
    ///     async fn process(&self, cx: &Context, upto: u64) -> Result<u64> {
    ///         Ok(cx.fan_out::<Square>(1..=upto).fold(0, |sum, square| sum + square).await?)
    ///     }
    /// }
    /// ```
    pub fn fan_out<A: Atom>(
        &self,
        inputs: impl IntoIterator<Item = A::Input, IntoIter: Send>,
    ) -> FanOut<'_, A, impl Stream<Item = A::Input> + Send> {
        FanOut::new(self, futures::stream::iter(inputs))
    }

    /// Asks one atom for each input of a stream, such as rows of a database, as they come and as there is room for
    /// them. See [`fan_out`](Self::fan_out).
    pub fn fan_out_stream<A: Atom>(
        &self,
        inputs: impl Stream<Item = A::Input> + Send,
    ) -> FanOut<'_, A, impl Stream<Item = A::Input> + Send> {
        FanOut::new(self, inputs)
    }

    /// Asks different atoms together, each with an input of its own.
    pub fn group(&self) -> Group<'_> {
        Group::new(self)
    }

    /// Makes the next child, without saying yet where it is answered. It is wanted no longer than its parent.
    pub(crate) fn next_child(&self, atom: AtomId, payload: Payload) -> Result<Electron, CallError> {
        if self.kind == Kind::Singleton && atom == self.electron.atom {
            return Err(CallError::AsksItself(atom));
        }
        let index = self.next_child.fetch_add(1, Ordering::Relaxed);
        let parent = self.electron.id;
        let mut child = Electron::with_id(parent.child(index), atom, payload);
        child.parent = Some(Parent { id: parent, index });
        child.deadline =
            self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        for name in TRACE_HEADERS {
            if let Some(value) = self.electron.extra.get(name) {
                child.extra.insert(name.to_owned(), value.clone());
            }
        }
        Ok(child)
    }
}

/// What a child inherits, so that one trace spans the tree (W3C Trace Context).
const TRACE_HEADERS: [&str; 2] = ["traceparent", "tracestate"];

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("electron", &self.electron).finish_non_exhaustive()
    }
}
