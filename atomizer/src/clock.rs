//! The only reader of the wall clock.

use std::time::SystemTime;

/// Returns the time of day. Use it to tell people; measure with `tokio::time::Instant`.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}
