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
use tokio::{sync::watch, task::JoinSet, time::timeout};

use crate::support::{Double, blocking, rabbit, serve, soon};

const QUEUE: &str = "atomizer.atom.double";
const DEAD: &str = "atomizer.dead";

/// How many calls are under way at any time.
const IN_FLIGHT: usize = 16;
/// How long it takes at the most until electrons flow.
const FLOWS_WITHIN: Duration = Duration::from_secs(90);
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

    /// Waits until there are answers to what was asked from now on. False when there are none in time, or every call
    /// has failed.
    async fn flow(&mut self) -> bool {
        // What is under way may have been answered already.
        let enough = *self.answered.borrow() + IN_FLIGHT as u64 + FLOW;
        let flowing = self.answered.wait_for(|answered| *answered >= enough);
        matches!(timeout(FLOWS_WITHIN, flowing).await, Ok(Ok(_)))
    }

    async fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        while let Some(ended) = soon(self.callers.join_next()).await {
            ended.unwrap();
        }
        *self.answered.borrow()
    }
}

/// What became of the sessions of a node. Read all the time: an event that waits too long is missed.
#[derive(Clone, Debug, Default)]
struct Heard {
    opened: u32,
    events: Vec<String>,
}

fn listen(mut events: EventStream, watching: &mut JoinSet<()>) -> watch::Receiver<Heard> {
    let (tell, heard) = watch::channel(Heard::default());
    watching.spawn(async move {
        while let Some(event) = events.next().await {
            let Ok(event) = event else { continue };
            match event.kind {
                EventKind::Sent { .. }
                | EventKind::Received { .. }
                | EventKind::Started { .. }
                | EventKind::Completed { .. }
                | EventKind::Suspected { .. } => {}
                EventKind::SessionOpened => tell.send_modify(|heard| {
                    heard.opened += 1;
                    heard.events.push(event.to_string());
                }),
                _ => tell.send_modify(|heard| heard.events.push(event.to_string())),
            }
        }
    });
    heard
}

/// Two nodes on a cluster, one of which keeps asking the other.
struct Scene {
    began: Instant,
    cluster: Arc<Cluster>,
    vhost: Arc<Vhost>,
    asker: Atomizer,
    worker: Atomizer,
    calls: Calls,
    asking: watch::Receiver<Heard>,
    working: watch::Receiver<Heard>,
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
        assert!(calls.flow().await, "it flows undisturbed");
        let mut watching = JoinSet::new();
        let asking = listen(asker.events(), &mut watching);
        let working = listen(worker.events(), &mut watching);
        println!("started after {:?}", began.elapsed());
        Self { began, cluster, vhost, asker, worker, calls, asking, working, watching }
    }

    /// Waits until electrons flow, and says what is the matter when they do not.
    async fn flow(&mut self, phase: &str) {
        let begun = Instant::now();
        if !self.calls.flow().await {
            let queues = self.with(|cluster, vhost| cluster.describe_queues(vhost)).await;
            let events =
                [&self.asking, &self.working].map(|heard| heard.borrow().events.join("\n"));
            panic!("{phase}: nothing flows\n{queues}\n{}", events.join("\n\n"));
        }
        println!("{phase}: flows after {:?}", begun.elapsed());
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
    scene.flow(phase).await;
}

/// Starts what was killed, and waits until electrons flow with all brokers.
async fn back(scene: &mut Scene, phase: &str) {
    scene.with(|cluster, _| cluster.start_again().unwrap()).await;
    scene.flow(&format!("{phase}, and back")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_loses_brokers_loses_no_electron() {
    let mut scene = Scene::start(|| Cluster::start().unwrap()).await;
    let publishes_to = scene.publishes_to().await;
    scene.with(move |cluster, vhost| cluster.lead(publishes_to, vhost, QUEUE).unwrap()).await;
    let phase = "the leader, which the publisher is connected to";
    kill(&mut scene, phase, publishes_to).await;
    back(&mut scene, phase).await;
    assert!(scene.asking.borrow().opened > 0, "it was connected to it");

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

    let opened = |scene: &Scene| [&scene.asking, &scene.working].map(|heard| heard.borrow().opened);
    let before = opened(&scene);
    scene
        .with(|cluster, _| {
            // An inbox that was declared a moment ago does not outlive a crash of RabbitMQ 3.10.
            cluster.flush().unwrap();
            cluster.brokers().iter().for_each(|broker| broker.kill().unwrap());
        })
        .await;
    back(&mut scene, "all at once").await;
    let after = opened(&scene);
    assert!(after[0] > before[0] && after[1] > before[1], "nobody was left: {before:?}, {after:?}");
    scene.end().await;
}

/// Whether a broker that is cut off has found out. Where Khepri keeps what a cluster knows, as from 4.2 on, it does not
/// pause: no majority agrees to anything there.
const PAUSED: &str = "not rabbit:is_running() orelse
    (erlang:nodes() =:= [] andalso code:ensure_loaded(rabbit_khepri) =:= {module, rabbit_khepri} andalso
        erlang:function_exported(rabbit_khepri, is_enabled, 0) andalso rabbit_khepri:is_enabled()).";

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
    soon(scene.asking.wait_for(|heard| heard.opened > 0)).await.expect("it was connected to it");
    println!("cut off: another broker serves the asker after {:?}", cut_off.elapsed());
    scene.flow("cut off").await;
    // Asked on its own side of the cut.
    let paused = scene.with(move |cluster, _| {
        let broker = &cluster.brokers()[minority];
        while broker.ctl(&["eval", PAUSED]).unwrap().trim() != "true" {}
        assert!(broker.pid().is_some(), "the process is there");
    });
    soon(paused).await;
    scene
        .with(move |cluster, _| {
            cluster.bring_back(minority).unwrap();
            cluster.wait_whole().unwrap();
        })
        .await;
    scene.flow("brought back").await;
    scene.end().await;
}
