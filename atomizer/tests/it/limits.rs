//! Permits: per atom, per node, and given back while waiting.

use std::{sync::atomic::Ordering, time::Duration};

use atomizer::prelude::*;
use tokio::task::JoinSet;

use crate::atoms::{Fibonacci, Gated, Obedient, Order, started, until};

/// Sends more than may run, lets all through one by one, and returns how many ran at once at the most.
async fn most_at_once(options: Options, node_limit: usize) -> usize {
    const COUNT: u64 = 20;
    let gated = Gated::new(options);
    let builder = Atomizer::builder().conductor(Memory::new()).atom(gated.clone());
    let atomizer = builder.concurrency(node_limit).start().await.unwrap();
    let mut calls = JoinSet::new();
    for number in 0..COUNT {
        calls.spawn(atomizer.call::<Gated>(number).into_future());
    }
    let mut answered = 0;
    while answered < COUNT {
        gated.open(1);
        calls.join_next().await.unwrap().unwrap().unwrap();
        answered += 1;
    }
    gated.running_most.load(Ordering::SeqCst)
}

#[tokio::test]
async fn the_limit_of_an_atom_holds() {
    assert_eq!(most_at_once(Options::default().concurrency(3), 100).await, 3);
}

#[tokio::test]
async fn the_limit_of_a_node_holds() {
    assert_eq!(most_at_once(Options::default().concurrency(10), 2).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_blocking_atom_runs_on_threads_of_its_own() {
    struct Apart;
    impl Atom for Apart {
        const ID: &'static str = "apart";
        type Input = ();
        type Output = bool;
        fn options(&self) -> Options {
            Options::default().blocking()
        }
        async fn process(&self, _cx: &Context, (): ()) -> Result<bool> {
            // Holds its thread until a task of the runtime ran: on the only worker this would wait in vain.
            let (tx, rx) = std::sync::mpsc::channel();
            let runtime = tokio::runtime::Handle::current();
            runtime.spawn(async move { tx.send(()) });
            Ok(rx.recv_timeout(Duration::from_secs(30)).is_ok())
        }
    }
    let atomizer = Atomizer::builder().conductor(Memory::new()).atom(Apart).start().await.unwrap();
    assert!(atomizer.call::<Apart>(()).await.unwrap(), "the runtime's worker was free meanwhile");
}

#[tokio::test]
async fn one_busy_atom_does_not_hold_up_another() {
    let gated = Gated::new(Options::default().concurrency(1));
    let builder = Atomizer::builder().conductor(Memory::new()).atom(gated.clone()).atom(Obedient);
    let atomizer = builder.start().await.unwrap();
    let mut events = atomizer.events();
    let mut calls = JoinSet::new();
    for number in 0..50 {
        calls.spawn(atomizer.call::<Gated>(number).into_future());
    }
    until(&mut events, started).await;
    let other = atomizer.call::<Obedient>(Order::Echo("through".into())).await.unwrap();
    assert_eq!(other, "through");
    gated.open(50);
    while let Some(answer) = calls.join_next().await {
        answer.unwrap().unwrap();
    }
}

#[tokio::test]
async fn parents_and_children_of_one_atom_finish_on_one_slot() {
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Fibonacci).concurrency(1);
    let atomizer = builder.start().await.unwrap();
    assert_eq!(atomizer.call::<Fibonacci>(10).await.unwrap(), 55);
}

#[tokio::test]
async fn two_spawners_at_once_finish_on_one_slot() {
    struct Sum;
    impl Atom for Sum {
        const ID: &'static str = "sum";
        const KIND: Kind = Kind::Spawner;
        type Input = u64;
        type Output = usize;
        async fn process(&self, cx: &Context, count: u64) -> Result<usize> {
            let orders = (0..count).map(|number| Order::Echo(number.to_string()));
            Ok(cx.fan_out::<Obedient>(orders).fold(0, |sum, text| sum + text.len()).await?)
        }
    }
    let builder =
        Atomizer::builder().conductor(Memory::new()).atom(Sum).atom(Obedient).concurrency(1);
    let atomizer = builder.start().await.unwrap();
    let (one, other) = tokio::join!(
        atomizer.call::<Sum>(100).into_future(),
        atomizer.call::<Sum>(1000).into_future()
    );
    assert_eq!((one.unwrap(), other.unwrap()), (190, 2890));
}
