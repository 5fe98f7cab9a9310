//! What becomes of children when their parent begins anew.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use atomizer::{EventKind, EventStream, prelude::*};
use tokio::sync::Notify;

use crate::atoms::{Gated, started, until, watched};

/// How long the first attempt wants its child.
const HURRY: Duration = Duration::from_secs(5);

/// Calls a child with the first number, and lets go of it when it is told to; in its next attempt with the second.
struct Wavering {
    lets_go: Arc<Notify>,
}

impl Atom for Wavering {
    const ID: &'static str = "wavering";
    const KIND: Kind = Kind::Spawner;
    type Input = (u64, u64);
    type Output = u64;

    async fn process(&self, cx: &Context, (first, second): (u64, u64)) -> Result<u64> {
        if cx.attempt() > 1 {
            return Ok(cx.call::<Gated>(second).await?);
        }
        tokio::select! {
            answer = cx.call::<Gated>(first).deadline(HURRY).into_future() => Ok(answer?),
            () = self.lets_go.notified() => Err(AtomError::msg("it lets go")),
        }
    }
}

/// Sums what its children say.
struct Sum;

impl Atom for Sum {
    const ID: &'static str = "sum";
    const KIND: Kind = Kind::Spawner;
    type Input = Vec<u64>;
    type Output = u64;

    async fn process(&self, cx: &Context, numbers: Vec<u64>) -> Result<u64> {
        Ok(cx.fan_out::<Gated>(numbers).fold(0, |sum, number| sum + number).await?)
    }
}

async fn node_of_children(memory: &Memory, gated: &Gated) -> (Atomizer, EventStream) {
    watched(Atomizer::builder().conductor(memory.clone()).atom(gated.clone())).await
}

fn adopted(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Adopted { .. })
}

/// Calls `Wavering`, and has it let go of its first child when that runs.
async fn let_go(
    numbers: (u64, u64),
) -> (Gated, EventStream, tokio::task::JoinHandle<u64>, EventStream) {
    let_go_of(Options::default(), numbers).await
}

async fn let_go_of(
    options: Options,
    numbers: (u64, u64),
) -> (Gated, EventStream, tokio::task::JoinHandle<u64>, EventStream) {
    let (memory, gated) = (Memory::new(), Gated::new(options));
    let (children, mut events) = node_of_children(&memory, &gated).await;
    let lets_go = Arc::new(Notify::new());
    let wavering = Wavering { lets_go: Arc::clone(&lets_go) };
    let parents = Atomizer::builder().conductor(memory.clone()).atom(wavering);
    let (parents, parents_events) = watched(parents).await;
    let call = tokio::spawn(async move {
        let policy = Policy::retry(1).backoff(Backoff::none());
        let answer = parents.call::<Wavering>(numbers).policy(policy).await.unwrap();
        children.drain().await.unwrap();
        answer
    });
    until(&mut events, started).await;
    lets_go.notify_one();
    (gated, events, call, parents_events)
}

#[tokio::test(start_paused = true)]
async fn an_answer_to_an_earlier_attempt_is_none_to_what_is_asked_now() {
    let (gated, mut events, call, mut parents_events) = let_go((5, 7)).await;
    // The same id, and something else: it has to wait.
    until(&mut events, |kind| matches!(kind, EventKind::HandedOn { .. })).await;
    gated.open(1);
    until(&mut parents_events, |kind| matches!(kind, EventKind::AnswerDropped { .. })).await;
    until(&mut events, started).await;
    gated.open(1);
    assert_eq!(call.await.unwrap(), 7);
}

#[tokio::test(start_paused = true)]
async fn what_the_next_attempt_asks_again_is_adopted_where_it_runs() {
    let (gated, mut events, call, _) = let_go((5, 5)).await;
    until(&mut events, adopted).await;
    // By a clock that is paused: the next attempt has more time.
    tokio::time::sleep(2 * HURRY).await;
    gated.open(1);
    assert_eq!(call.await.unwrap(), 5);
    assert_eq!(gated.running_most.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_second_life_adopts_the_children_that_have_just_finished() {
    let memory = Memory::new();
    let gated = Gated::new(Options::default().concurrency(1));
    let (children, mut events) = node_of_children(&memory, &gated).await;
    let parents = || {
        let builder = Atomizer::builder().conductor(memory.clone()).atom(Sum);
        builder.drain_timeout(Duration::ZERO).start()
    };
    let first = parents().await.unwrap();
    let caller = children.clone();
    let call = tokio::spawn(async move { caller.call::<Sum>(vec![1, 20]).await });
    let child = until(&mut events, started).await.electron();
    gated.open(1);
    until(&mut events, |kind| matches!(kind, EventKind::Completed { .. })).await;
    first.drain().await.unwrap();
    let _second = parents().await.unwrap();
    assert_eq!(until(&mut events, adopted).await.electron(), child);
    gated.open(1);
    assert_eq!(call.await.unwrap().unwrap(), 21);
    assert_eq!(gated.gate.available_permits(), 0, "each ran once");
}

#[tokio::test(start_paused = true)]
async fn another_try_has_its_children_run_again() {
    /// Wants to hear an even number.
    struct Polling;
    impl Atom for Polling {
        const ID: &'static str = "polling";
        const KIND: Kind = Kind::Spawner;
        type Input = ();
        type Output = u64;
        async fn process(&self, cx: &Context, (): ()) -> Result<u64> {
            match cx.call::<Count>(()).await? {
                odd if odd % 2 == 1 => Err(AtomError::msg("not yet")),
                even => Ok(even),
            }
        }
    }
    /// Counts how often it is asked.
    #[derive(Default)]
    struct Count(AtomicU64);
    impl Atom for Count {
        const ID: &'static str = "count";
        type Input = ();
        type Output = u64;
        async fn process(&self, _cx: &Context, (): ()) -> Result<u64> {
            Ok(self.0.fetch_add(1, Ordering::SeqCst) + 1)
        }
    }
    let memory = Memory::new();
    let children = Atomizer::builder().conductor(memory.clone()).atom(Count::default());
    let _children = children.start().await.unwrap();
    let parents = Atomizer::builder().conductor(memory).atom(Polling).start().await.unwrap();
    let call = parents.call::<Polling>(()).policy(Policy::retry(1).backoff(Backoff::none()));
    assert_eq!(call.await.unwrap(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_runs_at_most_once_answers_the_question_that_is_asked_now() {
    let once = Options::default().at_most_once();
    let (gated, _events, call, mut parents_events) = let_go_of(once, (5, 5)).await;
    until(&mut parents_events, |kind| matches!(kind, EventKind::Retried { .. })).await;
    gated.open(1);
    assert_eq!(call.await.unwrap(), 5);
    let once = Options::default().at_most_once();
    let (gated, mut events, call, mut parents_events) = let_go_of(once, (5, 7)).await;
    until(&mut events, |kind| matches!(kind, EventKind::HandedOn { .. })).await;
    gated.open(1);
    until(&mut parents_events, |kind| matches!(kind, EventKind::AnswerDropped { .. })).await;
    gated.open(1);
    assert_eq!(call.await.unwrap(), 7);
}
