//! `cargo xtask test`.

use anyhow::{Context as _, Result, bail};
use atomizer_test_support::{Broker, SHARED_BROKER, Server, server};

use crate::cargo::{cargo, has};
use crate::counts::{Counts, Runner};
use crate::stream;
use crate::versions::{self, Version};

/// What `cargo xtask test` can be told.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// Install what is missing without asking.
    #[arg(long)]
    pub(crate) yes: bool,
    /// Test on a RabbitMQ of at least this version, as in 4.0.
    #[arg(long, value_name = "VERSION")]
    pub(crate) rabbitmq: Option<Version>,
    /// Test this package only; may be given several times.
    #[arg(short, long = "package", value_name = "NAME")]
    pub(crate) packages: Vec<String>,
    /// Filters and flags for cargo-nextest (or `cargo test`); the documentation is not tested then.
    #[arg(last = true, value_name = "EXTRA")]
    pub(crate) extra: Vec<String>,
}

/// Runs the tests, and prints the line that sums them up last.
pub(crate) fn run(options: &Options) -> Result<()> {
    let server = versions::ensure(options.rabbitmq.as_ref(), options.yes)?;
    let broker = Broker::start_on(&server).context("failed to start a private RabbitMQ")?;
    let version = broker.version().to_owned();
    let brokers = Brokers { shared: &broker, server: &server };
    let checked =
        options.rabbitmq.as_ref().map_or(Ok(()), |asked| versions::check(&version, asked));
    let outcome = checked.and_then(|()| run_all(&brokers, options));
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

/// What tests that need a broker are told of.
struct Brokers<'a> {
    shared: &'a Broker,
    /// Where they find one to start by themselves.
    server: &'a Server,
}

fn run_all(brokers: &Brokers<'_>, options: &Options) -> Result<Counts> {
    let mut scope: Vec<&str> =
        options.packages.iter().flat_map(|name| ["--package", name.as_str()]).collect();
    if scope.is_empty() {
        scope.push("--workspace");
    }
    // All tests run, so that the numbers are those of the whole.
    scope.push("--no-fail-fast");
    let (runner, mut arguments) = if has("nextest") {
        (Runner::Nextest, vec!["nextest", "run"])
    } else {
        (Runner::Libtest, vec!["test", "--tests"])
    };
    arguments.extend(&scope);
    arguments.extend(options.extra.iter().map(String::as_str));
    let mut counts = run_one(brokers, runner, &arguments)?;
    if options.extra.is_empty() {
        // nextest leaves the documentation's tests out.
        let arguments = [&["test", "--doc"], &*scope].concat();
        counts.add(run_one(brokers, Runner::Libtest, &arguments)?);
    }
    Ok(counts)
}

fn run_one(brokers: &Brokers<'_>, runner: Runner, arguments: &[&str]) -> Result<Counts> {
    let mut command = cargo(arguments.iter().copied());
    command.env(SHARED_BROKER, brokers.shared.describe());
    command.env(server::RABBITMQ_SERVER, brokers.server.script());
    let watch = |pid| brokers.shared.end_with_us(pid);
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
