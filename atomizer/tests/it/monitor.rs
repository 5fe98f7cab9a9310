//! The events of a cluster: kept, read from anywhere, each once.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use atomizer::{
    AtomId, Bookmark, ClusterEvents, Conductor, ConductorId, Event, EventKind, EventLog,
    EventReader, EventWriter, Filter, Memory, Monitor, MonitorError, NodeId, NodeState, Nodes,
    OpenError, Pack, Position, Read, Seen, Session, SessionError, Severity, prelude::*,
};
use serde_json::Value;
use tokio::{sync::Notify, time::Instant};

use crate::atoms::{Obedient, Order};

const HOUR: Duration = Duration::from_secs(3600);

fn memory() -> Memory {
    Memory::new().keep_events(64 * 1024 * 1024, HOUR)
}

async fn start(memory: &Memory) -> Atomizer {
    let builder = Atomizer::builder().conductor(memory.clone()).atom(Obedient);
    builder.start().await.unwrap()
}

async fn echo(atomizer: &Atomizer, calls: usize) {
    for _ in 0..calls {
        atomizer.call::<Obedient>(Order::Echo(String::new())).await.unwrap();
    }
}

/// Reads until a node has stopped.
async fn until_stopped(events: &mut ClusterEvents, node: &NodeId) -> Vec<Seen> {
    let mut all = Vec::new();
    loop {
        let seen = events.next().await;
        let stopped = |event: &Event| event.kind == EventKind::Stopped && event.node == *node;
        let is_last = matches!(&seen, Seen::Event(event) if stopped(event));
        all.push(seen);
        if is_last {
            return all;
        }
    }
}

fn numbers(seen: &[Seen]) -> Vec<u64> {
    let events = seen.iter().filter_map(|seen| match seen {
        Seen::Event(event) => Some(event.sequence),
        Seen::CaughtUp => None,
        other => panic!("nothing is missing: {other:?}"),
    });
    events.collect()
}

#[tokio::test]
async fn replay_and_live_are_one_without_gap_or_repeat() {
    let memory = memory();
    let atomizer = start(&memory).await;
    echo(&atomizer, 500).await;
    let mut events = Monitor::new(&memory).unwrap().from(Position::Start).open().await.unwrap();
    // Half of them are kept already, others come while it reads.
    let (seen, ()) = tokio::join!(until_stopped(&mut events, atomizer.node()), async {
        echo(&atomizer, 500).await;
        atomizer.drain().await.unwrap();
    });
    let numbers = numbers(&seen);
    assert_eq!(numbers, Vec::from_iter(0..numbers.len() as u64));
    let of = |name| {
        let is = |seen: &&Seen| matches!(seen, Seen::Event(event) if event.kind.name() == name);
        seen.iter().filter(is).count()
    };
    assert_eq!(["sent", "received", "started", "completed"].map(of), [1000; 4]);
    assert_eq!(seen.iter().filter(|seen| **seen == Seen::CaughtUp).count(), 1);
}

#[tokio::test]
async fn who_goes_on_after_a_bookmark_sees_each_event_once() {
    let memory = memory();
    let atomizer = start(&memory).await;
    echo(&atomizer, 300).await;
    atomizer.drain().await.unwrap();
    let monitor = Monitor::new(&memory).unwrap().from(Position::Start);
    let whole = until_stopped(&mut monitor.clone().open().await.unwrap(), atomizer.node()).await;
    let whole = numbers(&whole);

    let mut parts = Vec::new();
    let mut bookmark = None;
    // In the middle of packs, and at their ends.
    for most in [1, 7, 100, 333, usize::MAX] {
        let monitor = match bookmark.take() {
            Some(text) => monitor.clone().after(Bookmark::to_owned(&text)),
            None => monitor.clone(),
        };
        let mut events = monitor.open().await.unwrap();
        let mut taken = 0;
        while taken < most && parts.len() < whole.len() {
            if let Seen::Event(event) = events.next().await {
                parts.push(event.sequence);
                taken += 1;
            }
        }
        let text = events.bookmark().to_string();
        bookmark = Some(text.parse().unwrap());
    }
    assert_eq!(parts, whole);
}

#[tokio::test]
async fn only_what_fits_is_returned() {
    let memory = memory();
    let atomizer = start(&memory).await;
    echo(&atomizer, 20).await;
    let failing = atomizer.call::<Obedient>(Order::Fail("no".to_owned()));
    let failed = failing.electron().unwrap();
    drop(failing.await);
    atomizer.drain().await.unwrap();
    let read = async |filter: Filter| {
        let monitor = Monitor::new(&memory).unwrap().from(Position::Start).filter(filter);
        let mut events = monitor.open().await.unwrap();
        let mut kinds = BTreeMap::<_, usize>::new();
        while let Seen::Event(event) = events.next().await {
            *kinds.entry(event.kind.name()).or_default() += 1;
        }
        Vec::from_iter(kinds)
    };
    assert_eq!(read(Filter::new().severity(Severity::Error)).await, [("failed", 1)]);
    assert_eq!(
        read(Filter::new().kind("completed").kind("draining")).await,
        [("completed", 20), ("draining", 1)]
    );
    let steps = [("failed", 1), ("received", 1), ("sent", 1), ("started", 1)];
    assert_eq!(read(Filter::new().electron(failed)).await, steps);
    assert_eq!(read(Filter::new().atom(AtomId::from_static("other"))).await, []);
    let nobody = NodeId::unique("nobody").unwrap();
    assert_eq!(read(Filter::new().node(nobody)).await, []);
}

#[tokio::test(start_paused = true)]
async fn nodes_are_known_to_be_there_to_have_stopped_and_to_be_gone() {
    let memory = memory();
    let (one, other) = (start(&memory).await, start(&memory).await);
    let mut events = Monitor::new(&memory).unwrap().from(Position::Start).open().await.unwrap();
    let mut nodes = Nodes::default();
    while nodes.list().iter().filter(|node| node.presence.is_some()).count() < 2 {
        nodes.see(&events.next().await);
    }
    let state = |nodes: &Nodes, of: &Atomizer| {
        nodes.list().into_iter().find(|node| node.node == *of.node()).unwrap()
    };
    let presence = state(&nodes, &one).presence.unwrap();
    assert_eq!(presence.process, std::process::id());
    assert_eq!(presence.atoms[0].atom.as_str(), "obedient");
    other.drain().await.unwrap();
    while state(&nodes, &other).state != NodeState::Stopped {
        nodes.see(&events.next().await);
    }
    assert_eq!(state(&nodes, &one).state, NodeState::Alive);
}

#[tokio::test]
async fn a_conductor_that_keeps_nothing_says_so() {
    let error = Monitor::new(&Memory::new()).unwrap_err();
    assert!(matches!(error, MonitorError::NotKept { .. }), "{error}");
}

/// Keeps what the one in it does, when it likes, and may break at any step.
#[derive(Clone, Debug)]
struct Moody {
    memory: Memory,
    mood: Arc<Mood>,
}

#[derive(Debug, Default)]
struct Mood {
    /// Cannot be reached.
    is_away: AtomicBool,
    /// Takes nothing.
    sulks: AtomicBool,
    /// Breaks after each pack, having kept it.
    breaks: AtomicBool,
    cheered_up: Notify,
    /// How often a writer was opened.
    opened: Mutex<usize>,
}

impl Moody {
    fn new() -> Self {
        Self { memory: memory(), mood: Arc::default() }
    }

    fn log(&self) -> Arc<dyn EventLog> {
        self.memory.event_log().unwrap()
    }
}

#[async_trait]
impl Conductor for Moody {
    fn id(&self) -> &ConductorId {
        self.memory.id()
    }

    async fn open(&self, node: &NodeId) -> Result<Arc<dyn Session>, OpenError> {
        self.memory.open(node).await
    }

    fn event_log(&self) -> Option<Arc<dyn EventLog>> {
        Some(Arc::new(self.clone()))
    }
}

#[async_trait]
impl EventLog for Moody {
    async fn writer(&self, node: &NodeId) -> Result<Box<dyn EventWriter>, OpenError> {
        *self.mood.opened.lock().unwrap() += 1;
        if self.mood.is_away.load(Ordering::SeqCst) {
            return Err(OpenError::Unreachable("away".to_owned()));
        }
        let writer = self.log().writer(node).await?;
        Ok(Box::new(MoodyWriter { writer, mood: Arc::clone(&self.mood) }))
    }

    async fn reader(&self, from: Position) -> Result<Box<dyn EventReader>, OpenError> {
        self.log().reader(from).await
    }
}

struct MoodyWriter {
    writer: Box<dyn EventWriter>,
    mood: Arc<Mood>,
}

#[async_trait]
impl EventWriter for MoodyWriter {
    async fn append(&mut self, pack: Pack) -> Result<(), SessionError> {
        while self.mood.sulks.load(Ordering::SeqCst) {
            self.mood.cheered_up.notified().await;
        }
        self.writer.append(pack).await
    }

    async fn kept(&mut self) -> Result<bool, SessionError> {
        let kept = self.writer.kept().await?;
        if self.mood.breaks.load(Ordering::SeqCst) {
            return Err(SessionError::lost("broken"));
        }
        Ok(kept)
    }

    async fn close(self: Box<Self>) {
        self.writer.close().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_is_heard_of_soon_after_a_long_outage() {
    let moody = Moody::new();
    moody.mood.is_away.store(true, Ordering::SeqCst);
    let builder = Atomizer::builder().conductor(moody.clone()).atom(Obedient);
    let atomizer = builder.start().await.unwrap();
    tokio::time::sleep(HOUR).await;
    moody.mood.is_away.store(false, Ordering::SeqCst);
    let back = Instant::now();
    let mut events = Monitor::new(&moody).unwrap().from(Position::Start).open().await.unwrap();
    while !matches!(events.next().await, Seen::Event(_)) {}
    assert!(back.elapsed() < Duration::from_secs(3), "{:?}", back.elapsed());
    atomizer.drain().await.unwrap();
}

#[tokio::test]
async fn what_is_kept_twice_is_seen_once() {
    let moody = Moody::new();
    moody.mood.breaks.store(true, Ordering::SeqCst);
    let builder = Atomizer::builder().conductor(moody.clone()).atom(Obedient);
    let atomizer = builder.start().await.unwrap();
    // Each pack is kept, and not known to be, until it stops breaking.
    while *moody.mood.opened.lock().unwrap() < 4 {
        echo(&atomizer, 1).await;
        tokio::task::yield_now().await;
    }
    moody.mood.breaks.store(false, Ordering::SeqCst);
    atomizer.drain().await.unwrap();
    let mut reader = moody.log().reader(Position::Start).await.unwrap();
    let (mut packs, mut repeated) = (Vec::new(), 0);
    while let Read::Pack { bytes, .. } = reader.next().await.unwrap() {
        repeated += usize::from(packs.contains(&bytes));
        packs.push(bytes);
    }
    assert!(repeated > 0, "it was kept twice");
    let mut events = Monitor::new(&moody).unwrap().from(Position::Start).open().await.unwrap();
    let numbers = numbers(&until_stopped(&mut events, atomizer.node()).await);
    assert_eq!(numbers, Vec::from_iter(0..numbers.len() as u64));
}

#[tokio::test]
async fn a_log_that_takes_nothing_holds_up_no_work_and_what_is_lost_is_counted() {
    let moody = Moody::new();
    moody.mood.sulks.store(true, Ordering::SeqCst);
    let builder = Atomizer::builder().conductor(moody.clone()).atom(Obedient);
    let atomizer = builder.start().await.unwrap();
    // Some 600 bytes each, and 8 MiB are kept back.
    echo(&atomizer, 20_000).await;
    moody.mood.sulks.store(false, Ordering::SeqCst);
    moody.mood.cheered_up.notify_one();
    let mut events = Monitor::new(&moody).unwrap().from(Position::Start).open().await.unwrap();
    let (mut seen, mut missed, mut lost) = (0, 0, 0);
    let mut last;
    let mut drained = false;
    loop {
        match events.next().await {
            Seen::Event(event) => {
                seen += 1;
                last = event.sequence;
                match event.kind {
                    EventKind::EventsLost { events } => lost += events,
                    EventKind::Stopped => break,
                    _ => {}
                }
            }
            Seen::Missed { events, .. } => missed += events,
            _ => {}
        }
        if !std::mem::replace(&mut drained, true) {
            // Events that come when there is room again say what was lost.
            echo(&atomizer, 1).await;
            atomizer.drain().await.unwrap();
        }
    }
    assert!(lost > 0);
    assert_eq!(missed, lost);
    assert_eq!(seen + missed, last + 1);
}

/// The schema of one kind, by its name.
fn schema_of<'a>(schema: &'a Value, kind: &str) -> &'a Value {
    let kinds = schema["oneOf"].as_array().unwrap();
    kinds
        .iter()
        .find(|schema| schema["title"] == kind)
        .unwrap_or_else(|| panic!("{kind} is not in it"))
}

#[tokio::test]
async fn what_is_written_is_what_the_schema_says() {
    let schema = include_str!("../../../docs/events.schema.json");
    let schema: Value = serde_json::from_str(schema).unwrap();
    let mut titles: Vec<_> = schema["oneOf"]
        .as_array()
        .unwrap()
        .iter()
        .map(|kind| kind["title"].as_str().unwrap())
        .collect();
    let mut names = EventKind::NAMES.to_vec();
    titles.sort_unstable();
    names.sort_unstable();
    assert_eq!(titles, names);

    let memory = memory();
    let atomizer = start(&memory).await;
    echo(&atomizer, 1).await;
    for order in [Order::Fail("no".to_owned()), Order::Panic("no".to_owned())] {
        drop(atomizer.call::<Obedient>(order).await);
    }
    atomizer.drain().await.unwrap();
    let mut events = Monitor::new(&memory).unwrap().from(Position::Start).open().await.unwrap();
    let seen = until_stopped(&mut events, atomizer.node()).await;
    for seen in seen {
        let Seen::Event(event) = seen else { continue };
        assert_eq!(event.kind.name(), serde_json::to_value(&event).unwrap()["event"]);
        let written = serde_json::to_value(&event).unwrap();
        let of_kind = schema_of(&schema, event.kind.name());
        let required = of_kind["required"].as_array().unwrap().iter();
        let required = required.chain(schema["required"].as_array().unwrap());
        for field in required {
            assert!(written.get(field.as_str().unwrap()).is_some(), "{field} of {written}");
        }
        for field in written.as_object().unwrap().keys() {
            let is_known =
                [&schema, of_kind].iter().any(|part| !part["properties"][field].is_null());
            assert!(is_known, "{field} of {written}");
        }
    }
}
