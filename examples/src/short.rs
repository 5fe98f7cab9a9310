//! Writes ids short enough for a line that people read.

use atomizer::{ElectronId, NodeId};

/// Returns the end of an id: ids begin with the time, and what tells them apart is at the end.
#[must_use]
pub fn electron(id: ElectronId) -> String {
    let id = id.to_string();
    id[id.len() - 4..].to_owned()
}

/// Returns the name of a node, without the digits that make it unique.
#[must_use]
pub fn node(id: &NodeId) -> &str {
    id.as_str().rsplit_once('-').map_or(id.as_str(), |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_short() {
        let id = ElectronId::new();
        assert!(id.to_string().ends_with(&electron(id)));
        assert_eq!(node(&NodeId::unique("two-words").unwrap()), "two-words");
    }
}
