//! Electrons that an atom sends and does not wait for: exactly when it succeeds, at once, many, later.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use atomizer::{EventKind, ResultsId, SendError, prelude::*};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::atoms::until;

/// Notes what it is given, and when.
#[derive(Clone, Default)]
struct Note(Arc<Mutex<Vec<(u64, Instant)>>>);

impl Note {
    fn noted(&self) -> Vec<u64> {
        let mut noted: Vec<_> = self.0.lock().unwrap().iter().map(|(number, _)| *number).collect();
        noted.sort_unstable();
        noted
    }
}

impl Atom for Note {
    const ID: &'static str = "note";
    type Input = u64;
    type Output = ();

    async fn process(&self, _cx: &Context, number: u64) -> Result<()> {
        self.0.lock().unwrap().push((number, Instant::now()));
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
enum Order {
    Succeed,
    FailOnce,
    Fail,
    PutOutTooMuch,
    SpawnTooMuch,
    Later,
    All(u64),
    Report(u64),
}

const RESULTS: ResultsId = ResultsId::from_static("notes");
const BYTES_MAX: usize = 1000;
const DELAY: Duration = Duration::from_secs(5);

/// Spawns 1 and 2 when it succeeds, and does as it is told.
struct Parent;

impl Atom for Parent {
    const ID: &'static str = "parent";
    const KIND: Kind = Kind::Spawner;
    type Input = Order;
    type Output = String;

    async fn process(&self, cx: &Context, order: Order) -> Result<String> {
        match order {
            Order::All(children) => {
                return Ok(cx.spawn_all::<Note>(0..children).await?.to_string());
            }
            Order::Report(children) => {
                let results_to = cx.result_address(&RESULTS).await?;
                let spawning = cx.spawning().results_to(results_to);
                return Ok(spawning.all::<Note>(0..children).await?.to_string());
            }
            Order::Later => drop(cx.spawning().after(DELAY).on_success::<Note>(3)?),
            Order::SpawnTooMuch => {
                let Err(CallError::NotSent { source, .. }) =
                    cx.spawn::<Words>("x".repeat(BYTES_MAX))
                else {
                    return Ok("it was taken".to_owned());
                };
                return Ok(source.to_string());
            }
            _ => {}
        }
        cx.spawn::<Note>(1)?;
        cx.spawn::<Note>(2)?;
        match order {
            Order::Fail => Err(AtomError::msg("as told")),
            Order::FailOnce if cx.attempt() == 1 => Err(AtomError::msg("as told")),
            Order::PutOutTooMuch => Ok("x".repeat(BYTES_MAX)),
            _ => Ok("done".to_owned()),
        }
    }
}

struct Words;

impl Atom for Words {
    const ID: &'static str = "words";
    type Input = String;
    type Output = ();

    async fn process(&self, _cx: &Context, _words: String) -> Result<()> {
        Ok(())
    }
}

async fn start() -> (Atomizer, Note) {
    start_on(Memory::new().payload_bytes_max(BYTES_MAX)).await
}

async fn start_on(memory: Memory) -> (Atomizer, Note) {
    let note = Note::default();
    let builder = Atomizer::builder().conductor(memory).atom(Parent).atom(note.clone());
    (builder.start().await.unwrap(), note)
}

/// Waits until so many have run, and stops the node: there are no more.
async fn end(atomizer: Atomizer, mut events: atomizer::EventStream, notes: usize) {
    let of_note = |kind: &EventKind| matches!(kind, EventKind::Completed { atom, .. } if atom.as_str() == Note::ID);
    for _ in 0..notes {
        until(&mut events, of_note).await;
    }
    atomizer.drain().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_spawned_is_sent_exactly_when_the_parent_succeeds() {
    let table: [(Order, &[u64]); 4] = [
        (Order::Succeed, &[1, 2]),
        (Order::FailOnce, &[1, 2]),
        (Order::Fail, &[]),
        (Order::PutOutTooMuch, &[]),
    ];
    for (order, expected) in table {
        let (atomizer, note) = start().await;
        let events = atomizer.events();
        let policy = Policy::retry(1);
        let answer = atomizer.call::<Parent>(order).policy(policy).await;
        assert_eq!(answer.is_ok(), !expected.is_empty(), "{order:?}: {answer:?}");
        end(atomizer, events, expected.len()).await;
        assert_eq!(note.noted(), expected, "{order:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_spawned_for_later_begins_then() {
    let (atomizer, note) = start().await;
    let (events, begun) = (atomizer.events(), Instant::now());
    atomizer.call::<Parent>(Order::Later).await.unwrap();
    end(atomizer, events, 3).await;
    let late = note.0.lock().unwrap().iter().find(|(number, _)| *number == 3).unwrap().1;
    assert!(late - begun >= DELAY, "{:?}", late - begun);
}

#[tokio::test(start_paused = true)]
async fn many_are_spawned_in_batches() {
    let (atomizer, note) = start().await;
    let events = atomizer.events();
    assert_eq!(atomizer.call::<Parent>(Order::All(1000)).await.unwrap(), "1000");
    end(atomizer, events, 1000).await;
    assert_eq!(note.noted(), (0..1000).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn what_could_never_be_sent_is_refused_when_it_is_spawned() {
    let (atomizer, _) = start().await;
    let said = atomizer.call::<Parent>(Order::SpawnTooMuch).await.unwrap();
    let too_large = SendError::TooLarge { bytes: BYTES_MAX + 2, bytes_max: BYTES_MAX };
    assert_eq!(said, too_large.to_string());
    atomizer.drain().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn outcomes_wait_at_a_result_address_for_whoever_reads_them() {
    let memory = Memory::new();
    let (asker, _) = start_on(memory.clone()).await;
    let events = asker.events();
    assert_eq!(asker.call::<Parent>(Order::Report(100)).await.unwrap(), "100");
    end(asker, events, 100).await;
    let reader = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let mut seen = std::collections::HashSet::new();
    {
        let mut results = reader.results(RESULTS);
        for _ in 0..50 {
            assert!(seen.insert(results.next().await.unwrap().electron), "each comes once");
        }
    }
    // The last that was returned was not done with.
    let mut results = reader.results(RESULTS);
    let mut again = 0;
    for _ in 0..51 {
        again += usize::from(!seen.insert(results.next().await.unwrap().electron));
    }
    results.done().await;
    assert_eq!((seen.len(), again), (100, 1));
    let (ended, none) = tokio::join!(reader.drain(), results.next());
    ended.unwrap();
    assert!(none.is_none(), "a node that drains reads no more");
}
