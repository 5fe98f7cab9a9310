//! Faults in the middle of work: nothing is lost, every call resolves once, the node takes electrons again.

use std::{
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use atomizer::{
    Address, AtomId, CallError, Conductor, Electron, Envelope, EventKind, Monitor, NodeId, Payload,
    Position, Seen, Source, prelude::*,
};
use atomizer_test_support::{Broker, Proxy};
use tokio::{sync::Semaphore, task::JoinSet, time::timeout};

use crate::support::{
    Double, blocking, delete_queue, impatient, lose_leader, rabbit, says_that_it_has_no_leader,
    says_that_it_is_down, serve, soon, start_queue, stop_queue, stop_streams, until, vhost,
};

/// Asks for the doubles of so many numbers at once.
fn ask(asker: &Atomizer, numbers: std::ops::Range<u64>) -> JoinSet<Result<(u64, u64), CallError>> {
    let mut calls = JoinSet::new();
    for number in numbers {
        let call = asker.call::<Double>(number).into_future();
        calls.spawn(async move { Ok((number, call.await?)) });
    }
    calls
}

/// Every call has its own answer, and only that.
async fn all_answered(calls: JoinSet<Result<(u64, u64), CallError>>) {
    for answer in soon(calls.join_all()).await {
        let (number, double) = answer.unwrap();
        assert_eq!(double, number * 2);
    }
}

/// Asks before, during and after a fault. Both sides must have lost their sessions: the fault was real.
async fn survive(asker: Atomizer, worker: Atomizer, fault: impl FnOnce() + Send + 'static) {
    let (mut asking, mut working) = (asker.events(), worker.events());
    let mut calls = ask(&asker, 0..500);
    let before = soon(calls.join_next()).await.unwrap().unwrap().unwrap();
    assert_eq!(before.1, before.0 * 2);
    let during = blocking(fault);
    let more = ask(&asker, 500..1000);
    during.await;
    for events in [&mut asking, &mut working] {
        until(events, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
        until(events, |kind| matches!(kind, EventKind::SessionOpened)).await;
    }
    all_answered(calls).await;
    all_answered(more).await;
    all_answered(ask(&asker, 1000..1100)).await;
    asker.drain().await.unwrap();
    worker.drain().await.unwrap();
}

async fn asker(url: &str) -> Atomizer {
    Atomizer::builder().conductor(rabbit(url)).start().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_restart_loses_nothing() {
    let broker = Arc::new(blocking(|| Broker::start().unwrap()).await);
    let url = broker.url("/");
    let (asker, worker) = (asker(&url).await, serve(&url).await);
    let restarted = Arc::clone(&broker);
    survive(asker, worker, move || restarted.restart().unwrap()).await;
    blocking(move || drop(broker)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_crash_loses_nothing() {
    let broker = Arc::new(blocking(|| Broker::start().unwrap()).await);
    let url = broker.url("/");
    let (asker, worker) = (asker(&url).await, serve(&url).await);
    let crashed = Arc::clone(&broker);
    survive(asker, worker, move || {
        // A queue that was declared a moment ago does not outlive a crash of RabbitMQ 3.10.
        crashed.flush().unwrap();
        crashed.kill().unwrap();
        crashed.start_again().unwrap();
    })
    .await;
    blocking(move || drop(broker)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_the_broker_closes_lose_nothing() {
    let vhost = Arc::new(vhost().await);
    let (asker, worker) = (asker(&vhost.url()).await, serve(&vhost.url()).await);
    let closing = Arc::clone(&vhost);
    survive(asker, worker, move || closing.close_connections("a test").unwrap()).await;
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_cut_lose_nothing() {
    let vhost = vhost().await;
    let proxy = Arc::new(Proxy::start(vhost.node().address()).unwrap());
    let url = vhost.url_through(proxy.address());
    let (asker, worker) = (asker(&url).await, serve(&url).await);
    let cut = Arc::clone(&proxy);
    survive(asker, worker, move || cut.cut()).await;
    blocking(move || drop((vhost, proxy))).await;
}

/// RabbitMQ leaves such a queue behind when brokers are lost while they make it. What could be in it is the operator's
/// to give up.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_without_a_leader_is_named_and_served_again_once_it_was_deleted() {
    let vhost = Arc::new(vhost().await);
    let queue = "atomizer.atom.double";
    let before = serve(&vhost.url()).await;
    before.drain().await.unwrap();
    lose_leader(&vhost, queue).await;
    let worker = serve(&vhost.url()).await;
    let mut events = worker.events();
    until(&mut events, |kind| says_that_it_has_no_leader(kind, queue)).await;
    delete_queue(&vhost, queue).await;
    let served = |kind: &EventKind| matches!(kind, EventKind::Subscribed { atom: Some(_) });
    until(&mut events, served).await;
    let asker = asker(&vhost.url()).await;
    all_answered(ask(&asker, 0..10)).await;
    asker.drain().await.unwrap();
    worker.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

struct Triple;

impl Atom for Triple {
    const ID: &'static str = "triple";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
        Ok(3 * input)
    }
}

/// The broker answers who consumes it with an error that closes the connection, and with it all that others have taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_whose_process_is_down_costs_its_own_atom_only() {
    const TRIES: usize = 5;
    let queue = "atomizer.atom.triple";
    let vhost = Arc::new(vhost().await);
    let builder = || Atomizer::builder().conductor(rabbit(&vhost.url())).atom(Double).atom(Triple);
    let before = builder().start().await.unwrap();
    before.drain().await.unwrap();
    stop_queue(&vhost, queue).await;
    let worker = builder().start().await.unwrap();
    let asker = asker(&vhost.url()).await;
    let mut events = worker.events();
    // One session at the most: of the first try, which may be over by now.
    let mut sessions_lost = 0;
    for _ in 0..TRIES {
        until(&mut events, |kind| {
            sessions_lost += u32::from(matches!(kind, EventKind::SessionLost { .. }));
            says_that_it_is_down(kind, queue)
        })
        .await;
        all_answered(ask(&asker, 0..10)).await;
    }
    assert!(sessions_lost <= 1, "{sessions_lost}");
    start_queue(&vhost, queue).await;
    assert_eq!(soon(asker.call::<Triple>(2).into_future()).await.unwrap(), 6);
    asker.drain().await.unwrap();
    worker.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

/// A consumer that the broker makes when nobody is there any more would be brought answers for ever, and those who wait
/// for them would wait in vain.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_dropped_while_it_subscribes_leaves_nothing_behind() {
    const MOMENTS: u32 = 80;
    let vhost = vhost().await;
    let conductor = rabbit(&vhost.url());
    let mut subscribed = 0;
    for moment in 0..MOMENTS {
        let session = conductor.open(&NodeId::unique("node").unwrap()).await.unwrap();
        let subscribing = session.subscribe(Source::Inbox, NonZeroUsize::MIN);
        let spent = Duration::from_micros(100) * moment;
        subscribed += u32::from(timeout(spent, subscribing).await.is_ok());
    }
    assert!(subscribed < MOMENTS, "some were dropped before");
    blocking(move || {
        let begun = Instant::now();
        loop {
            let left = vhost.connections().unwrap();
            if left.is_empty() {
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{} are left", left.len());
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_queue_is_made_again_and_served() {
    let vhost = Arc::new(vhost().await);
    let (asker, worker) = (asker(&vhost.url()).await, serve(&vhost.url()).await);
    all_answered(ask(&asker, 0..10)).await;
    let mut events = worker.events();
    delete_queue(&vhost, "atomizer.atom.double").await;
    until(&mut events, |kind| matches!(kind, EventKind::SubscriptionLost { .. })).await;
    all_answered(ask(&asker, 10..20)).await;
    asker.drain().await.unwrap();
    worker.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_inbox_is_made_again() {
    let vhost = Arc::new(vhost().await);
    let (asker, worker) = (asker(&vhost.url()).await, serve(&vhost.url()).await);
    all_answered(ask(&asker, 0..10)).await;
    let mut events = asker.events();
    delete_queue(&vhost, &format!("atomizer.inbox.{}", asker.node())).await;
    until(&mut events, |kind| matches!(kind, EventKind::SubscriptionLost { atom: None, .. })).await;
    until(&mut events, |kind| matches!(kind, EventKind::Subscribed { atom: None })).await;
    all_answered(ask(&asker, 10..20)).await;
    asker.drain().await.unwrap();
    worker.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_that_ends_behind_its_last_deliveries_says_so() {
    let vhost = Arc::new(vhost().await);
    let conductor = rabbit(&vhost.url());
    let session = conductor.open(&NodeId::unique("node").unwrap()).await.unwrap();
    let atom = AtomId::from_static("ending");
    let ten = NonZeroUsize::new(10).unwrap();
    let mut subscription = session.subscribe(Source::Atom(atom.clone()), ten).await.unwrap();
    let electron = || Electron::new(atom.clone(), Payload::json("1"));
    let envelope = || Envelope::new(Address::Atom(atom.clone()), electron().into());
    let sent = session.send(&[envelope(), envelope(), envelope()]).await;
    assert!(sent.iter().all(Result::is_ok), "{sent:?}");
    let first = soon(subscription.next(NonZeroUsize::MIN)).await.unwrap();
    let mut witness = session.subscribe(Source::Atom(atom.clone()), ten).await.unwrap();
    delete_queue(&vhost, "atomizer.atom.ending").await;
    assert!(soon(witness.next(ten)).await.is_err(), "the broker tells all subscribers");
    // The end lies behind two deliveries that are here already. It must not be lost with them.
    let mut held = Vec::new();
    let end = async {
        while let Ok(deliveries) = subscription.next(ten).await {
            held.extend(deliveries);
        }
    };
    soon(end).await;
    assert!(soon(subscription.next(ten)).await.is_err(), "and it stays ended");
    drop((first, held));
    session.close().await;
    blocking(move || drop(vhost)).await;
}

/// Tells that it runs, and goes on only when it may.
struct Held {
    runs: Arc<AtomicUsize>,
    gate: Arc<Semaphore>,
}

impl Atom for Held {
    const ID: &'static str = "held";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        self.gate.acquire().await?.forget();
        Ok(input)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_electron_in_work_on_a_node_that_is_cut_off_runs_on_another() {
    let vhost = vhost().await;
    let proxy = Proxy::start(vhost.node().address()).unwrap();
    let held = |gate: usize| {
        let runs = Arc::new(AtomicUsize::new(0));
        (Arc::clone(&runs), Held { runs, gate: Arc::new(Semaphore::new(gate)) })
    };
    let (_, never) = held(0);
    let cut_off =
        Atomizer::builder().conductor(rabbit(&vhost.url_through(proxy.address()))).atom(never);
    let cut_off = cut_off.start().await.unwrap();
    let mut events = cut_off.events();
    let asker = asker(&vhost.url()).await;
    let mut call = JoinSet::new();
    call.spawn(asker.call::<Held>(9).into_future());
    until(&mut events, |kind| matches!(kind, EventKind::Started { .. })).await;
    let (runs, willing) = held(1);
    let other =
        Atomizer::builder().conductor(rabbit(&vhost.url())).atom(willing).start().await.unwrap();
    proxy.refuse(true);
    proxy.cut();
    assert_eq!(soon(call.join_next()).await.unwrap().unwrap().unwrap(), 9);
    assert_eq!(runs.load(Ordering::SeqCst), 1, "the other node ran it");
    other.drain().await.unwrap();
    asker.drain().await.unwrap();
    drop(cut_off);
    blocking(move || drop((vhost, proxy))).await;
}

/// The server closes the channel under what runs, as it does when its acknowledgement time-out is over: each
/// is delivered again, to the node that still runs it.
#[tokio::test(flavor = "multi_thread")]
async fn what_runs_while_the_server_closes_its_channel_is_adopted() {
    const ELECTRONS: usize = 10;
    let broker = impatient().await;
    let url = broker.url("/");
    let (runs, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let held = Held { runs: Arc::clone(&runs), gate: Arc::clone(&gate) };
    let worker = Atomizer::builder().conductor(rabbit(&url)).atom(held).start().await.unwrap();
    let mut events = worker.events();
    let asker = asker(&url).await;
    let mut asked = asker.events();
    let mut calls = JoinSet::new();
    for number in 0..ELECTRONS as u64 {
        let asker = asker.clone();
        calls.spawn(async move { (number, asker.call::<Held>(number).await) });
    }
    let lost = |kind: &EventKind| matches!(kind, EventKind::SubscriptionLost { atom: Some(_), .. });
    let EventKind::SubscriptionLost { error, .. } = until(&mut events, lost).await else {
        unreachable!("it was waited for")
    };
    // From 4.3 on it takes away the consumer and leaves the channel as it is.
    let why = ["PRECONDITION_FAILED", "timed out", "the broker ended the subscription"];
    assert!(why.iter().any(|why| error.contains(why)), "{error}");
    for _ in 0..ELECTRONS {
        until(&mut events, |kind| matches!(kind, EventKind::Adopted { .. })).await;
    }
    gate.add_permits(ELECTRONS);
    while let Some(answered) = soon(calls.join_next()).await {
        let (number, answer) = answered.unwrap();
        assert_eq!(answer.unwrap(), number);
    }
    assert_eq!(runs.load(Ordering::SeqCst), ELECTRONS, "each ran once");
    worker.drain().await.unwrap();
    asker.drain().await.unwrap();
    drop(asker);
    while let Some(event) = asked.next().await {
        let twice = event.is_ok_and(|event| matches!(event.kind, EventKind::AnswerDropped { .. }));
        assert!(!twice, "each was answered once");
    }
    blocking(move || drop(broker)).await;
}

/// So it is for a moment after a stream was made, or its brokers were started.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_a_replica_is_read_once_it_has_one() {
    let vhost = Arc::new(vhost().await);
    serve(&vhost.url()).await.drain().await.unwrap();
    stop_streams(&vhost).await;
    let monitor = Monitor::new(&rabbit(&vhost.url())).unwrap().from(Position::Start);
    let mut events = soon(monitor.open()).await.unwrap();
    // It may be interrupted before that.
    soon(async { while !matches!(events.next().await, Seen::Event(_)) {} }).await;
    drop(events);
    blocking(move || drop(vhost)).await;
}
