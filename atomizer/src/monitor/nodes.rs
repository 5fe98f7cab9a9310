//! Which nodes there are, from what they say.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::Seen;
use crate::{Event, EventKind, NodeId, Presence, clock};

/// Keeps count of the nodes of a cluster: show it all that a [`Monitor`](super::Monitor) sees, and ask it.
///
/// A monitor that begins [`Presence::SILENCE_MAX`] ago knows all nodes that are there when it has
/// [caught up](Seen::CaughtUp).
#[derive(Debug, Default)]
pub struct Nodes {
    nodes: BTreeMap<NodeId, Heard>,
    live: bool,
}

#[derive(Debug)]
struct Heard {
    presence: Option<Presence>,
    at: Instant,
    stopped: bool,
}

/// What is known of a node.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct NodeStatus {
    /// The node.
    pub node: NodeId,
    /// Whether it is there.
    pub state: NodeState,
    /// How long it has been silent.
    #[serde(skip)]
    pub silent: Duration,
    /// What it said last of itself; none when it has not said it since the monitor began.
    pub presence: Option<Presence>,
}

/// Whether a node is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NodeState {
    /// It was heard of within [`Presence::SILENCE_MAX`].
    Alive,
    /// It said that it has stopped.
    Stopped,
    /// It has been silent for longer: killed, cut off, or its machine is too busy.
    Gone,
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Alive => "alive",
            Self::Stopped => "stopped",
            Self::Gone => "gone",
        })
    }
}

impl Nodes {
    /// Takes note of what a monitor sees. Events of all nodes and of every kind are signs of life; without
    /// [`EventKind::Alive`] among them nothing is known but that.
    pub fn see(&mut self, seen: &Seen) {
        match seen {
            Seen::Event(event) => self.hear(event),
            Seen::CaughtUp => self.live = true,
            Seen::Missed { .. } | Seen::Interrupted { .. } => {}
        }
    }

    fn hear(&mut self, event: &Event) {
        // What comes now was said now, whatever the clocks are; of what was kept only they can tell.
        let ago = if self.live { None } else { clock::now().duration_since(event.at).ok() };
        let now = Instant::now();
        let at = ago.and_then(|ago| now.checked_sub(ago)).unwrap_or(now);
        let heard = self.nodes.entry(event.node.clone());
        let heard = heard.or_insert(Heard { presence: None, at, stopped: false });
        heard.at = heard.at.max(at);
        match &event.kind {
            EventKind::Alive(presence) => heard.presence = Some(Presence::clone(presence)),
            EventKind::Stopped => heard.stopped = true,
            _ => {}
        }
    }

    /// Returns what is known of all nodes, by their ids.
    #[must_use]
    pub fn list(&self) -> Vec<NodeStatus> {
        let status = |(node, heard): (&NodeId, &Heard)| {
            let silent = heard.at.elapsed();
            let state = match heard.stopped {
                true => NodeState::Stopped,
                false if silent > Presence::SILENCE_MAX => NodeState::Gone,
                false => NodeState::Alive,
            };
            NodeStatus { node: node.clone(), state, silent, presence: heard.presence.clone() }
        };
        self.nodes.iter().map(status).collect()
    }

    /// Forgets those that have stopped, or been silent, for so long.
    pub fn forget(&mut self, silent: Duration) {
        self.nodes.retain(|_, heard| heard.at.elapsed() < silent);
    }
}
