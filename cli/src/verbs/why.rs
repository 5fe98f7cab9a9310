//! `atomizer why`.

use atomizer::{ElectronId, Event, EventKind, NodeState, Story, Whereabouts};
use atomizer_programs::{Exit, say};
use serde_json::json;

use crate::{output::one_line, shared::Shared};

/// How many children are shown one by one.
const CHILDREN_SHOWN: usize = 20;

/// Tells the story of one electron: where it was sent, each attempt on each node, each cause, and where it is now.
///
/// All of it is read from the events that are kept, so it needs no node and works after the end. Events of different nodes stand
/// in the order of their clocks.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  atomizer why 01932c07-e8f1-7a3b-9c4d-5e6f70819203
  atomizer dead list --each                  the ids of what failed for good

With --json, one line: {\"electron\", \"events\": [event, …], \"children\": [{\"electron\", \"atom\"}, …], \"whereabouts\": {\"state\":
\"unknown\" | \"queued\" | \"at\" | \"done\" | \"failed\", \"text\"}}. Exit code 1 when nothing is known of it.")]
pub(crate) struct Arguments {
    /// The electron: its id is in every event, dead letter and answer.
    #[arg(value_name = "ID")]
    electron: ElectronId,
}

pub(crate) async fn run(shared: &Shared, arguments: &Arguments) -> anyhow::Result<Exit> {
    let story = shared.monitor()?.story(arguments.electron).await?;
    if shared.json {
        say(as_json(&story))?;
    } else {
        print(&story)?;
    }
    if story.whereabouts == Whereabouts::Unknown {
        anyhow::bail!(
            "nothing is known of {}: it was never sent here, or its events are kept no more",
            story.electron
        );
    }
    Ok(Exit::Done)
}

fn as_json(story: &Story) -> serde_json::Value {
    let state = match story.whereabouts {
        Whereabouts::Queued { .. }
        | Whereabouts::At { state: Some(NodeState::Gone | NodeState::Stopped), .. } => "queued",
        Whereabouts::At { .. } => "at",
        Whereabouts::Done { .. } => "done",
        Whereabouts::Failed { .. } => "failed",
        _ => "unknown",
    };
    let child = |(electron, atom): &_| json!({ "electron": electron, "atom": atom });
    json!({
        "electron": story.electron,
        "events": story.events,
        "children": story.children.iter().map(child).collect::<Vec<_>>(),
        "whereabouts": { "state": state, "text": story.whereabouts.to_string() },
    })
}

fn print(story: &Story) -> anyhow::Result<()> {
    let Story { electron, events, children, whereabouts, .. } = story;
    for event in events {
        say(one_line(&event.to_string()))?;
    }
    for (child, atom) in children.iter().take(CHILDREN_SHOWN) {
        say(format_args!("child {child} of atom {atom}"))?;
    }
    if let Some(more @ 1..) = children.len().checked_sub(CHILDREN_SHOWN) {
        say(format_args!("and {more} more children"))?;
    }
    if *whereabouts == Whereabouts::Unknown {
        return Ok(());
    }
    say(format_args!("now: {whereabouts}"))?;
    if *whereabouts == (Whereabouts::Failed { dead: true }) {
        say(format_args!(
            "show it with `atomizer dead show {electron}`, send it back with `atomizer dead requeue {electron}`"
        ))?;
    }
    if let Some(parent) = events.iter().find_map(Event::parent) {
        say(format_args!("it is a child of {parent}"))?;
    } else if !events.iter().any(|event| matches!(event.kind, EventKind::Sent { .. })) {
        say("its sending is not among the events that are kept")?;
    }
    Ok(())
}
