//! The children of one fan-out or group, in flight.

use std::{collections::VecDeque, pin::Pin, sync::Arc, task::Poll};

use futures::{
    Stream, StreamExt,
    future::{BoxFuture, poll_fn},
    stream::Fuse,
};
use rustc_hash::FxHashMap;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use crate::{
    Address, AtomId, CallError, Context, ElectronId, Envelope, FailureKind, Message, Payload,
    Policy, Properties, SendError,
    ask::{Token, Waiter},
};

/// At most this many children are made safe together.
const BATCH_MAX: usize = 256;

/// What one child is asked.
pub(crate) struct Question {
    pub(crate) atom: AtomId,
    pub(crate) payload: Result<Payload, serde_json::Error>,
}

/// How children are asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asking {
    /// How many are in flight at the most.
    pub(crate) window: usize,
    pub(crate) policy: Option<Policy>,
    /// When they are not waited for any longer.
    pub(crate) until: Option<Instant>,
}

/// What came of one child, by its index.
pub(crate) type Arrived = (usize, Result<Arc<Properties>, CallError>);

type Sent = Vec<(usize, ElectronId, Result<(), SendError>)>;

/// Asks one question after the other as there is room, and tells what comes of each.
pub(crate) struct Children<'cx, S> {
    cx: &'cx Context,
    /// None when they have ended.
    questions: Option<Pin<Box<Fuse<S>>>>,
    asking: Asking,
    next_index: usize,
    /// Asked and not answered.
    in_flight: FxHashMap<usize, (ElectronId, Token)>,
    sending: Option<BoxFuture<'cx, Sent>>,
    answers: mpsc::Receiver<(usize, Arc<Properties>)>,
    /// Cloned into the entry of each child.
    answer_to: mpsc::Sender<(usize, Arc<Properties>)>,
    arrived: VecDeque<Arrived>,
    /// Whether their time is over.
    is_late: bool,
}

impl<'cx, S> Children<'cx, S>
where
    S: Stream<Item = Question> + Send,
{
    pub(crate) fn new(cx: &'cx Context, questions: S, asking: Asking) -> Self {
        let (answer_to, answers) = mpsc::channel(asking.window);
        Self {
            cx,
            questions: Some(Box::pin(questions.fuse())),
            asking,
            next_index: 0,
            in_flight: FxHashMap::default(),
            sending: None,
            answers,
            answer_to,
            arrived: VecDeque::new(),
            is_late: false,
        }
    }

    /// Returns what came of the next, or `None` after the last, and when their time is over.
    ///
    /// The permit is given back only when nothing has arrived yet.
    pub(crate) async fn next(&mut self) -> Option<Arrived> {
        if self.arrived.is_empty() {
            let cx = self.cx;
            cx.slot.wait(self.exchange()).await;
        }
        self.arrived.pop_front()
    }

    /// Whether children were left because their time was over.
    pub(crate) fn is_late(&self) -> bool {
        self.is_late
    }

    /// How many were asked and have not been answered.
    pub(crate) fn unanswered(&self) -> usize {
        self.in_flight.len()
    }

    fn nothing_more_can_come(&self) -> bool {
        self.questions.is_none() && self.sending.is_none() && self.in_flight.is_empty()
    }

    /// How many are worth asking now: none before a good part of the window is free.
    fn room(&self) -> usize {
        let free = self.asking.window - self.in_flight.len();
        let is_worth_it = free >= self.asking.window.div_ceil(8) || self.in_flight.is_empty();
        if self.sending.is_some() || !is_worth_it { 0 } else { free.min(BATCH_MAX) }
    }

    /// Sends and receives until something has arrived, nothing more can, or the time is over.
    async fn exchange(&mut self) {
        let mut answers = Vec::new();
        while self.arrived.is_empty() && !self.is_late && !self.nothing_more_can_come() {
            let room = self.room();
            tokio::select! {
                biased;
                () = maybe(self.asking.until.map(sleep_until)) => self.is_late = true,
                questions = maybe(self.questions.as_mut().map(|left| take(left, room))), if room > 0 => {
                    match questions {
                        Some(questions) => self.ask(questions),
                        None => self.questions = None,
                    }
                }
                sent = maybe(self.sending.as_mut()) => {
                    self.sending = None;
                    self.sent(sent);
                }
                received = self.answers.recv_many(&mut answers, self.asking.window) => {
                    debug_assert!(received > 0, "this side holds a sender");
                    answers.drain(..).for_each(|(index, answer)| self.answered(index, answer));
                }
            }
        }
    }

    fn answered(&mut self, index: usize, answer: Arc<Properties>) {
        // Its node was the first to notice that the time is over: that is no failure of the child.
        let expired =
            matches!(&answer.outcome, Err(failure) if failure.kind == FailureKind::Expired);
        if expired && self.asking.until.is_some() {
            self.is_late = true;
        } else if self.in_flight.remove(&index).is_some() {
            self.arrived.push_back((index, Ok(answer)));
        }
        // Not there when its send was given up meanwhile: a child counts once.
    }

    fn sent(&mut self, sent: Sent) {
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

    /// Begins to send the next children.
    fn ask(&mut self, questions: Vec<Question>) {
        let mut envelopes = Vec::with_capacity(questions.len());
        let mut sent = Vec::with_capacity(questions.len());
        let pending = &self.cx.asker.node.pending;
        for Question { atom, payload } in questions {
            let index = self.next_index;
            self.next_index += 1;
            let child = payload
                .map_err(CallError::Encode)
                .and_then(|payload| self.cx.next_question(atom, payload));
            let mut child = match child {
                Ok(child) => self.cx.asker.address(child),
                Err(error) => {
                    self.arrived.push_back((index, Err(error)));
                    continue;
                }
            };
            child.policy = self.asking.policy.or(child.policy);
            if let Some(until) = self.asking.until {
                let left = until.saturating_duration_since(Instant::now());
                child.deadline = Some(child.deadline.map_or(left, |deadline| deadline.min(left)));
            }
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

/// Waits for the next questions, and takes what is there beside it; none after the last.
///
/// Cancel safe: what it takes it returns at once.
async fn take<S: Stream>(questions: &mut Pin<Box<Fuse<S>>>, max: usize) -> Option<Vec<S::Item>> {
    poll_fn(|context| {
        let mut taken = Vec::new();
        while taken.len() < max {
            match questions.as_mut().poll_next(context) {
                Poll::Ready(Some(question)) => taken.push(question),
                Poll::Ready(None) | Poll::Pending if !taken.is_empty() => break,
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Some(taken))
    })
    .await
}

/// Waits for what there is, or for ever.
async fn maybe<F: Future>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

impl<S> Drop for Children<'_, S> {
    fn drop(&mut self) {
        for (id, token) in self.in_flight.values() {
            self.cx.asker.node.pending.remove(*id, *token);
        }
    }
}
