//! A program from its command line to its exit code.

use std::{
    fmt::Display,
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::Parser;
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;

use crate::cli;

/// How a program ended, when it did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It did what was asked.
    Done,
    /// It was interrupted: 128 and the number of the signal, as shells have it.
    Interrupted,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Done => Self::SUCCESS,
            Exit::Interrupted => Self::from(130),
        }
    }
}

/// How long threads may take to exit at the end.
const EXIT_MAX: Duration = Duration::from_millis(200);

/// Parses the command line, sets up the log and runs `program`.
///
/// The exit code is 0 when it is done, 1 when it failed, 2 when it was wrongly typed ([`Mistyped`]) and 130 when it
/// was interrupted. An error is one line on stderr, its causes included. `log_filter` says what is logged, unless
/// `RUST_LOG` does.
pub fn run<A: Parser>(
    log_filter: &str,
    program: impl AsyncFnOnce(A) -> anyhow::Result<Exit>,
) -> ExitCode {
    let arguments = match cli::parse() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    log_to_stderr(log_filter);
    let ended = Runtime::new().map_err(Into::into).and_then(|runtime| {
        let ended = runtime.block_on(program(arguments));
        // A thread that reads stdin, or is in the middle of a batch, cannot be told to stop.
        runtime.shutdown_timeout(EXIT_MAX);
        ended
    });
    match ended {
        Ok(exit) => exit.into(),
        // Whoever reads no further, as `head` does, has what it wanted.
        Err(error) if error.is::<NobodyReads>() => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if error.is::<Mistyped>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// What was typed is wrong, and only the program can tell: such as a file that is no JSON.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Mistyped(pub String);

/// Nobody reads what is written to stdout any more.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("nobody reads stdout any more")]
struct NobodyReads;

/// Writes a line to stdout.
///
/// # Errors
/// When that fails: unlike `println!`, which panics then. That nobody reads it any more ends a program that passes the
/// error on, without a word.
pub fn say(line: impl Display) -> anyhow::Result<()> {
    write(format!("{line}\n").as_bytes())
}

/// Writes bytes to stdout.
///
/// # Errors
/// As [`say`].
pub fn write(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(NobodyReads.into()),
        written => written.context("failed to write to stdout"),
    }
}

fn log_to_stderr(filter: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(filter));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
}
