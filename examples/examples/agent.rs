//! A node behind a RabbitMQ broker that serves until it is told to stop.

use std::{
    net::SocketAddr,
    num::NonZeroU32,
    process::ExitCode,
    str::FromStr,
    time::{Duration, Instant},
};

use atomizer::{Atom as _, Atomizer, EventKind, EventStream, InvalidId, NodeId};
use atomizer_atoms::{MonteCarlo, Toss};
use atomizer_examples::{
    Exit,
    broker::{self, Broker},
    signals,
    tosses::{Scaled, TossCount},
};
use atomizer_monitoring::Monitoring;
use clap::Parser;
use tokio::{
    sync::oneshot,
    time::{MissedTickBehavior, interval},
};

/// Serves the atoms montecarlo and montecarlo.toss behind a RabbitMQ broker, until SIGTERM or ctrl-c.
///
/// As many agents as you like, on as many machines, share the work. One that is lost costs no electron: what
/// it had is done by the others; a request that it was adding up begins again. Told to stop, it finishes its batches within 5 s, gives back the rest and
/// leaves; told again, it leaves at once.
///
/// What happens is on stderr; RUST_LOG changes how much of it. Metrics for Prometheus are served at /metrics, and probes at
/// /healthz and /readyz, to this machine only unless told otherwise: there is no login.
#[derive(Parser)]
#[command(
    name = "agent",
    version,
    after_help = "Exit codes: 0 stopped in order, 1 failed, 2 wrongly typed."
)]
struct Options {
    #[command(flatten)]
    broker: Broker,
    /// Give up when the broker cannot be reached for so long at the start, as in 30s or 5m [default: never].
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    connect_timeout: Option<Duration>,
    /// Give up when a broker that was there is gone for so long, as in 30s or 5m, and exit with 1 [default:
    /// never].
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    give_up_after: Option<Duration>,
    /// What the id of this node begins with.
    #[arg(long, default_value = "agent", value_parser = node_name)]
    name: String,
    /// How many electrons run at once here; of those that compute, a few more than there are cores at most [default: 1024].
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    concurrency: Option<NonZeroU32>,
    /// Where to serve metrics and probes, as in 0.0.0.0:9464; port 0 is any that is free; off is nowhere [default:
    /// 127.0.0.1:9464, or any port if that is taken].
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<Listen>,
}

/// Where metrics and probes are served.
#[derive(Clone, Copy, Debug)]
enum Listen {
    At(SocketAddr),
    Off,
}

impl FromStr for Listen {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" {
            return Ok(Self::Off);
        }
        let address =
            text.parse().map_err(|_| "expected an address such as 127.0.0.1:9464, or off")?;
        Ok(Self::At(address))
    }
}

/// Batches take far less. What takes longer is a request that waits for its batches: it is given back, and
/// begun anew by another agent.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

fn node_name(name: &str) -> Result<String, InvalidId> {
    NodeId::unique(name).map(|_| name.to_owned())
}

fn main() -> ExitCode {
    atomizer_examples::run("info,lapin=off", agent)
}

async fn agent(options: Options) -> anyhow::Result<Exit> {
    // First: probes are answered while the broker is tried, and what is measured has somewhere to go.
    let monitoring = serve(options.listen)?;
    let tosses = TossCount::default();
    let (hand_over, events) = oneshot::channel();
    let mut builder = Atomizer::builder()
        .name(options.name)
        .atom(MonteCarlo::default())
        .atom(tosses.atom())
        .drain_timeout(DRAIN_TIMEOUT)
        .give_up_after(options.give_up_after)
        // An error says that nobody is left to watch.
        .watch(|events| drop(hand_over.send(events)));
    if let Some(limit) = options.concurrency {
        builder = builder.concurrency(usize::try_from(limit.get()).unwrap_or(usize::MAX));
    }
    match options.connect_timeout {
        Some(limit) => {
            let limit = humantime::format_duration(limit);
            tracing::info!("connecting to {}; gives up after {limit}", options.broker.amqp);
        }
        None => tracing::info!("connecting to {}; keeps trying for ever", options.broker.amqp),
    }
    let node = tokio::select! {
        node = broker::start(builder, options.broker.amqp, options.connect_timeout) => node?,
        stopped = signals::stop() => {
            stopped?;
            tracing::info!("told to stop before the broker was reached");
            return Ok(Exit::Done);
        }
    };
    if let Some(monitoring) = &monitoring {
        monitoring.watch(node.health());
    }
    tracing::info!("node {} serves {} and {}", node.node(), MonteCarlo::ID, Toss::ID);
    let (ended, served) = tokio::join!(node.run(), follow(events.await?, &tosses));
    tracing::info!("served {} electrons, {} tosses", served.electrons, Scaled(tosses.get() as f64));
    ended?;
    Ok(Exit::Done)
}

/// Serves metrics and probes. Where no address was chosen, several agents on one machine each find one.
fn serve(listen: Option<Listen>) -> anyhow::Result<Option<Monitoring>> {
    let monitoring = match listen {
        Some(Listen::Off) => return Ok(None),
        Some(Listen::At(address)) => Monitoring::serve(address)?,
        None => match Monitoring::serve(Monitoring::ADDRESS_DEFAULT) {
            Err(error) if error.is_address_in_use() => {
                tracing::info!("{} is taken", Monitoring::ADDRESS_DEFAULT);
                let mut address = Monitoring::ADDRESS_DEFAULT;
                address.set_port(0);
                Monitoring::serve(address)?
            }
            served => served?,
        },
    };
    tracing::info!("metrics at http://{}/metrics", monitoring.address());
    Ok(Some(monitoring))
}

/// What a node has done.
#[derive(Clone, Copy, Default)]
struct Served {
    electrons: u64,
    tosses: u64,
}

/// Counts what the node does until it has stopped. Says when it takes up work, and every second what it did.
async fn follow(mut events: EventStream, tosses: &TossCount) -> Served {
    let mut served = Served::default();
    let mut said = (served, Instant::now());
    let mut idle = true;
    let mut seconds = interval(Duration::from_secs(1));
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            _ = seconds.tick() => {
                served.tosses = tosses.get();
                idle = served.electrons == said.0.electrons;
                if !idle {
                    say_since(said, served);
                }
                said = (served, Instant::now());
                continue;
            }
        };
        match event {
            None => return served,
            Some(Err(missed)) => tracing::warn!("{missed}: too much happens to count it all"),
            Some(Ok(event)) => match event.kind {
                EventKind::Started { .. } if idle => {
                    idle = false;
                    tracing::info!("at work");
                    said.1 = Instant::now();
                    seconds.reset();
                }
                // Failures are in the log already.
                EventKind::Completed { .. } | EventKind::Failed { .. } => served.electrons += 1,
                EventKind::Stopped => return served,
                _ => {}
            },
        }
    }
}

fn say_since((before, then): (Served, Instant), now: Served) {
    tracing::info!(
        "did {} electrons, {} tosses in {:.1} s; {} electrons in all",
        now.electrons - before.electrons,
        Scaled((now.tosses - before.tosses) as f64),
        then.elapsed().as_secs_f64(),
        now.electrons,
    );
}
