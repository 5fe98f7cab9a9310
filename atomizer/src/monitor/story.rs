//! The story of one electron, from what is kept of it.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{ClusterEvents, Filter, Monitor, MonitorError, NodeState, Nodes, Seen};
use crate::{AtomId, ElectronId, Event, EventKind, NodeId, OpenError, Position, Presence};

/// How far the clocks of a cluster may be apart for the first try to find the beginning.
const SKEW: Duration = Duration::from_secs(2);
/// And for the second.
const SKEW_MAX: Duration = Duration::from_secs(10 * 60);
/// How long after its end more may be told of an electron, by the clock of where it ended: it may have been delivered twice,
/// and other nodes may have been late with what they told before.
const AFTERWARDS: Duration = Duration::from_secs(5);

/// What is known of one electron: each step, in order, and where it is now. Made by [`Monitor::story`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Story {
    /// The electron.
    pub electron: ElectronId,
    /// What happened to it. In the order of the clocks of the nodes, and on each node in the order in which it happened.
    pub events: Vec<Event>,
    /// What it sent, in the order in which it was sent.
    pub children: Vec<(ElectronId, AtomId)>,
    /// Where it is now, as far as can be told.
    pub whereabouts: Whereabouts,
}

/// Where an electron is.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Whereabouts {
    /// Nothing is kept of it: it was never sent here, or so long ago that nothing is kept any more.
    Unknown,
    /// It was sent, and nobody has taken it.
    Queued {
        /// When it is due, where that is known.
        until: Option<SystemTime>,
    },
    /// A node has it.
    At {
        /// The node.
        node: NodeId,
        /// Whether it runs there, or waits to.
        runs: bool,
        /// Whether the node is there. Where it is not, the electron is delivered again, to another.
        state: Option<NodeState>,
    },
    /// It ended well.
    Done {
        /// Why its asker could not be told.
        unclaimed: Option<String>,
    },
    /// It ended in failure.
    Failed {
        /// Whether it is among the dead letters, or was when this was told.
        dead: bool,
    },
}

impl Monitor {
    /// Reads the story of one electron.
    ///
    /// Its id says when it was made: what is kept from then on is read, until shortly after it was done. What failed may have
    /// been sent back since, and what is a child may have been asked again: of these all that came after it is read.
    ///
    /// # Errors
    /// As [`open`](Self::open), also when the connection is lost meanwhile.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn story(&self, electron: ElectronId) -> Result<Story, MonitorError> {
        let made = UNIX_EPOCH + Duration::from_millis(electron.root_millis());
        let from = |skew| made.checked_sub(skew).map_or(Position::Start, Position::Time);
        let mut telling = Telling::new(electron);
        for position in [from(SKEW), from(SKEW_MAX), Position::Start] {
            // Where something is known but its sending, an earlier beginning is worth one more look, not two.
            if position == Position::Start && !telling.by_node.is_empty() {
                break;
            }
            telling = Telling::new(electron);
            let monitor = Self { from: position, after: None, ..self.clone() };
            let filter = Filter::new().electron(electron);
            telling.read(monitor.filter(filter).open().await?).await?;
            if telling.has_beginning() {
                break;
            }
        }
        let mut story = telling.finish();
        if let Whereabouts::At { node, state, .. } = &mut story.whereabouts {
            *state = self.state_of(node).await?;
        }
        Ok(story)
    }

    /// Returns whether a node is there; none when it was not heard of for long.
    async fn state_of(&self, node: &NodeId) -> Result<Option<NodeState>, MonitorError> {
        let recently = Position::ago(Presence::SILENCE_MAX + Presence::PERIOD);
        let monitor = Self { from: recently, after: None, ..self.clone() };
        let filter = Filter::new().node(node.clone());
        let mut events = monitor.filter(filter).open().await?;
        let mut nodes = Nodes::default();
        loop {
            match events.next().await {
                Seen::CaughtUp => break,
                Seen::Interrupted { reason } => return Err(OpenError::Unreachable(reason).into()),
                seen => nodes.see(&seen),
            }
        }
        let heard = nodes.list().into_iter().find(|status| status.node == *node);
        Ok(Some(heard.map_or(NodeState::Gone, |status| status.state)))
    }
}

/// A story that is being read.
struct Telling {
    electron: ElectronId,
    /// What each node told, in its order.
    by_node: BTreeMap<NodeId, VecDeque<Event>>,
    children: Vec<(ElectronId, AtomId)>,
}

impl Telling {
    fn new(electron: ElectronId) -> Self {
        Self { electron, by_node: BTreeMap::new(), children: Vec::new() }
    }

    async fn read(&mut self, mut events: ClusterEvents) -> Result<(), MonitorError> {
        let mut is_child = false;
        loop {
            match events.next().await {
                Seen::Event(event) => {
                    is_child |= event.parent().is_some_and(|parent| parent != self.electron);
                    let is_done = matches!(event.kind, EventKind::Completed { .. });
                    if is_done && !is_child && event.electron() == Some(self.electron) {
                        events.until(&event.node, event.at + AFTERWARDS);
                    }
                    self.add(event);
                }
                Seen::CaughtUp => return Ok(()),
                Seen::Interrupted { reason } => return Err(OpenError::Unreachable(reason).into()),
                Seen::Missed { .. } => {}
            }
        }
    }

    fn add(&mut self, event: Event) {
        match &event.kind {
            EventKind::Sent { electron, atom, .. } if *electron != self.electron => {
                let child = (*electron, atom.clone());
                if !self.children.contains(&child) {
                    self.children.push(child);
                }
            }
            _ => self.by_node.entry(event.node.clone()).or_default().push_back(event),
        }
    }

    fn has_beginning(&self) -> bool {
        let mut first = self.by_node.values().filter_map(VecDeque::front);
        first.any(|event| matches!(event.kind, EventKind::Sent { .. }))
    }

    fn finish(mut self) -> Story {
        let mut events: Vec<Event> = Vec::new();
        loop {
            let heads = self.by_node.values_mut().filter(|events| !events.is_empty());
            let next = heads.min_by_key(|events| events.front().map(|event| event.at));
            let Some(event) = next.and_then(VecDeque::pop_front) else { break };
            events.push(event);
        }
        let whereabouts = whereabouts(&events);
        Story { electron: self.electron, events, children: self.children, whereabouts }
    }
}

fn whereabouts(events: &[Event]) -> Whereabouts {
    // Done is done, though what was delivered twice, or a clock that is behind, may tell of something else later.
    let done = events.iter().find_map(|event| match &event.kind {
        EventKind::Completed { unclaimed, .. } => {
            Some(Whereabouts::Done { unclaimed: unclaimed.clone() })
        }
        _ => None,
    });
    let decided = events.iter().rev().find_map(|event| match &event.kind {
        EventKind::Failed { dead, .. } => Some(Whereabouts::Failed { dead: *dead }),
        EventKind::Requeued { wait, .. } => {
            Some(Whereabouts::Queued { until: Some(event.at + *wait) })
        }
        EventKind::Sent { .. } | EventKind::HandedOn { .. } | EventKind::NotSettled { .. } => {
            Some(Whereabouts::Queued { until: None })
        }
        EventKind::Received { .. } | EventKind::Suspected { .. } => {
            Some(Whereabouts::At { node: event.node.clone(), runs: false, state: None })
        }
        EventKind::Started { .. }
        | EventKind::Progress { .. }
        | EventKind::Blocking { .. }
        | EventKind::Stuck { .. }
        | EventKind::Retried { .. } => {
            Some(Whereabouts::At { node: event.node.clone(), runs: true, state: None })
        }
        // What runs or waits goes on to.
        _ => None,
    });
    done.or(decided).unwrap_or(Whereabouts::Unknown)
}

impl fmt::Display for Whereabouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("nothing is known of it"),
            Self::Queued { until: None } => f.write_str("it waits in its queue"),
            Self::Queued { until: Some(until) } => {
                let until = humantime::format_rfc3339_millis(*until);
                write!(f, "it waits in its queue, and is due at {until}")
            }
            Self::At { node, runs, state } => {
                let does = if *runs { "runs" } else { "waits to run" };
                match state {
                    None | Some(NodeState::Alive) => write!(f, "it {does} on {node}"),
                    Some(NodeState::Stopped) => {
                        write!(
                            f,
                            "it was on {node}, which has stopped: whoever serves its atom gets it"
                        )
                    }
                    Some(NodeState::Gone) => {
                        write!(
                            f,
                            "it was on {node}, which is gone: whoever serves its atom gets it"
                        )
                    }
                }
            }
            Self::Done { unclaimed: None } => f.write_str("it is done"),
            Self::Done { unclaimed: Some(reason) } => {
                write!(f, "it is done, and its asker could not be told: {reason}")
            }
            Self::Failed { dead: true } => f.write_str("it failed, and is a dead letter"),
            Self::Failed { dead: false } => f.write_str("it failed, and its asker was told"),
        }
    }
}
