//! `atomizer dead purge`.

use std::io::{self, IsTerminal as _, Write as _};

use anyhow::Context as _;
use atomizer_programs::{Exit, Mistyped};
use atomizer_rabbitmq::{DeadLetters, Selection};

use super::{Chosen, requeue};
use crate::shared::Shared;

/// Removes dead letters for good.
///
/// Asks first on a terminal; elsewhere --yes is needed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  atomizer dead purge --cause 1f2e3d4c5b6a
  atomizer dead purge --all --yes

With --json: {\"done\", \"refused\", \"kept\", \"interrupted\"}.")]
pub(super) struct Arguments {
    #[command(flatten)]
    chosen: Chosen,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

pub(super) async fn run(shared: &Shared, arguments: &Arguments) -> anyhow::Result<Exit> {
    let selection = arguments.chosen.selection()?;
    let dead = shared.dead_letters()?;
    if !arguments.yes && !confirmed(&dead, &selection).await? {
        eprintln!("nothing was removed");
        return Ok(Exit::Done);
    }
    let (progress, exit) = requeue::follow(dead.purge(selection), "removed").await?;
    requeue::report(shared, "removed", progress, exit)?;
    if arguments.chosen.id.is_some() && progress.done == 0 {
        anyhow::bail!("there is no such dead letter, or somebody else is at work on it just now");
    }
    Ok(exit)
}

/// Says how many these are, and asks.
async fn confirmed(dead: &DeadLetters, selection: &Selection) -> anyhow::Result<bool> {
    if !io::stdin().is_terminal() {
        return Err(Mistyped("there is nobody to ask: say --yes".to_owned()).into());
    }
    let (mut listing, mut count) = (dead.list(selection.clone()), 0_u64);
    while listing.next().await.transpose()?.is_some() {
        count += 1;
    }
    eprint!("Remove {count} dead letters for good? Type yes: ");
    io::stderr().flush().context("failed to ask")?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).context("failed to read the answer")?;
    Ok(answer.trim() == "yes")
}
