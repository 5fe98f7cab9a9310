//! The runtime as its users see it, on the in-memory conductor.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that panics has failed, and its tasks end with it"
)]

mod anew;
mod atoms;
mod cancelling;
mod completion;
mod conductors;
mod drain;
mod ends;
mod events;
mod fan_out;
mod holding;
mod inline;
mod instances;
mod kinds;
mod limits;
mod monitor;
mod once;
mod policies;
mod raw;
mod soak;
mod spawning;
mod start;
mod supervision;
mod suspects;
mod threads;
