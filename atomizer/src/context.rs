//! What an atom may ask of the runtime while it runs.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::Stream;
use tokio::time::Instant;

use crate::{
    Atom, AtomId, Call, CallError, Cancel, ChildError, Electron, ElectronId, Envelope, EventKind,
    Failure, FanOut, Group, Kind, NodeId, Parent, Payload, ReplyTo, ResultsId, SendError, Spawning,
    admission::Slot, ask::Asker, erased, node::Stage,
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
    /// In which round of its node it asks: the one in which it began, for a run that has been stopped may ask on after
    /// the next has begun.
    round: u64,
    /// What is sent when this run succeeds.
    pub(crate) spawned: Spawned,
    /// When its progress was told last.
    progress_told: Mutex<Option<Instant>>,
}

/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Children that are sent when their parent succeeds.
#[derive(Debug, Default)]
pub(crate) struct Spawned(Mutex<Vec<Envelope>>);

impl Spawned {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Vec<Envelope>> {
        // A panic cannot leave a push half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Context {
    pub(crate) fn new(asker: Asker, electron: Arc<Electron>, slot: Arc<Slot>) -> Self {
        let (kind, stop_at) = (Kind::Atomic, Stage::Cancelling);
        let (next_child, spawned) = (AtomicU64::new(0), Spawned::default());
        let round = asker.node.cancelled.round();
        let progress_told = Mutex::default();
        Self {
            asker,
            slot,
            electron,
            kind,
            deadline: None,
            stop_at,
            next_child,
            round,
            spawned,
            progress_told,
        }
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

    /// Tells who watches how far this run has come: so much is done, of so much where that is known, in whatever unit
    /// the atom likes to count.
    ///
    /// It is an [event](crate::EventKind::Progress), ten times a second at the most: what is told sooner after the last is
    /// left out, unless all is done. So it may be called in every round of a loop.
    pub fn progress(&self, done: u64, total: impl Into<Option<u64>>) {
        let (electron, attempt, total) = (&self.electron, self.attempt(), total.into());
        let mut last = self.progress_told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_soon = last.is_some_and(|last| last.elapsed() < PROGRESS_EVERY);
        if is_soon && total.is_none_or(|total| done < total) {
            return;
        }
        *last = Some(Instant::now());
        drop(last);
        self.asker.node.events.emit(Some(self.asker.link.id()), || EventKind::Progress {
            electron: electron.id,
            atom: electron.atom.clone(),
            attempt,
            done,
            total,
        });
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
            .and_then(|payload| self.next_question(AtomId::of::<A>(), payload));
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
        let electron = self.next_question(atom, payload);
        Call::new(self.asker.clone(), Some(&self.slot), electron, |payload| Ok(payload.clone()))
    }

    /// Sends an electron that nobody waits for, exactly when this run succeeds.
    ///
    /// # Errors
    /// As [`Spawning::on_success`].
    pub fn spawn<A: Atom>(&self, input: A::Input) -> Result<ElectronId, CallError> {
        self.spawning().on_success::<A>(input)
    }

    /// Sends an electron that nobody waits for, at once: whether this run succeeds or not. When this returns it
    /// is safe.
    ///
    /// # Errors
    /// As [`Spawning::now`].
    ///
    /// # Cancel safety
    /// Dropping the future leaves unknown whether the electron was sent.
    pub async fn spawn_now<A: Atom>(&self, input: A::Input) -> Result<ElectronId, CallError> {
        self.spawning().now::<A>(input).await
    }

    /// Sends an electron for each input at once, many at a time, and waits for none. Returns how many were sent.
    ///
    /// # Errors
    /// As [`Spawning::all`].
    ///
    /// # Cancel safety
    /// Dropping the future leaves unknown which were sent.
    pub async fn spawn_all<A: Atom>(
        &self,
        inputs: impl IntoIterator<Item = A::Input, IntoIter: Send>,
    ) -> Result<usize, ChildError> {
        self.spawning().all::<A>(inputs).await
    }

    /// Makes sure of a result address, and returns it: outcomes that are sent there wait until
    /// [`Atomizer::results`](crate::Atomizer::results) reads them, in this process or another.
    ///
    /// # Errors
    /// [`SendError`] when it is not known within 30 s to be there; [`SendError::Refused`] where the conductor has none.
    ///
    /// # Cancel safety
    /// Safe: it is made or not.
    pub async fn result_address(&self, id: &ResultsId) -> Result<ReplyTo, SendError> {
        self.asker.result_address(id).await
    }

    /// Says more of what is sent and not waited for: a delay, and where its outcome goes.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use atomizer::prelude::*;
    /// # struct Remind;
    /// # impl Atom for Remind {
    /// #     const ID: &'static str = "remind";
    /// #     type Input = String;
    /// #     type Output = ();
    /// #     async fn process(&self, _cx: &Context, _: String) -> Result<()> { Ok(()) }
    /// # }
    /// # fn order(cx: &Context, customer: String) -> Result<()> {
    /// cx.spawning().after(Duration::from_secs(3600)).on_success::<Remind>(customer)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn spawning(&self) -> Spawning<'_> {
        Spawning::new(self)
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

    /// Makes the next child that this run waits for.
    pub(crate) fn next_question(
        &self,
        atom: AtomId,
        payload: Payload,
    ) -> Result<Electron, CallError> {
        if self.kind == Kind::Singleton && atom == self.electron.atom {
            return Err(CallError::AsksItself(atom));
        }
        let mut child = self.next_child(atom, payload);
        // Another run of this electron on this node asked the same child, but in another round.
        child.correlation_id = (self.round > 0).then(|| self.round.to_string());
        let tries = self.electron.attempts.saturating_add(self.electron.passes);
        child.parent = child.parent.map(|parent| parent.tries(tries).lives(self.electron.lives));
        Ok(child)
    }

    /// Makes the next child, without saying yet where it is answered. It is wanted no longer than its parent.
    pub(crate) fn next_child(&self, atom: AtomId, payload: Payload) -> Electron {
        let index = self.next_child.fetch_add(1, Ordering::Relaxed);
        let parent = self.electron.id;
        let mut child = Electron::with_id(parent.child(index), atom, payload);
        child.parent = Some(Parent::new(parent, index).round(self.round));
        child.deadline =
            self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        for name in TRACE_HEADERS {
            if let Some(value) = self.electron.extra.get(name) {
                child.extra.insert(name.to_owned(), value.clone());
            }
        }
        child
    }

    /// Ends the round, if any child was asked: what a later run asks is told from that by its round.
    pub(crate) fn end_round(&self) {
        if self.next_child.load(Ordering::Relaxed) > 0 {
            self.asker.node.cancelled.end_round(self.round);
        }
    }

    /// Says that some children are not wanted any more, wherever they are.
    pub(crate) fn give_up(&self, children: &[ElectronId]) {
        self.end_round();
        let Asker { node, link } = &self.asker;
        for children in children.chunks(Cancel::ELECTRONS_MAX) {
            let cancel = Cancel::new(node.id.clone(), self.round, children.to_vec());
            link.telling.give_up(&node.cancelled, cancel);
        }
    }
}

/// What a child inherits, so that one trace spans the tree (W3C Trace Context).
const TRACE_HEADERS: [&str; 2] = ["traceparent", "tracestate"];

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("electron", &self.electron).finish_non_exhaustive()
    }
}
