//! The stream of events: complete for who keeps up, honest to who does not, free for who does not look.

use std::time::Duration;

use atomizer::{CallError, Event, EventKind, Resident, prelude::*};

use crate::atoms::{Obedient, Order, watched};

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
            Ok(event) => {
                // The numbers tell the same as the count of what was missed.
                assert_eq!(event.sequence, seen + missed);
                seen += 1;
            }
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

/// Fails once as a resident, so that there is more to tell.
struct Restless;

impl Resident for Restless {
    const ID: &'static str = "restless";

    async fn run(&self, cx: &Context) -> Result<()> {
        match cx.attempt() {
            1 => Err(AtomError::msg("two\nlines")),
            _ => Ok(()),
        }
    }
}

/// Each event names what it is about, prints as one line, stands in its place, and survives the way through
/// JSON.
#[tokio::test(start_paused = true)]
async fn events_are_numbered_without_gaps_name_their_subject_and_travel() {
    let memory = Memory::new();
    let builder = Atomizer::builder().conductor(memory.clone()).atom(Obedient);
    let (atomizer, mut events) = watched(builder.resident(|| Restless)).await;
    let policy = Policy::retry(1).then_requeue(1).backoff(Backoff::none());
    let failing = atomizer.call::<Obedient>(Order::Panic("at\nthe disco".into())).policy(policy);
    assert!(matches!(failing.await, Err(CallError::Failed(_))));
    atomizer.call::<Obedient>(Order::Echo("hello".into())).await.unwrap();
    memory.cut();
    atomizer.call::<Obedient>(Order::Echo("again".into())).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    atomizer.drain().await.unwrap();
    drop(atomizer);
    let mut seen = std::collections::BTreeSet::new();
    let mut next = 0;
    while let Some(event) = events.next().await {
        let event = event.unwrap();
        assert_eq!(event.sequence, next, "no gap");
        next += 1;
        assert!(!event.to_string().contains('\n'), "one line each: {event}");
        let json = serde_json::to_value(&event).unwrap();
        assert_eq!(
            serde_json::from_value::<Event>(json.clone()).unwrap().to_string(),
            event.to_string()
        );
        let name = json["event"].as_str().unwrap().to_owned();
        assert_eq!(json["electron"].is_string(), event.electron().is_some(), "{json}");
        assert_eq!(json["atom"].is_string(), event.atom().is_some(), "{json}");
        assert_eq!(json["attempt"].is_u64(), event.attempt().is_some(), "{json}");
        // What an electron goes through, and what a session does, comes through a conductor.
        let own =
            event.electron().is_some() || name.contains("session") || name.contains("subscri");
        assert_eq!(event.conductor.is_some(), own, "{json}");
        seen.insert(name);
    }
    for expected in [
        "session_opened",
        "session_lost",
        "subscribed",
        "received",
        "started",
        "retried",
        "requeued",
        "failed",
        "completed",
        "resident_started",
        "resident_failed",
        "resident_ended",
        "draining",
        "stopped",
    ] {
        assert!(seen.contains(expected), "{expected} is not among {seen:?}");
    }
}

#[test]
fn an_event_of_a_later_version_is_read() {
    let json = r#"{"sequence":7,"at":"2026-11-21T00:00:00Z","node":"n-1","event":"sang","song":1}"#;
    let event: Event = serde_json::from_str(json).unwrap();
    assert_eq!((event.sequence, event.kind), (7, EventKind::Other));
}
