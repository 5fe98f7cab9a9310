//! Nodes and conductors together: sharing, losing, recovering.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use atomizer::{Address, Conductor, Envelope, EventKind, Message, NodeId, Properties, prelude::*};
use tokio::task::JoinSet;

use crate::atoms::{Gated, Obedient, Order, started, until};

/// Counts how often it ran.
struct Counting(Arc<AtomicUsize>);

impl Atom for Counting {
    const ID: &'static str = "counting";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
        self.0.fetch_add(1, Ordering::SeqCst);
        tokio::task::yield_now().await;
        Ok(input)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_of_one_process_share_the_work() {
    let memory = Memory::new();
    let mut nodes = Vec::new();
    let mut counts = Vec::new();
    for _ in 0..3 {
        let count = Arc::new(AtomicUsize::new(0));
        let counting = Counting(Arc::clone(&count));
        let builder = Atomizer::builder().conductor(memory.clone()).atom(counting);
        nodes.push(builder.concurrency(1).start().await.unwrap());
        counts.push(count);
    }
    let asker = Atomizer::builder().conductor(memory).start().await.unwrap();
    let mut calls = JoinSet::new();
    for number in 0..3000 {
        calls.spawn(asker.call::<Counting>(number).into_future());
    }
    let answers = calls.join_all().await;
    assert!(answers.iter().all(Result::is_ok));
    let counts: Vec<_> = counts.iter().map(|count| count.load(Ordering::SeqCst)).collect();
    assert_eq!(counts.iter().sum::<usize>(), 3000, "each ran once: {counts:?}");
    assert!(counts.iter().all(|count| *count > 0), "each node took part: {counts:?}");
}

#[tokio::test]
async fn two_conductors_of_one_type_are_two_conductors() {
    let (left, right) = (Memory::new(), Memory::new());
    let builder = Atomizer::builder().conductor(left.clone()).conductor(right.clone());
    let serving = builder.atom(Obedient).start().await.unwrap();
    let mut events = serving.events();
    for memory in [left, right] {
        let asker = Atomizer::builder().conductor(memory).start().await.unwrap();
        let answer = asker.call::<Obedient>(Order::Echo("both".into())).await.unwrap();
        assert_eq!(answer, "both");
        asker.drain().await.unwrap();
    }
    let completed = |kind: &EventKind| matches!(kind, EventKind::Completed { .. });
    let first = until(&mut events, completed).await.conductor.unwrap();
    let second = until(&mut events, completed).await.conductor.unwrap();
    assert_eq!((first.as_str(), second.as_str()), ("memory", "memory-2"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_session_loses_no_call() {
    let memory = Memory::new();
    let count = Arc::new(AtomicUsize::new(0));
    let builder = Atomizer::builder().conductor(memory.clone()).atom(Counting(Arc::clone(&count)));
    let atomizer = builder.start().await.unwrap();
    let mut events = atomizer.events();
    let mut calls = JoinSet::new();
    for number in 0..2000 {
        calls.spawn(atomizer.call::<Counting>(number).into_future());
        if number % 400 == 200 {
            memory.cut();
            until(&mut events, |kind| matches!(kind, EventKind::SessionOpened)).await;
            events = atomizer.events();
        }
    }
    let mut answers: Vec<_> = calls.join_all().await.into_iter().map(Result::unwrap).collect();
    answers.sort_unstable();
    assert_eq!(answers, (0..2000).collect::<Vec<_>>());
}

fn received_again(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Received { redeliveries, .. } if *redeliveries > 0)
}

#[tokio::test]
async fn an_electron_that_comes_again_while_it_runs_is_adopted() {
    let memory = Memory::new();
    let gated = Gated::new(Options::default());
    let builder = Atomizer::builder().conductor(memory.clone()).atom(gated.clone());
    let atomizer = builder.start().await.unwrap();
    let mut events = atomizer.events();
    let call = tokio::task::spawn(atomizer.call::<Gated>(5).into_future());
    until(&mut events, started).await;
    memory.cut();
    until(&mut events, received_again).await;
    gated.open(1);
    assert_eq!(call.await.unwrap().unwrap(), 5);
    assert_eq!(
        gated.running_most.load(Ordering::SeqCst),
        1,
        "one run answered for both deliveries"
    );
    until(&mut events, |kind| matches!(kind, EventKind::Completed { .. })).await;
    atomizer.drain().await.unwrap();
    assert_eq!(memory.take_dead_letters().len(), 0);
}

#[tokio::test]
async fn a_parent_that_waits_outlives_its_session() {
    struct Parent;
    impl Atom for Parent {
        const ID: &'static str = "parent";
        const KIND: Kind = Kind::Spawner;
        type Input = ();
        type Output = (u64, u64);
        async fn process(&self, cx: &Context, (): ()) -> Result<(u64, u64)> {
            let called = cx.call::<Gated>(1).into_future();
            let folded = cx.fan_out::<Gated>(2..12).fold(0, |sum, n| sum + n);
            let (called, folded) = tokio::join!(called, folded);
            Ok((called?, folded?))
        }
    }
    let memory = Memory::new();
    let gated = Gated::new(Options::default());
    let builder = Atomizer::builder().conductor(memory.clone()).atom(Parent).atom(gated.clone());
    let atomizer = builder.start().await.unwrap();
    let mut events = atomizer.events();
    let call = tokio::task::spawn(atomizer.call::<Parent>(()).into_future());
    for _ in 0..12 {
        until(&mut events, started).await;
    }
    for _ in 0..3 {
        memory.cut();
        for _ in 0..12 {
            until(&mut events, received_again).await;
        }
    }
    gated.open(11);
    assert_eq!(call.await.unwrap().unwrap(), (1, 65));
    atomizer.drain().await.unwrap();
}

#[tokio::test]
async fn an_answer_that_comes_twice_counts_once() {
    let memory = Memory::new();
    let atomizer = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let mut events = atomizer.events();
    let call = tokio::task::spawn(atomizer.call::<Obedient>(Order::Echo("x".into())).into_future());
    let worker = NodeId::unique("worker").unwrap();
    let session = memory.open(&worker).await.unwrap();
    let source = atomizer::Source::Atom(atomizer::AtomId::of::<Obedient>());
    let mut subscription = session.subscribe(source, std::num::NonZeroUsize::MIN).await.unwrap();
    let delivery = subscription.next(std::num::NonZeroUsize::MIN).await.unwrap().remove(0);
    let Message::Electron(electron) = &delivery.message else { panic!("an electron") };
    let to = Address::Reply(electron.reply_to.clone().unwrap());
    for text in ["\"first\"", "\"second\""] {
        let output = Ok(atomizer::Payload::json(text));
        let answer = Properties::new(electron, worker.clone(), output);
        session.send(&[Envelope::new(to.clone(), answer.into())]).await[0].clone().unwrap();
    }
    assert_eq!(call.await.unwrap().unwrap(), "first");
    until(&mut events, |kind| matches!(kind, EventKind::AnswerDropped { .. })).await;
}
