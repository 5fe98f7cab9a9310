//! Children that their parent gives up.

use std::{sync::Arc, time::Duration};

use atomizer::{EventKind, EventStream, FailureKind, prelude::*};
use tokio::{sync::Notify, time::Instant};

use crate::atoms::{Gated, started, until, watched};

/// Asks so many children, and gives them up in its first attempt, when it is told to.
struct Fickle {
    changes_its_mind: Arc<Notify>,
}

impl Atom for Fickle {
    const ID: &'static str = "fickle";
    const KIND: Kind = Kind::Spawner;
    type Input = u64;
    type Output = u64;

    async fn process(&self, cx: &Context, children: u64) -> Result<u64> {
        let asking = cx.fan_out::<Gated>(0..children).fold(0, |sum, number| sum + number);
        tokio::select! {
            sum = asking => Ok(sum?),
            () = self.changes_its_mind.notified(), if cx.attempt() == 1 => {
                Err(AtomError::msg("it changed its mind"))
            }
        }
    }
}

/// Asks a parent, which has not been begun before, as far as that knows, in each attempt of this.
struct Grandparent;

impl Atom for Grandparent {
    const ID: &'static str = "grandparent";
    const KIND: Kind = Kind::Spawner;
    type Input = u64;
    type Output = u64;

    async fn process(&self, cx: &Context, children: u64) -> Result<u64> {
        Ok(cx.call::<Fickle>(children).await?)
    }
}

/// A node with the parent, and one with room for one child.
struct Scene {
    changes_its_mind: Arc<Notify>,
    parents: Atomizer,
    gated: Gated,
    children: Atomizer,
    events: EventStream,
}

impl Scene {
    async fn new() -> Self {
        let memory = Memory::new();
        let changes_its_mind = Arc::new(Notify::new());
        let fickle = Fickle { changes_its_mind: Arc::clone(&changes_its_mind) };
        let parents = Atomizer::builder().conductor(memory.clone());
        let parents = parents.atom(fickle).atom(Grandparent);
        let parents = parents.drain_timeout(Duration::ZERO).start().await.unwrap();
        let gated = Gated::new(Options::default().concurrency(1));
        let children = Atomizer::builder().conductor(memory).atom(gated.clone());
        let (children, events) = watched(children).await;
        Self { changes_its_mind, parents, gated, children, events }
    }

    /// Waits until so many children have ended because they were given up. Returns how many had been begun.
    async fn given_up(&mut self, count: usize) -> usize {
        let (mut begun, mut given_up) = (0, 0);
        while given_up < count {
            let event = until(&mut self.events, |_| true).await;
            match event.kind {
                EventKind::Started { .. } => begun += 1,
                EventKind::Failed { failure, .. } => {
                    assert_eq!(failure.kind, FailureKind::Expired);
                    assert_eq!(failure.message, "who asked gave it up");
                    given_up += 1;
                }
                _ => {}
            }
        }
        begun
    }
}

#[tokio::test(start_paused = true)]
async fn children_that_are_given_up_are_stopped_or_never_begun() {
    let mut scene = Scene::new().await;
    let parents = scene.parents.clone();
    let call = tokio::spawn(async move { parents.call::<Fickle>(100).await });
    until(&mut scene.events, started).await;
    let told = Instant::now();
    scene.changes_its_mind.notify_one();
    assert!(call.await.unwrap().is_err());
    assert_eq!(scene.given_up(100).await, 0, "of those that had not begun");
    assert!(told.elapsed() < Duration::from_secs(1), "after {:?}", told.elapsed());
    scene.gated.open(1);
    assert_eq!(scene.children.call::<Gated>(7).await.unwrap(), 7, "its place is free");
}

#[tokio::test(start_paused = true)]
async fn a_parent_that_begins_anew_gets_the_children_that_it_had_given_up() {
    let mut scene = Scene::new().await;
    let parents = scene.parents.clone();
    let policy = Policy::retry(1).backoff(Backoff::none());
    let call = tokio::spawn(async move { parents.call::<Fickle>(10).policy(policy).await });
    until(&mut scene.events, started).await;
    scene.changes_its_mind.notify_one();
    scene.given_up(10).await;
    scene.gated.open(10);
    assert_eq!(call.await.unwrap().unwrap(), 45);
}

#[tokio::test(start_paused = true)]
async fn a_parent_that_is_asked_anew_gets_the_children_that_it_had_given_up() {
    let mut scene = Scene::new().await;
    let parents = scene.parents.clone();
    let policy = Policy::retry(1).backoff(Backoff::none());
    let call = tokio::spawn(async move { parents.call::<Grandparent>(10).policy(policy).await });
    until(&mut scene.events, started).await;
    scene.changes_its_mind.notify_one();
    scene.given_up(10).await;
    scene.gated.open(10);
    assert_eq!(call.await.unwrap().unwrap(), 45);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stops_gives_up_the_children_of_its_parents() {
    let mut scene = Scene::new().await;
    let parents = scene.parents.clone();
    let call = tokio::spawn(async move { parents.call::<Fickle>(10).await });
    until(&mut scene.events, started).await;
    scene.parents.drain().await.unwrap();
    scene.given_up(10).await;
    call.abort();
}
