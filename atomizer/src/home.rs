//! The threads of a node.
//!
//! Atoms run on the runtime that the node was started in. Everything else (conductors, settlement, time
//! limits) has a thread of its own, so that an atom that blocks its thread holds up other atoms at the most,
//! but neither an answer nor a heartbeat. Blocking atoms have a pool of their own.
//!
//! On a single-threaded runtime all of it happens there, on one thread: what tests with a paused clock need.

use std::{io, thread, time::Duration};

use tokio::{
    runtime::{self, Handle, RuntimeFlavor},
    task::AbortHandle,
};

/// How long threads of blocking atoms may take to exit when their node has ended. Nobody waits for it.
const EXIT_MAX: Duration = Duration::from_secs(1);

/// Where the runs of a node take place.
#[derive(Clone, Debug)]
pub(crate) struct Threads {
    atoms: Handle,
    /// Whose blocking pool is for atoms.
    pool: Handle,
}

impl Threads {
    /// All on the runtime of the caller.
    pub(crate) fn here() -> Self {
        let atoms = Handle::current();
        Self { pool: atoms.clone(), atoms }
    }

    /// Runs an atom among the others.
    pub(crate) fn spawn(&self, run: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.atoms.spawn(run).abort_handle()
    }

    /// Runs an atom on a thread of its own.
    pub(crate) fn spawn_blocking(&self, run: impl Future<Output = ()> + Send + 'static) {
        let atoms = self.atoms.clone();
        // Its own end says that it ended.
        drop(self.pool.spawn_blocking(move || atoms.block_on(run)));
    }
}

/// Runs a node until it ends, apart from the atoms where that is possible. `blocking_max` is how many blocking
/// atoms may run at once.
///
/// # Errors
/// When the system gives no thread.
#[expect(
    clippy::disallowed_methods,
    reason = "the root of a node's tasks; all others are in its sets"
)]
pub(crate) fn host<N>(
    blocking_max: usize,
    node: impl FnOnce(Threads) -> N + Send + 'static,
) -> io::Result<()>
where
    N: Future<Output = ()> + Send + 'static,
{
    let atoms = Handle::current();
    if atoms.runtime_flavor() == RuntimeFlavor::CurrentThread {
        tokio::spawn(node(Threads::here()));
        return Ok(());
    }
    let home = runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("atomizer-blocking")
        .max_blocking_threads(blocking_max)
        .build()?;
    // It ends with the node, which ends when its last handle is dropped.
    thread::Builder::new().name("atomizer".to_owned()).spawn(move || {
        let threads = Threads { atoms, pool: home.handle().clone() };
        home.block_on(node(threads));
        // Blocking atoms that do not stop are not waited for. But threads that do are joined: to detach one while it exits
        // is a race in glibc (its bug 19951), and ended a process with SIGSEGV.
        home.shutdown_timeout(EXIT_MAX);
    })?;
    Ok(())
}
