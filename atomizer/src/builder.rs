//! Describes a node and starts it.

use std::{collections::HashSet, fmt, sync::Arc, time::Duration};

use futures::future::try_join_all;
use tokio::sync::watch;

use crate::{
    AtomId, Atomizer, Conductor, ConductorId, InvalidId, NodeId, OpenError, Options, RawAtom,
    admission::Admission,
    ask::Pending,
    event::{EventStream, Events},
    link::Link,
    node::{Node, Stage},
    run::Start,
    worker::Registered,
};

/// Describes a node: its conductors, its atoms and its limits.
#[must_use = "a node runs only once it is started"]
pub struct Builder {
    name: String,
    conductors: Vec<Arc<dyn Conductor>>,
    atoms: Vec<(AtomId, Options, Arc<dyn Start>)>,
    concurrency: usize,
    connect_timeout: Option<Duration>,
    drain_timeout: Duration,
    watch: Vec<Box<dyn FnOnce(EventStream) + Send>>,
}

impl Builder {
    /// How many electrons run at once on a node unless told otherwise.
    pub const CONCURRENCY_DEFAULT: usize = 1024;
    /// How long the first connection is tried unless told otherwise: 5 s.
    pub const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);
    /// How long draining lets electrons finish unless told otherwise: 30 s.
    pub const DRAIN_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

    pub(crate) fn new() -> Self {
        Self {
            name: "node".to_owned(),
            conductors: Vec::new(),
            atoms: Vec::new(),
            concurrency: Self::CONCURRENCY_DEFAULT,
            connect_timeout: Some(Self::CONNECT_TIMEOUT_DEFAULT),
            drain_timeout: Self::DRAIN_TIMEOUT_DEFAULT,
            watch: Vec::new(),
        }
    }

    /// Names the node; its id is the name and eight random digits. The default is `node`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Adds a conductor. What this node asks of its own accord goes through the first.
    pub fn conductor(mut self, conductor: impl Conductor) -> Self {
        self.conductors.push(Arc::new(conductor));
        self
    }

    /// Adds an atom, typed or raw. A node without atoms only asks.
    pub fn atom(mut self, atom: impl RawAtom) -> Self {
        self.atoms.push((atom.id(), RawAtom::options(&atom), Arc::new(atom)));
        self
    }

    /// Limits how many electrons run at once on this node, over all atoms; at least 1.
    pub fn concurrency(mut self, limit: usize) -> Self {
        self.concurrency = limit.max(1);
        self
    }

    /// Limits how long the start tries to reach a conductor; `None` tries for ever.
    ///
    /// It holds for the start only: a connection that was there once is tried again for ever.
    pub fn connect_timeout(mut self, limit: impl Into<Option<Duration>>) -> Self {
        self.connect_timeout = limit.into();
        self
    }

    /// Limits how long draining lets electrons finish.
    pub fn drain_timeout(mut self, limit: Duration) -> Self {
        self.drain_timeout = limit;
        self
    }

    /// Hands over a view of the node's events that misses nothing, the start included.
    pub fn watch(mut self, watch: impl FnOnce(EventStream) + Send + 'static) -> Self {
        self.watch.push(Box::new(watch));
        self
    }

    /// Connects and starts to serve. When it returns, the queues of all atoms are there and served, unless a
    /// conductor refused that: then it is tried again, which the log and the events tell.
    ///
    /// # Errors
    /// [`StartError`] when the description is wrong, a conductor refuses, or cannot be reached in time.
    ///
    /// # Cancel safety
    /// Dropping the future gives up the start.
    pub async fn start(self) -> Result<Atomizer, StartError> {
        let id = NodeId::unique(&self.name)?;
        let admission = Admission::new(self.concurrency);
        let atoms = register(self.atoms, &admission)?;
        let links = link(self.conductors)?;
        let events = Events::new(id.clone());
        for watch in self.watch {
            watch(events.subscribe());
        }
        let (stage_tx, stage) = watch::channel(Stage::Running);
        let node = Node { id, events, admission, pending: Pending::default(), stage };
        try_join_all(links.iter().map(|link| async {
            let opened = link.open_first(&node, self.connect_timeout).await;
            opened.map_err(|source| StartError::Open { conductor: link.id().clone(), source })
        }))
        .await?;
        Ok(Atomizer::spawn(node, stage_tx, links, &atoms, self.drain_timeout).await)
    }
}

fn register(
    atoms: Vec<(AtomId, Options, Arc<dyn Start>)>,
    admission: &Admission,
) -> Result<Vec<Registered>, StartError> {
    let mut taken = HashSet::new();
    let register = |(id, options, atom): (AtomId, Options, Arc<dyn Start>)| {
        if !taken.insert(id.clone()) {
            return Err(StartError::DuplicateAtom(id));
        }
        let lane = admission.add_lane(options.concurrency_limit());
        Ok(Registered { id, atom, options, lane })
    };
    atoms.into_iter().map(register).collect()
}

/// Two conductors of one type are two conductors: the second gets a number.
fn link(conductors: Vec<Arc<dyn Conductor>>) -> Result<Vec<Arc<Link>>, StartError> {
    if conductors.is_empty() {
        return Err(StartError::NoConductor);
    }
    let mut taken = HashSet::new();
    let link = |conductor: Arc<dyn Conductor>| {
        let mut id = conductor.id().clone();
        let mut number = 1;
        while !taken.insert(id.clone()) {
            number += 1;
            id = ConductorId::try_new(format!("{}-{number}", conductor.id()))?;
        }
        Ok(Arc::new(Link::new(id, conductor)))
    };
    conductors.into_iter().map(link).collect()
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("name", &self.name)
            .field("conductors", &self.conductors)
            .finish_non_exhaustive()
    }
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// There is nothing to take electrons from or send them to.
    #[error("a node needs at least one conductor")]
    NoConductor,
    /// Two atoms have the same id.
    #[error("atom {0} is registered twice")]
    DuplicateAtom(AtomId),
    /// The node's name cannot be part of its id.
    #[error(transparent)]
    Name(#[from] InvalidId),
    /// A conductor did not open.
    #[error("failed to open conductor {conductor}")]
    Open {
        /// Which.
        conductor: ConductorId,
        /// Why.
        source: OpenError,
    },
}
