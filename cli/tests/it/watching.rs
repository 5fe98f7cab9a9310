//! `events`, `nodes` and `why`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use atomizer::{EventKind, Policy, prelude::*};
use serde_json::{Value, json};
use tokio::{sync::Semaphore, task::JoinSet};

use crate::harness::{Double, Place, Running, blocking, soon};

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["event"].as_str().unwrap()).collect()
}

fn count(events: &[Value], kind: &str) -> usize {
    kinds(events).into_iter().filter(|name| *name == kind).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_shown_as_they_were_and_go_on_after_a_bookmark() {
    let place = Place::new().await;
    let work = async |calls: u64| {
        let node = place.serve().await;
        for number in 0..calls {
            soon(node.call::<Double>(number).into_future()).await.unwrap();
        }
        soon(node.drain()).await.unwrap();
        node.node().clone()
    };
    let bookmark = std::env::temp_dir().join(format!("atomizer-{}", atomizer::ElectronId::new()));
    let file = bookmark.to_str().unwrap();
    let all = ["events", "--from", "start", "--once", "--json", "--bookmark", file];
    let first = work(3).await;
    let events = place.run(&all).await.ok().json();
    assert_eq!(["sent", "received", "started", "completed"].map(|of| count(&events, of)), [3; 4]);
    let numbers: Vec<_> = events.iter().map(|event| event["sequence"].as_u64().unwrap()).collect();
    assert_eq!(numbers, Vec::from_iter(0..numbers.len() as u64));
    assert!(events.iter().all(|event| event["node"] == json!(first)));

    assert_eq!(place.run(&all).await.ok().stdout, "", "nothing has come since");
    let second = work(2).await;
    let events = place.run(&all).await.ok().json();
    assert_eq!(count(&events, "completed"), 2);
    assert!(events.iter().all(|event| event["node"] == json!(second)));
    std::fs::remove_file(&bookmark).unwrap();

    let filtered = ["events", "--from", "1h", "--once", "--kind", "stopped", "--severity", "info"];
    let text = place.run(&filtered).await.ok().stdout;
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(text.lines().all(|line| line.ends_with("stopped")), "{text}");
    place.run(&["events", "--from", "soon"]).await.failed_with(2, "is no position");
    std::fs::write(&bookmark, "no bookmark").unwrap();
    place.run(&all).await.failed_with(1, "failed to read");
    std::fs::remove_file(&bookmark).unwrap();
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_shown_as_they_come_until_it_is_interrupted() {
    let place = Place::new().await;
    let url = place.url();
    let mut running = blocking(move || {
        Running::start(&["events", "--url", &url, "--kind", "completed", "--json"])
    })
    .await;
    // It has begun when it sees what happens.
    let node = place.serve().await;
    let seen = blocking(move || {
        let line = running.next_line();
        running.interrupt();
        (line, running.end())
    });
    let mut seen = std::pin::pin!(seen);
    let (line, ran) = loop {
        soon(node.call::<Double>(1).into_future()).await.unwrap();
        if let Ok(seen) = tokio::time::timeout(Duration::from_millis(100), &mut seen).await {
            break seen;
        }
    };
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(event["event"], json!("completed"));
    ran.ended_with(130);
    soon(node.drain()).await.unwrap();
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_shown_with_what_they_serve_and_so_are_their_queues() {
    let place = Place::new().await;
    let (one, other) = (place.serve().await, place.serve().await);
    let nodes = async || place.run(&["nodes", "--json"]).await.ok().json();
    let state = |nodes: &[Value], of: &Atomizer| {
        nodes.iter().find(|node| node["node"] == json!(of.node())).map(|node| node["state"].clone())
    };
    soon(async {
        while state(&nodes().await, &one).is_none() || state(&nodes().await, &other).is_none() {}
    })
    .await;
    soon(other.drain()).await.unwrap();
    let nodes = nodes().await;
    assert_eq!(state(&nodes, &one), Some(json!("alive")));
    assert_eq!(state(&nodes, &other), Some(json!("stopped")));
    let alive = nodes.iter().find(|node| node["state"] == json!("alive")).unwrap();
    assert_eq!(alive["presence"]["atoms"][0]["atom"], json!("double"));
    assert_eq!(alive["presence"]["process"], json!(std::process::id()));
    let text = place.run(&["nodes"]).await.ok().stdout;
    assert!(text.contains("SERVES") && text.contains("double"), "{text}");

    let queues = place.run(&["queues", "--json"]).await.ok().json();
    assert_eq!(queues[0]["atom"], json!("double"));
    soon(one.drain()).await.unwrap();
    place.leave().await;
}

/// Succeeds on one node, and never on another.
struct Fickle {
    fails: bool,
    /// Held until all nodes are there.
    gate: Arc<Semaphore>,
    began: Arc<AtomicBool>,
}

impl Atom for Fickle {
    const ID: &'static str = "fickle";
    type Input = u64;
    type Output = u64;

    async fn process(&self, cx: &Context, number: u64) -> Result<u64> {
        self.began.store(true, Ordering::SeqCst);
        drop(self.gate.acquire().await);
        if self.fails {
            return Err(AtomError::msg(format!("no, says {}", cx.node())));
        }
        cx.progress(1, 2);
        cx.call::<Double>(number).await.map_err(Into::into)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_story_of_an_electron_is_told_in_order_over_all_its_nodes() {
    let place = Place::new().await;
    let (gate, began) = (Arc::new(Semaphore::new(0)), Arc::<AtomicBool>::default());
    let serve = async |fails| {
        let fickle = Fickle { fails, gate: Arc::clone(&gate), began: Arc::clone(&began) };
        let builder = Atomizer::builder().conductor(place.rabbit()).atom(fickle).atom(Double);
        builder.start().await.unwrap()
    };
    let asker = Atomizer::builder().conductor(place.rabbit()).start().await.unwrap();
    let bad = serve(true).await;
    let mut events = asker.events();
    let policy = Policy::retry(1).then_requeue(1);
    let call = asker.call::<Fickle>(4).policy(policy);
    let id = call.electron().unwrap();
    let mut answer = JoinSet::new();
    answer.spawn(call.into_future());
    soon(async {
        while !began.load(Ordering::SeqCst) {
            events.next().await;
        }
    })
    .await;

    // While it runs.
    let why = async || place.run(&["why", &id.to_string(), "--json"]).await;
    soon(async {
        while why().await.json().first().is_none_or(|story| story["whereabouts"]["state"] != "at") {
        }
    })
    .await;
    let story = why().await.ok().json().remove(0);
    assert_eq!(story["whereabouts"]["text"], json!(format!("it runs on {}", bad.node())));

    let good = serve(false).await;
    gate.close();
    assert_eq!(soon(answer.join_next()).await.unwrap().unwrap().unwrap(), 8);
    for node in [&asker, &bad, &good] {
        soon(node.drain()).await.unwrap();
    }
    let story = why().await.ok().json().remove(0);
    let steps: Vec<_> = (story["events"].as_array().unwrap().iter())
        .map(|event| (event["event"].as_str().unwrap(), event["node"].as_str().unwrap()))
        // Whoever takes it first after it was requeued may hand it on.
        .filter(|(kind, _)| !matches!(*kind, "handed_on" | "parked"))
        .collect();
    let (asker, bad, good) = (asker.node().as_str(), bad.node().as_str(), good.node().as_str());
    let mut expected = vec![
        ("sent", asker),
        ("received", bad),
        ("started", bad),
        ("retried", bad),
        ("started", bad),
        ("requeued", bad),
        ("received", good),
        ("started", good),
        ("progress", good),
        ("completed", good),
    ];
    if steps.len() > expected.len() {
        expected.insert(6, ("received", bad));
    }
    assert_eq!(steps, expected);
    assert_eq!(story["whereabouts"]["state"], json!("done"));
    assert_eq!(story["children"][0]["atom"], json!("double"));
    let text = place.run(&["why", &id.to_string()]).await.ok().stdout;
    assert!(text.contains(&format!("no, says {bad}")), "{text}");
    assert!(text.contains("now: it is done"), "{text}");

    // Of its child.
    let child = story["children"][0]["electron"].as_str().unwrap();
    let text = place.run(&["why", child]).await.ok().stdout;
    assert!(text.contains(&format!("it is a child of {id}")), "{text}");
    let unknown = atomizer::ElectronId::new().to_string();
    place.run(&["why", &unknown]).await.failed_with(1, "nothing is known of");
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn why_it_is_dead_is_told_with_what_to_do() {
    let place = Place::new().await;
    let node = place.serve().await;
    let mut events = node.events();
    let id = soon(node.send::<Double>(u64::MAX)).await.unwrap();
    soon(async {
        while !matches!(events.next().await.unwrap().unwrap().kind, EventKind::Failed { .. }) {}
    })
    .await;
    soon(node.drain()).await.unwrap();
    let text = place.run(&["why", &id.to_string()]).await.ok().stdout;
    for part in ["too large to double", "is a dead letter", &format!("atomizer dead requeue {id}")]
    {
        assert!(text.contains(part), "{text}");
    }
    place.leave().await;
}
