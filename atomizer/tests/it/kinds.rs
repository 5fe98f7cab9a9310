//! What a kind changes: singletons, residents.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use atomizer::{CallError, EventKind, FailureKind, Resident, prelude::*};
use tokio::sync::Semaphore;

use crate::atoms::{Obedient, Order, started, until};

/// Counts how many run at once, for as long as they truly run: what it spawns counts too.
#[derive(Clone)]
struct Single {
    running: Arc<AtomicUsize>,
    running_most: Arc<AtomicUsize>,
    time_limit: Option<Duration>,
}

impl Single {
    fn new(time_limit: Option<Duration>) -> Self {
        Self { running: Arc::default(), running_most: Arc::default(), time_limit }
    }
}

/// Counts its end, however that comes about.
struct Leave(Arc<AtomicUsize>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Atom for Single {
    const ID: &'static str = "single";
    const KIND: Kind = Kind::Singleton;
    /// For how long it blocks its thread, in milliseconds.
    type Input = u64;
    type Output = ();

    fn options(&self) -> Options {
        // A singleton is one, whatever else is said.
        let options = Options::default().concurrency(100).blocking();
        self.time_limit.map_or(options.clone(), |limit| options.time_limit(limit))
    }

    async fn process(&self, _cx: &Context, blocks_ms: u64) -> Result<()> {
        let now = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        let _leave = Leave(Arc::clone(&self.running));
        self.running_most.fetch_max(now, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(blocks_ms));
        tokio::task::yield_now().await;
        Ok(())
    }
}

/// Two conductors, and a time limit that fires while the code does not yield: never two at once.
#[tokio::test(flavor = "multi_thread")]
async fn two_instances_of_a_singleton_never_overlap() {
    let (one, other) = (Memory::new(), Memory::new());
    let atom = Single::new(Some(Duration::from_millis(20)));
    let builder = Atomizer::builder().conductor(one.clone()).conductor(other.clone());
    let serving = builder.stuck_max(1000).atom(atom.clone()).start().await.unwrap();
    let mut calls = Vec::new();
    for conductor in [one, other] {
        let asker = Atomizer::builder().conductor(conductor).start().await.unwrap();
        for number in 0..20 {
            // Every fourth goes on well past its limit.
            let blocks_ms = if number % 4 == 0 { 80 } else { 1 };
            let asker = asker.clone();
            calls.push(tokio::spawn(async move { asker.call::<Single>(blocks_ms).await }));
        }
    }
    let (mut done, mut timed_out) = (0, 0);
    for call in calls {
        match call.await.unwrap() {
            Ok(()) => done += 1,
            Err(CallError::Failed(failure)) => {
                assert_eq!(failure.kind, FailureKind::TimedOut);
                timed_out += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(timed_out >= 10 && done + timed_out == 40, "{done} done, {timed_out} timed out");
    assert_eq!(atom.running_most.load(Ordering::SeqCst), 1);
    serving.drain().await.unwrap();
}

/// Asks itself, or an atom beside it.
struct Asker;

impl Atom for Asker {
    const ID: &'static str = "asker";
    const KIND: Kind = Kind::Singleton;
    type Input = bool;
    type Output = String;

    async fn process(&self, cx: &Context, itself: bool) -> Result<String> {
        if itself {
            return Ok(cx.call::<Self>(false).await?);
        }
        Ok(cx.call::<Obedient>(Order::Echo("asked".into())).await?)
    }
}

#[tokio::test]
async fn a_singleton_that_waits_gives_back_the_nodes_permit() {
    let builder = Atomizer::builder().conductor(Memory::new()).concurrency(1);
    let atomizer = builder.atom(Asker).atom(Obedient).start().await.unwrap();
    assert_eq!(atomizer.call::<Asker>(false).await.unwrap(), "asked");
}

#[tokio::test]
async fn a_singleton_that_asks_itself_is_told_at_once() {
    let builder = Atomizer::builder().conductor(Memory::new());
    let atomizer = builder.atom(Asker).atom(Obedient).start().await.unwrap();
    let Err(CallError::Failed(failure)) = atomizer.call::<Asker>(true).await else {
        panic!("it would wait for itself")
    };
    assert!(failure.message.contains("asker is a singleton and cannot ask itself"), "{failure}");
}

/// What a [`Watcher`] does with each start.
#[derive(Clone)]
struct Script {
    starts: Arc<AtomicUsize>,
    instances: Arc<AtomicUsize>,
    done: Arc<Semaphore>,
}

struct Watcher(Script);

impl Resident for Watcher {
    const ID: &'static str = "watcher";

    async fn run(&self, cx: &Context) -> Result<()> {
        let Script { starts, done, .. } = &self.0;
        let start = starts.fetch_add(1, Ordering::SeqCst) + 1;
        assert_eq!(cx.attempt() as usize, start);
        match start {
            1 => Err(AtomError::msg("not yet")),
            2 => panic!("at the second start"),
            _ => {
                assert_eq!(cx.call::<Obedient>(Order::Echo("hello".into())).await?, "hello");
                tokio::select! {
                    () = cx.cancelled() => {}
                    _ = done.acquire() => {}
                }
                Ok(())
            }
        }
    }
}

fn script() -> Script {
    Script { starts: Arc::default(), instances: Arc::default(), done: Arc::new(Semaphore::new(0)) }
}

async fn watched(script: &Script) -> Atomizer {
    let script = script.clone();
    let make = move || {
        script.instances.fetch_add(1, Ordering::SeqCst);
        Watcher(script.clone())
    };
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Obedient);
    builder.resident(make).start().await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_resident_runs_from_start_to_drain_and_starts_again_when_it_fails() {
    let script = script();
    let atomizer = watched(&script).await;
    let mut events = atomizer.events();
    let completed = |kind: &EventKind| matches!(kind, EventKind::Completed { .. });
    until(&mut events, completed).await;
    assert_eq!(script.starts.load(Ordering::SeqCst), 3);
    assert_eq!(script.instances.load(Ordering::SeqCst), 3, "each start has a value of its own");
    atomizer.drain().await.unwrap();
    let ended = |kind: &EventKind| matches!(kind, EventKind::ResidentEnded { attempt: 3, .. });
    until(&mut events, ended).await;
}

#[tokio::test(start_paused = true)]
async fn a_resident_that_is_done_is_not_started_again() {
    let script = script();
    let atomizer = watched(&script).await;
    let mut events = atomizer.events();
    script.done.add_permits(1);
    until(&mut events, |kind| matches!(kind, EventKind::ResidentEnded { .. })).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(script.starts.load(Ordering::SeqCst), 3);
    // The node goes on without it.
    atomizer.call::<Obedient>(Order::Echo(String::new())).await.unwrap();
    atomizer.drain().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_resident_that_does_not_end_is_aborted_with_the_rest() {
    struct Stubborn;
    impl Resident for Stubborn {
        const ID: &'static str = "stubborn";
        async fn run(&self, _cx: &Context) -> Result<()> {
            std::future::pending().await
        }
    }
    let builder = Atomizer::builder().conductor(Memory::new()).resident(|| Stubborn);
    let atomizer = builder.drain_timeout(Duration::from_secs(7)).start().await.unwrap();
    let began = tokio::time::Instant::now();
    atomizer.drain().await.unwrap();
    assert_eq!(began.elapsed().as_secs(), 8, "the time to drain, and the time to heed");
}

#[tokio::test]
async fn a_resident_has_an_id_of_its_own() {
    struct Namesake;
    impl Resident for Namesake {
        const ID: &'static str = Obedient::ID;
        async fn run(&self, _cx: &Context) -> Result<()> {
            Ok(())
        }
    }
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Obedient);
    let error = builder.resident(|| Namesake).start().await.unwrap_err();
    assert_eq!(error.to_string(), "atom obedient is registered twice");
}

#[tokio::test(start_paused = true)]
async fn a_spawner_and_an_atomic_atom_run_at_once_up_to_their_limit() {
    use crate::atoms::Gated;
    let gated = Gated::new(Options::default().concurrency(3));
    let builder = Atomizer::builder().conductor(Memory::new()).atom(gated.clone());
    let atomizer = builder.start().await.unwrap();
    let mut events = atomizer.events();
    for number in 0..5 {
        atomizer.send::<Gated>(number).await.unwrap();
    }
    for _ in 0..3 {
        until(&mut events, started).await;
    }
    gated.open(5);
    for _ in 0..5 {
        until(&mut events, |kind| matches!(kind, EventKind::Completed { .. })).await;
    }
    assert_eq!(gated.running_most.load(Ordering::SeqCst), 3);
}
