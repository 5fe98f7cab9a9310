//! The command, as people run it: a real process, a real broker.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

mod asking;
mod dead;
mod doctor;
mod harness;
mod misuse;
mod permissions;
mod queues;
mod requeue;
mod topology;
mod watching;
