//! Atoms that block their thread: what it costs, and whom.
//!
//! These need real threads and real time.

use std::{
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use atomizer::{CallError, EventKind, FailureKind, NodeError, prelude::*};

use crate::atoms::{Obedient, Order, until};

/// Blocks its thread, or sleeps as it should, until it is let go.
#[derive(Clone, Default)]
struct Blocks {
    options: Options,
    released: Arc<(Mutex<bool>, Condvar)>,
}

impl Blocks {
    fn new(options: Options) -> Self {
        Self { options, released: Arc::default() }
    }

    fn release(&self) {
        *self.released.0.lock().unwrap() = true;
        self.released.1.notify_all();
    }
}

/// However a test ends, its threads do.
struct Release(Blocks);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl Atom for Blocks {
    const ID: &'static str = "blocks";
    type Input = ();
    type Output = ();

    fn options(&self) -> Options {
        self.options.clone()
    }

    async fn process(&self, _cx: &Context, (): ()) -> Result<()> {
        let (released, changed) = &*self.released;
        let mut now = released.lock().unwrap();
        while !*now {
            now = changed.wait(now).unwrap();
        }
        drop(now);
        Ok(())
    }
}

async fn node(atom: &Blocks, stuck_max: usize) -> (Atomizer, Release) {
    let builder = Atomizer::builder().conductor(Memory::new()).atom(atom.clone()).atom(Obedient);
    let builder = builder.stuck_max(stuck_max).drain_timeout(Duration::from_secs(1));
    (builder.start().await.unwrap(), Release(atom.clone()))
}

const SHORT: Duration = Duration::from_millis(200);

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_time_limit_answers_and_frees_the_slot_even_if_the_code_never_yields() {
    let atom = Blocks::new(Options::default().concurrency(1).time_limit(SHORT));
    let (atomizer, release) = node(&atom, 100).await;
    let mut events = atomizer.events();
    for _ in 0..2 {
        // The second one needs the slot of the first, which never yields.
        let Err(CallError::Failed(failure)) = atomizer.call::<Blocks>(()).await else {
            panic!("it does not end by itself")
        };
        assert_eq!(failure.kind, FailureKind::TimedOut);
        assert_eq!(failure.message, "did not finish within 200ms");
    }
    let stuck = until(&mut events, |kind| matches!(kind, EventKind::Stuck { .. })).await;
    assert_eq!(stuck.atom().map(ToString::to_string).as_deref(), Some("blocks"));
    drop(release);
    atomizer.drain().await.unwrap();
}

/// One of two threads is blocked, by an atom that has no time limit: it is named, and the others go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_atom_that_blocks_its_thread_is_named_and_others_are_settled() {
    let atom = Blocks::new(Options::default());
    let (atomizer, release) = node(&atom, 100).await;
    let mut events = atomizer.events();
    let id = atomizer.send::<Blocks>(()).await.unwrap();
    let blocking = until(&mut events, |kind| matches!(kind, EventKind::Blocking { .. })).await;
    assert_eq!(blocking.electron(), Some(id));
    let began = Instant::now();
    for _ in 0..100 {
        atomizer.call::<Obedient>(Order::Echo("alive".into())).await.unwrap();
    }
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    drop(release);
    atomizer.drain().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocking_atoms_have_threads_of_their_own() {
    let atom = Blocks::new(Options::default().blocking().concurrency(8));
    let (atomizer, release) = node(&atom, 100).await;
    let mut events = atomizer.events();
    for _ in 0..8 {
        atomizer.send::<Blocks>(()).await.unwrap();
    }
    for _ in 0..8 {
        until(&mut events, |kind| matches!(kind, EventKind::Started { .. })).await;
    }
    // More of them than there are other threads: these are not taken.
    atomizer.call::<Obedient>(Order::Echo("alive".into())).await.unwrap();
    drop(release);
    atomizer.drain().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn too_many_runs_that_do_not_stop_end_the_node_with_a_report() {
    let atom = Blocks::new(Options::default().time_limit(SHORT));
    let (atomizer, release) = node(&atom, 2).await;
    let mut events = atomizer.events();
    for _ in 0..2 {
        atomizer.send::<Blocks>(()).await.unwrap();
    }
    let report = tokio::time::timeout(Duration::from_secs(30), atomizer.run()).await.unwrap();
    let Err(NodeError::Stuck { stuck: 2, stuck_max: 2, last, .. }) = report else {
        panic!("the node gives up: {report:?}")
    };
    assert!(last.starts_with("blocks "), "{last}");
    until(&mut events, |kind| matches!(kind, EventKind::Critical { .. })).await;
    drop(release);
}

/// Others of the same atom come and go, one at a time: that must not hide the one that does not stop.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_run_that_does_not_stop_is_told_of_while_others_come_and_go() {
    struct Mixed(Blocks);
    impl Atom for Mixed {
        const ID: &'static str = "mixed";
        type Input = bool;
        type Output = ();
        fn options(&self) -> Options {
            Options::default().time_limit(SHORT)
        }
        async fn process(&self, cx: &Context, blocks: bool) -> Result<()> {
            if blocks { self.0.process(cx, ()).await } else { Ok(()) }
        }
    }
    let blocks = Blocks::default();
    let release = Release(blocks.clone());
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Mixed(blocks)).stuck_max(100);
    let atomizer = builder.drain_timeout(Duration::from_secs(1)).start().await.unwrap();
    let mut events = atomizer.events();
    let stuck = atomizer.send::<Mixed>(true).await.unwrap();
    let mut told = false;
    let began = Instant::now();
    while !told {
        atomizer.call::<Mixed>(false).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(30), "it is not told of");
        while let Some(event) = futures::FutureExt::now_or_never(events.next()).flatten() {
            let Ok(event) = event else { continue };
            told |= matches!(event.kind, EventKind::Stuck { electron, .. } if electron == stuck);
        }
    }
    drop(release);
    atomizer.drain().await.unwrap();
}
