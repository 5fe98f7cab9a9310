//! Watches over all nodes behind a RabbitMQ broker, and sums up what happens.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use atomizer::{Bookmark, Event, Monitor, NodeState, NodeStatus, Nodes, Position, Seen};
use atomizer_examples::{Exit, broker::Broker, say, signals};
use clap::Parser;
use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval};

/// Watches over all nodes behind a RabbitMQ broker, and says every second what has happened so far.
///
/// It is no node: start it anywhere, before the nodes or after them, as often as you like.
#[derive(Parser)]
#[command(
    name = "monitor",
    version,
    after_help = "\
Examples:
  monitor                             what happens from now on
  monitor --from 1h                   what has happened in the last hour, and goes on to
  monitor --from start --state seen   goes on where it was, also when it was killed

Exit codes: 0 told to stop, 1 failed, 2 wrongly typed."
)]
struct Options {
    #[command(flatten)]
    broker: Broker,
    /// Where to begin: now, start, how long ago (10m), a time (2026-11-21T12:00:00Z) or an offset (@1234).
    #[arg(long, value_name = "POSITION", default_value = "now")]
    from: Position,
    /// Keep the sums in a file, and go on from there.
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Print the sums as a line of JSON.
    #[arg(long)]
    json: bool,
}

/// How long nodes are counted that are silent.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60 * 60);

fn main() -> ExitCode {
    atomizer_examples::run("warn,lapin=off", watch)
}

async fn watch(options: Options) -> anyhow::Result<Exit> {
    let mut monitor = Monitor::new(&options.broker.amqp)?.from(options.from);
    let mut sums = Sums::default();
    if let Some(state) = options.state.as_deref().map(State::read).transpose()?.flatten() {
        sums = state.sums;
        monitor = monitor.after(state.bookmark);
    }
    let mut events = monitor.open().await?;
    let mut nodes = Nodes::default();
    let mut seconds = interval(Duration::from_secs(1));
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stop = std::pin::pin!(signals::stop());
    loop {
        let stopped = tokio::select! {
            seen = events.next() => {
                nodes.see(&seen);
                sums.add(&seen);
                continue;
            }
            _ = seconds.tick() => false,
            stopped = &mut stop => stopped.map(|()| true)?,
        };
        nodes.forget(FORGOTTEN_AFTER);
        say(sums.line(&nodes, options.json)?)?;
        if let Some(file) = &options.state {
            State { sums: sums.clone(), bookmark: events.bookmark() }.write(file)?;
        }
        if stopped {
            return Ok(Exit::Done);
        }
    }
}

/// How often what has happened.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
struct Sums {
    /// By kind.
    events: BTreeMap<String, u64>,
    /// By atom, and by kind: the ends, and what went wrong on the way to them.
    atoms: BTreeMap<String, BTreeMap<String, u64>>,
    missed: u64,
}

impl Sums {
    fn add(&mut self, seen: &Seen) {
        match seen {
            Seen::Event(event) => self.add_event(event),
            Seen::Missed { events, .. } => self.missed += events,
            _ => {}
        }
    }

    fn add_event(&mut self, event: &Event) {
        let kind = event.kind.name();
        *self.events.entry(kind.to_owned()).or_default() += 1;
        let matters = matches!(kind, "completed" | "failed" | "retried" | "requeued");
        if let (true, Some(atom)) = (matters, event.atom()) {
            let atom = self.atoms.entry(atom.to_string()).or_default();
            *atom.entry(kind.to_owned()).or_default() += 1;
        }
    }

    fn line(&self, nodes: &Nodes, json: bool) -> anyhow::Result<String> {
        let nodes = nodes.list();
        let count = |state| nodes.iter().filter(|node| node.state == state).count();
        let alive = count(NodeState::Alive);
        let is_gone = |node: &&NodeStatus| node.state == NodeState::Gone;
        let gone: Vec<_> = nodes.iter().filter(is_gone).map(|node| node.node.as_str()).collect();
        if json {
            let sums = serde_json::to_value(self)?;
            let line = serde_json::json!({ "alive": alive, "gone": gone, "sums": sums });
            return Ok(line.to_string());
        }
        let of = |kind| self.events.get(kind).copied().unwrap_or_default();
        let mut line = format!(
            "nodes: {alive} alive; electrons: {} completed, {} failed, {} retried, {} requeued",
            of("completed"),
            of("failed"),
            of("retried"),
            of("requeued"),
        );
        for (atom, counts) in &self.atoms {
            let counts: Vec<_> =
                counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            line += &format!("; {atom}: {}", counts.join(", "));
        }
        if !gone.is_empty() {
            line += &format!("; gone: {}", gone.join(", "));
        }
        if self.missed > 0 {
            line += &format!("; {} events were missed", self.missed);
        }
        Ok(line)
    }
}

/// What survives: the sums, and of which events they are. Both in one file, or they would not fit each other.
#[derive(Deserialize, Serialize)]
struct State {
    sums: Sums,
    bookmark: Bookmark,
}

impl State {
    fn read(file: &Path) -> anyhow::Result<Option<Self>> {
        let failed = || format!("failed to read {}", file.display());
        match fs::read_to_string(file) {
            Ok(text) => serde_json::from_str(&text).map(Some).with_context(failed),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(failed),
        }
    }

    /// Writes all of it or nothing.
    fn write(&self, file: &Path) -> anyhow::Result<()> {
        let failed = || format!("failed to write {}", file.display());
        let new = file.with_extension("new");
        fs::write(&new, serde_json::to_string(self)?).with_context(failed)?;
        fs::rename(&new, file).with_context(failed)
    }
}
