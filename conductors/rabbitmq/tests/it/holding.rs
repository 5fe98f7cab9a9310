//! What a node holds for long: on a server that closes the channel of who holds a delivery for three seconds.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use atomizer::{EventKind, EventStream, prelude::*};
use atomizer_rabbitmq::RabbitMq;
use atomizer_test_support::Proxy;
use tokio::{sync::Semaphore, task::JoinSet};

use crate::{
    parking::patience_ends,
    support::{Double, PATIENCE, blocking, impatient, rabbit, soon, until, vhost},
};

/// Counts its runs, and goes on only when it may.
#[derive(Clone)]
struct Long {
    runs: Arc<AtomicUsize>,
    gate: Arc<Semaphore>,
    options: Options,
}

impl Long {
    fn new(options: Options) -> Self {
        Self { runs: Arc::default(), gate: Arc::new(Semaphore::new(0)), options }
    }
}

impl Atom for Long {
    const ID: &'static str = "long";
    type Input = u64;
    type Output = u64;

    fn options(&self) -> Options {
        self.options.clone()
    }

    async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        self.gate.acquire().await?.forget();
        Ok(input)
    }
}

/// Counts its runs, and asks for something that takes long.
#[derive(Clone, Default)]
struct Parent(Arc<AtomicUsize>);

impl Atom for Parent {
    const ID: &'static str = "parent";
    const KIND: Kind = Kind::Spawner;
    type Input = u64;
    type Output = u64;

    async fn process(&self, cx: &Context, input: u64) -> Result<u64> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(cx.call::<Long>(input).await?)
    }
}

fn hasty(url: &str) -> RabbitMq {
    rabbit(url).hold_max(PATIENCE / 3)
}

fn is_parked(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Parked { .. })
}

/// Reads what a node has told: nothing was taken from it.
async fn nothing_was_lost(mut events: EventStream) {
    while let Some(event) = events.next().await {
        let Ok(event) = event else { continue };
        let lost = matches!(
            event.kind,
            EventKind::SubscriptionLost { .. }
                | EventKind::SessionLost { .. }
                | EventKind::Adopted { .. }
                | EventKind::NotSettled { .. }
        );
        assert!(!lost, "{event}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_or_waits_five_times_as_long_as_the_server_is_patient_runs_once() {
    const RUNS: u64 = 100;
    const PARENTS: u64 = 10;
    let broker = impatient().await;
    let url = broker.url("/");
    let (long, parent) = (Long::new(Options::default()), Parent::default());
    let worker = Atomizer::builder().conductor(hasty(&url)).atom(Double);
    let worker = worker.atom(long.clone()).atom(parent.clone()).start().await.unwrap();
    let asker = Atomizer::builder().conductor(hasty(&url)).start().await.unwrap();
    let events = worker.events();
    let mut calls = JoinSet::new();
    for number in 0..RUNS {
        calls.spawn(asker.call::<Long>(number).into_future());
    }
    for number in 0..PARENTS {
        calls.spawn(asker.call::<Parent>(number).into_future());
    }
    // Short work goes on beside it, as fast as it can.
    let (over, doubled) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut flow = JoinSet::new();
    for _ in 0..20 {
        let (asker, over, doubled) = (asker.clone(), Arc::clone(&over), Arc::clone(&doubled));
        flow.spawn(async move {
            while !over.load(Ordering::SeqCst) {
                assert_eq!(asker.call::<Double>(4).await.unwrap(), 8);
                doubled.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    for _ in 0..5 {
        let before = doubled.load(Ordering::SeqCst);
        patience_ends(&url).await;
        assert!(doubled.load(Ordering::SeqCst) - before > 100, "it flows");
    }
    over.store(true, Ordering::SeqCst);
    while let Some(ended) = soon(flow.join_next()).await {
        ended.unwrap();
    }
    assert!(calls.try_join_next().is_none(), "all of them go on");
    long.gate.add_permits((RUNS + PARENTS) as usize);
    while let Some(answer) = soon(calls.join_next()).await {
        answer.unwrap().unwrap();
    }
    worker.drain().await.unwrap();
    assert_eq!(long.runs.load(Ordering::SeqCst) as u64, RUNS + PARENTS, "each ran once");
    assert_eq!(parent.0.load(Ordering::SeqCst) as u64, PARENTS, "each ran once");
    asker.drain().await.unwrap();
    drop((worker, asker));
    nothing_was_lost(events).await;
    blocking(move || {
        let left = broker.ctl(&["-q", "list_queues", "name", "messages"]).unwrap();
        assert!(!left.contains(".lease."), "what was parked is settled: {left}");
        drop(broker);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_a_permit_longer_than_the_server_is_patient_runs_once() {
    let broker = impatient().await;
    let url = broker.url("/");
    let long = Long::new(Options::default().concurrency(1));
    let worker =
        Atomizer::builder().conductor(hasty(&url)).atom(long.clone()).start().await.unwrap();
    let mut events = worker.events();
    let told = worker.events();
    let mut calls = JoinSet::new();
    for number in 0..3 {
        calls.spawn(worker.call::<Long>(number).into_future());
    }
    until(&mut events, |kind| matches!(kind, EventKind::HandedOn { .. })).await;
    for _ in 0..2 {
        patience_ends(&url).await;
    }
    long.gate.add_permits(3);
    while let Some(answer) = soon(calls.join_next()).await {
        answer.unwrap().unwrap();
    }
    worker.drain().await.unwrap();
    assert_eq!(long.runs.load(Ordering::SeqCst), 3, "each ran once");
    drop((worker, events));
    nothing_was_lost(told).await;
    blocking(move || drop(broker)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_parked_on_a_node_that_is_cut_off_runs_on_another() {
    const RUNS: usize = 50;
    let vhost = vhost().await;
    let proxy = Proxy::start(vhost.node().address()).unwrap();
    let (never, willing) = (Long::new(Options::default()), Long::new(Options::default()));
    // It looks once a second, and from then on renews all the time.
    let url = vhost.url_through(proxy.address());
    let cut_off = Atomizer::builder().conductor(rabbit(&url).hold_max(Duration::from_millis(1)));
    let cut_off = cut_off.atom(never).start().await.unwrap();
    let mut events = cut_off.events();
    let asker = Atomizer::builder().conductor(rabbit(&vhost.url())).start().await.unwrap();
    let mut calls = JoinSet::new();
    for number in 0..RUNS as u64 {
        let call = asker.call::<Long>(number).into_future();
        calls.spawn(async move { (number, call.await) });
    }
    for _ in 0..RUNS {
        until(&mut events, is_parked).await;
    }
    let other = Atomizer::builder().conductor(rabbit(&vhost.url())).atom(willing.clone());
    let other = other.start().await.unwrap();
    // What was being renewed comes from both of its copies, and may run for each.
    willing.gate.add_permits(2 * RUNS);
    proxy.refuse(true);
    proxy.cut();
    while let Some(answered) = soon(calls.join_next()).await {
        let (number, answer) = answered.unwrap();
        assert_eq!(answer.unwrap(), number);
    }
    let runs = willing.runs.load(Ordering::SeqCst);
    assert!((RUNS..=2 * RUNS).contains(&runs), "{runs}");
    other.drain().await.unwrap();
    asker.drain().await.unwrap();
    drop(cut_off);
    blocking(move || drop((vhost, proxy))).await;
}

/// Asks itself for the two numbers before, and holds one delivery at a time.
struct Fibonacci;

impl Atom for Fibonacci {
    const ID: &'static str = "fibonacci";
    const KIND: Kind = Kind::Spawner;
    type Input = u64;
    type Output = u64;

    fn options(&self) -> Options {
        Options::default().concurrency(1).prefetch(1)
    }

    async fn process(&self, cx: &Context, n: u64) -> Result<u64> {
        match n {
            0 | 1 => Ok(n),
            n => Ok(cx.fan_out::<Self>([n - 1, n - 2]).fold(0, |sum, part| sum + part).await?),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_atom_that_spawns_itself_finishes_with_a_window_of_one() {
    let vhost = vhost().await;
    // From queue to queue, and each in the slot of its parent.
    for waiting_max in [10_000, 0] {
        let node = Atomizer::builder().conductor(rabbit(&vhost.url())).atom(Fibonacci);
        let node = node.waiting_max(waiting_max).concurrency(1).start().await.unwrap();
        let told = node.events();
        assert_eq!(soon(node.call::<Fibonacci>(14).into_future()).await.unwrap(), 377);
        node.drain().await.unwrap();
        drop(node);
        nothing_was_lost(told).await;
    }
    blocking(move || drop(vhost)).await;
}
