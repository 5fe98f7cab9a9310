//! `atomizer nodes`.

use std::time::Duration;

use atomizer::{
    AtomId, Filter, Monitor, NodeState, NodeStatus, Nodes, Position, Presence, Seen, Serving,
};
use atomizer_programs::{Exit, say};
use serde_json::json;

use crate::{rows::Rows, shared::Shared};

/// Shows which nodes there are, what they serve, and how busy they are.
///
/// Each node says every 3 s that it is there. One that has been silent for 10 s is gone: killed, cut off, or its machine is
/// too busy. Those that have gone or stopped within the hour are shown too, but for such as serve nothing: they were clients.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  atomizer nodes
  atomizer nodes --since 1d     also those that have gone or stopped within the day
  atomizer nodes --all          also clients that have stopped, as `atomizer send` is one

With --json: {\"node\", \"state\": \"alive\" | \"stopped\" | \"gone\", \"silent_s\", \"presence\"}, where \"presence\" is null or {\"host\",
\"process\", \"version\", \"uptime_us\", \"running\", \"concurrency\", \"waiting\", \"atoms\": [{\"atom\", \"running\", \"concurrency\"}]}.")]
pub(crate) struct Arguments {
    /// Show those that were heard of within so long.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = humantime::parse_duration)]
    since: Duration,
    /// Show also those that serve nothing and are there no more.
    #[arg(long)]
    all: bool,
}

pub(crate) async fn run(shared: &Shared, arguments: &Arguments) -> anyhow::Result<Exit> {
    let mut nodes = heard(shared.monitor()?, arguments.since).await?;
    nodes.retain(|node| arguments.all || node.state == NodeState::Alive || serves_anything(node));
    if shared.json {
        nodes.iter().try_for_each(|node| say(as_json(node)))?;
    } else if nodes.is_empty() {
        eprintln!("no node was heard of");
    } else {
        print(&nodes)?;
    }
    Ok(Exit::Done)
}

/// How far to look back for nodes, and for what they served.
pub(crate) const LATELY: Duration = Duration::from_secs(60 * 60);

pub(crate) fn serves_anything(node: &NodeStatus) -> bool {
    node.presence.as_ref().is_some_and(|presence| !presence.atoms.is_empty())
}

/// Returns the nodes that were heard of within so long, or that are there.
pub(crate) async fn heard(monitor: Monitor, since: Duration) -> anyhow::Result<Vec<NodeStatus>> {
    let since = since.max(Presence::SILENCE_MAX + Presence::PERIOD);
    let filter = Filter::new().kind("alive").kind("stopped");
    let mut events = monitor.from(Position::ago(since)).filter(filter).open().await?;
    let mut nodes = Nodes::default();
    loop {
        match events.next().await {
            Seen::CaughtUp => return Ok(nodes.list()),
            Seen::Interrupted { reason } => anyhow::bail!("the connection is lost: {reason}"),
            seen => nodes.see(&seen),
        }
    }
}

/// Returns what these nodes serve, or served.
pub(crate) fn atoms(nodes: &[NodeStatus]) -> Vec<AtomId> {
    let served = nodes.iter().filter_map(|node| node.presence.as_ref()).flat_map(|it| &it.atoms);
    let mut atoms: Vec<_> = served.map(|serving| serving.atom.clone()).collect();
    atoms.sort();
    atoms.dedup();
    atoms
}

fn as_json(status: &NodeStatus) -> serde_json::Value {
    let NodeStatus { node, state, silent, presence, .. } = status;
    json!({ "node": node, "state": state, "silent_s": silent.as_secs(), "presence": presence })
}

fn print(nodes: &[NodeStatus]) -> anyhow::Result<()> {
    let mut rows = Rows::new(["NODE", "STATE", "HOST", "UP", "RUNNING", "WAITING", "SERVES"]);
    for NodeStatus { node, state, silent, presence, .. } in nodes {
        let state = match state {
            NodeState::Alive => state.to_string(),
            _ => format!("{state} for {}", seconds(*silent)),
        };
        let cells = match presence {
            Some(Presence { host, uptime, running, concurrency, waiting, atoms, .. }) => [
                host.clone(),
                seconds(*uptime),
                format!("{running}/{concurrency}"),
                waiting.to_string(),
                serves(atoms),
            ],
            None => ["-", "-", "-", "-", "-"].map(str::to_owned),
        };
        let [host, up, running, waiting, serves] = cells;
        rows.push([node.to_string(), state, host, up, running, waiting, serves]);
    }
    rows.lines().into_iter().try_for_each(say)
}

fn seconds(duration: Duration) -> String {
    humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string()
}

fn serves(atoms: &[Serving]) -> String {
    let atoms: Vec<_> = atoms.iter().map(|serving| serving.atom.as_str()).collect();
    if atoms.is_empty() { "-".to_owned() } else { atoms.join(", ") }
}
