//! What every program of this workspace needs, so that the examples and the command are alike.
//!
//! - [`run`] is a program from its command line to its exit code.
//! - [`cli`] reads numbers and URLs as people type them, and never repeats a password.
//! - [`broker`] connects to RabbitMQ and says what was tried when that fails.
//! - [`progress`] shows how far a run has come.
//! - [`signals`] waits to be told to stop.

pub mod broker;
pub mod cli;
mod program;
pub mod progress;
pub mod signals;

pub use program::{Exit, Mistyped, run, say, write};
