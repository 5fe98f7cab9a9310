//! Measures Atomizer over RabbitMQ against a bare lapin program of the same guarantees, in one run.
//!
//! Both sides use the same broker, the same runtime and queues with the same arguments (the reference uses those
//! that a node has made). They run in turn, so that a machine whose speed drifts slows both; medians are compared.

mod emptied;
mod ours;
mod reference;
mod why;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use atomizer_bench::{Progress, median};
use atomizer_test_support::{Broker, Depth, Vhost};
use clap::{Parser, ValueEnum};
use tokio::task::block_in_place;

use emptied::Emptied;
use ours::Events;
use reference::Headers;

/// How many deliveries are unacknowledged at the most, on either side.
const PREFETCH: u16 = 1024;
/// The queue of the atom, as a node names it.
const QUEUE: &str = "atomizer.atom.noop";

/// Measures Atomizer over RabbitMQ against a bare lapin program of the same guarantees.
///
/// Starts a private broker, and takes about a minute and a half. Payloads are 256 bytes of JSON, queues are quorum
/// queues, messages are persistent, mandatory and confirmed, and acknowledged only when what follows from them is
/// confirmed; the reference confirms in a sliding window and acknowledges in groups.
///
/// A line for each case, where ratio = ours / reference:
///
///   case=publish ours_per_s=17000 reference_per_s=18000 ratio=0.94
#[derive(Parser)]
#[command(after_help = "\
Cases:
  publish   send electrons with 1024 in flight, until each is confirmed
  drain     run what was published on a node that has nothing else to do, from the first
            delivery until the node is closed and the broker counts 0 messages
  call_1    ask from one node for what runs on another, one call after the other
  call_256  the same, with 256 in flight
  events_on the same by nodes that have their events kept, over those that do not; fails when an event is lost
  why       find the story of one electron among so many events; prints how long that takes

Examples:
  cargo xtask bench rabbitmq
  cargo xtask bench rabbitmq --case drain --rounds 15 --json")]
struct Args {
    /// What to measure; everything unless told otherwise.
    #[arg(long, value_delimiter = ',', value_name = "CASE")]
    case: Vec<Case>,
    /// Rounds of each case, of which the median is taken; one more before them does not count.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
    /// Electrons in each round of `publish` and `drain`.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1_000..=10_000_000))]
    electrons: u64,
    /// Calls in each round of `call_256`; `call_1` makes a twentieth as many, `events_on` five times as many.
    #[arg(long, default_value_t = 8_000, value_parser = clap::value_parser!(u64).range(1_000..=10_000_000))]
    calls: u64,
    /// Events among which `why` finds a story.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(10_000..=100_000_000))]
    events: u64,
    /// Have the reference send the properties and headers of an electron with each message, though it needs none of
    /// them: what is left between the two is not the format's, but ours.
    #[arg(long)]
    same_headers: bool,
    /// Print a JSON object for each case, and for each round to stderr.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Case {
    Publish,
    Drain,
    #[value(name = "call_1")]
    Call1,
    #[value(name = "call_256")]
    Call256,
    EventsOn,
    Why,
}

impl Case {
    fn name(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Drain => "drain",
            Self::Call1 => "call_1",
            Self::Call256 => "call_256",
            Self::EventsOn => "events_on",
            Self::Why => "why",
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Side {
    Ours,
    Reference,
}

/// Electrons per second, round by round.
#[derive(Debug, Default)]
struct Rates {
    ours: Vec<f64>,
    reference: Vec<f64>,
}

impl Rates {
    fn note(&mut self, side: Side, count: u64, took: Duration) {
        match side {
            Side::Ours => self.ours.push(per_second(count, took)),
            Side::Reference => self.reference.push(per_second(count, took)),
        }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let broker = Broker::start().context("failed to start a private RabbitMQ")?;
    // Two threads, as in the figures that a ratio is compared with.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(measure(&broker, &args))
}

async fn measure(broker: &Broker, args: &Args) -> Result<()> {
    let headers = if args.same_headers { Headers::AnElectrons } else { Headers::None };
    let wanted = |case| args.case.is_empty() || args.case.contains(&case);
    let stores = wanted(Case::Publish) || wanted(Case::Drain);
    let others = [Case::Call1, Case::Call256, Case::EventsOn].into_iter();
    let cases = u64::from(stores) + others.map(|case| u64::from(wanted(case))).sum::<u64>();
    let progress = Progress::new(cases * u64::from(args.rounds + 1) * 2);
    let (mut publish, mut drain) = (Rates::default(), Rates::default());
    if stores {
        for (side, counts) in turns(args.rounds) {
            let vhost = vhost(broker)?;
            let (published, drained) = store(side, headers, &vhost, args.electrons).await?;
            if counts {
                publish.note(side, args.electrons, published);
                drain.note(side, args.electrons, drained);
            }
            progress.step("publish and drain");
            block_in_place(|| drop(vhost));
        }
        for (case, rates) in [(Case::Publish, publish), (Case::Drain, drain)] {
            if wanted(case) {
                progress.hide(|| report(case, rates, args.json));
            }
        }
    }
    for (case, calls, in_flight) in [
        (Case::Call1, args.calls / 20, 1),
        (Case::Call256, args.calls, 256),
        // More than what is gathered while a log does not keep up.
        (Case::EventsOn, 5 * args.calls, 256),
    ] {
        if !wanted(case) {
            continue;
        }
        let mut rates = Rates::default();
        for (side, counts) in turns(args.rounds) {
            let vhost = vhost(broker)?;
            let url = vhost.url();
            let took = match (case, side) {
                (Case::EventsOn, Side::Ours) => {
                    let took = ours::call(&url, calls, in_flight, Events::Kept).await?;
                    ours::check_events(&url, calls).await?;
                    took
                }
                (Case::EventsOn, Side::Reference) | (_, Side::Ours) => {
                    ours::call(&url, calls, in_flight, Events::NotKept).await?
                }
                (_, Side::Reference) => reference::call(&url, headers, calls, in_flight).await?,
            };
            if counts {
                rates.note(side, calls, took);
            }
            progress.step(case.name());
            block_in_place(|| drop(vhost));
        }
        progress.hide(|| report(case, rates, args.json));
    }
    if wanted(Case::Why) {
        let vhost = vhost(broker)?;
        let found = why::measure(&vhost.url(), args.events).await?;
        progress.hide(|| report_found(&found, args.json));
        block_in_place(|| drop(vhost));
    }
    Ok(())
}

fn report_found(why::Found { events, life_events, median_s }: &why::Found, json: bool) {
    if json {
        let line = serde_json::json!({
            "case": "why", "events": events, "life_events": life_events, "median_s": median_s,
        });
        println!("{line}");
    } else {
        println!("case=why events={events} life_events={life_events} median_s={median_s:.3}");
    }
}

/// Whose turn it is, and whether it counts: the first round warms up. Who is first changes from round to round.
fn turns(rounds: u32) -> impl Iterator<Item = (Side, bool)> {
    (0..=rounds).flat_map(|round| {
        let sides = match round % 2 {
            0 => [Side::Reference, Side::Ours],
            _ => [Side::Ours, Side::Reference],
        };
        sides.map(|side| (side, round > 0))
    })
}

/// Publishes so many electrons and works them off; returns how long each took.
async fn store(
    side: Side,
    headers: Headers,
    vhost: &Vhost,
    electrons: u64,
) -> Result<(Duration, Duration)> {
    let url = &vhost.url();
    ours::make_queues(url).await?;
    let published = match side {
        Side::Ours => ours::publish(url, electrons).await?,
        Side::Reference => reference::publish(url, headers, electrons).await?,
    };
    let emptied = Emptied::watch(vhost, QUEUE)?;
    let begun = match side {
        Side::Ours => ours::drain(url, electrons, &emptied).await?,
        Side::Reference => reference::drain(url, electrons, &emptied).await?,
    };
    let ended = emptied.wait()?;
    // All consumers are closed by now: what was not acknowledged is back in the queue.
    let depth = block_in_place(|| vhost.queue_depth(QUEUE))?.context("the queue is gone")?;
    ensure!(depth == Depth::default(), "{depth:?} after the end");
    Ok((published, ended.duration_since(begun)?))
}

fn vhost(broker: &Broker) -> Result<Vhost> {
    block_in_place(|| broker.vhost()).context("failed to make a virtual host")
}

fn report(case: Case, Rates { ours, reference }: Rates, json: bool) {
    let case = case.name();
    let rounds = serde_json::json!({ "case": case, "ours": ours, "reference": reference });
    let (ours, reference) = (median(ours), median(reference));
    let ratio = ours / reference;
    if json {
        eprintln!("{rounds}");
        let line = serde_json::json!({
            "case": case, "ours_per_s": ours, "reference_per_s": reference, "ratio": ratio,
        });
        println!("{line}");
    } else {
        println!(
            "case={case} ours_per_s={ours:.0} reference_per_s={reference:.0} ratio={ratio:.2}"
        );
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn per_second(count: u64, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}
