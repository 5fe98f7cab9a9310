//! Describes a node and starts it.

use std::{collections::HashSet, fmt, num::NonZeroUsize, sync::Arc, thread, time::Duration};

use futures::future::try_join_all;
use tokio::sync::{oneshot, watch};

use crate::{
    AtomId, Atomizer, Conductor, ConductorId, InvalidId, Kind, NodeId, OpenError, Options, Policy,
    RawAtom, Resident,
    admission::Admission,
    event::{EventStream, Events, Gather},
    home::{self, Threads},
    instance::Instances,
    link::Link,
    metrics,
    node::{Node, Rules, Stage},
    publish::Keeping,
    resident,
    run::Start,
    runtime::Supervisor,
    worker::Registered,
};

/// Describes a node: its conductors, its atoms and its limits.
#[must_use = "a node runs only once it is started"]
pub struct Builder {
    name: String,
    conductors: Vec<Arc<dyn Conductor>>,
    atoms: Vec<NewAtom>,
    residents: Vec<resident::Registered>,
    concurrency: usize,
    rules: Rules,
    connect_timeout: Option<Duration>,
    give_up_after: Option<Duration>,
    drain_timeout: Duration,
    watch: Vec<Box<dyn FnOnce(EventStream) + Send>>,
}

/// An atom that has no place in a node yet.
struct NewAtom {
    id: AtomId,
    kind: Kind,
    options: Options,
    atom: Arc<dyn Start>,
}

impl Builder {
    /// How many electrons run at once on a node unless told otherwise.
    pub const CONCURRENCY_DEFAULT: usize = 1024;
    /// How long the first connection is tried unless told otherwise: 5 s.
    pub const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);
    /// How long draining lets electrons finish unless told otherwise: 30 s.
    pub const DRAIN_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
    /// How many starts under suspicion an electron has unless told otherwise.
    pub const LIVES_DEFAULT: u32 = 5;
    /// How many parents wait for their children on a node, unless told otherwise, before children run inline.
    pub const WAITING_MAX_DEFAULT: usize = 10_000;

    pub(crate) fn new() -> Self {
        Self {
            name: "node".to_owned(),
            conductors: Vec::new(),
            atoms: Vec::new(),
            residents: Vec::new(),
            concurrency: Self::CONCURRENCY_DEFAULT,
            rules: Rules {
                policy: Policy::fail(),
                lives_max: Self::LIVES_DEFAULT,
                stuck_max: cores(),
                waiting_max: Self::WAITING_MAX_DEFAULT,
            },
            connect_timeout: Some(Self::CONNECT_TIMEOUT_DEFAULT),
            give_up_after: None,
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

    /// Adds an atom, typed or raw: one value that all its electrons share. A node without atoms only asks.
    ///
    /// A panic leaves the value as it is. Where that may leave it broken, [`atom_from`](Self::atom_from) makes
    /// it afresh.
    pub fn atom(self, atom: impl RawAtom) -> Self {
        let (id, kind, options) = (atom.id(), atom.kind(), RawAtom::options(&atom));
        self.add(id, kind, options, Instances::Shared(Arc::new(atom)))
    }

    /// Adds an atom by how it is made: one value that all its electrons share, made afresh after a panic, and
    /// with it its state.
    pub fn atom_from<A: RawAtom>(self, make: impl Fn() -> A + Send + Sync + 'static) -> Self {
        let instances = Instances::renewed(Box::new(make));
        let atom = instances.get();
        self.add(atom.id(), atom.kind(), RawAtom::options(&*atom), instances)
    }

    /// Adds an atom by how it is made: a new value for each electron. One more is made here, and asked for its
    /// id and options.
    pub fn atom_per_electron<A: RawAtom>(
        self,
        make: impl Fn() -> A + Send + Sync + 'static,
    ) -> Self {
        let atom = make();
        let instances = Instances::PerElectron(Box::new(make));
        self.add(atom.id(), atom.kind(), RawAtom::options(&atom), instances)
    }

    /// Adds an atom whose every electron begins with a copy of this value.
    pub fn atom_copied(self, atom: impl RawAtom + Clone) -> Self {
        self.atom_per_electron(move || atom.clone())
    }

    fn add<A: RawAtom>(
        mut self,
        id: AtomId,
        kind: Kind,
        options: Options,
        instances: Instances<A>,
    ) -> Self {
        self.atoms.push(NewAtom { id, kind, options, atom: Arc::new(instances) });
        self
    }

    /// Adds a resident by how it is made: it runs from the start to the drain, and is made anew when it fails.
    pub fn resident<R: Resident>(mut self, make: impl Fn() -> R + Send + Sync + 'static) -> Self {
        self.residents.push(resident::Registered::new(make));
        self
    }

    /// Says what follows a failure, where neither the electron nor its atom says. The default is
    /// [`Policy::fail`].
    pub fn policy(mut self, policy: Policy) -> Self {
        self.rules.policy = policy;
        self
    }

    /// Limits how often an electron that was delivered before, and may be what ended the node that had it, is
    /// begun; at least 1. After that it is a dead letter, and its asker is told.
    pub fn lives_max(mut self, lives: u32) -> Self {
        self.rules.lives_max = lives.max(1);
        self
    }

    /// Limits how many runs may hold their thread 5 s after their time limit; at least 1. Then the node drains,
    /// and [`run`](Atomizer::run) returns an error. The default is the number of cores: so many can hold every
    /// thread that atoms have. [Blocking](Options::blocking) atoms, which have threads of their own, do not count.
    pub fn stuck_max(mut self, runs: usize) -> Self {
        self.rules.stuck_max = runs.max(1);
        self
    }

    /// Sets how many parents may wait for their children at once on this node; 0 and more. Where there are so many, a
    /// parent runs its next children inline: in its own slot, one after the other, and theirs likewise. That bounds
    /// the memory that a tree of atoms takes, however wide it is. The default is
    /// [`WAITING_MAX_DEFAULT`](Self::WAITING_MAX_DEFAULT).
    ///
    /// Children of singletons, of atoms that this node does not have, and of those whose limit is reached go through
    /// the queue all the same.
    pub fn waiting_max(mut self, parents: usize) -> Self {
        self.rules.waiting_max = parents;
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

    /// Limits how long a conductor that was there once may be gone before it is given up; without it, it is
    /// tried for ever. A node whose last conductor is given up ends with an error.
    ///
    /// One that panics five times within a minute is given up at once.
    pub fn give_up_after(mut self, limit: impl Into<Option<Duration>>) -> Self {
        self.give_up_after = limit.into();
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
        metrics::describe();
        let id = NodeId::unique(&self.name)?;
        let admission = Admission::new(self.concurrency);
        let atoms = register(self.atoms, &self.residents, &admission)?;
        let links = link(self.conductors, self.give_up_after)?;
        let events = Events::new(id.clone());
        let keepings = keep(&id, &links, &events);
        for watch in self.watch {
            watch(events.subscribe());
        }
        let Self { rules, residents, connect_timeout, drain_timeout, .. } = self;
        let blocking_max = self.concurrency.min(Options::CONCURRENCY_MAX).saturating_mul(2);
        let (started_tx, started) = oneshot::channel();
        let serve = move |threads: Threads| async move {
            let (stage_tx, stage) = watch::channel(Stage::Running);
            let node = Node::new(id, admission, events, stage, threads, rules);
            let mut started_tx = started_tx;
            let opened = tokio::select! {
                opened = open_all(&node, &links, connect_timeout) => opened,
                () = started_tx.closed() => return,
            };
            if let Err(error) = opened {
                // An error says that the start was given up.
                drop(started_tx.send(Err(error)));
                return;
            }
            let (atomizer, mut supervisor, tried) =
                Supervisor::new(node, stage_tx, links, &atoms, keepings, drain_timeout);
            tokio::select! {
                () = tried => supervisor.start(residents),
                () = started_tx.closed() => {}
            }
            // When the start was given up, its handle is dropped here, and that ends the node.
            drop(started_tx.send(Ok(atomizer)));
            supervisor.run().await;
        };
        home::host(blocking_max, serve).map_err(|error| StartError::Thread(error.to_string()))?;
        started.await.unwrap_or_else(|_| Err(StartError::Thread("it ended at once".to_owned())))
    }
}

/// Has events gathered for each conductor that keeps them.
fn keep(node: &NodeId, links: &[Arc<Link>], events: &Events) -> Vec<Keeping> {
    let keeping = |link: &Arc<Link>| {
        let (log, conductor) = (link.event_log()?, link.id().clone());
        let gather = Arc::new(Gather::new(node.clone(), conductor.clone()));
        Some(Keeping { log, gather, conductor })
    };
    let keepings: Vec<_> = links.iter().filter_map(keeping).collect();
    events.keep(keepings.iter().map(|keeping| Arc::clone(&keeping.gather)).collect());
    keepings
}

async fn open_all(
    node: &Node,
    links: &[Arc<Link>],
    connect_timeout: Option<Duration>,
) -> Result<(), StartError> {
    let open = links.iter().map(|link| async {
        let opened = link.open_first(node, connect_timeout).await;
        opened.map_err(|source| StartError::Open { conductor: link.id().clone(), source })
    });
    try_join_all(open).await.map(drop)
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

fn register(
    atoms: Vec<NewAtom>,
    residents: &[resident::Registered],
    admission: &Admission,
) -> Result<Vec<Registered>, StartError> {
    let mut taken = HashSet::new();
    let ids =
        atoms.iter().map(|atom| &atom.id).chain(residents.iter().map(|resident| &resident.id));
    for id in ids {
        if !taken.insert(id.clone()) {
            return Err(StartError::DuplicateAtom(id.clone()));
        }
    }
    let register = |NewAtom { id, kind, options, atom }: NewAtom| {
        let keeps = kind == Kind::Singleton;
        let window = options.window(kind);
        let lane = admission.add_lane(options.concurrency_limit(kind), keeps);
        Registered { id, kind, atom, options, window, lane }
    };
    Ok(atoms.into_iter().map(register).collect())
}

/// Two conductors of one type are two conductors: the second gets a number.
fn link(
    conductors: Vec<Arc<dyn Conductor>>,
    give_up_after: Option<Duration>,
) -> Result<Vec<Arc<Link>>, StartError> {
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
        Ok(Arc::new(Link::new(id, conductor, give_up_after)))
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
    /// Two atoms, or an atom and a resident, have the same id.
    #[error("atom {0} is registered twice")]
    DuplicateAtom(AtomId),
    /// The node's name cannot be part of its id.
    #[error(transparent)]
    Name(#[from] InvalidId),
    /// The system gave the node no thread.
    #[error("failed to start a thread: {0}")]
    Thread(String),
    /// A conductor did not open.
    #[error("failed to open conductor {conductor}")]
    Open {
        /// Which.
        conductor: ConductorId,
        /// Why.
        source: OpenError,
    },
}
