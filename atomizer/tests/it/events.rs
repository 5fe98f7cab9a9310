//! The stream of events: complete for who keeps up, honest to who does not, free for who does not look.

use atomizer::{EventKind, prelude::*};

use crate::atoms::{Obedient, Order};

fn name(kind: &EventKind) -> &'static str {
    match kind {
        EventKind::Subscribed { .. } => "subscribed",
        EventKind::Received { .. } => "received",
        EventKind::Started { .. } => "started",
        EventKind::Completed { .. } => "completed",
        EventKind::Failed { .. } => "failed",
        _ => "other",
    }
}

#[tokio::test]
async fn two_subscribers_see_each_step_of_an_electron() {
    let atomizer =
        Atomizer::builder().conductor(Memory::new()).atom(Obedient).start().await.unwrap();
    let mut subscribers = [atomizer.events(), atomizer.events()];
    atomizer.call::<Obedient>(Order::Echo("hello".into())).await.unwrap();
    for events in &mut subscribers {
        let mut seen = Vec::new();
        while seen.last() != Some(&"completed") {
            let event = events.next().await.unwrap().unwrap();
            assert_eq!(&event.node, atomizer.node());
            assert!(!event.to_string().contains('\n'), "one line each: {event}");
            seen.push(name(&event.kind));
        }
        seen.retain(|name| !matches!(*name, "subscribed" | "other"));
        assert_eq!(seen, ["received", "started", "completed"]);
    }
}

#[tokio::test]
async fn a_subscriber_that_does_not_read_is_told_how_many_it_missed() {
    let atomizer =
        Atomizer::builder().conductor(Memory::new()).atom(Obedient).start().await.unwrap();
    let mut asleep = atomizer.events();
    for _ in 0..3000 {
        atomizer.call::<Obedient>(Order::Echo(String::new())).await.unwrap();
    }
    atomizer.drain().await.unwrap();
    let (mut seen, mut missed) = (0, 0);
    drop(atomizer);
    while let Some(event) = asleep.next().await {
        match event {
            Ok(_) => seen += 1,
            Err(lost) => missed += lost.events,
        }
    }
    assert!(missed > 0, "9,000 events do not fit");
    // Three for each electron, and a few about the node.
    assert!(seen + missed >= 9000, "{seen} seen and {missed} missed");
}

#[tokio::test]
async fn a_watcher_sees_the_start() {
    let (tx, rx) = std::sync::mpsc::channel();
    let builder = Atomizer::builder().conductor(Memory::new());
    let atomizer = builder.watch(move |events| tx.send(events).unwrap()).start().await.unwrap();
    let first = rx.recv().unwrap().next().await.unwrap().unwrap();
    assert!(matches!(first.kind, EventKind::SessionOpened), "{first}");
    atomizer.drain().await.unwrap();
}
