//! The example programs, as people run them: real processes, a real broker.

mod cluster;
mod harness;
mod misuse;
mod monitoring;
mod single;
mod small;
