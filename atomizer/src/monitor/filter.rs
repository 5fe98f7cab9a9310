//! Which events are wanted.

use std::fmt;

use memchr::memmem::Finder;

use crate::{AtomId, ElectronId, Event, NodeId, Severity, pack::Opened};

/// Says which events are wanted: those that fit all that is said. Of several atoms, nodes, electrons or kinds, any will do.
#[derive(Clone)]
pub struct Filter {
    severity: Severity,
    atoms: Vec<AtomId>,
    nodes: Vec<NodeId>,
    kinds: Vec<(String, Finder<'static>)>,
    electrons: Vec<(ElectronId, Finder<'static>)>,
}

impl Filter {
    /// Makes a filter that all events fit.
    #[must_use]
    pub fn new() -> Self {
        Self {
            severity: Severity::Debug,
            atoms: Vec::new(),
            nodes: Vec::new(),
            kinds: Vec::new(),
            electrons: Vec::new(),
        }
    }

    /// Leaves out what matters less.
    #[must_use]
    pub fn severity(mut self, least: Severity) -> Self {
        self.severity = least;
        self
    }

    /// Wants the events of an atom.
    #[must_use]
    pub fn atom(mut self, atom: AtomId) -> Self {
        self.atoms.push(atom);
        self
    }

    /// Wants the events of a node.
    #[must_use]
    pub fn node(mut self, node: NodeId) -> Self {
        self.nodes.push(node);
        self
    }

    /// Wants the events of a kind, by its [name](crate::EventKind::name): `failed`.
    #[must_use]
    pub fn kind(mut self, name: impl Into<String>) -> Self {
        let name = name.into();
        // As a line has it. No text of others reads like it: its quotes are escaped.
        let finder = Finder::new(&format!("\"event\":\"{name}\"")).into_owned();
        self.kinds.push((name, finder));
        self
    }

    /// Wants the events of an electron, and the sending of its children.
    ///
    /// They are found fast among many: what does not have the id in it is not read.
    #[must_use]
    pub fn electron(mut self, electron: ElectronId) -> Self {
        let finder = Finder::new(electron.to_string().as_bytes()).into_owned();
        self.electrons.push((electron, finder));
        self
    }

    /// Returns whether an event fits.
    #[must_use]
    pub fn fits(&self, event: &Event) -> bool {
        let of = |id: Option<ElectronId>| {
            id.is_some_and(|id| self.electrons.iter().any(|(wanted, _)| *wanted == id))
        };
        event.kind.severity() >= self.severity
            && (self.atoms.is_empty() || event.atom().is_some_and(|atom| self.atoms.contains(atom)))
            && (self.nodes.is_empty() || self.nodes.contains(&event.node))
            && (self.kinds.is_empty()
                || self.kinds.iter().any(|(kind, _)| *kind == event.kind.name()))
            && (self.electrons.is_empty() || of(event.electron()) || of(event.parent()))
    }

    /// Whether there may be something in a pack.
    pub(super) fn may_fit(&self, pack: &Opened) -> bool {
        (self.nodes.is_empty() || self.nodes.contains(pack.node())) && self.may_be_in(pack.rest())
    }

    /// Whether the event of a line may fit.
    pub(super) fn may_fit_line(&self, line: &[u8]) -> bool {
        self.may_be_in(line)
    }

    fn may_be_in(&self, text: &[u8]) -> bool {
        let has = |finder: &Finder<'_>| finder.find(text).is_some();
        (self.electrons.is_empty() || self.electrons.iter().any(|(_, finder)| has(finder)))
            && (self.kinds.is_empty() || self.kinds.iter().any(|(_, finder)| has(finder)))
    }
}

impl Default for Filter {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { severity, atoms, nodes, kinds, electrons } = self;
        let electrons: Vec<_> = electrons.iter().map(|(id, _)| id).collect();
        let kinds: Vec<_> = kinds.iter().map(|(name, _)| name).collect();
        f.debug_struct("Filter")
            .field("severity", severity)
            .field("atoms", atoms)
            .field("nodes", nodes)
            .field("kinds", &kinds)
            .field("electrons", &electrons)
            .finish()
    }
}
