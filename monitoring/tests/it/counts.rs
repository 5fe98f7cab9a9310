//! What is counted, against what was done and what the events say.

use std::{collections::BTreeMap, time::Duration};

use atomizer::{CallError, EventKind, FailureKind, prelude::*};
use tokio::sync::oneshot;

use crate::client::{get, serve, sum, until};

/// Does as it is told.
struct Work;

impl Atom for Work {
    const ID: &'static str = "work";
    type Input = String;
    type Output = String;

    async fn process(&self, cx: &Context, order: String) -> Result<String> {
        match order.as_str() {
            "fail" => Err(AtomError::msg("as told")),
            "fail once" if cx.attempt() == 1 => Err(AtomError::msg("as told, once")),
            "panic" => panic!("as told"),
            "give back" if cx.history().is_empty() => Err(AtomError::msg("elsewhere").give_back()),
            "hang" => std::future::pending().await,
            _ => Ok(order),
        }
    }
}

/// Asks [`Work`] for as many as it is told.
struct Many;

impl Atom for Many {
    const ID: &'static str = "many";
    const KIND: Kind = Kind::Spawner;
    type Input = u64;
    type Output = u64;

    async fn process(&self, cx: &Context, count: u64) -> Result<u64> {
        let children = (0..count).map(|_| "child".to_owned());
        Ok(cx.fan_out::<Work>(children).fold(0, |done, _| done + 1).await?)
    }
}

/// Fails once.
struct Restless;

impl atomizer::Resident for Restless {
    const ID: &'static str = "restless";

    async fn run(&self, cx: &Context) -> Result<()> {
        match cx.attempt() {
            1 => Err(AtomError::msg("once")),
            _ => Ok(()),
        }
    }
}

/// What the events say: how many there were of each kind, and how many failures of each.
#[derive(Debug, Default)]
struct Ledger {
    events: BTreeMap<(String, &'static str), f64>,
    failures: BTreeMap<(String, FailureName), f64>,
}

type FailureName = String;

impl Ledger {
    fn note(&mut self, kind: &EventKind, atom: Option<&atomizer::AtomId>) {
        let name = match kind {
            EventKind::Received { .. } => "received",
            EventKind::Adopted { .. } => "adopted",
            EventKind::Started { .. } => "started",
            EventKind::Retried { .. } => "retried",
            EventKind::Requeued { .. } => "requeued",
            EventKind::HandedOn { .. } => "handed_on",
            EventKind::NotSettled { .. } => "not_settled",
            EventKind::Completed { .. } => "completed",
            EventKind::Failed { dead: false, .. } => "failed",
            EventKind::Failed { dead: true, .. } => "dead",
            EventKind::ResidentFailed { .. } => "resident_failed",
            _ => return,
        };
        let atom = atom.unwrap().to_string();
        if let EventKind::Retried { failure, .. }
        | EventKind::Requeued { failure, .. }
        | EventKind::Failed { failure, .. } = kind
        {
            *self.failures.entry((atom.clone(), wire_name(failure.kind))).or_default() += 1.0;
        }
        *self.events.entry((atom, name)).or_default() += 1.0;
    }

    fn of(&self, atom: &str, name: &'static str) -> f64 {
        self.events.get(&(atom.to_owned(), name)).copied().unwrap_or_default()
    }
}

/// The name of a kind of failure, as events have it.
fn wire_name(kind: FailureKind) -> FailureName {
    match kind {
        FailureKind::TimedOut => "timed_out".to_owned(),
        kind => kind.to_string(),
    }
}

async fn fails(atomizer: &Atomizer, order: &str) {
    let answer = atomizer.call::<Work>(order.to_owned()).await;
    assert!(matches!(answer, Err(CallError::Failed(_))), "{order}: {answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_count_agrees_with_what_was_done_and_with_the_events() {
    let monitoring = serve();
    let address = monitoring.address();
    let (hand_over, events) = oneshot::channel();
    let memory = Memory::new();
    let builder = Atomizer::builder().conductor(memory.clone()).atom(Work).atom(Many);
    let builder = builder.resident(|| Restless).watch(|events| drop(hand_over.send(events)));
    let atomizer = builder.start().await.unwrap();
    let mut events = events.await.unwrap();

    for order in ["one", "two!", "three"] {
        atomizer.call::<Work>(order.to_owned()).await.unwrap();
    }
    fails(&atomizer, "fail").await;
    fails(&atomizer, "panic").await;
    let hanging = atomizer.call::<Work>("hang".to_owned()).time_limit(Duration::from_millis(20));
    assert!(matches!(hanging.await, Err(CallError::Failed(_))));
    let once = || atomizer.call::<Work>("fail once".to_owned());
    once().policy(Policy::retry(1).backoff(Backoff::none())).await.unwrap();
    once().policy(Policy::requeue(1).backoff(Backoff::none())).await.unwrap();
    atomizer.call::<Work>("give back".to_owned()).await.unwrap();
    // Nobody asked, so that the failure is a dead letter.
    atomizer.send::<Work>("fail".to_owned()).await.unwrap();
    assert_eq!(atomizer.call::<Many>(10).await.unwrap(), 10);

    let count = |text: &str, name: &str, atom: &str, label: (&str, &str)| {
        sum(text, name, &[("atom", atom), ("conductor", "memory"), label])
    };
    until(address, "/metrics", |answer| {
        let dead = ("end", "dead");
        let of_resident = ("atom", "restless");
        count(&answer.body, "atomizer_electrons_ended_total", "work", dead) == Some(1.0)
            && sum(&answer.body, "atomizer_resident_failures_total", &[of_resident]) == Some(1.0)
    })
    .await;
    atomizer.drain().await.unwrap();
    drop(atomizer);
    let text = get(address, "/metrics").body;

    let mut ledger = Ledger::default();
    while let Some(event) = events.next().await {
        let event = event.unwrap();
        ledger.note(&event.kind, event.atom());
    }

    // By what was done.
    let work = |name: &str, label: (&str, &str)| count(&text, name, "work", label);
    let ended = |end| work("atomizer_electrons_ended_total", ("end", end));
    assert_eq!(ended("completed"), Some(16.0), "3, 3 that failed first, and 10 children\n{text}");
    assert_eq!(ended("failed"), Some(3.0), "{text}");
    assert_eq!(ended("dead"), Some(1.0), "{text}");
    assert_eq!(ended("unreadable"), Some(0.0), "it is there before it happens\n{text}");
    let failures = |kind| work("atomizer_failures_total", ("kind", kind));
    assert_eq!(failures("error"), Some(4.0), "{text}");
    assert_eq!(failures("panic"), Some(1.0), "{text}");
    assert_eq!(failures("timed_out"), Some(1.0), "{text}");
    let any = ("atom", "work");
    assert_eq!(work("atomizer_retries_total", any), Some(1.0), "{text}");
    assert_eq!(work("atomizer_attempts_total", any), Some(23.0), "20 ended, 3 once more\n{text}");
    assert_eq!(work("atomizer_run_seconds_count", ("result", "succeeded")), Some(16.0), "{text}");
    // To give back is no failure, but a run that did not succeed.
    assert_eq!(work("atomizer_run_seconds_count", ("result", "failed")), Some(7.0), "{text}");
    let hung = work("atomizer_run_seconds_sum", ("result", "failed")).unwrap();
    assert!((0.02..10.0).contains(&hung), "{hung}");
    // Each that is received begins once; a retry does not wait in a queue.
    assert_eq!(work("atomizer_queue_wait_seconds_count", any), Some(22.0), "{text}");
    assert_eq!(work("atomizer_payload_bytes_count", ("direction", "in")), Some(22.0), "{text}");
    // As JSON: each with its two quotes.
    let texts = ["one", "two!", "three", "fail once", "fail once", "give back"];
    let bytes = texts.iter().map(|text| text.len() + 2).sum::<usize>() + 10 * "\"child\"".len();
    let out = work("atomizer_payload_bytes_sum", ("direction", "out"));
    assert_eq!(out, Some(bytes as f64), "{text}");
    assert_eq!(sum(&text, "atomizer_events_lost_total", &[]), Some(0.0), "{text}");

    // By the events.
    for atom in ["work", "many"] {
        for (name, label, event) in [
            ("atomizer_electrons_received_total", ("atom", atom), "received"),
            ("atomizer_electrons_adopted_total", ("atom", atom), "adopted"),
            ("atomizer_attempts_total", ("atom", atom), "started"),
            ("atomizer_retries_total", ("atom", atom), "retried"),
            ("atomizer_electrons_returned_total", ("reason", "requeued"), "requeued"),
            ("atomizer_electrons_returned_total", ("reason", "handed_on"), "handed_on"),
            ("atomizer_electrons_returned_total", ("reason", "not_settled"), "not_settled"),
            ("atomizer_electrons_ended_total", ("end", "completed"), "completed"),
            ("atomizer_electrons_ended_total", ("end", "failed"), "failed"),
            ("atomizer_electrons_ended_total", ("end", "dead"), "dead"),
        ] {
            let told = ledger.of(atom, event);
            assert_eq!(count(&text, name, atom, label), Some(told), "{atom} {event}\n{ledger:#?}");
        }
    }
    for ((atom, kind), times) in &ledger.failures {
        let counted = count(&text, "atomizer_failures_total", atom, ("kind", kind));
        assert_eq!(counted, Some(*times), "{atom} {kind}\n{text}");
    }
    assert_eq!(ledger.of("restless", "resident_failed"), 1.0);

    // The node has ended, and nothing is left of it.
    for gauge in
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" gauge"))
    {
        assert_eq!(sum(&text, gauge, &[]), Some(0.0), "{gauge}\n{text}");
    }
    // Each is described.
    for name in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()) {
        assert!(text.contains(&format!("# HELP {name} ")), "{name}\n{text}");
    }
}

/// Waits until it is let go.
struct Held(std::sync::Arc<tokio::sync::Semaphore>);

impl Atom for Held {
    const ID: &'static str = "held";
    type Input = u64;
    type Output = u64;

    fn options(&self) -> Options {
        Options::default().concurrency(2)
    }

    async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
        self.0.acquire().await?.forget();
        Ok(input)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gauges_show_what_is_under_way_on_all_nodes_of_a_process() {
    let monitoring = serve();
    let address = monitoring.address();
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    let memory = Memory::new();
    let start = || {
        let builder = Atomizer::builder().conductor(memory.clone());
        builder.atom(Held(std::sync::Arc::clone(&gate))).start()
    };
    let nodes = [start().await.unwrap(), start().await.unwrap()];
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..6 {
        let node = nodes[0].clone();
        calls.spawn(async move { node.call::<Held>(number).await });
    }
    let held = |text: &str, name: &str| sum(text, name, &[("atom", "held")]).unwrap();
    let busy = until(address, "/metrics", |answer| {
        held(&answer.body, "atomizer_electrons_in_flight") == 4.0
            && held(&answer.body, "atomizer_electrons_waiting") == 2.0
    });
    let text = busy.await.body;
    assert_eq!(sum(&text, "atomizer_sessions", &[]), Some(2.0), "{text}");
    assert!(held(&text, "atomizer_window_electrons") >= 6.0, "{text}");

    memory.cut();
    until(address, "/metrics", |answer| {
        sum(&answer.body, "atomizer_sessions_lost_total", &[]) == Some(2.0)
            && sum(&answer.body, "atomizer_sessions_reopened_total", &[]) == Some(2.0)
            && sum(&answer.body, "atomizer_sessions", &[]) == Some(2.0)
    })
    .await;

    gate.add_permits(12);
    while let Some(answer) = calls.join_next().await {
        answer.unwrap().unwrap();
    }
    nodes[1].drain().await.unwrap();
    until(address, "/metrics", |answer| {
        sum(&answer.body, "atomizer_sessions", &[]) == Some(1.0)
            && held(&answer.body, "atomizer_electrons_in_flight") == 0.0
            && held(&answer.body, "atomizer_electrons_waiting") == 0.0
    })
    .await;
    drop(nodes);
    until(address, "/metrics", |answer| {
        sum(&answer.body, "atomizer_sessions", &[]) == Some(0.0)
            && held(&answer.body, "atomizer_window_electrons") == 0.0
    })
    .await;
}

/// Fewer events than happen fit into what a watcher may lag behind.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_a_slow_watcher_missed_are_counted() {
    let monitoring = serve();
    let atomizer = Atomizer::builder().conductor(Memory::new()).atom(Work).start().await.unwrap();
    let mut asleep = atomizer.events();
    for _ in 0..3000 {
        atomizer.call::<Work>(String::new()).await.unwrap();
    }
    atomizer.drain().await.unwrap();
    drop(atomizer);
    let mut missed = 0;
    while let Some(event) = asleep.next().await {
        missed += event.err().map_or(0, |missed| missed.events);
    }
    assert!(missed > 0, "9,000 events do not fit");
    let text = get(monitoring.address(), "/metrics").body;
    assert_eq!(sum(&text, "atomizer_events_lost_total", &[]), Some(missed as f64));
}
