//! Fan-outs over RabbitMQ whose nodes are killed, and outcomes that another process reads.

use std::{
    fs,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use atomizer::{ResultsId, prelude::*};
use atomizer_test_support::Vhost;
use tokio::{sync::Notify, task::spawn_blocking};

use crate::{rabbit, vhost};

/// How long a fold may take, whatever is killed.
const FOLD_MAX: Duration = Duration::from_secs(1_200);
/// How much memory a process may take, whatever the number of children.
const RESIDENT_MAX_MIB: u64 = 150;

/// A process that serves `adder.square` and `adder.sum`.
struct Adder(Child);

impl Adder {
    fn start(vhost: &Vhost) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_adder"));
        command.arg(vhost.url()).stdin(Stdio::piped()).stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn peak_mib(&self) -> u64 {
        peak_mib(&self.0.id().to_string())
    }
}

impl Drop for Adder {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The most memory that a process has had, in MiB.
fn peak_mib(process: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// The atom of that name in the other process; here, one that counts how often it is run.
#[derive(Clone, Default)]
struct Square {
    runs: Arc<AtomicU64>,
    run: Arc<Notify>,
}

impl Atom for Square {
    const ID: &'static str = "adder.square";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, number: u64) -> Result<u64> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        self.run.notify_one();
        Ok(number.pow(2))
    }
}

/// The parent in the other process.
struct Sum;

impl Atom for Sum {
    const ID: &'static str = "adder.sum";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, _: u64) -> Result<u64> {
        unreachable!("it is run elsewhere")
    }
}

/// A parent here, whose children are elsewhere. It says how far it has got.
#[derive(Clone, Default)]
struct Fold {
    seen: Arc<AtomicU64>,
    one_more: Arc<Notify>,
}

impl Atom for Fold {
    const ID: &'static str = "fold";
    const KIND: Kind = Kind::Spawner;
    type Input = u64;
    type Output = u64;

    async fn process(&self, cx: &Context, upto: u64) -> Result<u64> {
        let fold = cx.fan_out::<Square>(1..=upto).fold(0, |sum, square| {
            self.seen.fetch_add(1, Ordering::SeqCst);
            self.one_more.notify_one();
            sum + square
        });
        Ok(fold.await?)
    }
}

/// Waits until so many are counted.
async fn until_there_are(count: u64, counted: &AtomicU64, one_more: &Notify) {
    while counted.load(Ordering::SeqCst) < count {
        one_more.notified().await;
    }
}

fn sum_of_squares(upto: u64) -> u64 {
    upto * (upto + 1) * (2 * upto + 1) / 6
}

/// A fold whose children run in two processes, of which one is killed when half is done.
async fn a_nodes_children_are_run_elsewhere(children: u64) {
    let vhost = vhost().await;
    let (one, other) = (Adder::start(&vhost), Adder::start(&vhost));
    let fold = Fold::default();
    let parent = Atomizer::builder().conductor(rabbit(&vhost)).atom(fold.clone());
    let parent = parent.start().await.unwrap();
    let begun = Instant::now();
    let mut one = Some(one);
    let killing = async {
        for quarter in 1..=4 {
            let part = children * quarter / 4;
            until_there_are(part, &fold.seen, &fold.one_more).await;
            println!("{part} after {:?}", begun.elapsed());
            if quarter == 2 {
                let peak = one.take().map(|one| one.peak_mib());
                println!("a node was killed; it had {peak:?} MiB at the most");
            }
        }
    };
    let call = parent.call::<Fold>(children).deadline(FOLD_MAX);
    let (sum, ()) = tokio::join!(call.into_future(), killing);
    assert_eq!(sum.unwrap(), sum_of_squares(children));
    let (there, here) = (other.peak_mib(), peak_mib("self"));
    println!("{there} MiB where the children ran, {here} MiB where the parent did");
    assert!(there.max(here) < RESIDENT_MAX_MIB);
    parent.drain().await.unwrap();
    drop(other);
    spawn_blocking(move || drop(vhost)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fold_is_exact_when_a_node_of_its_children_is_killed() {
    a_nodes_children_are_run_elsewhere(2_000).await;
}

/// `cargo nextest run -p atomizer-tests --run-ignored only two_hundred_thousand_children --no-capture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes; prints how fast and in how much memory"]
async fn a_fold_of_two_hundred_thousand_children_is_exact_when_a_node_is_killed() {
    a_nodes_children_are_run_elsewhere(200_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fold_is_exact_when_the_node_of_the_parent_is_killed() {
    const CHILDREN: u64 = 2_000;
    let vhost = vhost().await;
    let first = Adder::start(&vhost);
    let square = Square::default();
    let beside = Atomizer::builder().conductor(rabbit(&vhost)).atom(square.clone());
    let beside = beside.start().await.unwrap();
    let killing = async {
        until_there_are(CHILDREN / 4, &square.runs, &square.run).await;
        drop(first);
        Adder::start(&vhost)
    };
    let call = beside.call::<Sum>(CHILDREN).deadline(FOLD_MAX);
    let (sum, second) = tokio::join!(call.into_future(), killing);
    assert_eq!(sum.unwrap(), sum_of_squares(CHILDREN));
    beside.drain().await.unwrap();
    drop(second);
    spawn_blocking(move || drop(vhost)).await.unwrap();
}

/// What the other process sends its outcomes to; see `adder`.
const RESULTS: ResultsId = ResultsId::from_static("squares");

#[tokio::test(flavor = "multi_thread")]
async fn outcomes_are_read_by_another_process_when_the_one_that_spawned_is_gone() {
    const SPAWNED: u64 = 500;
    let vhost = vhost().await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_adder"));
    command.arg(vhost.url()).arg(SPAWNED.to_string()).stdin(Stdio::null());
    let spawner = spawn_blocking(move || command.status().unwrap()).await.unwrap();
    assert!(spawner.success(), "it has spawned all, and is gone");
    let adder = Adder::start(&vhost);
    let reader = Atomizer::builder().conductor(rabbit(&vhost)).start().await.unwrap();
    let mut results = reader.results(RESULTS);
    let mut left: std::collections::HashSet<_> = (0..SPAWNED).map(|number| number.pow(2)).collect();
    let reading = async {
        while !left.is_empty() {
            let outcome = results.next().await.expect("it is there");
            let square = outcome.outcome.as_ref().unwrap();
            left.remove(&std::str::from_utf8(&square.body).unwrap().parse().unwrap());
        }
        results.done().await;
    };
    tokio::time::timeout(Duration::from_secs(90), reading).await.expect("all are read");
    reader.drain().await.unwrap();
    drop(adder);
    let vhost_left = spawn_blocking(move || vhost.queue_depth("atomizer.results.squares").unwrap());
    assert_eq!(vhost_left.await.unwrap().unwrap_or_default(), Default::default());
}
