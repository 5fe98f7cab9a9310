//! How far a monitor has come.

use std::{
    collections::BTreeMap,
    fmt,
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::NodeId;

/// How long after its last event a node is forgotten, by the latest event of any. It tells nothing again by then.
const FORGOTTEN_AFTER_S: u64 = 60 * 60;
/// So few nodes are not worth looking through.
const FEW: usize = 256;

/// Where a monitor is in the events of a cluster, exactly. As text it is JSON on one line.
///
/// Keep it together with whatever was made of the events so far: who goes on after it sees each event once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bookmark {
    /// The pack that is read, or the next; none before the first.
    pub(super) offset: Option<u64>,
    /// What is expected of each node: packs may be kept twice, so the offset alone would not do.
    nodes: BTreeMap<NodeId, Expected>,
    /// The time of the latest event, in seconds since 1970.
    latest: u64,
    /// How many nodes were left when it was last looked which to forget.
    #[serde(skip)]
    left: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Expected {
    /// The number of the next event.
    next: u64,
    /// The time of the last, in seconds since 1970.
    at: u64,
}

impl Bookmark {
    /// Returns the number that the next event of a node has, if one was seen before.
    pub(super) fn expected(&self, node: &NodeId) -> Option<u64> {
        self.nodes.get(node).map(|expected| expected.next)
    }

    pub(super) fn advance(&mut self, node: &NodeId, next: u64, at: Option<SystemTime>) {
        let seconds = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let at = at.map_or(self.latest, seconds);
        self.latest = self.latest.max(at);
        if let Some(expected) = self.nodes.get_mut(node) {
            *expected = Expected { next: next.max(expected.next), at: at.max(expected.at) };
            return;
        }
        self.nodes.insert(node.clone(), Expected { next, at });
        if self.nodes.len() > FEW.max(2 * self.left) {
            let latest = self.latest;
            self.nodes.retain(|_, seen| latest.saturating_sub(seen.at) < FORGOTTEN_AFTER_S);
            self.left = self.nodes.len();
        }
    }
}

impl fmt::Display for Bookmark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl FromStr for Bookmark {
    type Err = InvalidBookmark;

    fn from_str(text: &str) -> Result<Self, InvalidBookmark> {
        serde_json::from_str(text).map_err(|error| InvalidBookmark(error.to_string()))
    }
}

/// Says that a text is no bookmark.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no bookmark: {0}")]
pub struct InvalidBookmark(String);
