//! `cargo xtask test`.

use anyhow::{Context as _, Result, bail};
use atomizer_test_support::{Broker, SHARED_BROKER};

use crate::cargo::{cargo, has};
use crate::counts::{Counts, Runner};
use crate::{install, stream};

/// What `cargo xtask test` can be told.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// Install what is missing without asking.
    #[arg(long)]
    pub(crate) yes: bool,
    /// Filters and flags for cargo-nextest (or `cargo test`); the documentation is not tested then.
    #[arg(last = true, value_name = "EXTRA")]
    pub(crate) extra: Vec<String>,
}

/// Runs the tests, and prints the line that sums them up last.
pub(crate) fn run(options: &Options) -> Result<()> {
    install::ensure_rabbitmq(options.yes)?;
    let broker = Broker::start().context("failed to start a private RabbitMQ")?;
    let outcome = run_all(&broker, &options.extra);
    let version = broker.version().to_owned();
    // What goes wrong with the end of the broker is said before the last line, not after it.
    drop(broker);
    let counts = match outcome {
        Ok(counts) => counts,
        Err(error) => {
            eprintln!("error: {error:#}");
            Counts { passed: 0, failed: 1 }
        }
    };
    let Counts { passed, failed } = counts;
    println!("passed={passed} failed={failed} rabbitmq={version}");
    match counts {
        Counts { failed: 1.., .. } => bail!("the tests failed"),
        Counts { passed: 0, .. } => bail!("no test was run"),
        Counts { .. } => Ok(()),
    }
}

fn run_all(broker: &Broker, extra: &[String]) -> Result<Counts> {
    // All tests run, so that the numbers are those of the whole.
    let (runner, arguments) = if has("nextest") {
        (Runner::Nextest, "nextest run --workspace --no-fail-fast")
    } else {
        (Runner::Libtest, "test --workspace --tests --no-fail-fast")
    };
    let mut arguments: Vec<&str> = arguments.split(' ').collect();
    arguments.extend(extra.iter().map(String::as_str));
    let mut counts = run_one(broker, runner, &arguments)?;
    if extra.is_empty() {
        // nextest leaves the documentation's tests out.
        let arguments = ["test", "--doc", "--workspace", "--no-fail-fast"];
        counts.add(run_one(broker, Runner::Libtest, &arguments)?);
    }
    Ok(counts)
}

fn run_one(broker: &Broker, runner: Runner, arguments: &[&str]) -> Result<Counts> {
    let mut command = cargo(arguments.iter().copied());
    command.env(SHARED_BROKER, broker.describe());
    let watch = |pid| broker.end_with_us(pid);
    let read = |counts: &mut Counts, line: &str| counts.read(runner, line);
    let ended = stream::run(&mut command, watch, read)?;
    // nextest sums up on one of the two, libtest on the other.
    let mut counts = ended.stdout;
    counts.add(ended.stderr);
    if !ended.status.success() && counts.failed == 0 {
        // A build that fails sums up nothing.
        eprintln!("`cargo {}` failed: {}", arguments.join(" "), ended.status);
        counts.failed = 1;
    }
    Ok(counts)
}
