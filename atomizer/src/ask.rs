//! Asking: send an electron, wait for the one answer that counts.

use std::{
    fmt,
    future::ready,
    marker::PhantomData,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::join_all;
use rustc_hash::FxHashMap;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    Address, AtomId, Electron, ElectronId, Envelope, EventKind, Failure, FailureKind, Message,
    Payload, Policy, Properties, ReplyTo, ResultsId, SendError, admission::Slot, link::Link,
    node::Node,
};

/// Who waits for which answer. The first answer takes the entry out: later ones find nobody.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    by_id: FxHashMap<ElectronId, Waits>,
    next_token: u64,
    /// The node has stopped: nobody waits any more.
    closed: bool,
}

#[derive(Debug)]
struct Waits {
    token: Token,
    /// Asked again should the answers be lost.
    question: Arc<Electron>,
    waiter: Waiter,
}

/// Tells an entry from a later one for the same electron, which must not be removed in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token(u64);

#[derive(Debug)]
pub(crate) enum Waiter {
    Call(oneshot::Sender<Arc<Properties>>),
    /// One of a spawner's children, by index. The channel has room for all that are in flight.
    Child(usize, mpsc::Sender<(usize, Arc<Properties>)>),
}

impl Pending {
    /// Waits for the answer to a question. On a node that has stopped, and for a run that has been, the waiter is dropped
    /// at once.
    pub(crate) fn insert(&self, question: &Arc<Electron>, waiter: Waiter) -> Token {
        let mut waiting = self.lock();
        let token = Token(waiting.next_token);
        waiting.next_token += 1;
        let round = |question: &Electron| question.parent.map_or(0, |parent| parent.round);
        let before = waiting.by_id.get(&question.id);
        // A run that was stopped may ask once more when the next has asked the same child.
        let is_late = before.is_some_and(|before| round(&before.question) > round(question));
        if !waiting.closed && !is_late {
            let question = Arc::clone(question);
            drop(waiting.by_id.insert(question.id, Waits { token, question, waiter }));
        }
        token
    }

    /// Does not wait any longer. Returns the question, if it was not answered.
    fn remove(&self, id: ElectronId, token: Token) -> Option<Arc<Electron>> {
        let mut waiting = self.lock();
        let waits = waiting.by_id.get(&id)?;
        if waits.token != token {
            return None;
        }
        waiting.by_id.remove(&id).map(|waits| waits.question)
    }

    /// Lets go of all who wait: the node has stopped.
    pub(crate) fn close(&self) {
        let mut waiting = self.lock();
        waiting.closed = true;
        drop(std::mem::take(&mut waiting.by_id));
    }

    /// Hands an answer to who waits for it. False when nobody does.
    pub(crate) fn resolve(&self, answer: Arc<Properties>) -> bool {
        let mut waiting = self.lock();
        let waits = waiting.by_id.get(&answer.electron);
        // What a parent asks anew has the same id, but may be something else than what this answers.
        let is_answered = |waits: &Waits| match &waits.question.correlation_id {
            Some(asked) => answer.correlation_id.as_ref() == Some(asked),
            None => true,
        };
        if !waits.is_some_and(is_answered) {
            return false;
        }
        let waits = waiting.by_id.remove(&answer.electron);
        drop(waiting);
        match waits.map(|waits| waits.waiter) {
            Some(Waiter::Call(tx)) => tx.send(answer).is_ok(),
            Some(Waiter::Child(index, tx)) => tx.try_send((index, answer)).is_ok(),
            None => false,
        }
    }

    /// Returns all that is asked, and is to be answered at one address.
    fn questions(&self, answered_at: &ReplyTo) -> Vec<Arc<Electron>> {
        let waiting = self.lock();
        let questions = waiting.by_id.values().map(|waits| &waits.question);
        questions
            .filter(|question| question.reply_to.as_ref() == Some(answered_at))
            .cloned()
            .collect()
    }

    /// Whether somebody waits for the answer to this question still.
    fn is_asked(&self, question: &Arc<Electron>) -> bool {
        let waiting = self.lock();
        let waits = waiting.by_id.get(&question.id);
        waits.is_some_and(|waits| Arc::ptr_eq(&waits.question, question))
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Every change is a single insert or remove: a panic cannot leave one half done.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends electrons through one conductor and waits for their answers.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    pub(crate) node: Arc<Node>,
    pub(crate) link: Arc<Link>,
}

impl Asker {
    /// Puts this node into an electron as the one who asks.
    pub(crate) fn address(&self, mut electron: Electron) -> Electron {
        electron.sender = Some(self.node.id.clone());
        electron.reply_to = Some(self.link.reply_to().clone());
        electron
    }

    /// Says that an electron is on its way to its queue.
    pub(crate) fn tell_sent(&self, electron: &Electron) {
        self.node.events.emit(Some(self.link.id()), || EventKind::Sent {
            electron: electron.id,
            atom: electron.atom.clone(),
            parent: electron.parent.map(|parent| parent.id),
        });
    }

    /// Says so of each electron among these.
    pub(crate) fn tell_all_sent(&self, envelopes: &[Envelope]) {
        for envelope in envelopes {
            if let Message::Electron(electron) = &envelope.message {
                self.tell_sent(electron);
            }
        }
    }

    /// Does not wait for an answer any longer. What is asked from now on, it may be under the same id, is told from it.
    pub(crate) fn forget(&self, id: ElectronId, token: Token) {
        let question = self.node.pending.remove(id, token);
        if let Some(parent) = question.and_then(|question| question.parent) {
            self.node.cancelled.end_round(parent.round);
        }
    }

    /// Makes an electron safe. The caller bounds the time.
    async fn send(&self, electron: Arc<Electron>, delay: Duration) -> Result<(), SendError> {
        self.tell_sent(&electron);
        self.link.send(&[envelope(&electron).after(delay)]).await.pop().unwrap_or(Ok(()))
    }

    /// Asks again, under the same ids, all that is not answered: answers may have been lost.
    pub(crate) async fn ask_again(self) {
        let questions = self.node.pending.questions(self.link.reply_to());
        if questions.is_empty() {
            return;
        }
        let electrons = questions.len();
        tracing::warn!(conductor = %self.link.id(), electrons, "answers may have been lost; asking again");
        self.link.metrics.asked_again.increment(electrons as u64);
        self.node.events.emit(Some(self.link.id()), || EventKind::AskedAgain { electrons });
        let mut by_atom = FxHashMap::<_, Vec<_>>::default();
        for question in questions {
            by_atom.entry(question.atom.clone()).or_default().push(question);
        }
        // Side by side: an atom whose queue takes nothing holds up no other.
        join_all(by_atom.values().map(|questions| self.ask_all_again(questions))).await;
    }

    /// Asks those of one atom again that somebody waits for still.
    async fn ask_all_again(&self, questions: &[Arc<Electron>]) {
        let is_asked = |question: &Arc<Electron>| self.node.pending.is_asked(question);
        for questions in questions.chunks(ASK_AGAIN_BATCH) {
            let questions = Vec::from_iter(questions.iter().filter(|question| is_asked(question)));
            let envelopes: Vec<_> = questions.iter().copied().map(envelope).collect();
            let sent = self.link.send_wanted(&envelopes, |at| is_asked(questions[at])).await;
            for (question, sent) in questions.iter().zip(sent) {
                if let Err(error) = sent {
                    // Its call has a deadline.
                    tracing::warn!(id = %question.id, %error, "failed to ask again");
                }
            }
        }
    }

    /// Makes an electron safe that nobody waits for, to be delivered after a delay.
    ///
    /// Not an `async fn`, which would keep room for the electron beside what is made of it: there are as many of these
    /// futures as sends under way.
    pub(crate) fn send_bounded(
        self,
        mut electron: Electron,
        delay: Duration,
    ) -> impl Future<Output = Result<ElectronId, CallError>> + Send {
        electron.sender = Some(self.node.id.clone());
        let (id, electron) = (electron.id, Arc::new(electron));
        async move {
            let not_sent = |source| CallError::NotSent { id, source };
            let delay_max = self.link.limits().delay_max;
            if delay > delay_max {
                let link = self.link.id();
                let reason = format!("{link} keeps electrons back for {delay_max:?} at the most");
                return Err(not_sent(SendError::Refused(reason)));
            }
            match timeout(SEND_TIMEOUT, self.send(electron, delay)).await {
                Ok(sent) => sent.map(|()| id).map_err(not_sent),
                Err(_) => {
                    let reason = format!("no confirmation within {SEND_TIMEOUT:?}");
                    Err(not_sent(SendError::Unknown(reason)))
                }
            }
        }
    }

    /// Makes a result address.
    pub(crate) async fn result_address(&self, id: &ResultsId) -> Result<ReplyTo, SendError> {
        timeout(SEND_TIMEOUT, self.link.make_results(id)).await.unwrap_or_else(|_| {
            Err(SendError::Unknown(format!("no confirmation within {SEND_TIMEOUT:?}")))
        })
    }

    /// Asks and waits for the answer, without the permit of who asks: that is given back, or lent to the child.
    async fn ask(
        &self,
        electron: Arc<Electron>,
        deadline: Duration,
        slot: Option<&Arc<Slot>>,
    ) -> Result<Arc<Properties>, CallError> {
        let id = electron.id;
        let (tx, mut rx) = oneshot::channel();
        let token = self.node.pending.insert(&electron, Waiter::Call(tx));
        let _forget = Forget { asker: self, id, token };
        let inline = slot.filter(|_| self.is_crowded());
        let inline = inline.and_then(|slot| Some((slot, self.run_inline(slot, &electron)?)));
        let answered = async {
            if let Some((slot, mut inline)) = inline {
                let was_run = inline.over().await;
                drop(inline);
                if let Ok(answer) = rx.try_recv() {
                    return Ok(answer);
                }
                // It is tried again elsewhere, or later.
                slot.pause();
                if was_run {
                    return rx.await.map_err(|_| CallError::Stopped);
                }
            }
            tokio::select! {
                biased;
                // The answer may be here before the send is confirmed; or the node has stopped.
                answer = &mut rx => return answer.map_err(|_| CallError::Stopped),
                sent = self.send(electron, Duration::ZERO) => {
                    sent.map_err(|source| CallError::NotSent { id, source })?;
                }
            }
            rx.await.map_err(|_| CallError::Stopped)
        };
        // Pinned here: moved from future to future it would have room in each. Gone as soon as it is over: what it holds
        // is not to be held by one that queues for its permit.
        let mut answering = pin!(Some(timeout(deadline, answered)));
        let answered = async {
            let answered = answering.as_mut().as_pin_mut().expect("it is asked once").await;
            answering.set(None);
            answered
        };
        let answer = match slot {
            Some(slot) => slot.wait(answered).await,
            None => answered.await,
        };
        answer.unwrap_or(Err(CallError::Deadline { id, deadline }))
    }
}

/// How long anything may take to be safe that nobody waits for.
pub(crate) const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// How many questions are asked again at once.
const ASK_AGAIN_BATCH: usize = 256;

fn envelope(electron: &Arc<Electron>) -> Envelope {
    let to = Address::Atom(electron.atom.clone());
    Envelope::new(to, Message::Electron(Arc::clone(electron)))
}

/// Takes the entry out when a call is dropped or fails.
struct Forget<'a> {
    asker: &'a Asker,
    id: ElectronId,
    token: Token,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.asker.forget(self.id, self.token);
    }
}

/// A question on its way: await it for the answer.
///
/// Nothing is sent before it is awaited. Dropping it gives up the answer, not the electron.
#[must_use = "nothing is sent before it is awaited"]
pub struct Call<'cx, T> {
    asker: Asker,
    /// The permit to give back while waiting, when an atom asks.
    slot: Option<&'cx Arc<Slot>>,
    electron: Result<Electron, CallError>,
    deadline: Duration,
    decode: fn(&Payload) -> Result<T, serde_json::Error>,
    output: PhantomData<fn() -> T>,
}

impl<'cx, T> Call<'cx, T> {
    /// How long a call waits unless told otherwise: an hour.
    pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(60 * 60);

    pub(crate) fn new(
        asker: Asker,
        slot: Option<&'cx Arc<Slot>>,
        electron: Result<Electron, CallError>,
        decode: fn(&Payload) -> Result<T, serde_json::Error>,
    ) -> Self {
        Self {
            electron: electron.map(|electron| asker.address(electron)),
            asker,
            slot,
            deadline: Self::DEADLINE_DEFAULT,
            decode,
            output: PhantomData,
        }
    }

    /// Returns the id of the electron that asks, to find it in the [events](crate::Event). None when the input
    /// could not be encoded.
    #[must_use]
    pub fn electron(&self) -> Option<ElectronId> {
        self.electron.as_ref().ok().map(|electron| electron.id)
    }

    /// Sets how long to wait for the answer, sending included. Afterwards the electron is neither begun nor gone
    /// on with, and a policy makes no attempt that would have to wait beyond it.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Sets what follows a failure, instead of what the atom or the node says.
    pub fn policy(mut self, policy: Policy) -> Self {
        if let Ok(electron) = &mut self.electron {
            electron.policy = Some(policy);
        }
        self
    }

    /// Sets how long one attempt may take, instead of what the atom says.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        if let Ok(electron) = &mut self.electron {
            electron.time_limit = Some(limit);
        }
        self
    }
}

impl<'cx, T: Send + 'cx> IntoFuture for Call<'cx, T> {
    type Output = Result<T, CallError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'cx>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { asker, slot, electron, deadline, decode, .. } = self;
        let mut electron = match electron {
            Ok(electron) => electron,
            Err(error) => return Box::pin(ready(Err(error))),
        };
        electron.deadline = Some(electron.deadline.map_or(deadline, |left| left.min(deadline)));
        let electron = Arc::new(electron);
        Box::pin(async move {
            let properties = asker.ask(electron, deadline, slot).await?;
            match &properties.outcome {
                Ok(payload) => decode(payload).map_err(CallError::Decode),
                // The node that had it noticed first.
                Err(failure) if failure.kind == FailureKind::Expired => {
                    Err(CallError::Deadline { id: properties.electron, deadline })
                }
                Err(failure) => Err(CallError::Failed(failure.clone())),
            }
        })
    }
}

impl<T> fmt::Debug for Call<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("electron", &self.electron).finish_non_exhaustive()
    }
}

/// Why a call has no output.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The input does not become JSON.
    #[error("failed to encode the input")]
    Encode(#[source] serde_json::Error),
    /// The electron is not known to be safe; it may be sent again under the same id.
    #[error("failed to send electron {id}")]
    NotSent {
        /// The electron.
        id: ElectronId,
        /// Why.
        source: SendError,
    },
    /// The electron failed, and this is its answer.
    #[error(transparent)]
    Failed(Failure),
    /// The answer is not what the caller takes.
    #[error("failed to decode the answer")]
    Decode(#[source] serde_json::Error),
    /// No answer came in time; the electron goes its way, and its answer is dropped.
    #[error("no answer to electron {id} within {deadline:?}")]
    Deadline {
        /// The electron.
        id: ElectronId,
        /// How long was waited.
        deadline: Duration,
    },
    /// A singleton asked its own atom: it would wait for itself.
    #[error("{0} is a singleton and cannot ask itself")]
    AsksItself(AtomId),
    /// The node stopped first.
    #[error("the node has stopped")]
    Stopped,
}
