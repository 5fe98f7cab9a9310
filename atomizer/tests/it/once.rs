//! At most once, for atoms that ask for it.

use std::{sync::atomic::Ordering, time::Duration};

use atomizer::{AtomId, CallError, Electron, EventKind, Payload, prelude::*};

use crate::atoms::{Gated, started, until, watched};

fn at_most_once() -> Gated {
    Gated::new(Options::default().at_most_once())
}

async fn node(memory: &Memory, atom: &Gated) -> Atomizer {
    Atomizer::builder().conductor(memory.clone()).atom(atom.clone()).start().await.unwrap()
}

/// The session is lost while it runs: nothing comes again, and the answer goes through the next session.
#[tokio::test]
async fn what_runs_at_most_once_does_not_come_again_and_is_answered() {
    let memory = Memory::new();
    let (first, second) = (at_most_once(), at_most_once());
    let running = node(&memory, &first).await;
    let mut events = running.events();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let call = tokio::spawn(asker.call::<Gated>(7).into_future());
    until(&mut events, started).await;
    let other = node(&memory, &second).await;
    memory.cut();
    let opened = |kind: &EventKind| matches!(kind, EventKind::Subscribed { atom: Some(_) });
    until(&mut events, opened).await;
    // Were it in its queue again, it would come before this one.
    second.open(1);
    first.open(2);
    asker.call::<Gated>(8).await.unwrap();
    assert_eq!(call.await.unwrap().unwrap(), 7);
    let all =
        first.running_most.load(Ordering::SeqCst) + second.running_most.load(Ordering::SeqCst);
    assert!(all <= 2, "each ran once: {all}");
    other.drain().await.unwrap();
    running.drain().await.unwrap();
}

#[tokio::test]
async fn what_runs_at_most_once_has_left_its_queue_when_it_begins() {
    let memory = Memory::new();
    let atom = at_most_once();
    let builder = Atomizer::builder().conductor(memory.clone()).atom(atom);
    let running = builder.drain_timeout(Duration::ZERO).start().await.unwrap();
    let mut events = running.events();
    running.send::<Gated>(7).await.unwrap();
    until(&mut events, started).await;
    // It is aborted in the middle: what ran does not come again.
    running.drain().await.unwrap();
    let heir = at_most_once();
    heir.open(1);
    let second = node(&memory, &heir).await;
    let mut events = second.events();
    let next = second.send::<Gated>(8).await.unwrap();
    // The gate lets one through: were the first there, it would be that one.
    until(
        &mut events,
        |kind| matches!(kind, EventKind::Completed { electron, .. } if *electron == next),
    )
    .await;
    second.drain().await.unwrap();
}

/// That an attempt failed is known: what the policy allows then is no second run of the same attempt.
#[tokio::test(start_paused = true)]
async fn what_runs_at_most_once_may_be_tried_again_when_it_failed() {
    struct Once;
    impl Atom for Once {
        const ID: &'static str = "once";
        type Input = ();
        type Output = u32;
        fn options(&self) -> Options {
            let policy = Policy::retry(1).then_requeue(1).backoff(Backoff::none());
            Options::default().at_most_once().policy(policy)
        }
        async fn process(&self, cx: &Context, (): ()) -> Result<u32> {
            match cx.attempt() {
                3 => Ok(3),
                attempt => Err(AtomError::msg(format!("failure {attempt}"))),
            }
        }
    }
    let atomizer = Atomizer::builder().conductor(Memory::new()).atom(Once).start().await.unwrap();
    let call = atomizer.call::<Once>(()).deadline(Duration::from_secs(60));
    assert_eq!(call.await.unwrap(), 3);
    let failing = atomizer.call::<Once>(()).policy(Policy::fail()).await;
    assert!(matches!(failing, Err(CallError::Failed(_))), "{failing:?}");
}

/// A sender that did not know whether its send arrived sent again: two messages, one run.
#[tokio::test]
async fn what_is_sent_twice_runs_once_where_both_are() {
    let memory = Memory::new();
    let sender = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let electron = Electron::new(AtomId::of::<Gated>(), Payload::json("7"));
    for _ in 0..3 {
        sender.send_electron(electron.clone()).await.unwrap();
    }
    let atom = at_most_once();
    let builder = Atomizer::builder().conductor(memory.clone()).atom(atom.clone());
    let (running, mut events) = watched(builder).await;
    atom.open(3);
    until(&mut events, started).await;
    until(&mut events, |kind| {
        assert!(!started(kind), "it is begun a second time");
        matches!(kind, EventKind::Completed { .. })
    })
    .await;
    running.drain().await.unwrap();
}

/// It will not come again, so its asker is told when its node stops in the middle.
#[tokio::test]
async fn what_runs_at_most_once_is_answered_when_its_node_stops() {
    let memory = Memory::new();
    let atom = at_most_once();
    let builder = Atomizer::builder().conductor(memory.clone()).atom(atom.clone());
    let running = builder.drain_timeout(Duration::ZERO).start().await.unwrap();
    let mut events = running.events();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let call = tokio::spawn(asker.call::<Gated>(7).into_future());
    until(&mut events, started).await;
    running.drain().await.unwrap();
    let answer = call.await.unwrap();
    let Err(CallError::Failed(failure)) = answer else { panic!("it is told: {answer:?}") };
    assert_eq!(failure.message, "its node stopped before it ended");
    assert_eq!(memory.take_dead_letters().len(), 1);
}
