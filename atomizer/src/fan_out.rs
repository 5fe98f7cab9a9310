//! Fan-out: many children of one atom, a window of them in flight, and what comes of them.

use std::{collections::VecDeque, fmt, marker::PhantomData, num::NonZeroUsize, sync::Arc};

use futures::{Stream, future::BoxFuture};
use rustc_hash::FxHashMap;
use tokio::sync::mpsc;

use crate::{
    Address, Atom, AtomId, CallError, Context, ElectronId, Envelope, Message, Policy, Properties,
    SendError,
    ask::{Token, Waiter},
    erased,
};

/// A fan-out that has not begun: choose what to make of the outputs.
///
/// Inputs are taken from the iterator as there is room in the window, so a million children do not need a
/// million entries. An atom that asks itself holds, while it waits, its place in the node's window for that
/// atom: its limit of concurrency and at most 64 more. Each child counts once, however often it is delivered or answered. Dropping the fan-out
/// gives up the answers.
#[must_use = "a fan-out does nothing until its outputs are asked for"]
pub struct FanOut<'cx, A, I> {
    cx: &'cx Context,
    inputs: I,
    window: NonZeroUsize,
    policy: Option<Policy>,
    atom: PhantomData<fn() -> A>,
}

impl<'cx, A, I> FanOut<'cx, A, I>
where
    A: Atom,
    I: Iterator<Item = A::Input> + Send,
{
    /// How many children are in flight unless told otherwise.
    pub const WINDOW_DEFAULT: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");

    pub(crate) fn new(cx: &'cx Context, inputs: I) -> Self {
        Self { cx, inputs, window: Self::WINDOW_DEFAULT, policy: None, atom: PhantomData }
    }

    /// Sets how many children may be in flight.
    pub fn window(mut self, children: NonZeroUsize) -> Self {
        self.window = children;
        self
    }

    /// Sets what follows the failure of a child, instead of what its atom or its node says.
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = Some(policy);
        self
    }

    /// Folds the outputs in the order in which they arrive.
    ///
    /// # Errors
    /// The first child that failed; the answers of all others are given up.
    ///
    /// # Cancel safety
    /// Dropping it gives up the answers.
    pub async fn fold<T, F>(self, initial: T, mut fold: F) -> Result<T, ChildError>
    where
        T: Send,
        F: FnMut(T, A::Output) -> T + Send,
    {
        let mut children = Children::new(self);
        let mut folded = initial;
        while let Some((index, result)) = children.next().await {
            let output = result.map_err(|source| ChildError { index, source })?;
            folded = fold(folded, output);
        }
        Ok(folded)
    }

    /// Collects the outputs in the order of the inputs.
    ///
    /// # Errors
    /// The first child that failed; the answers of all others are given up.
    ///
    /// # Cancel safety
    /// Dropping it gives up the answers.
    pub async fn collect(self) -> Result<Vec<A::Output>, ChildError> {
        let mut children = Children::new(self);
        let mut outputs: Vec<Option<A::Output>> = Vec::new();
        while let Some((index, result)) = children.next().await {
            let output = result.map_err(|source| ChildError { index, source })?;
            if outputs.len() <= index {
                outputs.resize_with(index + 1, || None);
            }
            outputs[index] = Some(output);
        }
        Ok(outputs.into_iter().flatten().collect())
    }

    /// Streams what comes of each child as it arrives, with the index of its input.
    ///
    /// # Cancel safety
    /// Dropping the stream gives up the answers that are outstanding.
    pub fn stream(self) -> impl Stream<Item = (usize, Result<A::Output, CallError>)> + Send + 'cx
    where
        I: 'cx,
    {
        futures::stream::unfold(Children::new(self), async |mut children| {
            let next = children.next().await?;
            Some((next, children))
        })
    }
}

impl<A, I> fmt::Debug for FanOut<'_, A, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FanOut").field("window", &self.window).finish_non_exhaustive()
    }
}

/// A child of a fan-out failed.
#[derive(Debug, thiserror::Error)]
#[error("child {index} failed")]
#[non_exhaustive]
pub struct ChildError {
    /// Which input, counted from 0.
    pub index: usize,
    /// How.
    pub source: CallError,
}

/// At most this many children are made safe together.
const BATCH_MAX: usize = 256;

type Sent = Vec<(usize, ElectronId, Result<(), SendError>)>;

/// The children of one fan-out, in flight.
struct Children<'cx, A, I: Iterator> {
    cx: &'cx Context,
    inputs: std::iter::Fuse<I>,
    window: usize,
    policy: Option<Policy>,
    next_index: usize,
    /// Asked and not answered. Empty when nothing more can come, once the inputs have ended.
    in_flight: FxHashMap<usize, (ElectronId, Token)>,
    sending: Option<BoxFuture<'cx, Sent>>,
    answers: mpsc::Receiver<(usize, Arc<Properties>)>,
    /// Cloned into the entry of each child.
    answer_to: mpsc::Sender<(usize, Arc<Properties>)>,
    arrived: VecDeque<(usize, Result<Arc<Properties>, CallError>)>,
    atom: PhantomData<fn() -> A>,
}

impl<'cx, A, I> Children<'cx, A, I>
where
    A: Atom,
    I: Iterator<Item = A::Input> + Send,
{
    fn new(fan_out: FanOut<'cx, A, I>) -> Self {
        let FanOut { cx, inputs, window, policy, .. } = fan_out;
        let window = window.get();
        let (answer_to, answers) = mpsc::channel(window);
        Self {
            cx,
            inputs: inputs.fuse(),
            window,
            policy,
            next_index: 0,
            in_flight: FxHashMap::default(),
            sending: None,
            answers,
            answer_to,
            arrived: VecDeque::new(),
            atom: PhantomData,
        }
    }

    /// Returns the next result, or `None` after the last.
    ///
    /// The permit is given back only when nothing has arrived yet.
    async fn next(&mut self) -> Option<(usize, Result<A::Output, CallError>)> {
        if self.arrived.is_empty() {
            let cx = self.cx;
            cx.slot.wait(self.exchange()).await;
        }
        let (index, result) = self.arrived.pop_front()?;
        let output = result.and_then(|answer| match &answer.outcome {
            Ok(payload) => erased::decode(payload).map_err(CallError::Decode),
            Err(failure) => Err(CallError::Failed(failure.clone())),
        });
        Some((index, output))
    }

    /// Sends and receives until something has arrived or nothing more can.
    async fn exchange(&mut self) {
        let mut answers = Vec::new();
        loop {
            self.fill();
            if !self.arrived.is_empty() || (self.in_flight.is_empty() && self.sending.is_none()) {
                return;
            }
            tokio::select! {
                received = self.answers.recv_many(&mut answers, self.window) => {
                    debug_assert!(received > 0, "this side holds a sender");
                    for (index, answer) in answers.drain(..) {
                        // Not there when its send was given up meanwhile: a child counts once.
                        if self.in_flight.remove(&index).is_some() {
                            self.arrived.push_back((index, Ok(answer)));
                        }
                    }
                }
                sent = sending(self.sending.as_mut()) => {
                    self.sending = None;
                    for (index, id, result) in sent {
                        // A child whose answer is here already was sent well, whatever else is known of it.
                        if let Err(source) = result
                            && let Some((_, token)) = self.in_flight.remove(&index)
                        {
                            self.cx.asker.node.pending.remove(id, token);
                            self.arrived.push_back((index, Err(CallError::NotSent { id, source })));
                        }
                    }
                }
            }
        }
    }

    /// Begins to send the next children, when a good part of the window is free.
    fn fill(&mut self) {
        let free = self.window - self.in_flight.len();
        let worth_it = free >= self.window.div_ceil(8) || self.in_flight.is_empty();
        if self.sending.is_some() || !worth_it {
            return;
        }
        let mut envelopes = Vec::new();
        let mut sent = Vec::new();
        let pending = &self.cx.asker.node.pending;
        for input in self.inputs.by_ref().take(free.min(BATCH_MAX)) {
            let index = self.next_index;
            self.next_index += 1;
            let payload = match erased::encode(&input) {
                Ok(payload) => payload,
                Err(error) => {
                    self.arrived.push_back((index, Err(CallError::Encode(error))));
                    continue;
                }
            };
            let mut child = match self.cx.next_child(AtomId::of::<A>(), payload) {
                Ok(child) => self.cx.asker.address(child),
                Err(error) => {
                    self.arrived.push_back((index, Err(error)));
                    continue;
                }
            };
            child.policy = self.policy.or(child.policy);
            let child = Arc::new(child);
            let token = pending.insert(&child, Waiter::Child(index, self.answer_to.clone()));
            self.in_flight.insert(index, (child.id, token));
            sent.push((index, child.id));
            envelopes
                .push(Envelope::new(Address::Atom(child.atom.clone()), Message::Electron(child)));
        }
        if envelopes.is_empty() {
            return;
        }
        let link = &self.cx.asker.link;
        self.sending = Some(Box::pin(async move {
            let results = link.send(&envelopes).await;
            sent.into_iter().zip(results).map(|((index, id), result)| (index, id, result)).collect()
        }));
    }
}

async fn sending(sending: Option<&mut BoxFuture<'_, Sent>>) -> Sent {
    match sending {
        Some(sending) => sending.await,
        None => std::future::pending().await,
    }
}

impl<A, I: Iterator> Drop for Children<'_, A, I> {
    fn drop(&mut self) {
        for (id, token) in self.in_flight.values() {
            self.cx.asker.node.pending.remove(*id, *token);
        }
    }
}
