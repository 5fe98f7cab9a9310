//! Asks whatever agents are behind a RabbitMQ broker for estimates of π, one per line of input.

use std::{
    io::{self, IsTerminal as _},
    pin::pin,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use atomizer::{Atomizer, CallError};
use atomizer_atoms::{Estimate, MonteCarlo, Request};
use atomizer_examples::{
    Exit,
    broker::{self, Broker},
    cli, say, signals,
    tosses::{Report, batch_for},
};
use clap::Parser;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    time::sleep,
};

/// Asks the agents behind a RabbitMQ broker for estimates of pi.
///
/// Reads how many points to toss, one number per line, from the terminal or from a pipe, until the end of the
/// input (ctrl-d). This program tosses nothing itself: start one agent or more. What it has asked and no longer
/// waits for is done by the agents all the same.
///
/// Each answer is one line on stdout: pi=.. error=.. tosses=.. electrons=.. seconds=.. tosses_per_s=..
#[derive(Parser)]
#[command(
    name = "console",
    version,
    after_help = "Exit codes: 0 at the end of the input, 1 failed, 2 wrongly typed, 130 interrupted."
)]
struct Options {
    #[command(flatten)]
    broker: Broker,
    /// How long to wait for each answer, as in 30s or 5m.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = humantime::parse_duration)]
    deadline: Duration,
    /// Chooses the points: the same seed and tosses give the same estimate.
    #[arg(long, value_name = "N", default_value = "1", value_parser = cli::whole_number, allow_hyphen_values = true)]
    seed: u64,
}

fn main() -> ExitCode {
    atomizer_examples::run("warn,lapin=off", console)
}

async fn console(options: Options) -> anyhow::Result<Exit> {
    let builder = Atomizer::builder().name("console");
    let node = broker::start(builder, options.broker.amqp.clone(), broker::PATIENCE).await?;
    let talked = tokio::select! {
        talked = talk(&node, &options) => talked.map(|()| Exit::Done),
        stopped = signals::stop() => stopped.map(|()| Exit::Interrupted).map_err(Into::into),
    };
    node.drain().await?;
    talked
}

/// Answers line after line until the input ends.
async fn talk(node: &Atomizer, options: &Options) -> anyhow::Result<()> {
    let on_terminal = io::stdin().is_terminal();
    let mut input = BufReader::new(tokio::io::stdin());
    loop {
        if on_terminal {
            eprint!("Enter tosses: ");
        }
        // Bytes, because what is no text is an answer that can be refused, not an end.
        let mut line = Vec::new();
        let length = input.read_until(b'\n', &mut line).await.context("failed to read stdin")?;
        if length == 0 {
            if on_terminal {
                eprintln!();
            }
            return Ok(());
        }
        let line = String::from_utf8_lossy(&line);
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        match cli::count(line) {
            Err(reason) => eprintln!("error: {line:?} is no number of tosses: {reason}"),
            Ok(tosses) => {
                let request = Request::new(tosses, batch_for(tosses), options.seed)?;
                let began = Instant::now();
                match ask(node, request, options.deadline).await {
                    Ok(estimate) => say(Report { estimate, took: began.elapsed() })?,
                    Err(error) => eprintln!("error: {:#}", anyhow::Error::new(error)),
                }
            }
        }
    }
}

/// Asks the agents, and says when they keep still.
async fn ask(node: &Atomizer, request: Request, deadline: Duration) -> Result<Estimate, CallError> {
    const STILL: Duration = Duration::from_secs(3);
    let mut answer = pin!(node.call::<MonteCarlo>(request).deadline(deadline).into_future());
    tokio::select! {
        answer = &mut answer => return answer,
        () = sleep(STILL) => {
            let deadline = humantime::format_duration(deadline);
            eprintln!(
                "no answer yet; is an agent running? Many tosses take a while: waiting for up to {deadline}"
            );
        }
    }
    answer.await
}
