//! What a node costs when it has nothing to do, and what it keeps of all that it has done. By hand, on a quiet
//! machine: `cargo test --release -p atomizer-rabbitmq --test it -- --ignored --nocapture load`.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use atomizer::{CallError, prelude::*};
use tokio::{sync::Notify, task::JoinSet, time::sleep};

use crate::support::{blocking, rabbit, serve, vhost};

/// Returns a number of this process from a file of Linux, by its place among all that stand there.
fn own(file: &str, place: usize) -> u64 {
    let text = fs::read_to_string(format!("/proc/self/{file}")).unwrap();
    // The name of the program comes first, and may have blanks in it.
    let numbers = text.rsplit_once(") ").map_or(text.as_str(), |(_, rest)| rest);
    numbers.split(' ').nth(place).unwrap().parse().unwrap()
}

/// Counts what runs, and tells when a round number is reached.
struct Count(Arc<AtomicU64>, Arc<Notify>);

const ROUND: u64 = 100_000;

impl Atom for Count {
    const ID: &'static str = "count";
    type Input = u64;
    type Output = ();

    async fn process(&self, _cx: &Context, _number: u64) -> Result<()> {
        if (self.0.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(ROUND) {
            self.1.notify_one();
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes; prints how much memory the process has"]
async fn two_million_electrons_leave_memory_as_it_was() {
    const ELECTRONS: u64 = 2_000_000;
    let vhost = vhost().await;
    let (count, reached) = (Arc::new(AtomicU64::new(0)), Arc::new(Notify::new()));
    let atom = Count(Arc::clone(&count), Arc::clone(&reached));
    let builder = Atomizer::builder().conductor(rabbit(&vhost.url())).atom(atom);
    let atomizer = builder.start().await.unwrap();
    let begun = Instant::now();
    let mut mebibytes = Vec::new();
    for _ in 0..ELECTRONS / ROUND {
        let mut sending = JoinSet::<Result<(), CallError>>::new();
        for number in 0..ROUND {
            if sending.len() == 1024 {
                sending.join_next().await.unwrap().unwrap().unwrap();
            }
            let atomizer = atomizer.clone();
            sending.spawn(async move { atomizer.send::<Count>(number).await.map(drop) });
        }
        for sent in sending.join_all().await {
            sent.unwrap();
        }
        reached.notified().await;
        mebibytes.push(own("statm", 1) * 4096 / 1024 / 1024);
    }
    let rate = ELECTRONS as f64 / begun.elapsed().as_secs_f64();
    println!("electrons={ELECTRONS} per_s={rate:.0} rss_mib={mebibytes:?}");
    // What is there after a tenth of them is not the least: the rest may add a tenth to it.
    let (early, last) = (mebibytes[1], *mebibytes.last().unwrap());
    assert!(last <= early + early / 10 + 2, "{early} MiB became {last} MiB");
    atomizer.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a minute on a quiet machine; prints what share of a core the process takes"]
async fn an_idle_node_takes_less_than_a_hundredth_of_a_core() {
    const LOOKED: Duration = Duration::from_secs(60);
    let vhost = vhost().await;
    let atomizer = serve(&vhost.url()).await;
    // In user and kernel mode, in hundredths of a second.
    let taken = || own("stat", 11) + own("stat", 12);
    sleep(Duration::from_secs(2)).await;
    let before = taken();
    sleep(LOOKED).await;
    let percent = (taken() - before) as f64 / LOOKED.as_secs_f64();
    println!("idle_percent_of_a_core={percent:.2}");
    assert!(percent < 1.0, "{percent} %");
    atomizer.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}
