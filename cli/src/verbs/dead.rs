//! `atomizer dead`: what failed for good.

mod edit;
mod list;
mod purge;
mod rate;
mod requeue;
mod show;

use atomizer::{AtomId, CauseKey, LetterId};
use atomizer_programs::{Exit, Mistyped};
use atomizer_rabbitmq::Selection;
use clap::Subcommand;

use crate::shared::Shared;

/// Sees to what failed for good: lists it by cause, shows one, sends back, purges.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  atomizer dead list                                        how many died of what
  atomizer dead list --each --cause 1f2e3d4c5b6a            each of those
  atomizer dead show 01932c07-e8f1-7a3b-9c4d-5e6f70819203   one, with payload and history
  atomizer dead requeue --cause 1f2e3d4c5b6a --rate 100/s   send those back to their atom
  atomizer dead requeue 01932c07-e8f1-7a3b-9c4d-5e6f70819203 --edit
  atomizer dead purge --atom mail --yes

docs/dead-letters.md says what is a dead letter, and what happens to it here.")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    List(list::Arguments),
    Show(show::Arguments),
    Requeue(requeue::Arguments),
    Purge(purge::Arguments),
}

pub(crate) async fn run(shared: &Shared, arguments: Arguments) -> anyhow::Result<Exit> {
    match arguments.verb {
        Verb::List(arguments) => list::run(shared, &arguments).await,
        Verb::Show(arguments) => show::run(shared, &arguments).await,
        Verb::Requeue(arguments) => requeue::run(shared, arguments).await,
        Verb::Purge(arguments) => purge::run(shared, &arguments).await,
    }
}

/// Letters of an atom, or of a cause, or both.
#[derive(Clone, Debug, clap::Args)]
struct Filter {
    /// Only those of this atom.
    #[arg(long, value_parser = |text: &str| AtomId::try_new(text))]
    atom: Option<AtomId>,
    /// Only those that died of this, as `dead list` names it.
    #[arg(long, value_name = "KEY")]
    cause: Option<CauseKey>,
}

impl Filter {
    fn narrow(&self, selection: Selection) -> Selection {
        let selection = match &self.atom {
            Some(atom) => selection.atom(atom.clone()),
            None => selection,
        };
        match self.cause {
            Some(cause) => selection.cause(cause),
            None => selection,
        }
    }
}

/// Letters that something is done to: nothing is done unless it is said to which.
#[derive(Clone, Debug, clap::Args)]
struct Chosen {
    /// One letter, by its id.
    #[arg(value_name = "ID", conflicts_with_all = ["atom", "cause", "all"])]
    id: Option<LetterId>,
    #[command(flatten)]
    filter: Filter,
    /// All dead letters.
    #[arg(long, conflicts_with_all = ["atom", "cause"])]
    all: bool,
}

impl Chosen {
    /// # Errors
    /// [`Mistyped`] when nothing is chosen.
    fn selection(&self) -> Result<Selection, Mistyped> {
        let Self { id, filter, all } = self;
        match id {
            Some(id) => Ok(Selection::id(*id)),
            None if *all || filter.atom.is_some() || filter.cause.is_some() => {
                Ok(filter.narrow(Selection::all()))
            }
            None => Err(Mistyped(
                "say which: an ID, --cause KEY, --atom ATOM or --all ('atomizer dead list' shows what there is)"
                    .to_owned(),
            )),
        }
    }
}
