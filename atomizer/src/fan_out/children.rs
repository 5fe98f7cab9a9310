//! The children of one fan-out or group, in flight.

use std::{collections::VecDeque, pin::Pin, sync::Arc, task::Poll, time::Duration};

use futures::{
    FutureExt, Stream, StreamExt,
    future::{BoxFuture, poll_fn},
    stream::Fuse,
};
use rustc_hash::FxHashMap;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use crate::{
    Address, AtomId, CallError, Context, Electron, ElectronId, Envelope, FailureKind, Message,
    Payload, Policy, Properties, SendError,
    ask::{Token, Waiter},
    inline::Inline,
};

/// At most this many children are made safe together.
const BATCH_MAX: usize = 256;

/// How much earlier a deadline may seem over to another node: deadlines travel in milliseconds.
const CLOCK_ERROR: Duration = Duration::from_millis(10);

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

/// A child by its index.
type Child = (usize, Arc<Electron>);

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
    /// To be sent next.
    unsent: Vec<Child>,
    /// To run inline, once there is a permit to lend it.
    next_inline: Option<Child>,
    /// Runs with the permit of this slot.
    inline: Option<(Child, Inline)>,
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
            unsent: Vec::new(),
            next_inline: None,
            inline: None,
            answers,
            answer_to,
            arrived: VecDeque::new(),
            is_late: false,
        }
    }

    /// Returns what came of the next, or `None` after the last, and when their time is over.
    ///
    /// The permit is given back, or lent to the next child, only when nothing has arrived yet.
    pub(crate) async fn next(&mut self) -> Option<Arrived> {
        let cx = self.cx;
        while !self.is_done() {
            self.lend();
            if !self.is_done() {
                cx.slot.wait(self.exchange()).await;
            }
        }
        self.arrived.pop_front()
    }

    /// Whether there is no need to wait.
    fn is_done(&self) -> bool {
        !self.arrived.is_empty() || self.is_late || self.nothing_more_can_come()
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

    /// How many are worth asking now: none before a good part of the window is free. Where children run inline, the
    /// next has to wait for the last.
    fn room(&self, is_crowded: bool) -> usize {
        let (window, asked) = (self.asking.window, self.in_flight.len());
        let free = window - asked;
        let is_worth_it = is_crowded || free >= window.div_ceil(8) || asked == 0;
        let has_one = is_crowded && (self.inline.is_some() || self.next_inline.is_some());
        if self.sending.is_some() || has_one || !is_worth_it { 0 } else { free.min(BATCH_MAX) }
    }

    /// Lends the permit to the next child where so many parents wait already, if it is there and can run here.
    fn lend(&mut self) {
        let asker = &self.cx.asker;
        let is_crowded = asker.is_crowded();
        let room = self.room(is_crowded);
        if is_crowded && room > 0 {
            let questions = self.questions.as_mut();
            let is_last = |question: &Question| asker.can_run_inline(&question.atom);
            match questions.and_then(|left| take(left, room, is_last).now_or_never()) {
                Some(Some(questions)) => self.ask(questions, is_crowded),
                Some(None) => self.questions = None,
                // It is waited for without a permit.
                None => {}
            }
        }
        if self.inline.is_none()
            && let Some((index, child)) = self.next_inline.take()
        {
            match asker.run_inline(&self.cx.slot, &child) {
                Some(inline) => self.inline = Some(((index, child), inline)),
                None => self.unsent.push((index, child)),
            }
        }
    }

    /// Sends and receives until something has arrived, nothing more can, or the time is over. What runs inline is
    /// waited for, and what is to run so returns to get the permit.
    async fn exchange(&mut self) {
        let mut answers = Vec::new();
        let asker = &self.cx.asker;
        while self.inline.is_some() || !self.is_done() {
            if self.is_late || self.inline.is_none() && self.next_inline.is_some() {
                break;
            }
            self.send();
            let is_crowded = asker.is_crowded();
            let room = self.room(is_crowded);
            let is_last = |question: &Question| is_crowded && asker.can_run_inline(&question.atom);
            tokio::select! {
                biased;
                () = maybe(self.asking.until.map(sleep_until)) => self.is_late = true,
                questions = maybe(self.questions.as_mut().map(|left| take(left, room, is_last))), if room > 0 => {
                    match questions {
                        Some(questions) => self.ask(questions, is_crowded),
                        None => self.questions = None,
                    }
                }
                was_run = maybe(self.inline.as_mut().map(|(_, inline)| inline.over())) => {
                    self.on_over(was_run);
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
        if self.is_late {
            // It has the permit.
            self.inline = None;
        }
    }

    /// The permit is back. The child has answered, or does so later; or it was not run, and goes through the queue.
    fn on_over(&mut self, was_run: bool) {
        let Some((child, _)) = self.inline.take() else { return };
        if !was_run && self.in_flight.contains_key(&child.0) {
            self.unsent.push(child);
        }
    }

    fn answered(&mut self, index: usize, answer: Arc<Properties>) {
        // Its node was the first to notice that the time is over: that is no failure of the child.
        let expired =
            matches!(&answer.outcome, Err(failure) if failure.kind == FailureKind::Expired);
        if expired && self.asking.until.is_some_and(|until| until <= Instant::now() + CLOCK_ERROR) {
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
                self.cx.asker.forget(id, token);
                self.arrived.push_back((index, Err(CallError::NotSent { id, source })));
            }
        }
    }

    /// Makes children of questions, to be sent next or to run inline.
    fn ask(&mut self, questions: Vec<Question>, is_crowded: bool) {
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
            if is_crowded && self.cx.asker.can_run_inline(&child.atom) {
                debug_assert!(self.next_inline.is_none(), "it is the last that is taken");
                self.next_inline = Some((index, child));
            } else {
                self.unsent.push((index, child));
            }
        }
    }

    /// Begins to send what is not sent, unless the last are on their way.
    fn send(&mut self) {
        if self.unsent.is_empty() || self.sending.is_some() {
            return;
        }
        let children = std::mem::take(&mut self.unsent);
        for (_, child) in &children {
            self.cx.asker.tell_sent(child);
        }
        let link = &self.cx.asker.link;
        self.sending = Some(Box::pin(async move {
            let mut sent = Vec::with_capacity(children.len());
            let mut envelopes = Vec::with_capacity(children.len());
            for (index, child) in children {
                sent.push((index, child.id));
                let to = Address::Atom(child.atom.clone());
                envelopes.push(Envelope::new(to, Message::Electron(child)));
            }
            let results = link.send(&envelopes).await;
            sent.into_iter().zip(results).map(|((index, id), result)| (index, id, result)).collect()
        }));
    }
}

/// Waits for the next questions, and takes what is there beside it, up to the last that fits; none after all of them.
///
/// Cancel safe: what it takes it returns at once.
async fn take<S: Stream>(
    questions: &mut Pin<Box<Fuse<S>>>,
    max: usize,
    is_last: impl Fn(&S::Item) -> bool,
) -> Option<Vec<S::Item>> {
    poll_fn(|context| {
        let mut taken = Vec::new();
        while taken.len() < max && !taken.last().is_some_and(&is_last) {
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
        if self.in_flight.is_empty() {
            return;
        }
        for (id, token) in self.in_flight.values() {
            self.cx.asker.forget(*id, *token);
        }
        let children: Vec<_> = self.in_flight.values().map(|(id, _)| *id).collect();
        self.cx.give_up(&children);
    }
}
