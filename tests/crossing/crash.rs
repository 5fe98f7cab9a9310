//! Atoms that take their thread, or their whole process, with them; brokers that go away. Over RabbitMQ, in
//! real processes and in real time.

use std::{
    io::Read as _,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use atomizer::{AtomId, CallError, EventKind, EventStream, FailureKind, Payload, prelude::*};
use atomizer_rabbitmq::RabbitMq;
use atomizer_test_support::Broker;
use futures::future::join_all;
use tokio::task::{JoinSet, spawn_blocking};

use crate::{rabbit, vhost};

const SOON: Duration = Duration::from_secs(120);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("it happens soon")
}

async fn until(events: &mut EventStream, fits: impl Fn(&EventKind) -> bool) {
    soon(async {
        // Events that are missed are of electrons, of which there are many.
        while !events.next().await.expect("the node lives").is_ok_and(|event| fits(&event.kind)) {}
    })
    .await;
}

fn misfit(url: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_misfit"));
    command.arg(url).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Starts misfits one after the other, as a service manager would, until it is dropped.
struct Restarted {
    stop: Arc<AtomicBool>,
    deaths: Arc<AtomicU32>,
    keeper: Option<JoinHandle<()>>,
}

impl Restarted {
    fn start(url: String) -> Self {
        let (stop, deaths) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let (stopped, died) = (Arc::clone(&stop), Arc::clone(&deaths));
        let keeper = thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                let mut child = misfit(&url);
                while child.try_wait().unwrap().is_none() {
                    if stopped.load(Ordering::SeqCst) {
                        child.kill().unwrap();
                        child.wait().unwrap();
                        return;
                    }
                    thread::sleep(Duration::from_millis(20));
                }
                died.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { stop, deaths, keeper: Some(keeper) }
    }
}

impl Drop for Restarted {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        drop(self.keeper.take().map(JoinHandle::join));
    }
}

/// It ends dead and answered; what was prefetched and in work beside it succeeds.
#[tokio::test(flavor = "multi_thread")]
async fn an_electron_that_kills_its_nodes_ends_and_costs_no_other() {
    const NEIGHBOURS: usize = 40;
    let vhost = vhost().await;
    let asker = Atomizer::builder().conductor(rabbit(&vhost)).start().await.unwrap();
    let ask = |payload: &'static str| {
        let atom = AtomId::from_static("misfit.abort");
        asker.call_raw(atom, Payload::json(payload)).deadline(SOON).into_future()
    };
    let neighbours = join_all((0..NEIGHBOURS).map(|_| ask("false")));
    let killer = ask("true");
    let more = join_all((0..NEIGHBOURS).map(|_| ask("false")));
    let misfits = Restarted::start(vhost.url());
    let (before, killed, after) = tokio::join!(neighbours, killer, more);
    let Err(CallError::Failed(failure)) = killed else { panic!("it kills: {killed:?}") };
    assert_eq!(failure.kind, FailureKind::Killer, "{failure}");
    for answer in before.into_iter().chain(after) {
        answer.expect("it was only beside it");
    }
    // Once before anything was known against it, and five times alone.
    assert_eq!(misfits.deaths.load(Ordering::SeqCst), 6);
    let dead = vhost.queue_depth("atomizer.dead").unwrap().expect("it is there");
    assert_eq!(dead.ready, 1, "the killer alone");
    asker.drain().await.unwrap();
    spawn_blocking(move || drop((misfits, vhost))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_whose_runs_do_not_stop_exits_with_the_report() {
    let vhost = vhost().await;
    let asker = Atomizer::builder().conductor(rabbit(&vhost)).start().await.unwrap();
    let mut child = misfit(&vhost.url());
    let calls = (0..2).map(|_| {
        let atom = AtomId::from_static("misfit.block");
        asker.call_raw(atom, Payload::json("null")).deadline(SOON).into_future()
    });
    for answer in join_all(calls).await {
        let Err(CallError::Failed(failure)) = answer else { panic!("{answer:?}") };
        assert_eq!(failure.kind, FailureKind::TimedOut);
    }
    let answered = Instant::now();
    let (status, report) = spawn_blocking(move || {
        let mut report = String::new();
        child.stderr.take().unwrap().read_to_string(&mut report).unwrap();
        (child.wait().unwrap(), report)
    })
    .await
    .unwrap();
    assert_eq!(status.code(), Some(1), "{report}");
    assert!(
        report.contains("error: stuck runs: 2 hold their threads after their time limit"),
        "{report}"
    );
    assert!(answered.elapsed() < Duration::from_secs(20), "{:?}", answered.elapsed());
    asker.drain().await.unwrap();
    spawn_blocking(move || drop(vhost)).await.unwrap();
}

/// Blocks its thread for so many milliseconds.
struct Blocks;

impl Atom for Blocks {
    const ID: &'static str = "blocks";
    type Input = u64;
    type Output = ();

    async fn process(&self, _cx: &Context, ms: u64) -> Result<()> {
        thread::sleep(Duration::from_millis(ms));
        Ok(())
    }
}

/// Both threads that atoms have are blocked for five heartbeats; nobody else's are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn atoms_that_block_their_threads_cost_neither_connection_nor_settlement() {
    let vhost = vhost().await;
    let url = format!("{}?heartbeat=2", vhost.url());
    let serving = Atomizer::builder().conductor(RabbitMq::from_url(&url).unwrap()).atom(Blocks);
    let serving = serving.start().await.unwrap();
    let asker = Atomizer::builder().conductor(rabbit(&vhost)).start().await.unwrap();
    let mut events = serving.events();
    let call = |ms| asker.call::<Blocks>(ms).deadline(SOON).into_future();
    // One is blocked: others are run and settled meanwhile, on the other.
    let began = Instant::now();
    let others = async {
        until(&mut events, |kind| matches!(kind, EventKind::Blocking { .. })).await;
        for answer in join_all((0..100).map(|_| call(0))).await {
            answer.unwrap();
        }
        assert!(began.elapsed() < Duration::from_secs(10), "they did not wait for it");
    };
    let (blocked, ()) = tokio::join!(call(10_000), others);
    blocked.unwrap();
    // Both are.
    for answer in join_all([call(10_000), call(10_000)]).await {
        answer.unwrap();
    }
    while let Some(event) = futures::FutureExt::now_or_never(events.next()).flatten() {
        let event = event.unwrap();
        let lost = matches!(
            event.kind,
            EventKind::SessionLost { .. } | EventKind::SubscriptionLost { .. }
        );
        assert!(!lost, "{event}");
    }
    serving.drain().await.unwrap();
    asker.drain().await.unwrap();
    spawn_blocking(move || drop(vhost)).await.unwrap();
}

/// Says where it ran; on one of the nodes it always fails.
#[derive(Clone)]
struct Somewhere {
    fails: bool,
    tries: Arc<AtomicUsize>,
}

impl Somewhere {
    fn new(fails: bool) -> Self {
        Self { fails, tries: Arc::default() }
    }
}

impl Atom for Somewhere {
    const ID: &'static str = "somewhere";
    type Input = u64;
    type Output = u32;

    fn options(&self) -> Options {
        Options::default().concurrency(4)
    }

    async fn process(&self, cx: &Context, _: u64) -> Result<u32> {
        self.tries.fetch_add(1, Ordering::SeqCst);
        if self.fails {
            return Err(AtomError::msg("not here"));
        }
        Ok(cx.attempt())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_requeued_over_rabbitmq_goes_to_another_node() {
    const ELECTRONS: usize = 100;
    let vhost = vhost().await;
    let (bad, good) = (Somewhere::new(true), Somewhere::new(false));
    let mut nodes = Vec::new();
    for atom in [&bad, &good] {
        let builder = Atomizer::builder().conductor(rabbit(&vhost)).atom(atom.clone());
        nodes.push(builder.start().await.unwrap());
    }
    let asker = Atomizer::builder().conductor(rabbit(&vhost)).start().await.unwrap();
    let policy = Policy::requeue(3).backoff(Backoff::none());
    let calls = (0..ELECTRONS as u64)
        .map(|number| asker.call::<Somewhere>(number).policy(policy).deadline(SOON).into_future());
    let attempts: Vec<_> = join_all(calls).await.into_iter().map(Result::unwrap).collect();
    assert!(attempts.iter().all(|attempt| *attempt <= 2), "one try on the bad one: {attempts:?}");
    let requeued = attempts.iter().filter(|attempt| **attempt == 2).count();
    assert!(requeued > 0, "the bad one got its share");
    assert_eq!(bad.tries.load(Ordering::SeqCst), requeued);
    assert_eq!(good.tries.load(Ordering::SeqCst), ELECTRONS);
    for node in nodes.into_iter().chain([asker]) {
        node.drain().await.unwrap();
    }
    spawn_blocking(move || drop(vhost)).await.unwrap();
}

/// Two real brokers, of which one is killed: the node goes on with the other, and takes the first up again.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_brokers_one_that_is_killed_costs_the_other_nothing() {
    let broker = || spawn_blocking(|| Arc::new(Broker::start().unwrap()));
    let (one, other) = (broker().await.unwrap(), broker().await.unwrap());
    let conductor = |broker: &Broker| RabbitMq::from_url(&broker.url("/")).unwrap();
    let builder = Atomizer::builder().conductor(conductor(&one)).conductor(conductor(&other));
    let serving = builder.atom(Somewhere::new(false)).start().await.unwrap();
    let mut events = serving.events();
    let through_one = Atomizer::builder().conductor(conductor(&one)).start().await.unwrap();
    let through_other = Atomizer::builder().conductor(conductor(&other)).start().await.unwrap();
    let ask = |asker: &Atomizer| asker.call::<Somewhere>(0).deadline(SOON).into_future();
    ask(&through_one).await.unwrap();
    let killed = Arc::clone(&one);
    spawn_blocking(move || {
        killed.flush().unwrap();
        killed.kill().unwrap();
    })
    .await
    .unwrap();
    until(&mut events, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
    for answer in join_all((0..100).map(|_| ask(&through_other))).await {
        answer.unwrap();
    }
    let revived = Arc::clone(&one);
    let asked_meanwhile = ask(&through_one);
    let again = spawn_blocking(move || revived.start_again().unwrap());
    let (answer, again) = tokio::join!(asked_meanwhile, again);
    again.unwrap();
    answer.unwrap();
    for node in [serving, through_one, through_other] {
        node.drain().await.unwrap();
    }
    spawn_blocking(move || drop((one, other))).await.unwrap();
}

/// Runs at most once, until it is let go.
struct Once {
    runs: Arc<AtomicUsize>,
    gate: Arc<tokio::sync::Semaphore>,
}

impl Atom for Once {
    const ID: &'static str = "once";
    type Input = u64;
    type Output = u64;

    fn options(&self) -> Options {
        Options::default().at_most_once()
    }

    async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        self.gate.acquire().await?.forget();
        Ok(input)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_at_most_once_over_rabbitmq_does_not_come_again() {
    const ELECTRONS: usize = 50;
    let vhost = Arc::new(vhost().await);
    let (runs, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(tokio::sync::Semaphore::new(0)));
    let atom = Once { runs: Arc::clone(&runs), gate: Arc::clone(&gate) };
    let serving = Atomizer::builder().conductor(rabbit(&vhost)).atom(atom).start().await.unwrap();
    let mut events = serving.events();
    let asker = Atomizer::builder().conductor(rabbit(&vhost)).start().await.unwrap();
    let calls =
        (0..ELECTRONS as u64).map(|number| asker.call::<Once>(number).deadline(SOON).into_future());
    let mut all = JoinSet::new();
    all.spawn(join_all(calls));
    for _ in 0..ELECTRONS {
        until(&mut events, |kind| matches!(kind, EventKind::Started { .. })).await;
    }
    let closing = Arc::clone(&vhost);
    spawn_blocking(move || closing.close_connections("a test").unwrap()).await.unwrap();
    let again = |kind: &EventKind| matches!(kind, EventKind::Subscribed { atom: Some(_) });
    until(&mut events, again).await;
    gate.add_permits(ELECTRONS + 1);
    let answers = soon(all.join_next()).await.unwrap().unwrap();
    for (number, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.unwrap(), number as u64);
    }
    // Were anything left in the queue, it would come before this one.
    assert_eq!(soon(asker.call::<Once>(99).into_future()).await.unwrap(), 99);
    assert_eq!(runs.load(Ordering::SeqCst), ELECTRONS + 1);
    serving.drain().await.unwrap();
    asker.drain().await.unwrap();
    spawn_blocking(move || drop(vhost)).await.unwrap();
}
