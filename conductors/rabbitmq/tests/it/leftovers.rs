//! What is left on the broker after everything that a node does to it: what `docs/topology.md` names, and no more.

use std::{collections::BTreeSet, fs, path::Path, sync::Arc, time::Duration};

use atomizer::{EventKind, ResultsId, prelude::*};
use atomizer_test_support::{Depth, Proxy, Vhost};
use tokio::{sync::watch, task::JoinSet};

use crate::support::{Double, blocking, rabbit, soon, until, until_it_holds, vhost};

/// The rows of the table whose first heading this is, cell by cell.
fn table<'a>(page: &'a str, heading: &str) -> Vec<Vec<&'a str>> {
    let first = format!("| {heading} |");
    let rows = page.lines().skip_while(|line| !line.starts_with(&first)).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    rows.map(|row| row.split('|').skip(1).map(str::trim).collect()).collect()
}

/// The names in a cell: `<ns>` is filled in, what else is in angle brackets stands for anything.
fn names(cell: &str) -> Vec<String> {
    let quoted = cell.split('`').skip(1).step_by(2).map(|name| name.replace("<ns>", "atomizer"));
    let quoted: Vec<_> = quoted.collect();
    if !cell.contains('…') {
        return quoted;
    }
    let numbered = |name: &String| {
        let (name, number) = name.rsplit_once('.').unwrap();
        (name.to_owned(), number.parse::<u32>().unwrap())
    };
    let ((name, first), (_, last)) = (numbered(&quoted[0]), numbered(&quoted[1]));
    (first..=last).map(|number| format!("{name}.{number}")).collect()
}

/// Whether the documentation means this name.
fn means(documented: &str, name: &str) -> bool {
    match documented.split_once('<') {
        None => documented == name,
        Some((before, rest)) => {
            let (_, after) = rest.split_once('>').unwrap();
            let Some(rest) = name.strip_prefix(before) else { return false };
            (1..=rest.len()).any(|at| rest.is_char_boundary(at) && means(after, &rest[at..]))
        }
    }
}

fn any_means(documented: &[String], name: &str) -> bool {
    documented.iter().any(|documented| means(documented, name))
}

/// Compares what is there with the tables.
fn compare(vhost: &Vhost) {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/topology.md");
    let page = fs::read_to_string(page).unwrap();
    let (mut stays, mut goes) = (Vec::new(), Vec::new());
    for row in table(&page, "object") {
        let [_, name, _, _, gone, _] = row[..] else { panic!("{row:?}") };
        if gone == "never" { &mut stays } else { &mut goes }.extend(names(name));
    }
    assert!(goes.len() >= 2 && stays.len() > 30, "the table is read: {stays:?}, {goes:?}");

    let queues = vhost.queues().unwrap().into_iter().map(|queue| queue.name);
    let queues: BTreeSet<_> = queues.collect();
    let exchanges = vhost.exchanges().unwrap().into_iter().map(|exchange| exchange.name);
    let of_everybody = |name: &String| name.is_empty() || name.starts_with("amq.");
    let exchanges: BTreeSet<_> = exchanges.filter(|name| !of_everybody(name)).collect();
    let there: BTreeSet<_> = queues.union(&exchanges).collect();
    let (left, unknown): (Vec<_>, Vec<_>) =
        there.iter().copied().partition(|name| any_means(&stays, name));
    // The session that was cut had parked: its queue is for the broker to remove, and empty.
    assert_eq!(unknown.len(), 1, "{unknown:?} is left, of {there:?}");
    let lease = unknown[0];
    assert!(lease.starts_with("atomizer.lease.") && any_means(&goes, lease), "{lease}");
    for documented in &stays {
        assert!(left.iter().any(|name| means(documented, name)), "{documented} is not there");
    }

    let documented: Vec<_> = table(&page, "binding of")
        .into_iter()
        .map(|row| {
            let (to, from) = (names(row[0]), names(row[1]));
            if from.is_empty() { (to.clone(), to) } else { (to, from) }
        })
        .collect();
    let bindings = vhost.bindings().unwrap();
    let bindings: Vec<_> = bindings.iter().filter(|binding| !binding.source.is_empty()).collect();
    for binding in &bindings {
        let named = documented.iter().any(|(to, from)| {
            any_means(to, &binding.destination) && any_means(from, &binding.source)
        });
        assert!(named, "{binding:?}");
    }
    // Of what is gone the bindings are, too.
    let is_left = |to: &Vec<String>| there.iter().any(|name| any_means(to, name));
    for (to, from) in documented.iter().filter(|(to, _)| is_left(to)) {
        let there = bindings
            .iter()
            .any(|binding| any_means(to, &binding.destination) && any_means(from, &binding.source));
        assert!(there, "a binding of {to:?} to {from:?} is not there");
    }
}

/// Returns which queues hold what they should not: more than the one dead letter.
fn left(vhost: &Vhost) -> Vec<(String, Option<Depth>)> {
    let mut depths = vhost.depths().unwrap();
    depths.retain(|(queue, depth)| {
        let ready = u64::from(queue == "atomizer.dead");
        // A stream keeps what is in it.
        queue != "atomizer.events" && *depth != Some(Depth { ready, unacknowledged: 0 })
    });
    depths
}

/// Runs until there is an end to it.
struct Linger(watch::Receiver<bool>);

impl Atom for Linger {
    const ID: &'static str = "linger";
    type Input = ();
    type Output = ();

    async fn process(&self, _cx: &Context, (): ()) -> Result<()> {
        self.0.clone().wait_for(|end| *end).await.expect("the test lives");
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_faults_parks_delays_and_dead_letters_only_what_is_documented_is_left() {
    let vhost = Arc::new(vhost().await);
    let proxy = Proxy::start(vhost.node().address()).unwrap();
    let end = watch::Sender::new(false);
    // Long enough for nothing to be renewed while the connection is cut: that would leave two copies.
    let through = rabbit(&vhost.url_through(proxy.address())).hold_max(Duration::from_secs(3));
    let worker = Atomizer::builder().conductor(through);
    let worker = worker.atom(Double).atom(Linger(end.subscribe())).start().await.unwrap();
    let asker = Atomizer::builder().conductor(rabbit(&vhost.url())).start().await.unwrap();
    asker.result_address(&ResultsId::from_static("left")).await.unwrap();
    let mut events = worker.events();
    let is_parked = |kind: &EventKind| matches!(kind, EventKind::Parked { .. });

    let mut lingering = JoinSet::new();
    let call = asker.call::<Linger>(()).into_future();
    lingering.spawn(async move { soon(call).await.unwrap() });
    until(&mut events, is_parked).await;
    proxy.cut();
    until(&mut events, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
    until(&mut events, is_parked).await;
    soon(asker.send_after::<Double>(Duration::from_millis(300), 1)).await.unwrap();
    until(&mut events, |kind| matches!(kind, EventKind::Completed { .. })).await;
    soon(asker.send::<Double>(u64::MAX)).await.unwrap();
    until_it_holds(&vhost, "atomizer.dead", 1).await;
    end.send_replace(true);
    soon(lingering.join_next()).await.unwrap().unwrap();
    // An acknowledgement that was cut off leaves two copies; the other comes within 5 s, and ends as well.
    soon(async {
        while {
            let vhost = Arc::clone(&vhost);
            blocking(move || !left(&vhost).is_empty()).await
        } {}
    })
    .await;

    worker.drain().await.unwrap();
    asker.drain().await.unwrap();
    blocking(move || {
        assert_eq!(left(&vhost), []);
        compare(&vhost);
        drop(vhost);
    })
    .await;
}
