//! What the example programs share, so that each shows little but itself.
//!
//! - [`run`] is a program from its command line to its exit code.
//! - [`cli`] reads numbers and URLs as people type them, and never repeats a password.
//! - [`broker`] connects to RabbitMQ and says what was tried when that fails.
//! - [`progress`] shows how far a run has come.
//! - [`short`] writes ids for people.
//! - [`tosses`] writes estimates of π, and counts who tossed what.

pub mod broker;
pub mod cli;
mod program;
pub mod progress;
pub mod short;
pub mod signals;
pub mod tosses;

pub use program::{Exit, run, say};

/// Its programs are tested with everything else.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
