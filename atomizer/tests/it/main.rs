//! The runtime as its users see it, on the in-memory conductor.

mod atoms;
mod conductors;
mod drain;
mod ends;
mod events;
mod fan_out;
mod limits;
mod start;
