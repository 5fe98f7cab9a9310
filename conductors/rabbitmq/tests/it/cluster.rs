//! A cluster of three brokers that loses some of them: every call resolves once, nothing is lost, work flows again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use atomizer::{EventKind, EventStream, prelude::*};
use atomizer_test_support::{Cluster, Depth, Vhost};
use tokio::{sync::watch, task::JoinSet};

use crate::support::{Double, blocking, rabbit, serve, soon};

const QUEUE: &str = "atomizer.atom.double";
const DEAD: &str = "atomizer.dead";

/// How many calls are under way at any time.
const IN_FLIGHT: usize = 16;
/// So many answers, all asked for afterwards, are flow again.
const FLOW: u64 = 100;

/// Calls that go on all the time; each must have its own answer.
struct Calls {
    callers: JoinSet<()>,
    answered: watch::Receiver<u64>,
    stop: Arc<AtomicBool>,
}

impl Calls {
    fn start(asker: &Atomizer) -> Self {
        let (count, answered) = watch::channel(0);
        let (count, numbers) = (Arc::new(count), Arc::new(AtomicU64::new(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let mut callers = JoinSet::new();
        for _ in 0..IN_FLIGHT {
            let (asker, count) = (asker.clone(), Arc::clone(&count));
            let (numbers, stop) = (Arc::clone(&numbers), Arc::clone(&stop));
            callers.spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    let number = numbers.fetch_add(1, Ordering::SeqCst);
                    let call = asker.call::<Double>(number).deadline(Duration::from_secs(120));
                    assert_eq!(call.await.unwrap(), number * 2);
                    count.send_modify(|count| *count += 1);
                }
            });
        }
        Self { callers, answered, stop }
    }

    /// Waits until there are answers to what was asked from now on.
    async fn flow(&mut self, phase: &str) {
        let begun = Instant::now();
        // What is under way may have been answered already.
        let enough = *self.answered.borrow() + IN_FLIGHT as u64 + FLOW;
        soon(self.answered.wait_for(|answered| *answered >= enough)).await.expect(phase);
        println!("{phase}: flows after {:?}", begun.elapsed());
    }

    async fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        while let Some(ended) = soon(self.callers.join_next()).await {
            ended.unwrap();
        }
        *self.answered.borrow()
    }
}

/// Counts the sessions of a node as they open. Read all the time: an event that waits too long is missed.
fn sessions(mut events: EventStream, watching: &mut JoinSet<()>) -> watch::Receiver<u32> {
    let (count, opened) = watch::channel(0);
    watching.spawn(async move {
        while let Some(event) = events.next().await {
            if event.is_ok_and(|event| matches!(event.kind, EventKind::SessionOpened)) {
                count.send_modify(|count| *count += 1);
            }
        }
    });
    opened
}

/// Two nodes on a cluster, one of which keeps asking the other.
struct Scene {
    began: Instant,
    cluster: Arc<Cluster>,
    vhost: Arc<Vhost>,
    asker: Atomizer,
    worker: Atomizer,
    calls: Calls,
    /// How many sessions each node has opened since the start.
    asking: watch::Receiver<u32>,
    working: watch::Receiver<u32>,
    watching: JoinSet<()>,
}

impl Scene {
    async fn start(start: fn() -> Cluster) -> Self {
        let began = Instant::now();
        let (cluster, vhost) = blocking(move || {
            let cluster = start();
            let vhost = cluster.brokers()[0].vhost().unwrap();
            (Arc::new(cluster), Arc::new(vhost))
        })
        .await;
        // A broker that is silent is known to be gone after four seconds.
        let url = format!("{}?heartbeat=2", cluster.url(vhost.name()));
        let worker = serve(&url).await;
        let asker = Atomizer::builder().name("asker").conductor(rabbit(&url)).start().await;
        let asker = asker.unwrap();
        let mut calls = Calls::start(&asker);
        calls.flow("undisturbed").await;
        let mut watching = JoinSet::new();
        let asking = sessions(asker.events(), &mut watching);
        let working = sessions(worker.events(), &mut watching);
        println!("started after {:?}", began.elapsed());
        Self { began, cluster, vhost, asker, worker, calls, asking, working, watching }
    }

    /// Does something to the cluster, on a thread for that.
    async fn with<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Cluster, &str) -> T + Send + 'static,
    ) -> T {
        let (cluster, vhost) = (Arc::clone(&self.cluster), Arc::clone(&self.vhost));
        blocking(move || act(&cluster, vhost.name())).await
    }

    /// Returns which broker the asker publishes to.
    async fn publishes_to(&self) -> usize {
        let client = format!("{} publishes", self.asker.node());
        self.with(move |cluster, _| cluster.connected_to(0, &client).unwrap()).await
    }

    /// Every call is answered, and nothing is left.
    async fn end(self) {
        let Self { began, cluster, vhost, asker, worker, calls, watching, .. } = self;
        let answered = calls.end().await;
        asker.drain().await.unwrap();
        worker.drain().await.unwrap();
        drop((asker, worker, watching));
        blocking(move || {
            for queue in [QUEUE, DEAD] {
                assert_eq!(vhost.queue_depth(queue).unwrap(), Some(Depth::default()), "{queue}");
            }
            drop((vhost, cluster));
        })
        .await;
        println!("{answered} answers in {:?}", began.elapsed());
    }
}

/// Kills a broker and waits until electrons flow without it.
async fn kill(scene: &mut Scene, phase: &str, broker: usize) {
    scene
        .with(move |cluster, _| {
            cluster.flush().unwrap();
            cluster.brokers()[broker].kill().unwrap();
        })
        .await;
    scene.calls.flow(phase).await;
}

/// Starts what was killed, and waits until electrons flow with all brokers.
async fn back(scene: &mut Scene, phase: &str) {
    scene.with(|cluster, _| cluster.start_again().unwrap()).await;
    scene.calls.flow(&format!("{phase}, and back")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_loses_brokers_loses_no_electron() {
    let mut scene = Scene::start(|| Cluster::start().unwrap()).await;
    let publishes_to = scene.publishes_to().await;
    scene.with(move |cluster, vhost| cluster.lead(publishes_to, vhost, QUEUE).unwrap()).await;
    let phase = "the leader, which the publisher is connected to";
    kill(&mut scene, phase, publishes_to).await;
    back(&mut scene, phase).await;
    assert!(*scene.asking.borrow() > 0, "it was connected to it");

    let leader = scene.with(|cluster, vhost| cluster.leader(0, vhost, QUEUE).unwrap()).await;
    kill(&mut scene, "a follower", (leader + 1) % 3).await;
    back(&mut scene, "a follower").await;
    let still = scene.with(|cluster, vhost| cluster.leader(0, vhost, QUEUE).unwrap()).await;
    assert_eq!(still, leader, "it led all the time");

    let publishes_to = scene.publishes_to().await;
    let (leader, other) = ((publishes_to + 1) % 3, (publishes_to + 2) % 3);
    scene.with(move |cluster, vhost| cluster.lead(leader, vhost, QUEUE).unwrap()).await;
    kill(&mut scene, "the leader, and the publisher is elsewhere", leader).await;
    let leads =
        scene.with(move |cluster, vhost| cluster.leader(other, vhost, QUEUE).unwrap()).await;
    assert_ne!(leads, leader, "another leads since");

    let before = (*scene.asking.borrow(), *scene.working.borrow());
    scene
        .with(|cluster, _| {
            // An inbox that was declared a moment ago does not outlive a crash of RabbitMQ 3.10.
            cluster.flush().unwrap();
            cluster.brokers().iter().for_each(|broker| broker.kill().unwrap());
        })
        .await;
    back(&mut scene, "all at once").await;
    let after = (*scene.asking.borrow(), *scene.working.borrow());
    assert!(after.0 > before.0 && after.1 > before.1, "nobody was left: {before:?}, {after:?}");
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minority_that_is_cut_off_costs_no_electron() {
    let mut scene = Scene::start(|| Cluster::start_apart().unwrap()).await;
    // The asker publishes to it, and it leads the queue.
    let minority = scene.publishes_to().await;
    scene
        .with(move |cluster, vhost| {
            cluster.lead(minority, vhost, QUEUE).unwrap();
            cluster.cut_off(minority).unwrap();
        })
        .await;
    // Silence is detected by heartbeats, within 4 s, and by the other brokers within 10 s.
    let cut_off = Instant::now();
    soon(scene.asking.wait_for(|opened| *opened > 0)).await.expect("it was connected to it");
    println!("cut off: another broker serves the asker after {:?}", cut_off.elapsed());
    scene.calls.flow("cut off").await;
    // Asked on its own side of the cut.
    let paused = scene.with(move |cluster, _| {
        let broker = &cluster.brokers()[minority];
        while broker.ctl(&["eval", "rabbit:is_running()."]).unwrap().trim() != "false" {}
        assert!(broker.pid().is_some(), "the process is there");
    });
    soon(paused).await;
    scene
        .with(move |cluster, _| {
            cluster.bring_back(minority).unwrap();
            cluster.wait_whole().unwrap();
        })
        .await;
    scene.calls.flow("brought back").await;
    scene.end().await;
}
