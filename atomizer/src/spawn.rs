//! Free spawning: electrons that nobody here waits for.

use std::{fmt, sync::Arc, time::Duration};

use futures::{Stream, StreamExt};

use crate::{
    Address, Atom, AtomId, CallError, ChildError, Context, Electron, ElectronId, Envelope, Message,
    Payload, ReplyTo, SendError, ask::SEND_TIMEOUT, erased,
};

/// How many are made safe together.
const BATCH: usize = 256;

/// How children are sent that this run does not wait for. Made by [`Context::spawning`].
///
/// They are children all the same: a second life of this run sends them again under the same ids. They have no
/// deadline.
#[must_use = "nothing is sent yet"]
pub struct Spawning<'cx> {
    cx: &'cx Context,
    delay: Duration,
    results_to: Option<ReplyTo>,
}

impl<'cx> Spawning<'cx> {
    pub(crate) fn new(cx: &'cx Context) -> Self {
        Self { cx, delay: Duration::ZERO, results_to: None }
    }

    /// Has them begin when a time is over that counts from when they are sent, and not before.
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// Has their outcomes sent to an address, such as a [result address](Context::result_address) that another process
    /// reads.
    ///
    /// ```
    /// # use atomizer::prelude::*;
    /// use atomizer::ResultsId;
    ///
    /// const SQUARES: ResultsId = ResultsId::from_static("squares");
    ///
    /// # struct Square;
    /// # impl Atom for Square {
    /// #     const ID: &'static str = "square";
    /// #     type Input = u64;
    /// #     type Output = u64;
    /// #     async fn process(&self, _cx: &Context, input: u64) -> Result<u64> { Ok(input * input) }
    /// # }
    /// async fn spawn(cx: &Context) -> Result<()> {
    ///     let squares = cx.result_address(&SQUARES).await?;
    ///     cx.spawning().results_to(squares).on_success::<Square>(12)?;
    ///     Ok(())
    /// }
    ///
    /// // In this process or another, now or later.
    /// async fn read(node: &Atomizer) {
    ///     let mut results = node.results(SQUARES);
    ///     while let Some(outcome) = results.next().await {
    ///         println!("{:?}", outcome.output::<Square>());
    ///     }
    /// }
    /// ```
    pub fn results_to(mut self, address: ReplyTo) -> Self {
        self.results_to = Some(address);
        self
    }

    /// Sends an electron exactly when this run succeeds: both are safe together. A run that fails, or is retried, has
    /// sent nothing.
    ///
    /// It is kept in memory until then. For many there is [`all`](Self::all).
    ///
    /// # Errors
    /// [`CallError::Encode`], and [`CallError::NotSent`] for what no conductor could send: it is too large, or the
    /// delay too long.
    pub fn on_success<A: Atom>(&self, input: A::Input) -> Result<ElectronId, CallError> {
        self.on_success_raw(AtomId::of::<A>(), encode(input)?)
    }

    /// Sends an electron of an atom that this program need not know; see [`on_success`](Self::on_success).
    ///
    /// # Errors
    /// As [`on_success`](Self::on_success).
    pub fn on_success_raw(&self, atom: AtomId, payload: Payload) -> Result<ElectronId, CallError> {
        let child = self.child(atom, payload)?;
        let id = child.id;
        self.cx.spawned.lock().push(self.envelope(child));
        Ok(id)
    }

    /// Sends an electron at once: whether this run succeeds or not. When this returns it is safe.
    ///
    /// # Errors
    /// [`CallError::NotSent`] when that is not known within 30 s, and [`CallError::Encode`].
    ///
    /// # Cancel safety
    /// Dropping the future leaves unknown whether the electron was sent.
    pub async fn now<A: Atom>(&self, input: A::Input) -> Result<ElectronId, CallError> {
        let child = self.child(AtomId::of::<A>(), encode(input)?)?;
        self.cx.asker.clone().send_bounded(child, self.delay).await
    }

    /// Sends an electron for each input at once, many at a time: whether this run succeeds or not. Inputs are taken
    /// as the last ones are safe. Returns how many were sent; when this returns all are safe.
    ///
    /// # Errors
    /// The first that could not be sent, by its index; those after it may have been sent or not.
    ///
    /// # Cancel safety
    /// Dropping the future leaves unknown which were sent.
    pub async fn all<A: Atom>(
        &self,
        inputs: impl IntoIterator<Item = A::Input, IntoIter: Send>,
    ) -> Result<usize, ChildError> {
        self.all_of_stream::<A>(futures::stream::iter(inputs)).await
    }

    /// The same for the inputs of a stream, as they come.
    ///
    /// # Errors
    /// As [`all`](Self::all).
    ///
    /// # Cancel safety
    /// As [`all`](Self::all).
    pub async fn all_of_stream<A: Atom>(
        &self,
        inputs: impl Stream<Item = A::Input> + Send,
    ) -> Result<usize, ChildError> {
        let mut batches = std::pin::pin!(inputs.ready_chunks(BATCH));
        let mut sent = 0;
        while let Some(inputs) = batches.next().await {
            let mut envelopes = Vec::with_capacity(inputs.len());
            for (at, input) in inputs.into_iter().enumerate() {
                let child = encode(input).and_then(|input| self.child(AtomId::of::<A>(), input));
                let child = child.map_err(|source| ChildError { index: sent + at, source })?;
                envelopes.push(self.envelope(child));
            }
            // Without the permit: who is to make room may need it.
            self.cx
                .slot
                .wait(self.send(&envelopes))
                .await
                .map_err(|(at, source)| ChildError { index: sent + at, source })?;
            sent += envelopes.len();
        }
        Ok(sent)
    }

    async fn send(&self, envelopes: &[Envelope]) -> Result<(), (usize, CallError)> {
        self.cx.asker.tell_all_sent(envelopes);
        let sending = self.cx.asker.link.send(envelopes);
        let results = tokio::time::timeout(SEND_TIMEOUT, sending).await.unwrap_or_else(|_| {
            let reason = format!("no confirmation within {SEND_TIMEOUT:?}");
            vec![Err(SendError::Unknown(reason))]
        });
        for (at, (envelope, result)) in envelopes.iter().zip(results).enumerate() {
            if let (Err(source), Message::Electron(child)) = (result, &envelope.message) {
                return Err((at, CallError::NotSent { id: child.id, source }));
            }
        }
        Ok(())
    }

    /// Makes a child that this conductor can send.
    fn child(&self, atom: AtomId, payload: Payload) -> Result<Electron, CallError> {
        let bytes = payload.body.len();
        let mut child = self.cx.next_child(atom, payload);
        // Nobody waits for it, so nobody stops waiting.
        child.deadline = None;
        child.sender = Some(self.cx.node().clone());
        child.reply_to.clone_from(&self.results_to);
        let limits = self.cx.asker.link.limits();
        let (bytes_max, delay_max) = (limits.payload_bytes_max, limits.delay_max);
        let source = if bytes > bytes_max {
            SendError::TooLarge { bytes, bytes_max }
        } else if self.delay > delay_max {
            SendError::Refused(format!("electrons are kept back for {delay_max:?} at the most"))
        } else {
            return Ok(child);
        };
        Err(CallError::NotSent { id: child.id, source })
    }

    fn envelope(&self, child: Electron) -> Envelope {
        let to = Address::Atom(child.atom.clone());
        Envelope::new(to, Message::Electron(Arc::new(child))).after(self.delay)
    }
}

fn encode<T: serde::Serialize>(input: T) -> Result<Payload, CallError> {
    erased::encode(&input).map_err(CallError::Encode)
}

impl fmt::Debug for Spawning<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cx: _, delay, results_to } = self;
        f.debug_struct("Spawning")
            .field("delay", delay)
            .field("results_to", results_to)
            .finish_non_exhaustive()
    }
}
