//! `atomizer queues`.

use std::collections::HashMap;

use atomizer::{AtomId, Census};
use atomizer_programs::{Exit, cli, say};
use atomizer_rabbitmq::Counted;
use serde_json::{Value, json};

use crate::{management::Management, rows::Rows, shared::Shared, verbs::nodes};

/// Shows what waits in the queues of atoms, and who takes from them.
///
/// AMQP has no question for which queues there are. Without more these are the queues of the atoms that nodes serve, or
/// have served within the hour; name others, or, where the broker has the management plugin, its address.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  atomizer queues
  atomizer queues double montecarlo.toss
  atomizer queues --management http://localhost:15672

With --json: {\"atom\", \"queue\", \"exists\", \"ready\", \"unacknowledged\", \"consumers\"}; the dead letters have \"atom\": null, and
\"unacknowledged\" is null unless the management API says it, and may be 5 s old then.")]
pub(crate) struct Arguments {
    /// The atoms.
    #[arg(value_name = "ATOM", value_parser = |text: &str| AtomId::try_new(text))]
    atoms: Vec<AtomId>,
    /// The broker's management API, for all queues: http://user:password@host:15672 [default user: guest].
    #[arg(
        long,
        value_name = "URL",
        env = "ATOMIZER_MANAGEMENT_URL",
        hide_env_values = true,
        value_parser = cli::Secret::<Management>::new()
    )]
    management: Option<Management>,
}

/// One queue of the namespace.
struct Queue {
    /// None for that of the dead letters.
    atom: Option<String>,
    name: String,
    /// None where it is not there, or may not be looked at.
    counts: Option<Counts>,
    /// None where it may not be looked at.
    exists: Option<bool>,
}

struct Counts {
    ready: u64,
    unacknowledged: Option<u64>,
    consumers: u64,
}

pub(crate) async fn run(shared: &Shared, arguments: &Arguments) -> anyhow::Result<Exit> {
    let (atoms, unacknowledged) = match (&arguments.management, arguments.atoms.is_empty()) {
        (None, true) => (served(shared).await?, HashMap::new()),
        (None, false) => (arguments.atoms.clone(), HashMap::new()),
        (Some(management), all) => {
            let listed = list(shared, management).await?;
            let there = || atoms_of(shared, &listed);
            (if all { there() } else { arguments.atoms.clone() }, listed)
        }
    };
    let queues = count(shared, &atoms, &unacknowledged).await?;
    if shared.json {
        queues.iter().try_for_each(|queue| say(queue.json()))?;
    } else {
        print(&queues)?;
    }
    Ok(Exit::Done)
}

/// Returns the atoms that nodes serve, or have served lately: what waits for a node that is gone is what matters.
async fn served(shared: &Shared) -> anyhow::Result<Vec<AtomId>> {
    Ok(nodes::atoms(&nodes::heard(shared.monitor()?, nodes::LATELY).await?))
}

/// Lists all queues, with how many messages are unacknowledged in each.
async fn list(shared: &Shared, management: &Management) -> anyhow::Result<HashMap<String, u64>> {
    let listed = management.list("queues", &shared.vhost()).await?;
    let read = |queue: &Value| {
        let unacknowledged = queue.get("messages_unacknowledged").and_then(Value::as_u64);
        Some((queue.get("name")?.as_str()?.to_owned(), unacknowledged.unwrap_or_default()))
    };
    Ok(listed.iter().filter_map(read).collect())
}

/// Returns the atoms that have a queue, in order.
fn atoms_of(shared: &Shared, queues: &HashMap<String, u64>) -> Vec<AtomId> {
    let prefix = format!("{}.atom.", shared.namespace());
    let atom = |name: &String| AtomId::try_new(name.strip_prefix(&prefix)?).ok();
    let mut atoms: Vec<_> = queues.keys().filter_map(atom).collect();
    atoms.sort();
    atoms
}

/// Counts what is in the queues of these atoms, and in the dead letters.
async fn count(
    shared: &Shared,
    atoms: &[AtomId],
    unacknowledged: &HashMap<String, u64>,
) -> anyhow::Result<Vec<Queue>> {
    let rabbit = shared.rabbit()?;
    let counted = rabbit.operator().census(atoms).await?;
    let dead = rabbit.dead_letters().census().await?;
    let queue = |atom: Option<String>, name: String, counted: Counted| {
        let (counts, exists) = match counted {
            Counted::Queue(Census { ready, subscribers: consumers, .. }) => {
                let unacknowledged = unacknowledged.get(&name).copied();
                (Some(Counts { ready, unacknowledged, consumers }), Some(true))
            }
            Counted::NoQueue => (None, Some(false)),
            _ => (None, None),
        };
        Queue { atom, name, counts, exists }
    };
    let queues = atoms.iter().zip(counted);
    let queues =
        queues.map(|(atom, census)| queue(Some(atom.to_string()), shared.queue_of(atom), census));
    let mut queues: Vec<_> = queues.collect();
    queues.push(queue(None, format!("{}.dead", shared.namespace()), Counted::Queue(dead)));
    Ok(queues)
}

impl Queue {
    fn json(&self) -> Value {
        let counts = self.counts.as_ref();
        json!({
            "atom": self.atom,
            "queue": self.name,
            "exists": self.exists,
            "ready": counts.map(|counts| counts.ready),
            "unacknowledged": counts.and_then(|counts| counts.unacknowledged),
            "consumers": counts.map(|counts| counts.consumers),
        })
    }

    fn remark(&self) -> &'static str {
        match (&self.atom, &self.counts) {
            (_, None) if self.exists.is_none() => "this user may not look at it",
            (_, None) => "no queue: no node has served it so far",
            (Some(_), Some(Counts { consumers: 0, ready: 1.., .. })) => "nobody serves it",
            (None, Some(Counts { ready: 1.., .. })) => "see atomizer dead list",
            _ => "",
        }
    }
}

fn print(queues: &[Queue]) -> anyhow::Result<()> {
    let mut rows = Rows::new(["ATOM", "READY", "UNACKED", "CONSUMERS", ""]);
    let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
    for queue in queues {
        let counts = queue.counts.as_ref();
        rows.push([
            queue.atom.clone().unwrap_or_else(|| "(dead letters)".to_owned()),
            number(counts.map(|counts| counts.ready)),
            number(counts.and_then(|counts| counts.unacknowledged)),
            number(counts.map(|counts| counts.consumers)),
            queue.remark().to_owned(),
        ]);
    }
    rows.lines().into_iter().try_for_each(say)
}
