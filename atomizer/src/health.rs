//! How a node fares, for who watches it from outside: a load balancer, an orchestrator, a test.

use std::{
    fmt,
    sync::{Arc, Weak},
};

use tokio::sync::watch;

use crate::{ConductorId, NodeError, NodeId, link::Link, node::Stage};

/// A view of how a node fares. It does not keep the node running; clones are views of the same node.
#[derive(Clone)]
pub struct Health {
    node: NodeId,
    stage: watch::Receiver<Stage>,
    ended: watch::Receiver<Option<Result<(), NodeError>>>,
    links: Weak<[Arc<Link>]>,
}

impl Health {
    pub(crate) fn new(
        node: NodeId,
        stage: watch::Receiver<Stage>,
        ended: watch::Receiver<Option<Result<(), NodeError>>>,
        links: Weak<[Arc<Link>]>,
    ) -> Self {
        Self { node, stage, ended, links }
    }

    /// Returns the id of the node.
    #[must_use]
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// Returns whether the node's supervisor runs: from the start until the node has stopped or failed.
    ///
    /// A broker that is away does not end a node, nor does draining.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.ended.has_changed().is_ok() && self.ended.borrow().is_none()
    }

    /// Returns whether the node takes electrons and answers, and if not, why.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        match &*self.ended.borrow() {
            Some(Ok(())) => return Readiness::Stopped,
            Some(Err(report)) => return Readiness::Failed(report.clone()),
            None => {}
        }
        let Some(links) = self.links.upgrade().filter(|_| self.is_alive()) else {
            return Readiness::Stopped;
        };
        if *self.stage.borrow() >= Stage::Draining {
            return Readiness::Draining;
        }
        let without = links.iter().filter(|link| link.session().is_none());
        let without: Vec<_> = without.map(|link| link.id().clone()).collect();
        if without.is_empty() { Readiness::Ready } else { Readiness::NoSession(without) }
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health")
            .field("node", &self.node)
            .field("readiness", &self.readiness())
            .finish_non_exhaustive()
    }
}

/// Whether a node takes electrons and answers. It prints as one line.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Readiness {
    /// Each conductor has a session.
    Ready,
    /// These conductors have no session at the moment, or are given up.
    NoSession(Vec<ConductorId>),
    /// The node takes no more and finishes what runs.
    Draining,
    /// The node has stopped in order.
    Stopped,
    /// The node could not go on.
    Failed(NodeError),
}

impl Readiness {
    /// Returns true for [`Ready`](Self::Ready).
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Ready)
    }
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => f.write_str("ready"),
            Self::NoSession(conductors) => {
                f.write_str("no session of ")?;
                for (at, conductor) in conductors.iter().enumerate() {
                    write!(f, "{}{conductor}", if at == 0 { "" } else { ", " })?;
                }
                Ok(())
            }
            Self::Draining => f.write_str("draining"),
            Self::Stopped => f.write_str("stopped"),
            Self::Failed(report) => {
                write!(f, "failed: {}", report.to_string().replace(['\n', '\r'], " "))
            }
        }
    }
}
