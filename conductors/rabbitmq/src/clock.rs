//! The only reader of the wall clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Returns the time of day after a delay, in whole seconds since the Unix epoch.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub(crate) fn seconds_at(delay: Duration) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_add(delay).as_secs()
}
