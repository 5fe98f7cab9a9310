//! The life of an electron on one node, as a state machine.
//!
//! ```text
//!                            delivered
//!                                │
//!            ┌───────────┬───────┴────┬──────────────┬───────────────┐
//!   failed here before   │  delivered before   expired, killer,      │
//!   and requeued         │            │        unfit: nothing runs   │
//!            ▼           │            ▼              │               │
//!        AVOIDING ──────►│◄─────── SUSPECT           │               │
//!   others serve it │    │ nobody    │ its turn, and │               │
//!                   │    │ else does │ it is written │               │
//!                   │    ▼           │               │               │
//!                   │  READY ◄───────┴───────────────│───────────────┘
//!                   │    │  ▲                        │
//!                   │ permit └───── PAUSING          │
//!                   │    ▼             ▲             │
//!                   │ RUNNING ─ retry ─┘             │
//!                   │    │  │                        │
//!            requeue,    │  └─ output, or the last failure
//!            give back   │                           │
//!                   ▼    ▼                           ▼
//!                LEAVING: handed on      LEAVING: done, failed, dead
//!                        │                           │
//!                        └────────► GONE ◄───────────┘
//! ```
//!
//! Nothing here does anything. [`State::arrive`], [`State::after_failure`] and [`State::next`] say what follows
//! from what happened, and [`Worker`](crate::worker::Worker) does what the new state asks for. A session that is
//! lost leads from every state but RUNNING straight to GONE: the electron is in its queue again. What runs
//! goes on, and is adopted when it comes again.

use std::time::Duration;

use crate::{ElectronId, FailureKind, Policy, error::Directive, policy::Next};

/// The longest wait that is spent in the node, if the conductor can keep an electron back.
pub(crate) const HOLD_MAX: Duration = Duration::from_secs(10);

/// How often an electron is handed on untried before it is run, or fails, wherever it is.
pub(crate) const PASSES_MAX: u32 = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// This node failed it last: it is for another, if one serves its atom.
    Avoiding { suspect: bool },
    /// It was delivered before, and may be what ended the node that had it: waits for its turn to be alone,
    /// and for that to be written into it.
    Suspect,
    /// Waits for a permit.
    Ready,
    /// Its atom works on it.
    Running,
    /// Its attempt failed; waits for the next.
    Pausing(Duration),
    /// Its outcome is being made safe, and then it is removed.
    Leaving(Leave),
    /// This node has nothing to do with it any more.
    Gone,
}

/// How an electron leaves the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// It is done: its output is the answer.
    Done,
    /// It failed: so is the answer. With `dead` it is a dead letter too.
    Failed { dead: bool },
    /// A copy goes back to its queue, to be delivered after so long.
    HandedOn(Duration),
}

/// What is known of an electron on arrival.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    /// It is for an atom that this is not the queue of.
    pub(crate) misdirected: bool,
    /// Its deadline is over.
    pub(crate) expired: bool,
    /// Somebody waits for the answer.
    pub(crate) asked: bool,
    /// It was delivered before, and may have been begun.
    pub(crate) suspect: bool,
    /// Starts under suspicion so far, and how many there may be.
    pub(crate) lives: u32,
    pub(crate) lives_max: u32,
    /// This node failed it last, and put it back for another.
    pub(crate) failed_here: bool,
    /// How often it was handed on untried.
    pub(crate) passes: u32,
}

/// What is known of a failed attempt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempt {
    pub(crate) electron: ElectronId,
    /// How many have failed, this one included.
    pub(crate) failures: u32,
    pub(crate) kind: FailureKind,
    pub(crate) then: Directive,
    pub(crate) policy: Policy,
    /// Somebody waits for the answer.
    pub(crate) asked: bool,
    /// How often it was handed on untried.
    pub(crate) passes: u32,
    /// How long anyone wants it still.
    pub(crate) left: Option<Duration>,
    /// How long the conductor can keep it back.
    pub(crate) delay_max: Duration,
    /// The node takes no more.
    pub(crate) draining: bool,
}

/// What happens to an electron after its arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fact {
    /// It is known whether another node serves its atom.
    Served { elsewhere: bool, passes: u32 },
    /// Its turn as a suspect has come, and its count of lives is written.
    Written,
    /// There is a permit.
    Admitted,
    /// Its deadline passed before it began.
    Expired { asked: bool },
    /// Its atom returned an output.
    Succeeded,
    /// Its pause is over.
    Rested,
    /// The node takes no more.
    Draining,
    /// Its outcome is safe and it is removed; or that is for others to see to.
    Settled,
    /// Its session is gone.
    Lost,
}

impl State {
    /// Where the life of an electron begins.
    pub(crate) fn arrive(arrival: &Arrival) -> Self {
        let Arrival { suspect, .. } = *arrival;
        if arrival.misdirected || arrival.expired {
            // Who set a deadline does not want to hear of it afterwards, and is told all the same.
            Self::Leaving(Leave::Failed { dead: !arrival.asked })
        } else if suspect && arrival.lives >= arrival.lives_max {
            Self::Leaving(Leave::Failed { dead: true })
        } else if arrival.failed_here && arrival.passes < PASSES_MAX {
            Self::Avoiding { suspect }
        } else {
            Self::untried(suspect)
        }
    }

    fn untried(suspect: bool) -> Self {
        if suspect { Self::Suspect } else { Self::Ready }
    }

    /// Where a failed attempt leads.
    pub(crate) fn after_failure(attempt: &Attempt) -> Self {
        let Attempt { policy, failures, .. } = *attempt;
        // Who set out to try more than once wants to see what came of it, answered or not.
        let end = Self::Leaving(Leave::Failed { dead: !attempt.asked || !policy.is_fail() });
        let wait = match attempt.then {
            Directive::Final => return end,
            Directive::GiveBack if attempt.passes >= PASSES_MAX => return end,
            Directive::GiveBack => {
                return Self::Leaving(Leave::HandedOn(pass_wait(attempt.passes)));
            }
            Directive::RetryAfter(wait) => wait,
            Directive::Policy => policy.pause(attempt.electron, failures),
        };
        // Not worth waiting for, or nothing that another attempt would change.
        let in_vain = attempt.left.is_some_and(|left| left <= wait);
        if in_vain || attempt.kind == FailureKind::Expired {
            return match attempt.kind {
                FailureKind::Expired => Self::Leaving(Leave::Failed { dead: !attempt.asked }),
                _ => end,
            };
        }
        match policy.after(failures) {
            Next::Fail => end,
            Next::Requeue => Self::Leaving(Leave::HandedOn(wait)),
            Next::Retry if attempt.draining => Self::Leaving(Leave::HandedOn(wait)),
            Next::Retry if wait > HOLD_MAX && wait <= attempt.delay_max => {
                Self::Leaving(Leave::HandedOn(wait))
            }
            Next::Retry => Self::Pausing(wait),
        }
    }

    /// Where a fact leads; none where it cannot happen.
    pub(crate) fn next(self, fact: Fact) -> Option<Self> {
        Some(match (self, fact) {
            (Self::Running, Fact::Lost) => Self::Running,
            (_, Fact::Lost) => Self::Gone,
            (Self::Avoiding { .. }, Fact::Served { elsewhere: true, passes }) => {
                Self::Leaving(Leave::HandedOn(pass_wait(passes)))
            }
            (Self::Avoiding { suspect }, Fact::Served { elsewhere: false, .. }) => {
                Self::untried(suspect)
            }
            (Self::Suspect, Fact::Written) | (Self::Pausing(_), Fact::Rested) => Self::Ready,
            (Self::Ready, Fact::Admitted) => Self::Running,
            (Self::Ready, Fact::Expired { asked }) => Self::Leaving(Leave::Failed { dead: !asked }),
            (Self::Running, Fact::Succeeded) => Self::Leaving(Leave::Done),
            (Self::Pausing(wait), Fact::Draining) => Self::Leaving(Leave::HandedOn(wait)),
            // What has not begun is given back as it came.
            (Self::Avoiding { .. } | Self::Suspect | Self::Ready, Fact::Draining)
            | (Self::Leaving(_), Fact::Settled) => Self::Gone,
            _ => return None,
        })
    }
}

/// How long an electron that is handed on untried waits: 100 ms, twice as long each time, at most 1 s. No two
/// nodes that do not want it may toss it to and fro as fast as they can.
fn pass_wait(passes: u32) -> Duration {
    Duration::from_millis(100 << passes.min(4)).min(Duration::from_secs(1))
}
