//! Metrics and probes of a program's nodes over HTTP.
//!
//! Nodes measure through the facade of the crate `metrics` whether anybody looks or not. [`Monitoring`] looks: it installs
//! a recorder for the process and serves what it holds.
//!
//! | path | answer |
//! |---|---|
//! | `/metrics` | all metrics of the process, in Prometheus' text format |
//! | `/healthz` | 200 while no node has stopped or failed, else 503 |
//! | `/readyz` | 200 when there is a node and each takes electrons and answers, else 503; the text says what is missing |
//!
//! ```
//! use atomizer::prelude::*;
//! use atomizer_monitoring::Monitoring;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Before the nodes start, or what they measure goes nowhere. Port 0 is any that is free.
//! let monitoring = Monitoring::serve(([127, 0, 0, 1], 0).into())?;
//! println!("http://{}/metrics", monitoring.address());
//! let atomizer = Atomizer::builder().conductor(Memory::new()).start().await?;
//! monitoring.watch(atomizer.health());
//! # atomizer.drain().await?;
//! # Ok(())
//! # }
//! ```
//!
//! There is no login and no TLS: serve to a loopback address or a network of your own, as
//! [the default](Monitoring::ADDRESS_DEFAULT) does.

mod answer;
mod listener;

/// Its program is tested with everything else.
#[cfg(doctest)]
#[doc = include_str!("../../docs/metrics.md")]
struct Page;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use atomizer::Health;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

use crate::{answer::Shown, listener::Listener};

/// Serves the metrics and probes of a process until it is dropped.
///
/// It has a thread of its own, so that atoms which block theirs cost no answer.
#[derive(Debug)]
pub struct Monitoring {
    nodes: Arc<Mutex<Vec<Health>>>,
    listener: Listener,
}

impl Monitoring {
    /// Where to serve unless told otherwise: port 9464 of this machine only.
    pub const ADDRESS_DEFAULT: SocketAddr =
        SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9464);

    /// Installs a recorder for the process, and serves at an address; port 0 is any that is free.
    ///
    /// What is measured by nodes that have started before is not recorded. A program that has a recorder already needs
    /// no other: nodes measure through it, and it serves them itself.
    ///
    /// # Errors
    /// [`ServeError`] when the address cannot be had, or the process has a recorder. Then nothing is installed, and it
    /// may be tried again.
    pub fn serve(address: SocketAddr) -> Result<Self, ServeError> {
        let nodes = Arc::default();
        let bound =
            listener::bind(address).map_err(|source| ServeError::Address { address, source })?;
        let recorder = recorder().map_err(|_| ServeError::Recorded)?;
        let shown = Shown { recorder, nodes: Arc::clone(&nodes) };
        let listener = Listener::start(bound, shown).map_err(ServeError::Thread)?;
        Ok(Self { nodes, listener })
    }

    /// Returns the address that is served.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.listener.address()
    }

    /// Has the probes heed a node, too.
    pub fn watch(&self, node: Health) {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).push(node);
    }
}

/// Why metrics are not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address is taken, or not of this machine.
    #[error("failed to listen on {address}")]
    Address {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The process has a recorder, and can have one only.
    #[error("the process has a recorder of metrics already")]
    Recorded,
    /// The system gave no thread.
    #[error("failed to start a thread")]
    Thread(#[source] io::Error),
}

impl ServeError {
    /// Returns true when the address is in use: another may be free.
    #[must_use]
    pub fn is_address_in_use(&self) -> bool {
        matches!(self, Self::Address { source, .. } if source.kind() == io::ErrorKind::AddrInUse)
    }
}

/// Upper bounds of what is measured in seconds: from the cost of a call in memory to jobs of hours.
const SECONDS: [f64; 19] = [
    0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 300.0, 1800.0, 3600.0,
];

/// Upper bounds of what is measured in bytes: each is four times the one before, up to 16 MiB.
const BYTES: [f64; 10] = [
    64.0,
    256.0,
    1024.0,
    4096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
];

fn recorder() -> Result<metrics_exporter_prometheus::PrometheusHandle, BuildError> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix("_bytes".to_owned()), &BYTES)?
        .install_recorder()
}
