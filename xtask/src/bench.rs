//! `cargo xtask bench` and `cargo xtask recovery`.

use anyhow::{Context as _, Result, ensure};

use crate::cargo::cargo;

/// What can be measured.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    /// Measures the path of an electron within one process, without a broker.
    #[command(disable_help_flag = true)]
    InProcess {
        /// Arguments of the benchmark itself; `--help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        arguments: Vec<String>,
    },
    /// Measures fan-outs within one process, without a broker: speed and memory.
    #[command(disable_help_flag = true)]
    FanOut {
        /// Arguments of the benchmark itself; `--help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        arguments: Vec<String>,
    },
    /// Measures a Monte Carlo estimate within one process against a plain loop on all cores.
    #[command(disable_help_flag = true)]
    Montecarlo {
        /// Arguments of the benchmark itself; `--help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        arguments: Vec<String>,
    },
    /// Measures nodes over a private RabbitMQ against a bare client of the same guarantees.
    #[command(disable_help_flag = true)]
    Rabbitmq {
        /// Arguments of the benchmark itself; `--help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        arguments: Vec<String>,
    },
}

/// What `cargo xtask recovery` can be told.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Recovery {
    /// Arguments of the measurement itself; `--help` lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    arguments: Vec<String>,
}

impl Recovery {
    /// Each fault once.
    pub(crate) fn smoke() -> Self {
        Self { arguments: vec!["--smoke".to_owned()] }
    }
}

/// Builds the benchmark in release mode and runs it.
pub(crate) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::InProcess { arguments } => run_bin("in-process", arguments),
        Bench::FanOut { arguments } => run_bin("fan-out", arguments),
        Bench::Montecarlo { arguments } => run_bin("montecarlo", arguments),
        Bench::Rabbitmq { arguments } => run_bin("rabbitmq", arguments),
    }
}

/// Builds the measurement in release mode and runs it.
pub(crate) fn recovery(recovery: &Recovery) -> Result<()> {
    run_bin("recovery", &recovery.arguments)
}

fn run_bin(name: &str, arguments: &[String]) -> Result<()> {
    let build = "run --release --quiet --package atomizer-bench --bin";
    let status = cargo(build.split(' '))
        .args([name, "--"])
        .args(arguments)
        .status()
        .context("failed to run cargo")?;
    ensure!(status.success(), "the measurement failed: {status}");
    Ok(())
}
