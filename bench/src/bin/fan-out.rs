//! Measures fan-outs within one process against a bare tokio round trip, and how much memory they take.
//!
//! The floor is what any in-process job needs: a channel to a task, a spawn, a oneshot back. Both sides run in turn,
//! so that a machine whose speed drifts slows both; medians are compared. Each case has a process of its own, for
//! the highest of its memory is part of what is measured.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use atomizer::prelude::*;
use atomizer_bench::median;
use clap::{Parser, ValueEnum};
use futures::{StreamExt, stream};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};

/// Measures fan-outs in one process against a bare tokio channel, spawn and oneshot.
///
/// A line for each case, where ratio = ns_per_child / floor_ns, and the floor has as many round trips in flight as
/// the fan-out has children:
///
///   case=fold children=1000000 seconds=3 ns_per_child=3100 floor_ns=1100 ratio=2.82 peak_rss_mib=60
#[derive(Parser)]
#[command(after_help = "\
Cases:
  fold  fold the outputs of children with inputs and outputs of 16 bytes
  fib   the Fibonacci number of --fib, by atoms that ask themselves, on one slot")]
struct Args {
    /// What to measure; everything unless told otherwise.
    #[arg(long, value_delimiter = ',', value_name = "CASE")]
    case: Vec<Case>,
    /// Children of `fold`.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1_000..=100_000_000))]
    children: u64,
    /// Of which number to take the Fibonacci number.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=40))]
    fib: u64,
    /// How many children are in flight.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(64..=65_536))]
    window: u32,
    /// How many parents may wait before children run inline.
    #[arg(long, default_value_t = 10_000)]
    waiting_max: u32,
    /// Rounds, of which the median is taken.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
    /// Print a JSON object for each case.
    #[arg(long)]
    json: bool,
    /// Measure in this process.
    #[arg(long, hide = true)]
    here: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Case {
    Fold,
    Fib,
}

impl Case {
    fn name(self) -> &'static str {
        match self {
            Self::Fold => "fold",
            Self::Fib => "fib",
        }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let all = [Case::Fold, Case::Fib];
    for case in all.into_iter().filter(|case| args.case.is_empty() || args.case.contains(case)) {
        if args.here {
            // Two threads, as in the figures that a ratio is compared with.
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?;
            runtime.block_on(measure(case, &args))?;
        } else {
            alone(case, &args)?;
        }
    }
    Ok(())
}

/// Measures one case in a process of its own.
fn alone(case: Case, args: &Args) -> Result<()> {
    let program = std::env::current_exe().context("failed to find this program")?;
    let Args { children, fib, window, waiting_max, rounds, json, .. } = args;
    let mut command = Command::new(program);
    command.args(["--here", "--case", case.name()]).args(json.then_some("--json"));
    let numbers = [("children", *children), ("fib", *fib)];
    let sizes = [("window", window), ("waiting-max", waiting_max), ("rounds", rounds)];
    let sizes = sizes.map(|(name, size)| (name, u64::from(*size)));
    for (name, number) in numbers.into_iter().chain(sizes) {
        command.arg(format!("--{name}={number}"));
    }
    let status = command.status().context("failed to run this program")?;
    ensure!(status.success(), "case={}: {status}", case.name());
    Ok(())
}

/// 16 digits, and so 16 bytes of JSON.
const FIRST: u64 = 1_000_000_000_000_000;

struct Next;

impl Atom for Next {
    const ID: &'static str = "next";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, input: u64) -> atomizer::Result<u64> {
        Ok(input + 1)
    }
}

/// Sums what follows each number.
struct Sum {
    window: std::num::NonZeroUsize,
}

impl Atom for Sum {
    const ID: &'static str = "sum";
    const KIND: Kind = Kind::Spawner;
    type Input = u64;
    type Output = u64;

    async fn process(&self, cx: &Context, children: u64) -> atomizer::Result<u64> {
        let inputs = FIRST..FIRST + children;
        let all = cx.fan_out::<Next>(inputs).window(self.window);
        Ok(all.fold(0_u64, |sum, next| sum.wrapping_add(next)).await?)
    }
}

struct Fib;

impl Atom for Fib {
    const ID: &'static str = "fib";
    const KIND: Kind = Kind::Spawner;
    type Input = u64;
    type Output = u64;

    async fn process(&self, cx: &Context, number: u64) -> atomizer::Result<u64> {
        if number < 2 {
            return Ok(number);
        }
        Ok(cx.fan_out::<Self>([number - 1, number - 2]).fold(0, |sum, fib| sum + fib).await?)
    }
}

fn fib(number: u64) -> u64 {
    (0..number).fold((0, 1), |(one, other), _| (other, one + other)).0
}

async fn measure(case: Case, args: &Args) -> Result<()> {
    let window = std::num::NonZeroUsize::new(args.window as usize).context("no window")?;
    let mut builder = Atomizer::builder().conductor(Memory::new()).atom(Next).atom(Fib);
    if case == Case::Fib {
        builder = builder.concurrency(1);
    }
    let waiting_max = args.waiting_max as usize;
    let node = builder.waiting_max(waiting_max).atom(Sum { window }).start().await?;
    // Each number that is greater than 1 has two children; the first is nobody's child.
    let children = match case {
        Case::Fold => args.children,
        Case::Fib => 2 * fib(args.fib + 1) - 2,
    };
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        let began = Instant::now();
        match case {
            Case::Fold => {
                let sum = node.call::<Sum>(children).await?;
                let expected =
                    (FIRST..FIRST + children).fold(0_u64, |sum, n| sum.wrapping_add(n + 1));
                ensure!(sum == expected, "{sum} in place of {expected}");
            }
            Case::Fib => ensure!(node.call::<Fib>(args.fib).await? == fib(args.fib), "it is wrong"),
        }
        ours.push(began.elapsed());
        floor.push(floor_round(args.window as usize, children).await);
    }
    node.drain().await?;
    let peak = peak_rss_mib()?;
    report(case, children, &ours, &floor, peak, args.json);
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn report(case: Case, children: u64, ours: &[Duration], floor: &[Duration], peak: u64, json: bool) {
    let middle = |times: &[Duration]| median(times.iter().map(Duration::as_secs_f64).collect());
    let each = |seconds: f64| seconds * 1e9 / children.max(1) as f64;
    let (case, seconds) = (case.name(), middle(ours));
    let (ours, floor) = (each(seconds), each(middle(floor)));
    let ratio = ours / floor;
    if json {
        let line = serde_json::json!({
            "case": case, "children": children, "seconds": seconds, "ns_per_child": ours,
            "floor_ns": floor, "ratio": ratio, "peak_rss_mib": peak,
        });
        println!("{line}");
    } else {
        println!(
            "case={case} children={children} seconds={seconds:.0} ns_per_child={ours:.0} floor_ns={floor:.0} \
             ratio={ratio:.2} peak_rss_mib={peak}"
        );
    }
}

/// The most memory that this process has had so far (Linux, proc(5)).
fn peak_rss_mib() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no VmHWM")?;
    Ok(kib.trim().parse::<u64>()?.div_ceil(1024))
}

async fn floor_round(window: usize, round_trips: u64) -> Duration {
    let (tx, mut rx) = mpsc::channel::<(u64, oneshot::Sender<u64>)>(window);
    let mut server = JoinSet::new();
    server.spawn(async move {
        while let Some((number, answer)) = rx.recv().await {
            #[expect(clippy::disallowed_methods, reason = "the floor supervises nothing")]
            drop(tokio::spawn(async move { answer.send(number + 1).expect("it is waited for") }));
        }
    });
    let mut client = JoinSet::new();
    client.spawn(async move {
        let began = Instant::now();
        let asked = stream::iter(0..round_trips).map(async |number| {
            let (answer, answered) = oneshot::channel();
            tx.send((number, answer)).await.expect("the server runs");
            answered.await.expect("the server answers")
        });
        let sum =
            asked.buffer_unordered(window).fold(0_u64, async |sum, next| sum.wrapping_add(next));
        std::hint::black_box(sum.await);
        began.elapsed()
    });
    let took = client.join_next().await.expect("there is one").expect("it does not panic");
    server.join_all().await;
    took
}
