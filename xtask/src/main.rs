//! The chores of this repository, as `cargo xtask COMMAND`.

mod bench;
mod cargo;
mod ci;
mod counts;
mod install;
mod sabotage;
mod stream;
mod test;
mod versions;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The chores of this repository.
///
/// Everything that needs a broker gets a private RabbitMQ, which listens on 127.0.0.1 only and is
/// gone afterwards, even after an interrupt. An installed rabbitmq-server is all that is needed;
/// `cargo xtask test` installs it where it may.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    after_help = "\
Exit status: 0 done, 1 failed, 2 wrongly typed.

Environment:
  ATOMIZER_RABBITMQ_SERVER  the rabbitmq-server script to use, instead of the installed one

Examples:
  cargo xtask test                    run every test
  cargo xtask test -- outage          run the tests whose names contain \"outage\"
  cargo xtask test --rabbitmq 4.0     run them on a newer RabbitMQ
  cargo xtask ci                      do everything that is checked before a merge
  cargo xtask sabotage                break the code on purpose, and see whether the tests notice
  cargo xtask bench in-process --help say what the benchmark can do
  cargo xtask bench rabbitmq          measure nodes over RabbitMQ against a bare client
  cargo xtask recovery --smoke        bring about each fault once, and see everything recover"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the tests against a private RabbitMQ.
    ///
    /// Installs RabbitMQ first where it is missing and this is allowed to (as root, or with a sudo
    /// that asks for no password); else says what to type. Uses cargo-nextest where it is
    /// installed, else `cargo test`; then runs the documentation's tests.
    ///
    /// With --rabbitmq it is a RabbitMQ of at least that version: the installed one where that is new enough,
    /// else one from a newer Debian. That is fetched with debootstrap, from where the machine's apt gets its
    /// packages, into `rabbitmq` in cargo's target folder, where it stays. Only root may do that.
    ///
    /// The last line of the output is `passed=N failed=N rabbitmq=VERSION`, with the version that
    /// the broker itself reports. A missing broker, a failed build and a run without any test are
    /// failures.
    Test(test::Options),
    /// Does everything that is checked before a merge, and stops at the first failure.
    ///
    /// Formatting, clippy, documentation, licences and sources of dependencies (with cargo-deny,
    /// where it is installed), the tests, those of what depends on RabbitMQ also on RabbitMQ 4.0, and the first
    /// command of the README. Where RabbitMQ 4.0 can neither be found nor fetched, this says so, at the end too.
    Ci,
    /// Breaks the code on purpose, and sees whether the tests notice.
    ///
    /// Each patch in tests/sabotage breaks one promise and names the test that has to notice: it must pass
    /// without the patch, and fail (or not end within 2 minutes) with it. A patch that does not apply, code
    /// that does not build with it, and a test that is not there are errors.
    ///
    /// All of it is done in a copy of the working tree as it is, in the folder for temporary files, which is
    /// gone afterwards, even after an interrupt. What is built stays in `sabotage` in cargo's target folder,
    /// and so does the output of each test, as NAME.log. `cargo test` runs the tests, also where cargo-nextest
    /// is installed: it is one at a time. Tests that need a broker get a private RabbitMQ.
    ///
    /// The last line of the output is `caught N of N`: how many of how many patches. It fails unless all are
    /// caught, and there is one.
    Sabotage(sabotage::Options),
    /// Measures how fast things are.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Measures how long it takes after each fault of a broker until electrons flow again.
    Recovery(bench::Recovery),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Test(options) => test::run(&options),
        Command::Ci => ci::run(),
        Command::Sabotage(options) => sabotage::run(&options),
        Command::Bench(bench) => bench::run(&bench),
        Command::Recovery(recovery) => bench::recovery(&recovery),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
