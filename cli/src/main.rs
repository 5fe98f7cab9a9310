//! The command `atomizer`: send, call, watch, and put right what failed.
//!
//! One file per verb in `verbs`; each takes its arguments and what all share ([`Shared`]).

mod input;
mod management;
mod output;
mod rows;
mod shared;
mod verbs;

use std::process::ExitCode;

use atomizer_programs::Exit;
use clap::{Parser, Subcommand};

use crate::{
    shared::Shared,
    verbs::{call, completions, dead, doctor, events, nodes, queues, send, topology, why},
};

/// Asks atoms, watches over nodes, and sees to what failed, behind a RabbitMQ broker.
///
/// It is a client: it runs no atom itself, and makes nothing on the broker that is to stay unless it is told to
/// (--declare, and the verb topology apply).
#[derive(Debug, Parser)]
#[command(
    name = "atomizer",
    version,
    after_help = "\
Examples:
  atomizer call double 21                      ask an atom, and print its output
  echo '{\"to\": \"x\"}' | atomizer send mail -    leave work for whoever serves the atom
  atomizer nodes                               who is there, and serves what
  atomizer events --severity warning           what goes wrong, as it happens
  atomizer dead list                           what failed for good, grouped by cause
  atomizer why 01932c07-e8f1-7a3b-9c4d-5e6f70819203
  atomizer dead requeue --cause 1f2e3d4c5b6a --rate 100/s
  atomizer doctor                              what is wrong, and what to do about it

With --json every verb prints one JSON object a line; docs/cli.md has the fields.
Exit codes: 0 done, 1 failed, 2 wrongly typed, 130 interrupted."
)]
struct Arguments {
    #[command(flatten)]
    shared: Shared,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Call(call::Arguments),
    Completions(completions::Arguments),
    Dead(dead::Arguments),
    Doctor(doctor::Arguments),
    Events(events::Arguments),
    Nodes(nodes::Arguments),
    Queues(queues::Arguments),
    Send(send::Arguments),
    Topology(topology::Arguments),
    Why(why::Arguments),
}

fn main() -> ExitCode {
    atomizer_programs::run("warn,lapin=off", atomizer)
}

async fn atomizer(arguments: Arguments) -> anyhow::Result<Exit> {
    let Arguments { shared, verb } = arguments;
    match verb {
        Verb::Call(arguments) => call::run(&shared, arguments).await,
        Verb::Completions(arguments) => completions::run::<self::Arguments>(&arguments),
        Verb::Dead(arguments) => dead::run(&shared, arguments).await,
        Verb::Doctor(arguments) => doctor::run(&shared, &arguments).await,
        Verb::Events(arguments) => events::run(&shared, &arguments).await,
        Verb::Nodes(arguments) => nodes::run(&shared, &arguments).await,
        Verb::Queues(arguments) => queues::run(&shared, &arguments).await,
        Verb::Send(arguments) => send::run(&shared, arguments).await,
        Verb::Topology(arguments) => topology::run(&shared, &arguments).await,
        Verb::Why(arguments) => why::run(&shared, &arguments).await,
    }
}
