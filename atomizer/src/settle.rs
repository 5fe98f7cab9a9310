//! How an electron ends: what is made safe before it is removed, and what to do when that fails.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::future::BoxFuture;
use tokio::time::sleep;

use crate::{
    Address, AtomId, Electron, Envelope, EventKind, Failure, FailureKind, Message, Outcome,
    Payload, Properties, ReplyTo, SendError, SettleError, Ticket, Unreadable,
    ask::Asker,
    clock,
    link::SharedSession,
    wire::{Wire, header},
};

/// How long to wait before what was not taken is tried again, for the first time; it doubles each time.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(100);
const TRY_AGAIN_AFTER_MAX: Duration = Duration::from_secs(1);

/// The end of one delivery, on its way to be settled.
#[derive(Debug)]
pub(crate) struct Ending {
    subject: Subject,
    unclaimed: bool,
    /// Why it did not end here after all.
    not_settled: Option<String>,
    /// How often it was tried in vain.
    tries: u32,
}

#[derive(Debug)]
enum Subject {
    Electron {
        electron: Arc<Electron>,
        took: Duration,
        started_at: SystemTime,
        failure: Option<Failure>,
    },
    /// A message that is no electron this node can read.
    Unreadable { reason: String },
}

/// An ending with the right to carry it out and what it emits.
pub(crate) type Settlement = (Ticket, Vec<Envelope>, Ending);

/// What came of settlements.
pub(crate) type Settled = Vec<(Ending, Result<(), SettleError>)>;

/// What is to follow from the result of one settlement.
pub(crate) enum Verdict {
    /// Nothing: it is over.
    Ended(Ending),
    /// It is not over, and this is to be tried next.
    Again { settlement: Settlement, after: Duration },
}

impl Ending {
    fn new(subject: Subject) -> Self {
        Self { subject, unclaimed: false, not_settled: None, tries: 0 }
    }

    /// True when a failure may be answered in place of what was too large. It is all that was emitted then.
    fn may_be_told(&self) -> bool {
        match &self.subject {
            Subject::Electron { failure: Some(failure), .. } => {
                failure.kind != FailureKind::AnswerTooLarge
            }
            Subject::Electron { failure: None, .. } => true,
            Subject::Unreadable { .. } => false,
        }
    }

    fn next_pause(&self) -> Duration {
        TRY_AGAIN_AFTER.saturating_mul(1 << self.tries.min(10)).min(TRY_AGAIN_AFTER_MAX)
    }

    /// Logs what did not go well; the rest is an event only.
    pub(crate) fn log(&self, atom: &AtomId) {
        match &self.subject {
            Subject::Electron { electron, failure, .. } => {
                if let Some(reason) = &self.not_settled {
                    tracing::warn!(%atom, electron = %electron.id, %reason, "not settled here");
                } else if let Some(failure) = failure {
                    tracing::warn!(%atom, electron = %electron.id, %failure, "failed");
                }
            }
            Subject::Unreadable { reason } => tracing::warn!(%atom, %reason, "unreadable message"),
        }
    }

    pub(crate) fn into_event(self, atom: AtomId) -> EventKind {
        let unclaimed = self.unclaimed;
        let (electron, took, failure) = match self.subject {
            Subject::Unreadable { reason } => return EventKind::Unreadable { atom, reason },
            Subject::Electron { electron, took, failure, .. } => (electron.id, took, failure),
        };
        match (self.not_settled, failure) {
            (Some(reason), _) => EventKind::NotSettled { electron, atom, reason },
            (None, Some(failure)) => EventKind::Failed { electron, atom, failure, unclaimed },
            (None, None) => EventKind::Completed { electron, atom, took, unclaimed },
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
    /// The end of an electron that ran, or could not.
    pub(crate) fn electron(
        &self,
        ticket: Ticket,
        electron: Arc<Electron>,
        started_at: SystemTime,
        took: Duration,
        result: Result<Payload, Failure>,
    ) -> Settlement {
        let result = result.map_err(|mut failure| {
            failure.node = Some(self.asker.node.id.clone());
            failure.attempt = electron.attempts + 1;
            failure
        });
        let failure = result.as_ref().err().cloned();
        let emit = match &electron.reply_to {
            Some(reply_to) => {
                let node = self.asker.node.id.clone();
                let mut properties = Properties::new(&electron, node, result);
                properties.started_at = started_at;
                properties.duration = took;
                self.answer(reply_to, properties)
            }
            None => (failure.clone())
                .map_or_else(Vec::new, |failure| vec![self.dead(&electron, failure)]),
        };
        (ticket, emit, Ending::new(Subject::Electron { electron, took, started_at, failure }))
    }

    /// What is emitted to answer.
    ///
    /// An asker that waits in this very process is handed its answer here: that is as safe as it can be, for
    /// whatever ends this process ends the asker too. It saves the way through the queue.
    fn answer(&self, reply_to: &ReplyTo, properties: Properties) -> Vec<Envelope> {
        let Asker { node, link } = &self.asker;
        let bytes = properties.outcome.as_ref().map_or(0, |payload| payload.body.len());
        if reply_to != link.reply_to() || bytes > link.limits().payload_bytes_max {
            return vec![Envelope::new(Address::Reply(reply_to.clone()), properties.into())];
        }
        node.answer(link.id(), properties.into());
        Vec::new()
    }

    /// The end of an electron that lies in the queue of another atom than its own.
    pub(crate) fn misdirected(&self, ticket: Ticket, electron: Arc<Electron>) -> Settlement {
        let message = format!("{} is not {}, whose queue this is", electron.atom, self.atom);
        let failure = Failure::new(FailureKind::UnknownAtom, message);
        self.electron(ticket, electron, clock::now(), Duration::ZERO, Err(failure))
    }

    /// The end of a message that is not an electron: it goes to the dead letters, whole and with the reason.
    /// Who asks for an answer is told.
    pub(crate) fn unreadable(&self, ticket: Ticket, message: Message) -> Settlement {
        let (message, reason) = match message {
            Message::Unreadable(unreadable) => {
                let Unreadable { mut wire, reason } = Arc::unwrap_or_clone(unreadable);
                let why = serde_json::Value::String(reason.clone());
                wire.headers.insert(header::UNREADABLE.to_owned(), why);
                (Message::Unreadable(Arc::new(Unreadable { wire, reason: reason.clone() })), reason)
            }
            Message::Answer(_) => (message, "an answer in a queue of electrons".to_owned()),
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
        (ticket, emit, Ending::new(Subject::Unreadable { reason }))
    }

    fn dead(&self, electron: &Electron, failure: Failure) -> Envelope {
        let mut electron = electron.clone();
        electron.attempts += 1;
        electron.history.push(failure);
        Envelope::new(Address::DeadLetter(self.atom.clone()), electron.into())
    }

    /// Decides what a settlement's result means.
    pub(crate) fn decide(&self, mut ending: Ending, result: Result<(), SettleError>) -> Verdict {
        let (ticket, failed) = match result {
            Ok(()) => return Verdict::Ended(ending),
            Err(SettleError::NotSafe { ticket, failed }) => (ticket, failed),
            Err(error) => {
                ending.not_settled = Some(error.to_string());
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
                // The asker is gone for good, or can be told nothing at all. An output nobody can receive is
                // finished with; a failure nobody is told of must not be silent.
                (Address::Reply(_), SendError::Unroutable(_) | SendError::TooLarge { .. }) => {
                    ending.unclaimed = true;
                    if let Subject::Electron { electron, failure: Some(failure), .. } =
                        &ending.subject
                    {
                        emit.push(self.dead(electron, failure.clone()));
                    }
                }
                // Where dead letters or a copy cannot be put now, they can be later: it is never dropped.
                (_, error) => {
                    tracing::warn!(to = %envelope.to, %error, "failed to make a message safe; trying again");
                    after = ending.next_pause();
                    emit.push(envelope);
                }
            }
        }
        ending.tries += 1;
        let settlement = (ticket, emit, ending);
        Verdict::Again { settlement, after }
    }

    /// Answers with a failure in place of what cannot be answered.
    fn instead(&self, ticket: Ticket, ending: Ending, failure: Failure) -> Verdict {
        let settlement = match ending.subject {
            Subject::Electron { electron, took, started_at, .. } => {
                self.electron(ticket, electron, started_at, took, Err(failure))
            }
            Subject::Unreadable { .. } => unreachable!("`may_be_told` says so of electrons only"),
        };
        Verdict::Again { settlement, after: Duration::ZERO }
    }
}

/// Settles a batch through a session. Without one the tickets are released: the session they came from is
/// gone, so the electrons come again.
pub(crate) fn settle(
    session: Option<SharedSession>,
    batch: Vec<Settlement>,
    after: Duration,
) -> BoxFuture<'static, Settled> {
    Box::pin(async move {
        if !after.is_zero() {
            sleep(after).await;
        }
        let mut endings = Vec::with_capacity(batch.len());
        let mut outcomes = Vec::with_capacity(batch.len());
        for (ticket, emit, ending) in batch {
            endings.push(ending);
            outcomes.push((ticket, Outcome::done(emit)));
        }
        let Some(session) = session else {
            return endings.into_iter().map(|ending| (ending, Err(SettleError::Stale))).collect();
        };
        let results = session.settle(outcomes).await;
        endings.into_iter().zip(results).collect()
    })
}
