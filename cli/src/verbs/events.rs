//! `atomizer events`.

use std::{fs, io::ErrorKind, path::PathBuf};

use anyhow::Context as _;
use atomizer::{
    AtomId, Bookmark, ClusterEvents, ElectronId, EventKind, Filter, Monitor, NodeId, Position,
    Seen, Severity,
};
use atomizer_programs::{Exit, say, signals};
use clap::builder::PossibleValuesParser;
use serde_json::json;

use crate::{output::one_line, shared::Shared};

/// Shows what happens on all nodes, and what has happened.
///
/// It begins now, unless it is told from where, and goes on until it is stopped, unless it is told to end. What is shown fits
/// all that is said; of several atoms, nodes, electrons or kinds, any will do.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  atomizer events --severity warning               what goes wrong, from now on
  atomizer events --from 10m --once --atom mail    what happened to mail in the last 10 min
  atomizer events --kind failed --kind retried --json | jq .failure.message
  atomizer events --from start --bookmark seen     all that is kept, and the next time what came since

With --json each line is an event (docs/events.md), or {\"event\": \"missed\", \"node\", \"events\"}: so many events of the node are
not there.")]
pub(crate) struct Arguments {
    /// Where to begin: now, start, how long ago (10m, 2h 30m), a time (2026-11-21T12:00:00Z) or an offset (@1234).
    #[arg(long, value_name = "POSITION", default_value = "now")]
    from: Position,
    /// End when all that is kept has been shown.
    #[arg(long)]
    once: bool,
    /// Leave out what matters less.
    #[arg(long, value_name = "LEVEL", default_value = "debug", value_parser = severity())]
    severity: String,
    /// Only events of this kind, as in failed or session_lost; docs/events.md lists them.
    #[arg(long, value_name = "KIND", value_parser = PossibleValuesParser::new(EventKind::NAMES), hide_possible_values = true)]
    kind: Vec<String>,
    /// Only events of this atom.
    #[arg(long, value_name = "ATOM", value_parser = |text: &str| AtomId::try_new(text))]
    atom: Vec<AtomId>,
    /// Only events of this node.
    #[arg(long, value_name = "NODE", value_parser = |text: &str| NodeId::try_new(text))]
    node: Vec<NodeId>,
    /// Only events of this electron, and the sending of its children.
    #[arg(long, value_name = "ID")]
    electron: Vec<ElectronId>,
    /// Go on where the last run with this file ended, and write into it where this one ends.
    #[arg(long, value_name = "FILE")]
    bookmark: Option<PathBuf>,
}

fn severity() -> PossibleValuesParser {
    PossibleValuesParser::new(Severity::ALL.map(Severity::as_str))
}

impl Arguments {
    fn filter(&self) -> Filter {
        let least = Severity::ALL.into_iter().find(|severity| severity.as_str() == self.severity);
        let mut filter = Filter::new().severity(least.unwrap_or(Severity::Debug));
        for kind in &self.kind {
            filter = filter.kind(kind);
        }
        for atom in &self.atom {
            filter = filter.atom(atom.clone());
        }
        for node in &self.node {
            filter = filter.node(node.clone());
        }
        for electron in &self.electron {
            filter = filter.electron(*electron);
        }
        filter
    }
}

pub(crate) async fn run(shared: &Shared, arguments: &Arguments) -> anyhow::Result<Exit> {
    let mut monitor = shared.monitor()?.from(arguments.from).filter(arguments.filter());
    if let Some(file) = &arguments.bookmark {
        monitor = go_on(monitor, file)?;
    }
    let mut events = monitor.open().await?;
    let shown = tokio::select! {
        shown = show(shared, arguments, &mut events) => shown.map(|()| Exit::Done),
        stopped = signals::stop() => stopped.map(|()| Exit::Interrupted).map_err(Into::into),
    };
    if let Some(file) = &arguments.bookmark {
        keep(file, &events.bookmark())?;
    }
    shown
}

async fn show(
    shared: &Shared,
    arguments: &Arguments,
    events: &mut ClusterEvents,
) -> anyhow::Result<()> {
    loop {
        match events.next().await {
            // It comes of a later version, which has more to say.
            Seen::Event(event) if event.kind == EventKind::Other => {}
            Seen::Event(event) if shared.json => say(serde_json::to_string(&event)?)?,
            Seen::Event(event) => say(one_line(&event.to_string()))?,
            Seen::Missed { node, events } if shared.json => {
                say(json!({ "event": "missed", "node": node, "events": events }))?;
            }
            Seen::Missed { node, events } => eprintln!("{events} events of {node} are not there"),
            Seen::Interrupted { reason } => {
                eprintln!("the connection is lost ({reason}); it is made anew");
            }
            Seen::CaughtUp if arguments.once => return Ok(()),
            _ => {}
        }
    }
}

/// Goes on after the bookmark of a file, if there is one.
fn go_on(monitor: Monitor, file: &PathBuf) -> anyhow::Result<Monitor> {
    let name = file.display();
    match fs::read_to_string(file) {
        Ok(text) => {
            let bookmark: Bookmark =
                text.trim().parse().with_context(|| format!("failed to read {name}"))?;
            Ok(monitor.after(bookmark))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(monitor),
        Err(error) => Err(error).with_context(|| format!("failed to read {name}")),
    }
}

/// Writes a bookmark whole or not at all.
fn keep(file: &PathBuf, bookmark: &Bookmark) -> anyhow::Result<()> {
    let failed = || format!("failed to write {}", file.display());
    let mut new = file.clone().into_os_string();
    new.push(".new");
    fs::write(&new, format!("{bookmark}\n")).with_context(failed)?;
    fs::rename(&new, file).with_context(failed)
}
