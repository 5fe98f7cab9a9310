//! What is served, as a scraper, a probe and a slow client see it.
//!
//! A process has one recorder: each of these tests is for a process of its own, as nextest runs them.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

mod client;
mod counts;
mod probes;
mod serving;
