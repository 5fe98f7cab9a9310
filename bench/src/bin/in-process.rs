//! Measures an electron's whole way on `Memory` against a bare tokio round trip, in one run.
//!
//! The floor is what any in-process job needs: a channel to a task, a spawn, a oneshot back. Both sides run
//! in turn, so that a machine whose speed drifts slows both; medians are compared.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use atomizer::prelude::*;
use atomizer_bench::median;
use clap::Parser;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};

/// Measures the in-process cost of an electron against a bare tokio channel, spawn and oneshot.
#[derive(Parser)]
struct Args {
    /// Round trips in each round of each case.
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u64).range(1_000..=100_000_000))]
    round_trips: u64,
    /// Rounds, of which the median is taken.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
    /// How many round trips are in flight: one case for each.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 4096])]
    in_flight: Vec<u64>,
    /// Print a JSON object for each case.
    #[arg(long)]
    json: bool,
}

struct Noop;

impl Atom for Noop {
    const ID: &'static str = "noop";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
        Ok(input)
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    // Two threads, as in the figures that a ratio is compared with.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        for in_flight in &args.in_flight {
            measure(*in_flight, &args).await?;
        }
        anyhow::Ok(())
    })
}

async fn measure(in_flight: u64, args: &Args) -> anyhow::Result<()> {
    let atomizer = Atomizer::builder().conductor(Memory::new()).atom(Noop).start().await?;
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    // The first round warms up and does not count.
    for round in 0..=args.rounds {
        let floor_took = floor_round(in_flight, args.round_trips).await;
        let ours_took = ours_round(&atomizer, in_flight, args.round_trips).await;
        if round > 0 {
            floor.push(nanoseconds_each(floor_took, args.round_trips));
            ours.push(nanoseconds_each(ours_took, args.round_trips));
        }
    }
    atomizer.drain().await?;
    let (ours, floor) = (median(ours), median(floor));
    let ratio = ours / floor;
    if args.json {
        let line = serde_json::json!({
            "case": "in_process", "in_flight": in_flight, "ours_ns": ours, "floor_ns": floor, "ratio": ratio,
        });
        println!("{line}");
    } else {
        println!(
            "case=in_process in_flight={in_flight} ours_ns={ours:.0} floor_ns={floor:.0} ratio={ratio:.2}"
        );
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn nanoseconds_each(took: Duration, count: u64) -> f64 {
    took.as_nanos() as f64 / count as f64
}

/// Runs `round_trips` in `in_flight` tasks that each make one after the other.
async fn round<F>(
    in_flight: u64,
    round_trips: u64,
    client: impl Fn(Arc<AtomicU64>) -> F,
) -> Duration
where
    F: Future<Output = ()> + Send + 'static,
{
    let begun = Instant::now();
    let made = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..in_flight {
        clients.spawn(client(Arc::clone(&made)));
    }
    while let Some(ended) = clients.join_next().await {
        ended.expect("clients do not panic");
    }
    assert!(made.load(Ordering::Relaxed) >= round_trips, "all round trips were made");
    begun.elapsed()
}

async fn ours_round(atomizer: &Atomizer, in_flight: u64, round_trips: u64) -> Duration {
    round(in_flight, round_trips, |made| {
        let atomizer = atomizer.clone();
        async move {
            loop {
                let number = made.fetch_add(1, Ordering::Relaxed);
                if number >= round_trips {
                    return;
                }
                let output = atomizer.call::<Noop>(number).await.expect("a no-op succeeds");
                assert_eq!(output, number);
            }
        }
    })
    .await
}

async fn floor_round(in_flight: u64, round_trips: u64) -> Duration {
    let (tx, mut rx) = mpsc::channel::<(u64, oneshot::Sender<u64>)>(8192);
    let mut server = JoinSet::new();
    server.spawn(async move {
        while let Some((number, answer)) = rx.recv().await {
            #[expect(clippy::disallowed_methods, reason = "the floor supervises nothing")]
            drop(tokio::spawn(async move { answer.send(number).expect("the client waits") }));
        }
    });
    let took = round(in_flight, round_trips, |made| {
        let tx = tx.clone();
        async move {
            loop {
                let number = made.fetch_add(1, Ordering::Relaxed);
                if number >= round_trips {
                    return;
                }
                let (answer, answered) = oneshot::channel();
                tx.send((number, answer)).await.expect("the server runs");
                assert_eq!(answered.await.expect("the server answers"), number);
            }
        }
    })
    .await;
    drop(tx);
    server.join_all().await;
    took
}
