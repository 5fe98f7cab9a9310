//! What the RabbitMQ conductor does beyond the contract, on a real broker.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

mod addresses;
mod answers;
mod aside;
mod cancelling;
mod cluster;
mod dead;
mod delays;
mod faults;
mod holding;
mod interop;
mod leftovers;
mod load;
mod open;
mod parking;
mod permissions;
mod publishing;
mod silent;
mod support;
mod taking;
#[cfg(feature = "tls")]
mod tls;
mod topology;
