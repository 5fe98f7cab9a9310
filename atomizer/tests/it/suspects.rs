//! Electrons that were delivered before, and may be what ended the node that had them.

use std::{num::NonZeroUsize, time::Duration};

use atomizer::{
    AtomId, CallError, Conductor, Electron, EventKind, EventStream, FailureKind, Message, NodeId,
    Payload, Source, prelude::*,
};

use crate::atoms::{Gated, started, until, watched};

/// As many nodes that take what there is and die: each delivery is one more.
pub(crate) async fn killed_with_it(memory: &Memory, atom: AtomId, times: usize) {
    for _ in 0..times {
        let session = memory.open(&NodeId::unique("killed").unwrap()).await.unwrap();
        let many = NonZeroUsize::new(100).unwrap();
        let mut subscription = session.subscribe(Source::Atom(atom.clone()), many).await.unwrap();
        drop(subscription.next(many).await.unwrap());
    }
}

async fn node(memory: &Memory, atom: &Gated) -> (Atomizer, EventStream) {
    watched(Atomizer::builder().conductor(memory.clone()).atom(atom.clone())).await
}

fn suspected(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Suspected { .. })
}

#[tokio::test]
async fn what_was_delivered_before_is_counted_before_it_begins() {
    let memory = Memory::new();
    let sender = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let id = sender.send::<Gated>(7).await.unwrap();
    killed_with_it(&memory, AtomId::of::<Gated>(), 1).await;
    let first = Gated::new(Options::default());
    let (running, mut events) = node(&memory, &first).await;
    until(&mut events, started).await;
    // As if it were killed in the middle: what is in the queue then says so.
    memory.cut();
    let session = memory.open(&NodeId::unique("reader").unwrap()).await.unwrap();
    drop(running);
    let source = Source::Atom(AtomId::of::<Gated>());
    let mut subscription = session.subscribe(source, NonZeroUsize::MIN).await.unwrap();
    let delivery = subscription.next(NonZeroUsize::MIN).await.unwrap().remove(0);
    let Message::Electron(electron) = &delivery.message else { panic!("an electron was sent") };
    assert_eq!((electron.id, electron.lives), (id, 1));
    assert!(delivery.redeliveries > 0);
}

#[tokio::test]
async fn an_electron_that_was_never_delivered_before_is_no_suspect() {
    let memory = Memory::new();
    let atom = Gated::new(Options::default());
    atom.open(1);
    let (running, mut events) = node(&memory, &atom).await;
    running.call::<Gated>(7).await.unwrap();
    until(&mut events, |kind| {
        assert!(!suspected(kind));
        matches!(kind, EventKind::Completed { .. })
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn suspects_run_one_at_a_time_until_they_have_run_for_a_while() {
    let memory = Memory::new();
    let sender = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    for number in 0..3 {
        sender.send::<Gated>(number).await.unwrap();
    }
    killed_with_it(&memory, AtomId::of::<Gated>(), 1).await;
    let atom = Gated::new(Options::default());
    let (_running, mut events) = node(&memory, &atom).await;
    // One that ends lets the next begin at once.
    until(&mut events, started).await;
    let began = tokio::time::Instant::now();
    atom.open(1);
    until(&mut events, started).await;
    assert!(began.elapsed() < Duration::from_secs(1));
    // One that goes on does so after a while: it has not killed the node.
    until(&mut events, started).await;
    let waited = began.elapsed();
    assert!((5..=6).contains(&waited.as_secs()), "{waited:?}");
    atom.open(2);
    for _ in 0..2 {
        until(&mut events, |kind| matches!(kind, EventKind::Completed { .. })).await;
    }
}

#[tokio::test]
async fn an_electron_that_used_up_its_lives_is_dead_and_answered() {
    let memory = Memory::new();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let call = asker.call::<Gated>(7).into_future();
    let dies = async {
        // The electron is changed as if it had been begun alone five times.
        let session = memory.open(&NodeId::unique("editor").unwrap()).await.unwrap();
        let source = Source::Atom(AtomId::of::<Gated>());
        let mut subscription = session.subscribe(source, NonZeroUsize::MIN).await.unwrap();
        let delivery = subscription.next(NonZeroUsize::MIN).await.unwrap().remove(0);
        let Message::Electron(electron) = &delivery.message else { panic!("an electron was sent") };
        let mut killer = Electron::clone(electron);
        killer.lives = 5;
        drop(session.park(delivery.ticket, killer.into()).await.unwrap());
        session.close().await;
        let (running, mut events) = node(&memory, &Gated::new(Options::default())).await;
        (until(&mut events, |kind| matches!(kind, EventKind::Failed { .. })).await, running)
    };
    let (answer, (event, running)) = tokio::join!(call, dies);
    let Err(CallError::Failed(failure)) = answer else { panic!("it is not run: {answer:?}") };
    assert_eq!(failure.kind, FailureKind::Killer);
    assert!(matches!(event.kind, EventKind::Failed { dead: true, .. }), "{event}");
    let dead = memory.take_dead_letters();
    let [Message::Electron(dead)] = &dead[..] else { panic!("one dead letter: {dead:?}") };
    assert_eq!(dead.history.last().map(|failure| failure.kind), Some(FailureKind::Killer));
    running.drain().await.unwrap();
}

/// Only starts are counted: whatever lay beside a killer in the hands of nodes that died has done nothing.
#[tokio::test]
async fn deliveries_alone_kill_no_electron() {
    let memory = Memory::new();
    let sender = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let atom = Gated::new(Options::default());
    let mut electron = Electron::new(AtomId::of::<Gated>(), Payload::json("7"));
    electron.lives = 1;
    sender.send_electron(electron).await.unwrap();
    killed_with_it(&memory, AtomId::of::<Gated>(), 50).await;
    atom.open(1);
    let (_running, mut events) = node(&memory, &atom).await;
    let event = until(&mut events, |kind| {
        matches!(kind, EventKind::Completed { .. } | EventKind::Failed { .. })
    });
    assert!(matches!(event.await.kind, EventKind::Completed { .. }));
}

/// A suspect whose atom has no room must not hold up the suspects of others.
#[tokio::test(start_paused = true)]
async fn a_suspect_without_a_permit_holds_up_no_other() {
    struct Full;
    impl Atom for Full {
        const ID: &'static str = "full";
        const KIND: Kind = Kind::Singleton;
        type Input = ();
        type Output = ();
        async fn process(&self, _cx: &Context, (): ()) -> Result<()> {
            std::future::pending().await
        }
    }
    let memory = Memory::new();
    let sender = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    for number in 0..5 {
        sender.send::<Full>(()).await.unwrap();
        sender.send::<Gated>(number).await.unwrap();
    }
    killed_with_it(&memory, AtomId::of::<Full>(), 1).await;
    killed_with_it(&memory, AtomId::of::<Gated>(), 1).await;
    let atom = Gated::new(Options::default());
    atom.open(5);
    let builder = Atomizer::builder().conductor(memory.clone()).atom(Full).atom(atom);
    let (_running, mut events) = watched(builder).await;
    for _ in 0..5 {
        until(&mut events, |kind| matches!(kind, EventKind::Completed { .. })).await;
    }
}

/// What can never be written into is begun alone all the same.
#[tokio::test(start_paused = true)]
async fn a_suspect_that_can_never_be_written_is_begun_all_the_same() {
    let memory = Memory::new();
    let sender = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    sender.send::<Gated>(1_000_000).await.unwrap();
    killed_with_it(&memory, AtomId::of::<Gated>(), 1).await;
    let atom = Gated::new(Options::default());
    atom.open(1);
    let (_running, mut events) = node(&memory.payload_bytes_max(3), &atom).await;
    until(&mut events, |kind| matches!(kind, EventKind::Completed { .. })).await;
}
