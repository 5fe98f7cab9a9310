//! Answers: they wait for who is away, and are asked for again when they are lost.

use std::{num::NonZeroUsize, sync::Arc};

use atomizer::{Conductor, EventKind, EventStream, NodeId, Source, prelude::*};
use atomizer_test_support::{Proxy, Vhost};
use serde_json::json;
use tokio::{sync::Semaphore, task::JoinSet};

use crate::support::{
    blocking, delete_queue, lose_leader, rabbit, says_that_it_has_no_leader, says_that_it_is_down,
    soon, stop_queue, until, until_it_holds, vhost,
};

/// Answers when it may.
struct Gate(Arc<Semaphore>);

impl Atom for Gate {
    const ID: &'static str = "gate";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, number: u64) -> Result<u64> {
        self.0.acquire().await?.forget();
        Ok(number)
    }
}

const CALLS: usize = 20;

/// A worker, an asker behind a proxy, and what the asker waits for.
struct Scene {
    vhost: Arc<Vhost>,
    proxy: Arc<Proxy>,
    gate: Arc<Semaphore>,
    worker: Atomizer,
    asker: Atomizer,
    calls: JoinSet<(u64, Result<u64, atomizer::CallError>)>,
}

impl Scene {
    /// All is asked, and all of it runs.
    async fn new() -> Self {
        let vhost = Arc::new(vhost().await);
        let proxy = Arc::new(Proxy::start(vhost.node().address()).unwrap());
        let gate = Arc::new(Semaphore::new(0));
        let worker = Atomizer::builder().conductor(rabbit(&vhost.url()));
        let worker = worker.atom(Gate(Arc::clone(&gate))).concurrency(CALLS).start();
        let worker = worker.await.unwrap();
        let mut working = worker.events();
        let asker = Atomizer::builder().conductor(rabbit(&vhost.url_through(proxy.address())));
        let asker = asker.start().await.unwrap();
        let mut calls = JoinSet::new();
        for number in 0..CALLS as u64 {
            let asker = asker.clone();
            calls.spawn(async move { (number, asker.call::<Gate>(number).await) });
        }
        for _ in 0..CALLS {
            until(&mut working, |kind| matches!(kind, EventKind::Started { .. })).await;
        }
        Self { vhost, proxy, gate, worker, asker, calls }
    }

    fn inbox(&self) -> String {
        format!("atomizer.inbox.{}", self.asker.node())
    }

    /// Everything is answered to the worker's satisfaction.
    async fn answer(&self, mut working: EventStream, as_unclaimed: bool) {
        self.gate.add_permits(CALLS);
        for _ in 0..CALLS {
            let ended = |kind: &EventKind| matches!(kind, EventKind::Completed { .. });
            let EventKind::Completed { unclaimed, .. } = until(&mut working, ended).await else {
                unreachable!("it was waited for")
            };
            assert_eq!(unclaimed.is_some(), as_unclaimed, "{unclaimed:?}");
        }
    }

    async fn all_resolve(mut self) {
        // What was asked again may run again, when it comes after the first has ended.
        self.gate.add_permits(CALLS);
        while let Some(call) = soon(self.calls.join_next()).await {
            let (number, answer) = call.unwrap();
            assert_eq!(answer.unwrap(), number);
        }
        self.asker.drain().await.unwrap();
        self.worker.drain().await.unwrap();
        blocking(move || drop((self.vhost, self.proxy))).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asker_that_was_away_finds_its_answers_in_its_inbox() {
    let scene = Scene::new().await;
    let (mut asking, working) = (scene.asker.events(), scene.worker.events());
    scene.proxy.refuse(true);
    scene.proxy.cut();
    until(&mut asking, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
    scene.answer(working, false).await;
    scene.proxy.refuse(false);
    let again = |kind: &EventKind| {
        assert!(!matches!(kind, EventKind::AskedAgain { .. }), "nothing was lost");
        matches!(kind, EventKind::Subscribed { atom: None })
    };
    until(&mut asking, again).await;
    scene.all_resolve().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asker_whose_inbox_expired_while_it_was_away_asks_again() {
    let scene = Scene::new().await;
    let (mut asking, working) = (scene.asker.events(), scene.worker.events());
    scene.proxy.refuse(true);
    scene.proxy.cut();
    until(&mut asking, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
    // As it goes with its time, which is half an hour.
    delete_queue(&scene.vhost, &scene.inbox()).await;
    scene.answer(working, true).await;
    let working = scene.worker.events();
    scene.proxy.refuse(false);
    let EventKind::AskedAgain { electrons } =
        until(&mut asking, |kind| matches!(kind, EventKind::AskedAgain { .. })).await
    else {
        unreachable!("it was waited for")
    };
    assert_eq!(electrons, CALLS);
    scene.answer(working, false).await;
    scene.all_resolve().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asker_whose_inbox_is_deleted_under_it_asks_again() {
    let scene = Scene::new().await;
    let mut asking = scene.asker.events();
    delete_queue(&scene.vhost, &scene.inbox()).await;
    until(&mut asking, |kind| matches!(kind, EventKind::AskedAgain { electrons: CALLS })).await;
    // What runs is adopted, and answered to the inbox that is there now.
    scene.answer(scene.worker.events(), false).await;
    scene.all_resolve().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_asker_that_is_gone_has_asked_ends_unclaimed() {
    let scene = Scene::new().await;
    let working = scene.worker.events();
    let Scene { asker, mut calls, .. } = scene;
    calls.shutdown().await;
    // It takes its inbox along.
    asker.drain().await.unwrap();
    let scene = Scene { asker, calls, ..scene };
    scene.answer(working, true).await;
    scene.worker.drain().await.unwrap();
    blocking(move || drop((scene.vhost, scene.proxy))).await;
}

/// Whoever makes the inbox anew may be gone before anyone takes from it.
#[tokio::test(flavor = "multi_thread")]
async fn an_inbox_that_was_lost_is_told_of_by_a_later_session() {
    let vhost = Arc::new(vhost().await);
    let (conductor, node) = (rabbit(&vhost.url()), NodeId::unique("asker").unwrap());
    let missed = async || {
        let session = soon(conductor.open(&node)).await.unwrap();
        let one = NonZeroUsize::MIN;
        let subscription = soon(session.subscribe(Source::Inbox, one)).await.unwrap();
        subscription.may_have_missed()
    };
    assert!(missed().await, "it was not there before");
    assert!(!missed().await);
    delete_queue(&vhost, &format!("atomizer.inbox.{node}")).await;
    drop(soon(conductor.open(&node)).await.unwrap());
    assert!(missed().await);
    assert!(!missed().await, "it is told once");
    blocking(move || drop(vhost)).await;
}

/// Asks what nobody has.
struct Nobody;

impl Atom for Nobody {
    const ID: &'static str = "nobody";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, number: u64) -> Result<u64> {
        Ok(number)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_again_is_not_held_up_by_a_full_queue() {
    const STUCK: usize = 300;
    let scene = Scene::new().await;
    let mut stuck = JoinSet::new();
    for number in 0..STUCK as u64 {
        stuck.spawn(scene.asker.call::<Nobody>(number).into_future());
    }
    until_it_holds(&scene.vhost, "atomizer.atom.nobody", STUCK as u64).await;
    let policy = json!({
        "pattern": "^atomizer\\.atom\\.nobody$", "apply-to": "queues",
        "definition": { "max-length": 5 },
    });
    let (limited, path) =
        (Arc::clone(&scene.vhost), format!("/api/policies/{}/short", scene.vhost.name()));
    blocking(move || limited.node().manage("PUT", &path, Some(&policy)).unwrap()).await;
    let (mut asking, working) = (scene.asker.events(), scene.worker.events());
    scene.proxy.refuse(true);
    scene.proxy.cut();
    until(&mut asking, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
    delete_queue(&scene.vhost, &scene.inbox()).await;
    scene.answer(working, true).await;
    scene.proxy.refuse(false);
    const ALL: usize = STUCK + CALLS;
    until(&mut asking, |kind| matches!(kind, EventKind::AskedAgain { electrons: ALL })).await;
    scene.all_resolve().await;
    stuck.shutdown().await;
}

impl Scene {
    /// The asker is away while something happens to its inbox, and makes it anew and asks again when it is back.
    async fn survive(
        self,
        fault: impl AsyncFnOnce(&Arc<Vhost>, &str),
        is_told: impl Fn(&EventKind, &str) -> bool,
    ) {
        let mut asking = self.asker.events();
        self.proxy.refuse(true);
        self.proxy.cut();
        until(&mut asking, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
        let inbox = self.inbox();
        fault(&self.vhost, &inbox).await;
        self.proxy.refuse(false);
        until(&mut asking, |kind| is_told(kind, &inbox)).await;
        let mut lost = 0;
        until(&mut asking, |kind| {
            lost += u32::from(matches!(kind, EventKind::SessionLost { .. }));
            matches!(kind, EventKind::AskedAgain { electrons: CALLS })
        })
        .await;
        // The one that found out, where that costs a connection, and the one that deleted the inbox.
        assert!(lost <= 2, "{lost} sessions were lost");
        // The queue by which it tried whether another would do is gone.
        let vhost = Arc::clone(&self.vhost);
        let queues = blocking(move || vhost.queues().unwrap()).await;
        let trials = queues.iter().filter(|queue| queue.name.starts_with(&format!("{inbox}.")));
        assert_eq!(trials.count(), 0, "{queues:?}");
        // What runs is adopted, and answered to the inbox that is there now.
        self.answer(self.worker.events(), false).await;
        self.all_resolve().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asker_whose_inbox_has_no_leader_any_more_makes_it_anew_and_asks_again() {
    Scene::new().await.survive(lose_leader, says_that_it_has_no_leader).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asker_whose_inbox_is_down_makes_it_anew_and_asks_again() {
    Scene::new().await.survive(stop_queue, says_that_it_is_down).await;
}
