//! What cannot be published where it goes holds up nothing else.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use atomizer::{CallError, EventKind, prelude::*};
use atomizer_test_support::{Proxy, Vhost};
use tokio::{sync::Semaphore, task::JoinSet};

use crate::support::{
    Double, blocking, delete_queue, lose_leader, rabbit, soon, until, until_it_holds, vhost,
};

/// Answers when it may; so many at a time are delivered.
struct Gate {
    opened: Arc<Semaphore>,
    window: usize,
}

impl Atom for Gate {
    const ID: &'static str = "gate";
    type Input = u64;
    type Output = u64;

    fn options(&self) -> Options {
        Options::default().concurrency(self.window).prefetch(self.window)
    }

    async fn process(&self, _cx: &Context, number: u64) -> Result<u64> {
        drop(self.opened.acquire().await?);
        Ok(number)
    }
}

/// A worker, an asker, and another who has asked and is gone for now, and whose inbox has no leader.
///
/// RabbitMQ leaves such a queue behind when brokers are lost while they make it, and who asked may be lost with them.
struct Scene {
    vhost: Arc<Vhost>,
    proxy: Arc<Proxy>,
    gate: Arc<Semaphore>,
    worker: Atomizer,
    asker: Atomizer,
    gone: Atomizer,
    asked: JoinSet<Result<u64, CallError>>,
}

impl Scene {
    async fn new(window: usize, calls: u64) -> Self {
        let vhost = Arc::new(vhost().await);
        let proxy = Arc::new(Proxy::start(vhost.node().address()).unwrap());
        let gate = Arc::new(Semaphore::new(0));
        let worker = Atomizer::builder().conductor(rabbit(&vhost.url()));
        let worker = worker.atom(Gate { opened: Arc::clone(&gate), window }).atom(Double);
        let worker = worker.start().await.unwrap();
        let gone = rabbit(&vhost.url_through(proxy.address()));
        let gone = Atomizer::builder().conductor(gone).start().await.unwrap();
        let mut asked = JoinSet::new();
        for number in 0..calls {
            asked.spawn(gone.call::<Gate>(number).into_future());
        }
        until_it_holds(&vhost, "atomizer.atom.gate", calls).await;
        let mut asking = gone.events();
        proxy.refuse(true);
        proxy.cut();
        until(&mut asking, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
        let asker = Atomizer::builder().conductor(rabbit(&vhost.url())).start().await.unwrap();
        let scene = Self { vhost, proxy, gate, worker, asker, gone, asked };
        lose_leader(&scene.vhost, &scene.inbox()).await;
        scene
    }

    fn inbox(&self) -> String {
        format!("atomizer.inbox.{}", self.gone.node())
    }

    /// Where there is no inbox any more, nobody waits for an answer.
    async fn end(self) {
        let mut working = self.worker.events();
        delete_queue(&self.vhost, &self.inbox()).await;
        for _ in 0..self.asked.len() {
            let unclaimed =
                |kind: &EventKind| matches!(kind, EventKind::Completed { unclaimed: Some(_), .. });
            until(&mut working, unclaimed).await;
        }
        let Self { vhost, proxy, worker, asker, gone, mut asked, .. } = self;
        asked.shutdown().await;
        asker.drain().await.unwrap();
        worker.drain().await.unwrap();
        drop(gone);
        blocking(move || drop((vhost, proxy))).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_to_an_inbox_without_a_leader_hold_up_no_others() {
    // RabbitMQ reads no more from a channel when 32 are unconfirmed.
    let scene = Scene::new(100, 60).await;
    assert_eq!(soon(scene.asker.call::<Double>(1).into_future()).await.unwrap(), 2);
    scene.gate.add_permits(100);
    let (begun, mut slowest, mut number) = (Instant::now(), Duration::ZERO, 0);
    while begun.elapsed() < Duration::from_secs(15) {
        let asked = Instant::now();
        let answer = soon(scene.asker.call::<Double>(number).into_future()).await;
        assert_eq!(answer.unwrap(), 2 * number);
        slowest = slowest.max(asked.elapsed());
        number += 1;
    }
    println!("{number} answers, the slowest after {slowest:?}");
    assert!(slowest < Duration::from_secs(10), "{slowest:?}");
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_not_taken_use_up_no_window() {
    // More than can be delivered at a time.
    let scene = Scene::new(4, 16).await;
    scene.gate.add_permits(4);
    let asked = Instant::now();
    assert_eq!(soon(scene.asker.call::<Gate>(7).into_future()).await.unwrap(), 7);
    println!("answered after {:?}", asked.elapsed());
    scene.end().await;
}
