//! How a node ends: drain, cancel, abort.

use std::time::Duration;

use atomizer::{CallError, EventKind, prelude::*};

use crate::atoms::{Gated, Obedient, Order, started, until};

/// A node that lets one electron through.
async fn willing(memory: Memory) -> Atomizer {
    let gated = Gated::new(Options::default());
    gated.open(1);
    Atomizer::builder().conductor(memory).atom(gated).start().await.unwrap()
}

#[tokio::test]
async fn draining_finishes_what_runs_and_gives_back_the_rest() {
    let memory = Memory::new();
    let gated = Gated::new(Options::default().concurrency(1));
    let builder = Atomizer::builder().conductor(memory.clone()).atom(gated.clone());
    let leaving = builder.start().await.unwrap();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let mut events = leaving.events();
    let first = tokio::task::spawn(asker.call::<Gated>(1).into_future());
    until(&mut events, started).await;
    // In hand of the leaving node, and not begun.
    let second = tokio::task::spawn(asker.call::<Gated>(2).into_future());
    until(&mut events, |kind| matches!(kind, EventKind::Received { .. })).await;
    let drain = async {
        until(&mut events, |kind| matches!(kind, EventKind::Draining)).await;
        gated.open(1);
    };
    let (drained, ()) = tokio::join!(leaving.drain(), drain);
    drained.unwrap();
    assert_eq!(first.await.unwrap().unwrap(), 1, "it was finished");
    assert!(!second.is_finished());
    let other = willing(memory).await;
    assert_eq!(second.await.unwrap().unwrap(), 2, "another node ran it");
    other.drain().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_heeds_the_cancellation_is_answered() {
    struct Polite;
    impl Atom for Polite {
        const ID: &'static str = "polite";
        type Input = ();
        type Output = String;
        async fn process(&self, cx: &Context, (): ()) -> Result<String> {
            cx.cancelled().await;
            Ok("as you wish".into())
        }
    }
    let memory = Memory::new();
    let builder = Atomizer::builder().conductor(memory.clone()).atom(Polite);
    let atomizer = builder.drain_timeout(Duration::from_secs(5)).start().await.unwrap();
    let asker = Atomizer::builder().conductor(memory).start().await.unwrap();
    let mut events = atomizer.events();
    let call = tokio::task::spawn(asker.call::<Polite>(()).into_future());
    until(&mut events, started).await;
    atomizer.drain().await.unwrap();
    assert_eq!(call.await.unwrap().unwrap(), "as you wish");
}

#[tokio::test(start_paused = true)]
async fn what_does_not_stop_is_aborted_and_runs_elsewhere() {
    let memory = Memory::new();
    let builder =
        Atomizer::builder().conductor(memory.clone()).atom(Gated::new(Options::default()));
    let stuck = builder.drain_timeout(Duration::from_secs(5)).start().await.unwrap();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let mut events = stuck.events();
    let call = tokio::task::spawn(asker.call::<Gated>(7).into_future());
    until(&mut events, started).await;
    stuck.drain().await.unwrap();
    for stage in ["draining", "cancelling", "aborting", "stopped"] {
        until(&mut events, |kind| kind.to_string() == stage).await;
    }
    let other = willing(memory).await;
    assert_eq!(call.await.unwrap().unwrap(), 7);
    other.drain().await.unwrap();
}

#[tokio::test]
async fn a_node_whose_last_handle_is_dropped_gives_everything_back() {
    let memory = Memory::new();
    let builder =
        Atomizer::builder().conductor(memory.clone()).atom(Gated::new(Options::default()));
    let dropped = builder.start().await.unwrap();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let mut events = dropped.events();
    let call = tokio::task::spawn(asker.call::<Gated>(7).into_future());
    until(&mut events, started).await;
    drop(dropped);
    let other = willing(memory).await;
    assert_eq!(call.await.unwrap().unwrap(), 7);
    other.drain().await.unwrap();
}

#[tokio::test]
async fn a_drained_node_can_be_drained_again() {
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Obedient);
    let atomizer = builder.start().await.unwrap();
    atomizer.drain().await.unwrap();
    atomizer.drain().await.unwrap();
    let late = atomizer.call::<Obedient>(Order::Echo("too late".into())).await;
    assert!(matches!(late, Err(CallError::Stopped)), "{late:?}");
}
