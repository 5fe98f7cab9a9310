//! Private RabbitMQ brokers for tests, and faults on the way to them.
//!
//! - [`Broker::start`] starts a broker of one's own, which may be killed, stopped, paused and
//!   started again on the same data and ports.
//! - [`Cluster::start`] starts three of them that are one cluster; [`Cluster::start_apart`] three of
//!   which each can be taken off the network.
//! - [`shared`] gives the one broker that tests share; each takes a [`Vhost`] of its own on it.
//! - [`Proxy`] stands between a client and a broker and cuts, refuses or stalls the link.
//!
//! A missing RabbitMQ is an error that says how to install it ([`Missing`]): a test that needs a
//! broker fails without one, it is never skipped.
//!
//! Everything listens on 127.0.0.1 only, or on addresses that only this machine has. A broker never outlives the process that started it, nor
//! does its data folder, not even when that process is killed: a guard process sees to it.
//!
//! All calls block; from asynchronous code, run the slow ones on a thread for blocking work.

mod broker;
mod cluster;
mod ctl;
mod env;
mod error;
mod guard;
mod host;
mod http;
mod machinery;
mod network;
mod node;
mod ports;
mod process;
mod proxy;
pub mod server;
mod settings;
mod shared;
mod vhost;

pub use broker::Broker;
pub use cluster::Cluster;
pub use error::BrokerError;
pub use guard::Guest;
pub use node::{Node, Permissions};
pub use proxy::Proxy;
pub use server::{Missing, Server};
pub use shared::{SHARED_BROKER, shared};
pub use vhost::{Binding, Depth, Exchange, Queue, Vhost};
