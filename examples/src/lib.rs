//! What the example programs share, so that each shows little but itself.
//!
//! What they share with the command `atomizer` is in `atomizer-programs`: a program from its command line to its exit
//! code, and what is typed there. Beside it:
//!
//! - [`broker`] connects to RabbitMQ where there is one.
//! - [`progress`] shows how far a run has come.
//! - [`short`] writes ids for people.
//! - [`tosses`] writes estimates of π, and counts who tossed what.

pub mod broker;
pub mod progress;
pub mod short;
pub mod tosses;

pub use atomizer_programs::{Exit, cli, run, say, signals};

/// Its programs are tested with everything else.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
