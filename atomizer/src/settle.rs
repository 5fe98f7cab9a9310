//! How an electron leaves a node: what is made safe before it is removed, and what to do when that fails.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use crate::{
    Address, AtomId, Electron, Envelope, EventKind, Failure, FailureKind, Message, Outcome,
    Payload, Properties, ReplyTo, SendError, SettleError, Ticket, Unreadable,
    ask::Asker,
    claim::{Claim, NotParked, park},
    clock,
    metrics::OfAtom,
    run::Success,
    wire::{Wire, header, timestamp},
};

/// How long to wait before what was not taken is tried again, for the first time; it doubles each time.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(100);
const TRY_AGAIN_AFTER_MAX: Duration = Duration::from_secs(1);
/// How long what was not taken is held as it was delivered.
const HELD_UP_MAX: Duration = Duration::from_secs(5);

/// The time of day as a header has it.
fn now() -> serde_json::Value {
    timestamp(clock::now()).into()
}

/// The end of one delivery, on its way to be settled.
#[derive(Debug)]
pub(crate) struct Ending {
    subject: Subject,
    /// Why nobody was told how it ended.
    unclaimed: Option<String>,
    /// Why it did not end here after all.
    not_settled: Option<String>,
    /// How often it was tried in vain.
    tries: u32,
    /// When that began.
    held_up: Option<Instant>,
    /// Whether it is held outside of the window, or cannot be.
    parked: bool,
    /// Its place among those that are, for this reason.
    _place: Option<OwnedSemaphorePermit>,
}

#[derive(Debug)]
enum Subject {
    Electron {
        /// As it was when the attempt began.
        electron: Arc<Electron>,
        spent: Spent,
        how: How,
    },
    /// A message that is no electron this node can read.
    Unreadable { reason: String },
}

/// How an electron leaves, and what there is to say of it.
#[derive(Debug)]
enum How {
    Done,
    Failed { failure: Failure, dead: bool },
    Requeued { failure: Failure, wait: Duration },
    HandedOn { reason: String },
}

/// When an attempt began, and how long it took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spent {
    pub(crate) at: SystemTime,
    pub(crate) took: Duration,
}

/// An ending with the right to carry it out and what it emits. An electron that was taken for good beforehand
/// has no ticket any more.
#[derive(Debug)]
pub(crate) struct Settlement {
    pub(crate) ticket: Option<Claim>,
    emit: Vec<Envelope>,
    ending: Ending,
}

impl Settlement {
    /// Whether it may take long for itself: its ticket is to come, or what it emits is sent until it is taken.
    pub(crate) fn is_alone(&self) -> bool {
        self.ticket.as_ref().is_none_or(Claim::is_parking)
    }

    /// Parks it when it was not taken for long: others need its place in the window.
    pub(crate) async fn park(&mut self, asker: &Asker) {
        let Ending { subject: Subject::Electron { electron, .. }, held_up, parked, _place, .. } =
            &mut self.ending
        else {
            return;
        };
        let is_held_up = held_up.is_some_and(|since| since.elapsed() >= HELD_UP_MAX);
        if *parked || !is_held_up {
            return;
        }
        let places = Arc::clone(&asker.node.held_up);
        let Ok(place) = places.try_acquire_owned() else { return };
        *_place = Some(place);
        let Some((ticket, result)) = self.ticket.as_mut().and_then(Claim::park) else { return };
        let held = park(asker, ticket, Arc::clone(electron)).await;
        // What never can be parked is held as it is.
        *parked = !matches!(held, Err(NotParked::Kept { until: Some(_), .. }));
        // The receiver is in the claim.
        drop(result.send(held));
    }

    fn new(
        ticket: Option<Claim>,
        emit: Vec<Envelope>,
        electron: Arc<Electron>,
        spent: Spent,
        how: How,
    ) -> Self {
        let mut ending = Ending::new(Subject::Electron { electron, spent, how });
        ending.parked = ticket.as_ref().is_some_and(|claim| !claim.is_delivered());
        Self { ticket, emit, ending }
    }
}

/// What came of settlements.
pub(crate) type Settled = Vec<(Ending, Result<(), Unsettled>)>;

/// Why something is not settled.
#[derive(Debug)]
pub(crate) enum Unsettled {
    /// Another outcome is to be chosen for these.
    NotSafe { ticket: Option<Claim>, failed: Vec<(Envelope, SendError)> },
    /// It is for others to see to: the delivery comes again.
    Gone(String),
}

/// What is to follow from the result of one settlement.
pub(crate) enum Verdict {
    /// Nothing: it is over.
    Ended(Ending),
    /// It is not over, and this is to be tried next.
    Again { settlement: Settlement, after: Duration },
}

impl Ending {
    fn new(subject: Subject) -> Self {
        Self {
            subject,
            unclaimed: None,
            not_settled: None,
            tries: 0,
            held_up: None,
            parked: false,
            _place: None,
        }
    }

    /// True when a failure may be answered in place of what was too large. It is all that was emitted then.
    fn may_be_told(&self) -> bool {
        self.is_done()
    }

    fn is_done(&self) -> bool {
        matches!(&self.subject, Subject::Electron { how: How::Done, .. })
    }

    fn next_pause(&self) -> Duration {
        TRY_AGAIN_AFTER.saturating_mul(1 << self.tries.min(10)).min(TRY_AGAIN_AFTER_MAX)
    }

    /// Logs what did not go well; the rest is an event only.
    pub(crate) fn log(&self, atom: &AtomId) {
        let (electron, how) = match &self.subject {
            Subject::Unreadable { reason } => {
                return tracing::warn!(%atom, %reason, "unreadable message");
            }
            Subject::Electron { electron, how, .. } => (electron.id, how),
        };
        match (&self.not_settled, how) {
            (Some(reason), _) => tracing::warn!(%atom, %electron, %reason, "not settled here"),
            // Nobody wants to know: who asked was told by its own clock, or gave it up. A dead letter is told of.
            (None, How::Failed { failure, dead: false })
                if failure.kind == FailureKind::Expired =>
            {
                tracing::debug!(%atom, %electron, %failure, "failed");
            }
            (None, How::Failed { failure, .. }) => {
                tracing::warn!(%atom, %electron, %failure, "failed");
            }
            (None, How::Requeued { failure, .. }) => {
                tracing::warn!(%atom, %electron, %failure, "failed, and is requeued");
            }
            (None, How::HandedOn { reason }) => {
                tracing::debug!(%atom, %electron, %reason, "handed on");
            }
            (None, How::Done) => {}
        }
    }

    /// Counts what [`into_event`](Self::into_event) tells.
    pub(crate) fn measure(&self, metrics: &OfAtom) {
        let how = match &self.subject {
            Subject::Unreadable { .. } => return metrics.unreadable.increment(1),
            Subject::Electron { .. } if self.not_settled.is_some() => {
                return metrics.not_settled.increment(1);
            }
            Subject::Electron { how, .. } => how,
        };
        if self.unclaimed.is_some() {
            metrics.unclaimed.increment(1);
        }
        match how {
            How::Done => metrics.completed.increment(1),
            How::Failed { dead, .. } => {
                if *dead { &metrics.dead } else { &metrics.failed }.increment(1);
            }
            How::Requeued { .. } => metrics.requeued.increment(1),
            How::HandedOn { .. } => metrics.handed_on.increment(1),
        }
        if let How::Failed { failure, .. } | How::Requeued { failure, .. } = how {
            metrics.failure(failure.kind);
        }
    }

    pub(crate) fn into_event(self, atom: AtomId) -> EventKind {
        let unclaimed = self.unclaimed;
        let (of, spent, how) = match self.subject {
            Subject::Unreadable { reason } => return EventKind::Unreadable { atom, reason },
            Subject::Electron { electron, spent, how } => (electron, spent, how),
        };
        let (electron, attempt) = (of.id, of.attempts.saturating_add(1));
        if let Some(reason) = self.not_settled {
            return EventKind::NotSettled { electron, atom, attempt, reason };
        }
        let attempt = match &how {
            How::Failed { failure, .. } | How::Requeued { failure, .. } => failure.attempt,
            How::Done | How::HandedOn { .. } => attempt,
        };
        match how {
            How::Done => {
                EventKind::Completed { electron, atom, attempt, took: spent.took, unclaimed }
            }
            How::Failed { failure, dead } => {
                EventKind::Failed { electron, atom, attempt, failure, dead, unclaimed }
            }
            How::Requeued { failure, wait } => {
                EventKind::Requeued { electron, atom, attempt, failure, wait }
            }
            How::HandedOn { reason } => EventKind::HandedOn { electron, atom, attempt, reason },
        }
    }
}

/// Who answers, and for which atom.
#[derive(Debug)]
pub(crate) struct Settler {
    pub(crate) asker: Asker,
    pub(crate) atom: AtomId,
}

impl Settler {
    /// The end of an electron whose atom returned an output.
    pub(crate) fn done(
        &self,
        ticket: Option<Claim>,
        electron: Arc<Electron>,
        spent: Spent,
        Success { output, spawned }: &Success,
    ) -> Settlement {
        let too_large = output.body.len() > self.asker.link.limits().payload_bytes_max;
        // An output that cannot be answered is a failure. And an electron may be delivered twice, and which ticket is
        // good is not known: each brings the children, which have the same ids.
        let spawned = if too_large && electron.reply_to.is_some() { &[][..] } else { spawned };
        self.asker.tell_all_sent(spawned);
        let mut emit = spawned.to_vec();
        let may_be_direct = emit.is_empty();
        emit.extend(self.answer(&electron, spent, Ok(output.clone()), may_be_direct));
        Settlement::new(ticket, emit, electron, spent, How::Done)
    }

    /// The end of an electron that failed, or was never begun.
    pub(crate) fn failed(
        &self,
        ticket: Option<Claim>,
        electron: Arc<Electron>,
        spent: Spent,
        failure: Failure,
        dead: bool,
    ) -> Settlement {
        // Who is told of a failure finds its dead letter: both are safe together, or the letter is first.
        let answer = self.answer(&electron, spent, Err(failure.clone()), !dead);
        let mut emit: Vec<_> = answer.into_iter().collect();
        if dead {
            emit.insert(0, self.dead(&electron, failure.clone()));
        }
        Settlement::new(ticket, emit, electron, spent, How::Failed { failure, dead })
    }

    /// What is emitted to answer, if anybody asked.
    ///
    /// An asker that waits in this very process is handed its answer here: that is as safe as it can be, for
    /// whatever ends this process ends the asker too. It saves the way through the queue, where that `may_be_direct`.
    fn answer(
        &self,
        electron: &Electron,
        spent: Spent,
        outcome: Result<Payload, Failure>,
        may_be_direct: bool,
    ) -> Option<Envelope> {
        let reply_to = electron.reply_to.as_ref()?;
        let Asker { node, link } = &self.asker;
        let mut properties = Properties::new(electron, node.id.clone(), outcome);
        properties.started_at = spent.at;
        properties.duration = spent.took;
        let bytes = properties.outcome.as_ref().map_or(0, |payload| payload.body.len());
        if !may_be_direct || reply_to != link.reply_to() || bytes > link.limits().payload_bytes_max
        {
            return Some(Envelope::new(Address::Reply(reply_to.clone()), properties.into()));
        }
        node.answer(link, properties.into());
        None
    }

    /// The end of a message that is not an electron: it goes to the dead letters, whole and with the reason.
    /// Who asks for an answer is told.
    pub(crate) fn unreadable(&self, ticket: Ticket, message: Message) -> Settlement {
        let (emit, reason) = self.aside(message);
        let ending = Ending::new(Subject::Unreadable { reason });
        Settlement { ticket: Some(Claim::Delivered { ticket, until: None }), emit, ending }
    }

    /// What is emitted for a message that is not an electron, and why.
    pub(crate) fn aside(&self, message: Message) -> (Vec<Envelope>, String) {
        let (message, reason) = match message {
            Message::Unreadable(unreadable) => {
                let Unreadable { mut wire, reason } = Arc::unwrap_or_clone(unreadable);
                let why = serde_json::Value::String(reason.clone());
                wire.headers.insert(header::UNREADABLE.to_owned(), why);
                wire.headers.insert(header::DEAD_AT.to_owned(), now());
                wire.headers.insert(header::DEAD_ATOM.to_owned(), self.atom.as_str().into());
                (Message::Unreadable(Arc::new(Unreadable { wire, reason: reason.clone() })), reason)
            }
            Message::Answer(_) | Message::Cancel(_) => {
                (message, "no electron in a queue of electrons".to_owned())
            }
            Message::Electron(_) => (message, "an electron in a queue of answers".to_owned()),
        };
        let mut emit = Vec::new();
        if let Message::Unreadable(unreadable) = &message
            && let Some(reply_to) = &unreadable.wire.reply_to
        {
            // Its own id cannot be told, so the answer has none that means anything.
            let mut electron = Electron::new(self.atom.clone(), Payload::bytes(Vec::new()));
            let Wire { correlation_id, id, .. } = &unreadable.wire;
            electron.correlation_id = correlation_id.clone().or_else(|| id.clone());
            let mut failure = Failure::new(FailureKind::Undecodable, reason.clone());
            failure.node = Some(self.asker.node.id.clone());
            let answer = Properties::new(&electron, self.asker.node.id.clone(), Err(failure));
            let to = Address::Reply(ReplyTo::new(reply_to.as_str()));
            emit.push(Envelope::new(to, answer.into()));
        }
        emit.push(Envelope::new(Address::DeadLetter(self.atom.clone()), message));
        (emit, reason)
    }

    fn dead(&self, electron: &Electron, failure: Failure) -> Envelope {
        let mut electron = electron.clone();
        electron.attempts = electron.attempts.saturating_add(1);
        electron.remember(failure);
        electron.extra.insert(header::DEAD_AT.to_owned(), now());
        Envelope::new(Address::DeadLetter(self.atom.clone()), electron.into())
    }

    /// Decides what a settlement's result means.
    pub(crate) fn decide(&self, mut ending: Ending, result: Result<(), Unsettled>) -> Verdict {
        let (ticket, failed) = match result {
            Ok(()) => return Verdict::Ended(ending),
            Err(Unsettled::NotSafe { ticket, failed }) => (ticket, failed),
            Err(Unsettled::Gone(reason)) => {
                ending.not_settled = Some(reason);
                return Verdict::Ended(ending);
            }
        };
        let mut after = Duration::ZERO;
        let mut emit = Vec::new();
        for (envelope, error) in failed {
            match (&envelope.to, error) {
                (Address::Reply(_), error @ SendError::TooLarge { .. }) if ending.may_be_told() => {
                    let failure = Failure::new(FailureKind::AnswerTooLarge, error.to_string());
                    return self.instead(ticket, ending, failure);
                }
                // The asker is gone for good, or can be told nothing at all, or not by this node. An output nobody can receive is
                // finished with; a failure nobody is told of must not be silent.
                (
                    Address::Reply(_),
                    error @ (SendError::Unroutable(_)
                    | SendError::TooLarge { .. }
                    | SendError::Refused(_)),
                ) => {
                    ending.unclaimed = Some(error.to_string());
                    emit.extend(self.dead_instead(&mut ending));
                }
                (
                    Address::Atom(_),
                    error @ (SendError::TooLarge { .. } | SendError::Refused(_)),
                ) => {
                    if !ending.is_done() {
                        // It cannot go back, ever: this is its end.
                        return self.cannot_go_back(ticket, ending, &error);
                    }
                    emit.extend(self.not_spawned(envelope.message, &error));
                }
                // Where dead letters or a copy cannot be put now, they can be later: it is never dropped.
                (_, error) => {
                    if ending.tries == 0 {
                        tracing::warn!(to = %envelope.to, %error, "failed to make a message safe; trying again");
                    }
                    after = ending.next_pause();
                    emit.push(envelope);
                }
            }
        }
        ending.tries += 1;
        if !after.is_zero() {
            ending.held_up.get_or_insert_with(Instant::now);
        }
        Verdict::Again { settlement: Settlement { ticket, emit, ending }, after }
    }

    /// The dead letter of a child that can never be sent. Its parent has succeeded.
    fn not_spawned(&self, child: Message, error: &SendError) -> Option<Envelope> {
        let Message::Electron(child) = child else { return None };
        let (node, atom) = (self.asker.node.id.clone(), child.atom.clone());
        tracing::warn!(child = %child.id, %atom, %error, "cannot be sent; it goes to the dead letters");
        let mut failure = Failure::new(FailureKind::Error, format!("it was never sent: {error}"));
        failure.node = Some(node);
        let settler = Self { asker: self.asker.clone(), atom };
        Some(settler.dead(&child, failure))
    }

    /// Ends an electron that cannot be put back: with the failure of its attempt, or with why it was handed on.
    fn cannot_go_back(&self, ticket: Option<Claim>, ending: Ending, error: &SendError) -> Verdict {
        let Subject::Electron { electron, spent, how } = ending.subject else {
            unreachable!("what cannot be read does not go back")
        };
        let mut failure = match how {
            How::Requeued { failure, .. } => failure,
            How::HandedOn { reason } => Failure::new(FailureKind::GivenBack, reason),
            How::Done | How::Failed { .. } => unreachable!("these do not go back"),
        };
        tracing::warn!(electron = %electron.id, %error, "cannot be put back");
        failure.node = Some(self.asker.node.id.clone());
        failure.attempt = electron.attempts.saturating_add(1);
        let settlement = self.failed(ticket, electron, spent, failure, true);
        Verdict::Again { settlement, after: Duration::ZERO }
    }

    /// The dead letter of a failure that its asker cannot be told of. Who set a deadline and went does not want
    /// one.
    fn dead_instead(&self, ending: &mut Ending) -> Option<Envelope> {
        match &mut ending.subject {
            Subject::Electron { electron, how: How::Failed { failure, dead }, .. }
                if !*dead && failure.kind != FailureKind::Expired =>
            {
                *dead = true;
                Some(self.dead(electron, failure.clone()))
            }
            _ => None,
        }
    }

    /// Answers with a failure in place of what cannot be answered.
    fn instead(&self, ticket: Option<Claim>, ending: Ending, mut failure: Failure) -> Verdict {
        let settlement = match ending.subject {
            Subject::Electron { electron, spent, .. } => {
                failure.node = Some(self.asker.node.id.clone());
                failure.attempt = electron.attempts.saturating_add(1);
                self.failed(ticket, electron, spent, failure, false)
            }
            Subject::Unreadable { .. } => unreachable!("`may_be_told` says so of electrons only"),
        };
        Verdict::Again { settlement, after: Duration::ZERO }
    }
}

/// An electron that goes back: a copy is safe before this delivery is removed.
pub(crate) fn put_back(
    ticket: Option<Claim>,
    electron: Arc<Electron>,
    spent: Spent,
    copy: Electron,
    delay: Duration,
    why: &Why,
) -> Settlement {
    let to = Address::Atom(copy.atom.clone());
    let emit = vec![Envelope::new(to, copy.into()).after(delay)];
    let how = match why.clone() {
        Why::Failed { failure, wait } => How::Requeued { failure, wait },
        Why::Untried(reason) | Why::Late(reason) => How::HandedOn { reason },
    };
    Settlement::new(ticket, emit, electron, spent, how)
}

/// Why an electron goes back.
#[derive(Clone, Debug)]
pub(crate) enum Why {
    /// Its attempt failed and another is to follow, elsewhere or later.
    Failed { failure: Failure, wait: Duration },
    /// It is counted as no attempt.
    Untried(String),
    /// Nor is it counted how often.
    Late(String),
}

/// Settles a batch through the session that is open now. Tickets of an earlier one are stale there, and without
/// one they are released: the electrons come again. What was taken for good is answered through whichever session
/// is open.
pub(crate) async fn settle(asker: Asker, batch: Vec<Settlement>) -> Settled {
    let mut settled = Vec::new();
    let mut endings = Vec::with_capacity(batch.len());
    let mut outcomes = Vec::with_capacity(batch.len());
    for Settlement { ticket, emit, ending } in batch {
        match ticket {
            Some(claim) => match claim.ticket().await {
                Ok(ticket) => {
                    endings.push(ending);
                    outcomes.push((ticket, Outcome::done(emit)));
                }
                Err(reason) => settled.push((ending, Err(Unsettled::Gone(reason)))),
            },
            None => {
                let failed = failed_to_send(&asker, emit).await;
                let sent = failed.is_empty().then_some(());
                settled.push((ending, sent.ok_or(Unsettled::NotSafe { ticket: None, failed })));
            }
        }
    }
    if endings.is_empty() {
        return settled;
    }
    let results = match asker.link.session() {
        Some(session) => asker.link.settle(&session, outcomes).await,
        None => outcomes.iter().map(|_| Err(SettleError::Stale)).collect(),
    };
    let results = results.into_iter().map(|result| {
        result.map_err(|error| match error {
            SettleError::NotSafe { ticket, failed } => {
                let ticket = Some(Claim::Delivered { ticket, until: None });
                Unsettled::NotSafe { ticket, failed }
            }
            gone => Unsettled::Gone(gone.to_string()),
        })
    });
    settled.extend(endings.into_iter().zip(results));
    settled
}

async fn failed_to_send(asker: &Asker, emit: Vec<Envelope>) -> Vec<(Envelope, SendError)> {
    let results = asker.link.send(&emit).await;
    let results = emit.into_iter().zip(results);
    results.filter_map(|(envelope, result)| Some((envelope, result.err()?))).collect()
}
