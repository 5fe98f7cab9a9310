//! What is found out about a namespace on a broker.

use std::time::Duration;

use atomizer::{AtomId, Census, Monitor, NodeState, NodeStatus};
use atomizer_rabbitmq::{Counted, Found, Object, Operator, OperatorError};

use super::{
    super::topology::{title, words},
    Finding,
};
use crate::{shared::Shared, verbs::nodes};

const TOPOLOGY: &str = "topology";

/// Compares what is there with what is needed.
pub(super) async fn topology(shared: &Shared, operator: &Operator) -> Vec<Finding> {
    let checked = match shared.rabbit() {
        Ok(rabbit) => operator.check(&rabbit.topology_plan(&[], &[]).delays()).await,
        Err(error) => Err(OperatorError::Lost(error.to_string())),
    };
    let checked = match checked {
        Ok(checked) => checked,
        Err(error) => {
            return vec![Finding::wrong(TOPOLOGY, error.to_string(), "see the broker's log")];
        }
    };
    let (rungs, events) =
        (format!("{}.delay.", shared.namespace()), format!(" {}.events", shared.namespace()));
    let is_rung = |object: &Object| match object {
        Object::Exchange { name, .. } | Object::Queue { name, .. } => name.starts_with(&rungs),
        _ => false,
    };
    let is_missing = |(_, found): &&(Object, Found)| *found == Found::Missing;
    let all: Vec<_> = (checked.into_iter())
        .filter(|(object, _)| !matches!(object, Object::Binding { .. }))
        .collect();
    let (rungs, base): (Vec<_>, Vec<_>) = all.into_iter().partition(|(object, _)| is_rung(object));
    let mut findings = Vec::new();
    let none_of = |part: &[(Object, Found)]| part.iter().filter(is_missing).count() == part.len();
    if none_of(&base) {
        let what = format!("nothing of the namespace {} is there", shared.namespace());
        let advice = "is it spelt right (--namespace)? The first node makes it, or 'atomizer topology apply'";
        return vec![Finding::note(TOPOLOGY, what, advice)];
    }
    let rungs = if none_of(&rungs) { Vec::new() } else { rungs };
    let looked_at = base.len() + rungs.len();
    for (object, found) in base.into_iter().chain(rungs) {
        let what = |word: &str, detail: &str| {
            let separator = if detail.is_empty() { "" } else { ": " };
            format!("{} {word}{separator}{detail}", title(&object))
        };
        findings.extend(match &found {
            Found::Missing if title(&object).ends_with(&events) => Some(Finding::note(
                TOPOLOGY,
                what("is missing: no events are kept", ""),
                "nodes make it that have events to tell (RabbitMq::events_kept), or atomizer topology apply",
            )),
            Found::Missing => Some(Finding::wrong(
                TOPOLOGY,
                what("is missing", ""),
                "atomizer topology apply makes it",
            )),
            Found::Unsafe(detail) => Some(Finding::wrong(
                TOPOLOGY,
                what("is of no use as it is", detail),
                "see what is in it, delete it, and make it anew: atomizer topology apply",
            )),
            Found::Differs(_) => Some(Finding::note(
                TOPOLOGY,
                what("is not as it should be", &words(&found).1),
                "it does no harm; was it made by hand, or is there a policy?",
            )),
            _ => None,
        });
    }
    if findings.is_empty() {
        findings.push(Finding::ok(TOPOLOGY, format!("{looked_at} exchanges and queues are there")));
    }
    findings
}

/// Looks which nodes there are, and returns what they serve, or have served lately.
pub(super) async fn nodes(shared: &Shared) -> (Vec<Finding>, Vec<AtomId>) {
    const NODES: &str = "nodes";
    let listening = async {
        // Nothing is made by looking.
        nodes::heard(Monitor::new(&shared.rabbit()?)?, nodes::LATELY).await
    };
    let heard = listening.await;
    let heard = match heard {
        Ok(heard) => heard,
        Err(error) => {
            let advice =
                "nodes are known by their events; docs/topology.md has what a monitor may do";
            return (vec![Finding::note(NODES, format!("{error:#}"), advice)], Vec::new());
        }
    };
    let of = |state| heard.iter().filter(move |node| node.state == state);
    let serves = |node: &&NodeStatus| nodes::serves_anything(node);
    let mut findings = Vec::new();
    match of(NodeState::Alive).filter(serves).count() {
        0 => findings.push(Finding::note(
            NODES,
            "no node is there that serves anything",
            "start one, or see why it is not connected: its log says so",
        )),
        1 => findings.push(Finding::ok(NODES, "1 node serves")),
        alive => findings.push(Finding::ok(NODES, format!("{alive} nodes serve"))),
    }
    findings.extend(of(NodeState::Gone).filter(serves).map(|node| {
        let silent = humantime::format_duration(Duration::from_secs(node.silent.as_secs()));
        Finding::note(
            NODES,
            format!("{} is gone: silent for {silent}", node.node),
            "what it had is delivered again; see what became of its process",
        )
    }));
    (findings, nodes::atoms(&heard))
}

/// Looks at the queues of atoms that are to be served.
pub(super) async fn atoms(shared: &Shared, operator: &Operator, atoms: &[AtomId]) -> Vec<Finding> {
    if atoms.is_empty() {
        return Vec::new();
    }
    let counted = match operator.census(atoms).await {
        Ok(counted) => counted,
        Err(error) => {
            return vec![Finding::wrong("atom", error.to_string(), "see the broker's log")];
        }
    };
    let describe = |(atom, counted): (&AtomId, Counted)| match counted {
        Counted::NoQueue => Finding::wrong(
            "atom",
            format!("{atom} has no queue: no node has served it so far"),
            format!(
                "start a node that has it; is it spelt right? Its queue would be {}",
                shared.queue_of(atom)
            ),
        ),
        Counted::Queue(Census { ready, subscribers: 0, .. }) => unserved(atom, ready),
        Counted::Queue(Census { ready, subscribers, .. }) => {
            Finding::ok("atom", format!("{atom}: {ready} wait, {subscribers} take from them"))
        }
        _ => Finding::note(
            "atom",
            format!("this user may not look at the queue of {atom}"),
            "from RabbitMQ 4.2.6 on that takes some permission for it; to send takes none",
        ),
    };
    atoms.iter().zip(counted).map(describe).collect()
}

/// Looks whether work waits for atoms that nobody serves any more.
pub(super) async fn abandoned(operator: &Operator, atoms: &[AtomId]) -> Vec<Finding> {
    // Who cannot look at the queues was told so by other checks.
    let counted = operator.census(atoms).await.unwrap_or_default();
    let waits = |(atom, counted): (&AtomId, Counted)| match counted {
        Counted::Queue(Census { ready: ready @ 1.., subscribers: 0, .. }) => {
            Some(unserved(atom, ready))
        }
        _ => None,
    };
    atoms.iter().zip(counted).filter_map(waits).collect()
}

fn unserved(atom: &AtomId, ready: u64) -> Finding {
    Finding::wrong(
        "atom",
        format!("nobody serves {atom}, and {ready} electrons wait"),
        "start a node that has it, or see why it is not connected: its log says so",
    )
}

/// Looks whether there are dead letters.
pub(super) async fn dead(shared: &Shared) -> Finding {
    const DEAD: &str = "dead letters";
    let census = match shared.dead_letters() {
        Ok(dead) => dead.census().await.map_err(|error| format!("{:#}", anyhow::Error::new(error))),
        Err(error) => Err(error.to_string()),
    };
    match census {
        Ok(Census { subscribers: 1.., ready, .. }) => Finding::note(
            DEAD,
            format!("{ready} are ready, and somebody takes from them"),
            "somebody lists them, or a program of yours eats them: nothing else takes from this queue",
        ),
        Ok(Census { ready: 0, .. }) => Finding::ok(DEAD, "there are none"),
        Ok(Census { ready, .. }) => {
            let what = format!("there are {ready}");
            Finding::note(
                DEAD,
                what,
                "atomizer dead list says of what; dead requeue sends them back",
            )
        }
        Err(error) => {
            let advice =
                "an operator needs read for the queue of the dead letters (docs/topology.md)";
            Finding::wrong(DEAD, error, advice)
        }
    }
}
