//! Children that run inline: where many parents wait already, in their parent's slot and past the queue.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use atomizer::{AtomId, Builder, CallError, Electron, EventKind, FailureKind, Payload, prelude::*};
use futures::{StreamExt, future::join_all};

use crate::atoms::{Fibonacci, Gated, Obedient, Order, started, until, watched};

fn one_slot(waiting_max: usize) -> Builder {
    Atomizer::builder().conductor(Memory::new()).concurrency(1).waiting_max(waiting_max)
}

/// Passes orders on, to be obeyed one after the other, and tells what came of each.
struct Boss;

impl Atom for Boss {
    const ID: &'static str = "boss";
    const KIND: Kind = Kind::Spawner;
    type Input = (Vec<Order>, u32);
    type Output = Vec<String>;

    async fn process(&self, cx: &Context, (orders, retries): Self::Input) -> Result<Vec<String>> {
        let policy = Policy::retry(retries).backoff(Backoff::none());
        let mut came: Vec<_> =
            cx.fan_out::<Obedient>(orders).policy(policy).stream().collect().await;
        came.sort_by_key(|(index, _)| *index);
        Ok(came.into_iter().map(|(_, result)| told(result)).collect())
    }
}

fn told(result: Result<String, CallError>) -> String {
    match result {
        Ok(text) => text,
        Err(CallError::Failed(failure)) => format!("{:?} {}", failure.kind, failure.attempt),
        Err(other) => other.to_string(),
    }
}

/// What was told of each electron of an atom: how often it was received, begun, and completed or failed.
async fn books(atomizer: Atomizer, mut events: atomizer::EventStream, atom: &str) -> [usize; 3] {
    atomizer.drain().await.unwrap();
    drop(atomizer);
    let mut counts = [0; 3];
    while let Some(event) = events.next().await {
        match event.expect("the test keeps up").kind {
            EventKind::Received { atom: of, .. } if of.as_str() == atom => counts[0] += 1,
            EventKind::Started { atom: of, .. } if of.as_str() == atom => counts[1] += 1,
            EventKind::Completed { atom: of, .. } | EventKind::Failed { atom: of, .. }
                if of.as_str() == atom =>
            {
                counts[2] += 1;
            }
            EventKind::Stopped => return counts,
            _ => {}
        }
    }
    counts
}

#[tokio::test]
async fn an_atom_that_spawns_itself_finishes_on_one_slot_however_few_parents_may_wait() {
    // And how many of the 465 electrons may go through the queue.
    for (waiting_max, queued) in [(0, 1), (1, 3), (8, 40), (10_000, 465)] {
        let (atomizer, events) = watched(one_slot(waiting_max).atom(Fibonacci)).await;
        assert_eq!(atomizer.call::<Fibonacci>(12).await.unwrap(), 144, "{waiting_max}");
        let [received, begun, ended] = books(atomizer, events, Fibonacci::ID).await;
        assert_eq!((begun, ended), (465, 465), "{waiting_max}: each is told of");
        assert!(
            (1..=queued).contains(&received),
            "{waiting_max}: {received} went through the queue"
        );
    }
}

#[tokio::test]
async fn the_fourteenth_fibonacci_number_is_found_on_one_slot() {
    let atomizer = one_slot(Builder::WAITING_MAX_DEFAULT).atom(Fibonacci).start().await.unwrap();
    assert_eq!(atomizer.call::<Fibonacci>(14).await.unwrap(), 377);
}

/// Asks itself so many times, one within the other. The last one may never end.
struct Chain;

impl Atom for Chain {
    const ID: &'static str = "chain";
    const KIND: Kind = Kind::Spawner;
    type Input = (u64, bool);
    type Output = u64;

    async fn process(&self, cx: &Context, (links, ends): (u64, bool)) -> Result<u64> {
        match links {
            0 if ends => Ok(0),
            0 => std::future::pending().await,
            links => Ok(cx.call::<Self>((links - 1, ends)).await? + 1),
        }
    }
}

#[tokio::test]
async fn a_chain_of_parents_may_be_long() {
    for waiting_max in [0, 100] {
        let atomizer = one_slot(waiting_max).atom(Chain).start().await.unwrap();
        assert_eq!(atomizer.call::<Chain>((3000, true)).await.unwrap(), 3000);
    }
}

#[tokio::test]
async fn a_chain_that_is_not_waited_for_ends_link_by_link() {
    let (atomizer, events) = watched(one_slot(0).atom(Chain)).await;
    let call = atomizer.call::<Chain>((300, false)).time_limit(Duration::from_millis(100)).await;
    assert!(
        matches!(call, Err(CallError::Failed(failure)) if failure.kind == FailureKind::TimedOut)
    );
    let begun = tokio::time::Instant::now();
    let [received, _, ended] = books(atomizer, events, Chain::ID).await;
    assert!(begun.elapsed() < Builder::DRAIN_TIMEOUT_DEFAULT, "none ran on");
    assert_eq!((received, ended), (1, 1), "the others were given up");
}

#[tokio::test]
async fn a_child_that_runs_inline_ends_as_any_other() {
    let echo = |text: &str| Order::Echo(text.to_owned());
    let cases = [
        ("an output", vec![echo("a"), echo("b")], 0, vec!["a", "b"]),
        ("an error", vec![Order::Fail("no".into()), echo("b")], 0, vec!["Error 1", "b"]),
        ("its policy", vec![Order::Fail("no".into()), echo("b")], 2, vec!["Error 3", "b"]),
        ("a panic", vec![Order::Panic("no".into()), echo("b")], 0, vec!["Panic 1", "b"]),
    ];
    let atomizer = one_slot(0).atom(Boss).atom(Obedient).start().await.unwrap();
    for (what, orders, retries, expected) in cases {
        let came = atomizer.call::<Boss>((orders, retries)).await.unwrap();
        assert_eq!(came, expected, "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_time_limit_of_a_child_that_runs_inline_holds() {
    struct Hurried;
    impl Atom for Hurried {
        const ID: &'static str = "hurried";
        type Input = u64;
        type Output = u64;
        fn options(&self) -> Options {
            Options::default().time_limit(Duration::from_secs(3))
        }
        async fn process(&self, _cx: &Context, seconds: u64) -> Result<u64> {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            Ok(seconds)
        }
    }
    struct Patient;
    impl Atom for Patient {
        const ID: &'static str = "patient";
        type Input = ();
        type Output = Vec<String>;
        async fn process(&self, cx: &Context, (): ()) -> Result<Vec<String>> {
            let children = cx.fan_out::<Hurried>([1, 3600, 2]).stream();
            let told = children.map(|(index, result)| match result {
                Err(CallError::Failed(failure)) => format!("{index} {:?}", failure.kind),
                other => format!("{index} {other:?}"),
            });
            Ok(told.collect().await)
        }
    }
    let atomizer = one_slot(0).atom(Patient).atom(Hurried).start().await.unwrap();
    let told = atomizer.call::<Patient>(()).await.unwrap();
    assert_eq!(told, ["0 Ok(1)", "1 TimedOut", "2 Ok(2)"]);
}

/// Asks an atom by its id.
struct Asker;

impl Atom for Asker {
    const ID: &'static str = "asker";
    type Input = String;
    type Output = u64;

    async fn process(&self, cx: &Context, atom: String) -> Result<u64> {
        let mut group = cx.group();
        let member = group.call_raw(AtomId::try_new(atom)?, Payload::json("1"));
        let answer = group.join().await?.take(member).expect("it has succeeded");
        Ok(serde_json::from_slice(&answer.body)?)
    }
}

struct Alone;

impl Atom for Alone {
    const ID: &'static str = "alone";
    const KIND: Kind = Kind::Singleton;
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
        Ok(input)
    }
}

#[tokio::test]
async fn a_singleton_is_never_run_inline() {
    let (atomizer, events) = watched(one_slot(0).atom(Asker).atom(Alone)).await;
    assert_eq!(atomizer.call::<Asker>(Alone::ID.into()).await.unwrap(), 1);
    assert_eq!(books(atomizer, events, Alone::ID).await, [1, 1, 1], "it went through the queue");
}

#[tokio::test]
async fn a_child_of_an_atom_that_is_elsewhere_goes_through_the_queue() {
    let queue = Memory::new();
    let here = Atomizer::builder().conductor(queue.clone()).concurrency(1).waiting_max(0);
    let here = here.atom(Asker).start().await.unwrap();
    let gated = Gated::new(Options::default());
    gated.open(1);
    let elsewhere = Atomizer::builder().conductor(queue).atom(gated);
    let (elsewhere, events) = watched(elsewhere).await;
    assert_eq!(here.call::<Asker>(Gated::ID.into()).await.unwrap(), 1);
    here.drain().await.unwrap();
    assert_eq!(books(elsewhere, events, Gated::ID).await, [1, 1, 1]);
}

#[tokio::test]
async fn a_child_of_an_atom_whose_limit_is_reached_waits_its_turn() {
    let gated = Gated::new(Options::default().concurrency(1));
    let builder = Atomizer::builder().conductor(Memory::new()).concurrency(9).waiting_max(0);
    let atomizer = builder.atom(Asker).atom(gated.clone()).start().await.unwrap();
    let asked = std::iter::repeat_with(|| atomizer.call::<Asker>(Gated::ID.into()).into_future());
    let all = join_all(asked.take(20));
    let opened = async {
        for _ in 0..20 {
            gated.open(1);
            tokio::task::yield_now().await;
        }
    };
    let (came, ()) = tokio::join!(all, opened);
    assert!(came.into_iter().all(|came| came.unwrap() == 1));
    assert_eq!(gated.running_most.load(Ordering::SeqCst), 1);
}

/// Asks, and does not wait for the answer for long.
struct Fickle;

impl Atom for Fickle {
    const ID: &'static str = "fickle";
    type Input = bool;
    type Output = String;

    async fn process(&self, cx: &Context, drops: bool) -> Result<String> {
        let waiting = cx.fan_out::<Obedient>([Order::Sleep(Duration::from_secs(3600))]);
        let waiting = waiting.fold(0, |sum, text| sum + text.len());
        if drops {
            assert!(tokio::time::timeout(Duration::from_secs(1), waiting).await.is_err());
        } else {
            waiting.await?;
        }
        // Its permit is its own again.
        Ok(cx.call::<Obedient>(Order::Echo("free".into())).await?)
    }
}

#[tokio::test(start_paused = true)]
async fn a_fan_out_that_is_dropped_stops_the_child_that_runs_inline() {
    let (atomizer, mut events) = watched(one_slot(0).atom(Fickle).atom(Obedient)).await;
    assert_eq!(atomizer.call::<Fickle>(true).await.unwrap(), "free");
    let given_up = |kind: &EventKind| matches!(kind, EventKind::NotSettled { atom, .. } if atom.as_str() == Obedient::ID);
    until(&mut events, given_up).await;
    // What still ran would hold up the end.
    let begun = tokio::time::Instant::now();
    atomizer.drain().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test(start_paused = true)]
async fn a_parent_that_is_given_up_takes_with_it_what_runs_inline() {
    let (atomizer, mut events) = watched(one_slot(0).atom(Fickle).atom(Obedient)).await;
    let call = atomizer.call::<Fickle>(false).time_limit(Duration::from_secs(1)).await;
    assert!(
        matches!(call, Err(CallError::Failed(failure)) if failure.kind == FailureKind::TimedOut)
    );
    let given_up = |kind: &EventKind| matches!(kind, EventKind::NotSettled { atom, .. } if atom.as_str() == Obedient::ID);
    until(&mut events, given_up).await;
    assert_eq!(atomizer.call::<Fickle>(true).await.unwrap(), "free", "the slot is free");
}

#[tokio::test]
async fn a_call_runs_inline_too_and_its_second_attempt_does_not_need_the_slot() {
    struct Flaky(AtomicUsize);
    impl Atom for Flaky {
        const ID: &'static str = "flaky";
        type Input = ();
        type Output = u32;
        fn options(&self) -> Options {
            Options::default().policy(Policy::retry(1).backoff(Backoff::none()))
        }
        async fn process(&self, cx: &Context, (): ()) -> Result<u32> {
            if self.0.fetch_add(1, Ordering::SeqCst) == 0 {
                return Err(AtomError::msg("the first time"));
            }
            Ok(cx.attempt())
        }
    }
    struct Caller;
    impl Atom for Caller {
        const ID: &'static str = "caller";
        type Input = ();
        type Output = (u32, u32);
        async fn process(&self, cx: &Context, (): ()) -> Result<(u32, u32)> {
            Ok((cx.call::<Flaky>(()).await?, cx.call::<Flaky>(()).await?))
        }
    }
    let builder = one_slot(0).atom(Caller).atom(Flaky(AtomicUsize::new(0)));
    let (atomizer, events) = watched(builder).await;
    assert_eq!(atomizer.call::<Caller>(()).await.unwrap(), (2, 1));
    assert_eq!(books(atomizer, events, Flaky::ID).await, [0, 3, 2]);
}

/// A node on which an atom asks `Gated` inline.
async fn asks_gated() -> (Atomizer, atomizer::EventStream, Gated) {
    let gated = Gated::new(Options::default());
    let builder = Atomizer::builder().conductor(Memory::new()).concurrency(2).waiting_max(0);
    let (atomizer, events) = watched(builder.atom(Asker).atom(gated.clone())).await;
    (atomizer, events, gated)
}

fn started_gated(kind: &EventKind) -> bool {
    started(kind) && matches!(kind, EventKind::Started { atom, .. } if atom.as_str() == Gated::ID)
}

fn adopted(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Adopted { .. })
}

fn copy_of(id: atomizer::ElectronId) -> Electron {
    Electron::with_id(id, AtomId::of::<Gated>(), Payload::json("1"))
}

#[tokio::test]
async fn a_copy_from_the_queue_is_adopted_by_the_run_that_is_inline() {
    let (atomizer, mut events, gated) = asks_gated().await;
    let call = tokio::task::spawn(atomizer.call::<Asker>(Gated::ID.into()).into_future());
    let EventKind::Started { electron, .. } = until(&mut events, started_gated).await.kind else {
        unreachable!("it fits")
    };
    atomizer.send_electron(copy_of(electron)).await.unwrap();
    until(&mut events, adopted).await;
    gated.open(1);
    assert_eq!(call.await.unwrap().unwrap(), 1);
    assert_eq!(gated.running_most.load(Ordering::SeqCst), 1);
    assert_eq!(books(atomizer, events, Gated::ID).await, [0, 0, 2], "one run answered for both");
}

#[tokio::test]
async fn a_child_that_runs_already_is_not_begun_inline() {
    let (atomizer, mut events, gated) = asks_gated().await;
    let call = atomizer.call::<Asker>(Gated::ID.into());
    // As an earlier life of its parent would have asked it.
    let child = call.electron().unwrap().child(0);
    atomizer.send_electron(copy_of(child)).await.unwrap();
    until(&mut events, started_gated).await;
    let call = tokio::task::spawn(call.into_future());
    until(&mut events, adopted).await;
    gated.open(1);
    assert_eq!(call.await.unwrap().unwrap(), 1);
    assert_eq!(gated.running_most.load(Ordering::SeqCst), 1);
}

/// What a call holds goes with it when its time is over, before its parent queues for a permit: or the parent waits for
/// the one that its child has given back to it.
#[tokio::test]
async fn a_call_that_is_over_keeps_nothing_of_the_child_that_runs_inline() {
    const WANTED_FOR: Duration = Duration::from_secs(1);
    struct Hasty(Gated);
    impl Atom for Hasty {
        const ID: &'static str = "hasty";
        type Input = ();
        type Output = ();
        async fn process(&self, cx: &Context, (): ()) -> Result<()> {
            let call = cx.call::<Gated>(1).deadline(WANTED_FOR).into_future();
            // The child ends in the same moment in which nobody wants it any more: the call is polled first.
            let end = async {
                tokio::time::sleep(WANTED_FOR).await;
                self.0.open(1);
            };
            let (called, ()) = futures::future::join(call, end).await;
            assert!(matches!(called, Err(CallError::Deadline { .. })));
            Ok(())
        }
    }
    let gated = Gated::new(Options::default());
    let builder = one_slot(0).atom(Hasty(gated.clone())).atom(gated);
    let (atomizer, mut events) = watched(builder).await;
    let call = tokio::task::spawn(atomizer.call::<Hasty>(()).into_future());
    let EventKind::Started { electron, .. } = until(&mut events, started_gated).await.kind else {
        unreachable!("it fits")
    };
    // Adopted, it is wanted for longer than its parent wants it.
    atomizer.send_electron(copy_of(electron)).await.unwrap();
    until(&mut events, adopted).await;
    let ended = tokio::time::timeout(Duration::from_secs(20), call).await;
    ended.expect("its parent ends").unwrap().unwrap();
}
