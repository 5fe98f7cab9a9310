//! Measures how many tosses a node does in a second against a plain loop of the same generator on all cores.
//!
//! Both sides toss the same batches and must find the same. They run in turn, so that a machine whose speed drifts
//! slows both; medians are compared.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use atomizer::prelude::*;
use atomizer_atoms::{MonteCarlo, Request, Toss, toss};
use atomizer_bench::{Progress, median};
use clap::Parser;
use rayon::prelude::*;

/// Measures a Monte Carlo estimate by electrons against a plain loop of the same generator on all cores.
///
/// A line, where ratio = ours_per_s / reference_per_s:
///
///   case=montecarlo tosses=1000000000 batch=1000000 ours_per_s=700000000 reference_per_s=705000000 ratio=0.99
#[derive(Parser)]
struct Args {
    /// Tosses in each round.
    #[arg(long, default_value_t = 1_000_000_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000_000))]
    tosses: u64,
    /// Tosses of one electron.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000_000))]
    batch: u64,
    /// Rounds, of which the median is taken.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let node = Atomizer::builder().conductor(Memory::new());
    let node = node.atom(MonteCarlo::default()).atom(Toss).start().await?;
    let progress = Progress::new(u64::from(args.rounds) + 1);
    let (mut ours, mut reference) = (Vec::new(), Vec::new());
    // The first round warms up and does not count.
    for round in 0..=args.rounds {
        let request = Request::new(args.tosses, args.batch, u64::from(round))?;
        let (expected, reference_took) =
            tokio::task::spawn_blocking(move || plain(request)).await?;
        let began = Instant::now();
        let estimate = node.call::<MonteCarlo>(request).await?;
        let took = began.elapsed();
        ensure!(estimate.inside == expected, "{} in place of {expected}", estimate.inside);
        if round > 0 {
            ours.push(took);
            reference.push(reference_took);
        }
        progress.step("montecarlo");
    }
    node.drain().await?;
    drop(progress);
    report(&args, &ours, &reference);
    Ok(())
}

/// Tosses all batches of a request on all cores. Returns how many points lie inside.
fn plain(request: Request) -> (u64, Duration) {
    let began = Instant::now();
    // Indexed, as a loop over known batches would be: bridged from an iterator each would take a lock.
    let batches: Vec<_> = request.batches().collect();
    let inside = batches.par_iter().with_max_len(1).map(toss).sum();
    (inside, began.elapsed())
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn report(args: &Args, ours: &[Duration], reference: &[Duration]) {
    let Args { tosses, batch, .. } = args;
    let per_second = |times: &[Duration]| {
        *tosses as f64 / median(times.iter().map(Duration::as_secs_f64).collect())
    };
    let (ours, reference) = (per_second(ours), per_second(reference));
    let ratio = ours / reference;
    if args.json {
        let line = serde_json::json!({
            "case": "montecarlo", "tosses": tosses, "batch": batch, "ours_per_s": ours,
            "reference_per_s": reference, "ratio": ratio,
        });
        println!("{line}");
    } else {
        println!(
            "case=montecarlo tosses={tosses} batch={batch} ours_per_s={ours:.0} reference_per_s={reference:.0} \
             ratio={ratio:.2}"
        );
    }
}
