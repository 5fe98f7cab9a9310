//! The example programs, as people run them: real processes, a real broker.

mod cluster;
mod harness;
mod misuse;
mod single;
mod small;
