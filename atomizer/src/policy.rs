//! What follows a failure: tried again here, then elsewhere, then given up.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ElectronId;

/// What follows the failure of an attempt. It travels with the electron.
///
/// Three things can follow, in this order: *retry* so many times on the same node, then *requeue* so many
/// times for a different one, then *fail*: the asker is answered with the last failure. It is also a dead letter,
/// with its history, when nobody asked, or when the policy allowed more than one attempt.
///
/// What an electron says goes before what its [atom](crate::Options::policy) says, and that before what the
/// [node](crate::Builder::policy) says.
///
/// ```
/// use std::time::Duration;
/// use atomizer::{Backoff, Policy};
///
/// // At most six attempts: the first, two more here, three elsewhere.
/// let policy = Policy::retry(2)
///     .then_requeue(3)
///     .backoff(Backoff::exponential(Duration::from_millis(200)).max(Duration::from_secs(30)));
/// # let _ = policy;
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[must_use]
pub struct Policy {
    #[serde(default)]
    retry: u32,
    #[serde(default)]
    requeue: u32,
    #[serde(default)]
    backoff: Backoff,
}

/// What a policy has to say about one failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Retry,
    Requeue,
    Fail,
}

impl Policy {
    /// The first failure is the end. This is the default.
    pub const fn fail() -> Self {
        Self { retry: 0, requeue: 0, backoff: Backoff::new() }
    }

    /// After a failure tries again on the same node, so many times at most.
    pub const fn retry(times: u32) -> Self {
        Self { retry: times, ..Self::fail() }
    }

    /// After a failure puts the electron back for another node, so many times at most.
    ///
    /// As long as another node serves the atom, the one that failed does not take it again. Where there is no
    /// other, it does.
    pub const fn requeue(times: u32) -> Self {
        Self { requeue: times, ..Self::fail() }
    }

    /// When the retries are used up, puts the electron back for another node, so many times at most.
    pub const fn then_requeue(mut self, times: u32) -> Self {
        self.requeue = times;
        self
    }

    /// Sets how long to wait before each further attempt.
    pub const fn backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }

    /// What follows when so many attempts have failed.
    pub(crate) fn after(&self, failures: u32) -> Next {
        if failures <= self.retry {
            Next::Retry
        } else if failures <= self.retry.saturating_add(self.requeue) {
            Next::Requeue
        } else {
            Next::Fail
        }
    }

    /// Whether the last of so many failures put the electron back for another node.
    pub(crate) fn was_requeued(&self, failures: u32) -> bool {
        failures > 0 && self.after(failures) == Next::Requeue
    }

    /// How long to wait before the attempt that follows so many failures.
    pub(crate) fn pause(&self, electron: ElectronId, failures: u32) -> Duration {
        self.backoff.pause(failures, || jitter(electron, failures))
    }

    pub(crate) fn is_fail(&self) -> bool {
        self.retry == 0 && self.requeue == 0
    }
}

/// How long to wait before each further attempt, in whole milliseconds.
///
/// Unless told otherwise a wait is never longer than [`Backoff::MAX_DEFAULT`], and is drawn from the upper half
/// of its length, so that what failed together does not come again together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[must_use]
pub struct Backoff {
    #[serde(default)]
    growth: Growth,
    #[serde(default = "Backoff::base_ms_default")]
    base_ms: u64,
    #[serde(default = "Backoff::max_ms_default")]
    max_ms: u64,
    #[serde(default = "Backoff::jitter_percent_default")]
    jitter_percent: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Growth {
    Constant,
    Linear,
    #[default]
    Exponential,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}

impl Backoff {
    /// The longest wait, unless told otherwise: one minute.
    pub const MAX_DEFAULT: Duration = Duration::from_secs(60);

    /// The default: 100 ms, and twice as long each time.
    const fn new() -> Self {
        Self::exponential(Duration::from_millis(100))
    }

    /// Waits equally long each time.
    pub const fn constant(wait: Duration) -> Self {
        Self::growing(Growth::Constant, wait)
    }

    /// Waits longer each time by as much as the first time.
    pub const fn linear(first: Duration) -> Self {
        Self::growing(Growth::Linear, first)
    }

    /// Waits twice as long each time.
    pub const fn exponential(first: Duration) -> Self {
        Self::growing(Growth::Exponential, first)
    }

    /// Waits not at all.
    pub const fn none() -> Self {
        Self::constant(Duration::ZERO)
    }

    const fn growing(growth: Growth, base: Duration) -> Self {
        Self {
            growth,
            base_ms: milliseconds(base),
            max_ms: Self::max_ms_default(),
            jitter_percent: Self::jitter_percent_default(),
        }
    }

    /// Sets the longest wait.
    pub const fn max(mut self, max: Duration) -> Self {
        self.max_ms = milliseconds(max);
        self
    }

    /// Sets how much of each wait is left to chance, from 0 (nothing) to 100 percent; the default is 50.
    pub const fn jitter_percent(mut self, percent: u8) -> Self {
        self.jitter_percent = if percent > 100 { 100 } else { percent };
        self
    }

    const fn base_ms_default() -> u64 {
        100
    }

    const fn max_ms_default() -> u64 {
        milliseconds(Self::MAX_DEFAULT)
    }

    const fn jitter_percent_default() -> u8 {
        50
    }

    /// The wait after so many failures, at least one. `chance` gives any number.
    fn pause(&self, failures: u32, chance: impl FnOnce() -> u64) -> Duration {
        let factor = match self.growth {
            Growth::Constant => 1,
            Growth::Linear => u64::from(failures.max(1)),
            Growth::Exponential => 1_u64.checked_shl(failures.max(1) - 1).unwrap_or(u64::MAX),
        };
        let wait_ms = self.base_ms.saturating_mul(factor).min(self.max_ms);
        let spread = u128::from(wait_ms) * u128::from(self.jitter_percent.min(100)) / 100;
        // At most 100 percent of a `u64`.
        let spread = u64::try_from(spread).unwrap_or(u64::MAX);
        let shorter = if spread == 0 { 0 } else { chance() % spread.saturating_add(1) };
        Duration::from_millis(wait_ms - shorter)
    }
}

const fn milliseconds(duration: Duration) -> u64 {
    let ms = duration.as_millis();
    if ms > u64::MAX as u128 { u64::MAX } else { ms as u64 }
}

/// A number that differs from electron to electron and from attempt to attempt, and is the same each time it
/// is asked for. Ids are random already; this stirs the number of the attempt in (the finaliser of
/// SplitMix64: Steele, Lea, Flood, 2014).
fn jitter(electron: ElectronId, failures: u32) -> u64 {
    let (high, low) = electron.as_uuid().as_u64_pair();
    let mut bits = high ^ low.wrapping_add(u64::from(failures).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn pauses(backoff: Backoff) -> [Duration; 5] {
        [1, 2, 3, 4, 5].map(|failures| backoff.jitter_percent(0).pause(failures, || 7))
    }

    #[test]
    fn waits_grow_as_they_are_told_to() {
        assert_eq!(pauses(Backoff::constant(MS(20))), [20, 20, 20, 20, 20].map(MS));
        assert_eq!(pauses(Backoff::linear(MS(20))), [20, 40, 60, 80, 100].map(MS));
        assert_eq!(pauses(Backoff::exponential(MS(20))), [20, 40, 80, 160, 320].map(MS));
        assert_eq!(pauses(Backoff::exponential(MS(20)).max(MS(100)))[3..], [100, 100].map(MS));
        assert_eq!(pauses(Backoff::none()), [0; 5].map(MS));
    }

    #[test]
    fn retries_come_before_requeues_and_failing_comes_last() {
        let policy = Policy::retry(2).then_requeue(1);
        let next = [1, 2, 3, 4, u32::MAX].map(|failures| policy.after(failures));
        assert_eq!(next, [Next::Retry, Next::Retry, Next::Requeue, Next::Fail, Next::Fail]);
        assert_eq!(Policy::default().after(1), Next::Fail);
        assert_eq!(Policy::retry(u32::MAX).then_requeue(9).after(u32::MAX), Next::Retry);
    }

    #[test]
    fn what_fails_together_comes_again_apart() {
        let policy = Policy::retry(1).backoff(Backoff::constant(MS(1000)));
        let waits: std::collections::HashSet<_> =
            (0..100).map(|_| policy.pause(ElectronId::new(), 1)).collect();
        assert!(waits.len() > 50, "{waits:?}");
    }

    #[test]
    fn a_policy_is_read_from_what_is_there() {
        let policy: Policy = serde_json::from_str(r#"{"retry":3,"new":true}"#).unwrap();
        assert_eq!(policy, Policy::retry(3));
    }

    proptest! {
        #[test]
        fn a_wait_stays_within_its_bounds(
            growth in prop_oneof![
                Just(Growth::Constant), Just(Growth::Linear), Just(Growth::Exponential)
            ],
            base_ms: u64, max_ms: u64, jitter_percent in 0_u8..=255, failures: u32, chance: u64,
        ) {
            let backoff = Backoff { growth, base_ms, max_ms, jitter_percent };
            let longest = Backoff { jitter_percent: 0, ..backoff }.pause(failures, || 0);
            let wait = backoff.pause(failures, || chance);
            prop_assert!(wait <= longest && longest <= MS(max_ms));
            let percent = u128::from(100 - jitter_percent.min(100));
            prop_assert!(wait.as_millis() >= longest.as_millis() * percent / 100);
        }
    }
}
