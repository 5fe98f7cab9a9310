//! Estimates π, in this process or together with all agents behind a RabbitMQ broker.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use atomizer::Atomizer;
use atomizer_atoms::{MonteCarlo, Request};
use atomizer_examples::{
    Exit, broker, cli,
    progress::{self, Done},
    say,
    tosses::{Report, Scaled, TossCount, batch_for},
};
use atomizer_rabbitmq::RabbitMq;
use clap::Parser;
use tokio::signal::ctrl_c;

/// Estimates pi by tossing points at a square and counting those that land within the circle.
///
/// The tosses are divided into batches, one electron each. They run on the cores of this machine, or, with
/// --amqp, on this machine and on every agent behind the same broker.
///
/// The same tosses, batch and seed give the same estimate, wherever the batches run.
///
/// The last line on stdout is for machines: pi=.. error=.. tosses=.. electrons=.. seconds=.. tosses_per_s=..
#[derive(Parser)]
#[command(
    name = "montecarlo",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrongly typed, 130 interrupted.\n\
                  Interrupted over a broker, what has begun is left to the agents there."
)]
struct Options {
    /// How many points to toss, as in 5000000, 5_000_000 or 5e6.
    #[arg(long, value_name = "N", default_value = "3e9", value_parser = cli::count, allow_hyphen_values = true)]
    tosses: u64,
    /// How many points one electron tosses [default: chosen for at least 1,000 electrons].
    #[arg(long, value_name = "N", value_parser = cli::count, allow_hyphen_values = true)]
    batch: Option<u64>,
    /// Chooses the points.
    #[arg(long, value_name = "N", default_value = "1", value_parser = cli::whole_number, allow_hyphen_values = true)]
    seed: u64,
    /// Share the work over this broker: amqp://user:password@host:port/vhost.
    #[arg(long, value_name = "URL", value_parser = cli::Url)]
    amqp: Option<RabbitMq>,
    /// Print one line of JSON and nothing else on stdout.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    atomizer_examples::run("warn,lapin=off", montecarlo)
}

async fn montecarlo(options: Options) -> anyhow::Result<Exit> {
    let batch = options.batch.unwrap_or_else(|| batch_for(options.tosses));
    let request = Request::new(options.tosses, batch, options.seed)?;
    let work = Work::default();
    let node = start(options.amqp, request, &work).await?;
    let began = Instant::now();
    // However many tosses it is, they take as long as they take.
    let call = node.call::<MonteCarlo>(request).deadline(Duration::MAX);
    let answer = tokio::select! {
        answer = call.into_future() => answer.context("no estimate"),
        never = progress::show(request.tosses, || work.done()) => match never {},
        interrupted = ctrl_c() => {
            interrupted?;
            stop(&node).await?;
            return Ok(Exit::Interrupted);
        }
    };
    let took = began.elapsed();
    stop(&node).await?;
    let report = Report { estimate: answer?, took };
    if options.json {
        say(report.json())?;
    } else {
        print(&report)?;
    }
    Ok(Exit::Done)
}

async fn start(amqp: Option<RabbitMq>, request: Request, work: &Work) -> anyhow::Result<Atomizer> {
    let builder = Atomizer::builder()
        .name("montecarlo")
        .atom(work.monte_carlo(request))
        .atom(work.here.atom())
        // What may still run at the end is the work of others, or was interrupted.
        .drain_timeout(Duration::from_millis(200));
    broker::start_or_in_memory(builder, amqp).await
}

/// Gives back what still runs. Whoever presses ctrl-c again does not wait for that.
async fn stop(node: &Atomizer) -> anyhow::Result<()> {
    tokio::select! {
        stopped = node.drain() => Ok(stopped?),
        interrupted = ctrl_c() => Ok(interrupted?),
    }
}

/// What is known here of how far the run has come.
#[derive(Default)]
struct Work {
    /// Tosses that were answered, wherever they were done. 0 while the spawner runs on another node.
    answered: Arc<AtomicU64>,
    here: TossCount,
}

impl Work {
    /// The broker may hand this node the requests of others too: they do not count.
    fn monte_carlo(&self, mine: Request) -> MonteCarlo {
        let answered = Arc::clone(&self.answered);
        MonteCarlo::with_progress(move |progress| {
            if progress.request == mine {
                answered.store(progress.tosses, Ordering::Relaxed);
            }
        })
    }

    fn done(&self) -> Done {
        match self.answered.load(Ordering::Relaxed) {
            0 => Done::Here(self.here.get()),
            answered => Done::OfAll(answered),
        }
    }
}

fn print(report: &Report) -> anyhow::Result<()> {
    let estimate = &report.estimate;
    say(format_args!("estimate   {:.8}", estimate.pi))?;
    say(format_args!("error      {:+.8}", estimate.error))?;
    say(format_args!("tosses     {} ({}/s)", estimate.tosses, Scaled(report.tosses_per_s())))?;
    say(format_args!(
        "electrons  {} ({}/s)",
        estimate.electrons,
        Scaled(report.electrons_per_s())
    ))?;
    say(format_args!("time       {:.3} s", report.took.as_secs_f64()))?;
    say(report)
}
