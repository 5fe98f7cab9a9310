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
//! goes on, and is adopted when it comes again. A child that its parent hands over to run inline begins in READY, and
//! has its permit.

use std::time::Duration;

use crate::{ElectronId, FailureKind, Policy, error::Directive, policy::Next};

/// The longest wait that is spent in the node, if the conductor can keep an electron back.
pub(crate) const HOLD_MAX: Duration = Duration::from_secs(10);

/// The longest wait that is spent in the node, if the conductor cannot keep an electron back: a broker may lose its
/// patience with what is held for longer (RabbitMQ: 30 minutes).
pub(crate) const HOLD_LONGEST: Duration = Duration::from_secs(10 * 60);

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
    /// It has not begun, and may not be held any longer.
    Late,
    /// The node takes no more.
    Draining,
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
        let wait = if wait > attempt.delay_max { wait.min(HOLD_LONGEST) } else { wait };
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
            // It goes on, and is adopted when it comes again.
            (Self::Running, Fact::Lost) | (Self::Ready, Fact::Admitted) => Self::Running,
            (Self::Avoiding { .. }, Fact::Served { elsewhere: true, passes }) => {
                Self::Leaving(Leave::HandedOn(pass_wait(passes)))
            }
            (Self::Avoiding { suspect }, Fact::Served { elsewhere: false, .. }) => {
                Self::untried(suspect)
            }
            (Self::Suspect, Fact::Written) | (Self::Pausing(_), Fact::Rested) => Self::Ready,
            (Self::Ready, Fact::Expired { asked }) => Self::Leaving(Leave::Failed { dead: !asked }),
            (Self::Running, Fact::Succeeded) => Self::Leaving(Leave::Done),
            (Self::Ready, Fact::Late) => Self::Leaving(Leave::HandedOn(Duration::ZERO)),
            (Self::Pausing(wait), Fact::Draining) => Self::Leaving(Leave::HandedOn(wait)),
            // What has not begun is given back as it came.
            (Self::Avoiding { .. } | Self::Suspect, Fact::Late)
            | (Self::Avoiding { .. } | Self::Suspect | Self::Ready, Fact::Draining)
            | (_, Fact::Lost) => Self::Gone,
            _ => return None,
        })
    }
}

/// How long an electron that is handed on untried waits: 100 ms, twice as long each time, at most 1 s. No two
/// nodes that do not want it may toss it to and fro as fast as they can.
fn pass_wait(passes: u32) -> Duration {
    Duration::from_millis(100 << passes.min(4)).min(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Backoff;

    /// What happens to an electron at one step, of its own doing or by a fault.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Luck {
        /// All goes well, and an atom that runs succeeds.
        Good,
        Fails,
        FailsForGood,
        FailsUntil(u64),
        GivesBack,
        Expires,
        /// The node dies, before or after what it was about to do.
        Killed {
            after: bool,
        },
        /// The session is lost, and the electron comes again here or elsewhere.
        Lost {
            here: bool,
        },
        Drained,
        /// What was to be made safe was not taken this time.
        NotTaken,
    }

    fn luck() -> impl Strategy<Value = Luck> {
        prop_oneof![
            3 => Just(Luck::Good),
            4 => Just(Luck::Fails),
            1 => Just(Luck::FailsForGood),
            1 => (0_u64..40).prop_map(Luck::FailsUntil),
            1 => Just(Luck::GivesBack),
            1 => Just(Luck::Expires),
            3 => any::<bool>().prop_map(|after| Luck::Killed { after }),
            2 => any::<bool>().prop_map(|here| Luck::Lost { here }),
            1 => Just(Luck::Drained),
            1 => Just(Luck::NotTaken),
        ]
    }

    /// What is in the queue, or was when it was taken out: all that a killed node leaves.
    #[derive(Clone, Copy, Debug, Default)]
    struct Stored {
        failures: u32,
        lives: u32,
        passes: u32,
        redelivered: bool,
        avoids: Option<u32>,
    }

    struct World {
        lucks: std::vec::IntoIter<Luck>,
        policy: Policy,
        asked: bool,
        lives_max: u32,
        ends: Vec<Leave>,
        runs_in_this_life: u32,
        steps: u32,
    }

    impl World {
        /// When the faults are over, all goes well.
        fn luck(&mut self) -> Luck {
            self.steps += 1;
            assert!(self.steps < 100_000, "it goes on for ever");
            self.lucks.next().unwrap_or(Luck::Good)
        }

        fn arrival(&self, stored: Stored, node: u32, luck: Luck) -> Arrival {
            Arrival {
                misdirected: false,
                expired: luck == Luck::Expires,
                asked: self.asked,
                suspect: stored.redelivered,
                lives: stored.lives,
                lives_max: self.lives_max,
                failed_here: stored.avoids == Some(node),
                passes: stored.passes,
            }
        }

        fn attempt(&self, held: Stored, luck: Luck) -> Attempt {
            let then = match luck {
                Luck::FailsForGood => Directive::Final,
                Luck::FailsUntil(seconds) => Directive::RetryAfter(Duration::from_secs(seconds)),
                Luck::GivesBack => Directive::GiveBack,
                _ => Directive::Policy,
            };
            Attempt {
                electron: ElectronId::new(),
                failures: held.failures + 1,
                kind: if luck == Luck::Expires { FailureKind::Expired } else { FailureKind::Error },
                then,
                policy: self.policy,
                asked: self.asked,
                passes: held.passes,
                left: None,
                delay_max: Duration::MAX,
                draining: luck == Luck::Drained,
            }
        }

        /// The life of an electron on one node. Returns what is in the queue afterwards, unless it has ended.
        fn live(&mut self, mut stored: Stored, node: u32) -> Option<Stored> {
            let again = |stored: Stored| Some(Stored { redelivered: true, ..stored });
            let luck = self.luck();
            let mut state = State::arrive(&self.arrival(stored, node, luck));
            // What this node knows, and would take with it.
            let mut held = stored;
            let mut counted = false;
            self.runs_in_this_life = 0;
            // The ticket is of a session that is gone: what is settled with it changes nothing.
            let mut stale = false;
            loop {
                let luck = self.luck();
                if luck == (Luck::Killed { after: false }) {
                    return again(stored);
                }
                if let Luck::Lost { here } = luck {
                    state = state.next(Fact::Lost).expect("it can always be lost");
                    if state == State::Gone {
                        return again(stored);
                    }
                    // It runs. Here it is adopted; elsewhere it is run a second time, and that one counts.
                    stale = !here;
                }
                state = match state {
                    State::Avoiding { .. } => {
                        let elsewhere = luck != Luck::NotTaken;
                        state.next(Fact::Served { elsewhere, passes: held.passes })
                    }
                    State::Suspect if luck == Luck::NotTaken => return again(stored),
                    State::Suspect => {
                        // Written: from here on that is what a killed node leaves.
                        held.lives += 1;
                        stored = held;
                        state.next(Fact::Written)
                    }
                    State::Ready if luck == Luck::Expires => {
                        state.next(Fact::Expired { asked: self.asked })
                    }
                    State::Ready => {
                        self.runs_in_this_life += 1;
                        state.next(Fact::Admitted)
                    }
                    State::Running => match luck {
                        Luck::Good | Luck::Killed { .. } | Luck::NotTaken | Luck::Lost { .. } => {
                            state.next(Fact::Succeeded)
                        }
                        luck => {
                            let attempt = self.attempt(held, luck);
                            counted = luck != Luck::GivesBack;
                            held.failures += u32::from(counted);
                            let requeued = self.policy.was_requeued(held.failures) || !counted;
                            held.avoids = requeued.then_some(node);
                            Some(State::after_failure(&attempt))
                        }
                    },
                    State::Pausing(_) if luck == Luck::Drained => state.next(Fact::Draining),
                    State::Pausing(_) => state.next(Fact::Rested),
                    State::Leaving(_) if stale => return again(stored),
                    State::Leaving(_) if luck == Luck::NotTaken => Some(state),
                    State::Leaving(Leave::HandedOn(_)) => {
                        held.passes += u32::from(!counted);
                        return Some(Stored { redelivered: false, ..held });
                    }
                    State::Leaving(leave) => {
                        self.ends.push(leave);
                        return None;
                    }
                    State::Gone => unreachable!("it was looked at"),
                }
                .expect("every state goes on");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        /// Whatever happens on the way: an electron ends, once, and within the bounds it was given.
        #[test]
        fn every_electron_ends_once_through_random_faults(
            lucks in proptest::collection::vec(luck(), 0..60),
            retry in 0_u32..4, requeue in 0_u32..4, asked: bool, lives_max in 1_u32..6,
        ) {
            let policy = Policy::retry(retry).then_requeue(requeue).backoff(Backoff::none());
            let mut world = World {
                lucks: lucks.into_iter(), policy, asked, lives_max,
                ends: Vec::new(), runs_in_this_life: 0, steps: 0,
            };
            let mut stored = Some(Stored::default());
            let mut node = 0;
            while let Some(copy) = stored {
                stored = world.live(copy, node % 2);
                node += 1;
                prop_assert!(world.runs_in_this_life <= 1 + retry + requeue);
                if let Some(left) = stored {
                    prop_assert!(left.lives <= lives_max);
                    prop_assert!(left.failures <= retry + requeue);
                }
            }
            prop_assert_eq!(world.ends.len(), 1);
            // Somebody hears of every failure: who asked, or who looks through the dead letters.
            if let Leave::Failed { dead } = world.ends[0] {
                prop_assert!(dead || asked);
            }
        }
    }

    fn attempt(policy: Policy, failures: u32) -> Attempt {
        Attempt {
            electron: ElectronId::new(),
            failures,
            kind: FailureKind::Error,
            then: Directive::Policy,
            policy,
            asked: true,
            passes: 0,
            left: None,
            delay_max: Duration::MAX,
            draining: false,
        }
    }

    const SECOND: Duration = Duration::from_secs(1);
    const END: State = State::Leaving(Leave::Failed { dead: true });

    #[test]
    fn long_waits_are_spent_in_the_queue() {
        let every = |wait| Policy::retry(9).backoff(Backoff::constant(wait).jitter_percent(0));
        let short = attempt(every(10 * SECOND), 1);
        assert_eq!(State::after_failure(&short), State::Pausing(10 * SECOND));
        let long = attempt(every(11 * SECOND), 1);
        let in_the_queue = State::Leaving(Leave::HandedOn(11 * SECOND));
        assert_eq!(State::after_failure(&long), in_the_queue);
        let held = Attempt { delay_max: 5 * SECOND, ..long };
        assert_eq!(State::after_failure(&held), State::Pausing(11 * SECOND));
    }

    #[test]
    fn an_error_has_the_last_word() {
        let policy = Policy::retry(9).backoff(Backoff::none());
        let with = |then| State::after_failure(&Attempt { then, ..attempt(policy, 1) });
        assert_eq!(with(Directive::Final), END);
        assert_eq!(with(Directive::RetryAfter(SECOND)), State::Pausing(SECOND));
        let handed_on = State::Leaving(Leave::HandedOn(SECOND / 10));
        assert_eq!(with(Directive::GiveBack), handed_on);
        let worn_out =
            Attempt { passes: PASSES_MAX, then: Directive::GiveBack, ..attempt(policy, 1) };
        assert_eq!(State::after_failure(&worn_out), END);
    }

    #[test]
    fn nobody_waits_beyond_a_deadline() {
        let policy = Policy::retry(9).backoff(Backoff::constant(SECOND).jitter_percent(0));
        let in_time = Attempt { left: Some(2 * SECOND), ..attempt(policy, 1) };
        assert_eq!(State::after_failure(&in_time), State::Pausing(SECOND));
        let in_vain = Attempt { left: Some(SECOND), ..in_time };
        assert_eq!(State::after_failure(&in_vain), END);
        let expired = Attempt { kind: FailureKind::Expired, ..in_time };
        assert_eq!(State::after_failure(&expired), State::Leaving(Leave::Failed { dead: false }));
    }
}
