//! What is on the broker, who makes it, and what is left behind.

use atomizer::{
    Address, AtomId, Conductor, Electron, Envelope, Monitor, NodeId, OpenError, Payload, Position,
    Seen, SendError, Source,
};
use atomizer_rabbitmq::TopologyMode;
use atomizer_test_support::Vhost;
use serde_json::{Value, json};

use crate::support::{Double, blocking, rabbit, serve, soon, vhost};

/// Calls the management interface; `{}` in the path is the virtual host.
async fn manage(vhost: Vhost, calls: Vec<(&'static str, &'static str, Value)>) -> Vhost {
    blocking(move || {
        for (method, path, body) in calls {
            let path = path.replace("{}", vhost.name());
            vhost.node().manage(method, &path, Some(&body)).unwrap();
        }
        vhost
    })
    .await
}

fn node() -> NodeId {
    NodeId::unique("node").unwrap()
}

/// Waits until an event is kept.
async fn read_event(vhost: &Vhost) {
    let monitor = Monitor::new(&rabbit(&vhost.url())).unwrap().from(Position::Start);
    let mut events = monitor.open().await.unwrap();
    while !matches!(events.next().await, Seen::Event(_)) {}
}

fn to_double() -> Envelope {
    let atom = AtomId::from_static("double");
    let electron = Electron::new(atom.clone(), Payload::json("1"));
    Envelope::new(Address::Atom(atom), electron.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_broker_holds_what_the_documentation_names_and_nothing_else() {
    let vhost = vhost().await;
    let atomizer = serve(&vhost.url()).await;
    soon(atomizer.call::<Double>(1).into_future()).await.unwrap();
    let node = atomizer.node().clone();
    // Events are told beside all else: the stream is there when one has come.
    soon(read_event(&vhost)).await;
    let (vhost, mut queues, exchanges) = blocking(move || {
        let (queues, exchanges) = (vhost.queues().unwrap(), vhost.exchanges().unwrap());
        (vhost, queues, exchanges)
    })
    .await;
    queues.sort_by(|a, b| a.name.cmp(&b.name));
    let names: Vec<_> = queues.iter().map(|queue| queue.name.as_str()).collect();
    let inbox = format!("atomizer.inbox.{node}");
    assert_eq!(names, ["atomizer.atom.double", "atomizer.dead", "atomizer.events", &inbox]);
    let events = queues.remove(2);
    assert_eq!((events.kind.as_str(), events.durable), ("stream", true));
    assert_eq!(events.arguments["x-max-length-bytes"], json!(1_u64 << 30));
    assert_eq!(events.arguments["x-max-age"], json!("604800s"));
    assert_eq!(events.arguments["x-stream-max-segment-size-bytes"], json!(64 << 20));
    for queue in &queues {
        assert_eq!((queue.kind.as_str(), queue.durable), ("quorum", true), "{}", queue.name);
        assert_eq!(queue.arguments["x-delivery-limit"], json!(100_000), "{}", queue.name);
    }
    let atom = &queues[0].arguments;
    assert_eq!(atom["x-dead-letter-exchange"], json!("atomizer"));
    assert_eq!(atom["x-dead-letter-routing-key"], json!("dead"));
    assert_eq!(atom["x-dead-letter-strategy"], json!("at-least-once"));
    assert_eq!(atom["x-overflow"], json!("reject-publish"));
    assert_eq!(queues[2].arguments["x-expires"], json!(1_800_000));
    let ours: Vec<_> =
        exchanges.iter().filter(|exchange| !exchange.name.starts_with("amq.")).collect();
    let ours: Vec<_> = ours.iter().map(|exchange| exchange.name.as_str()).collect();
    assert!(
        ours.iter().all(|name| {
            ["", "atomizer", "atomizer.due", "atomizer.events", "atomizer.lost"].contains(name)
        }),
        "{ours:?}"
    );

    atomizer.drain().await.unwrap();
    let left = blocking(move || vhost.queues().unwrap()).await;
    assert!(left.iter().all(|queue| !queue.name.contains("inbox")), "the inbox is gone: {left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_with_other_arguments_is_used_when_nothing_can_be_lost_by_it() {
    let vhost = vhost().await;
    let safe = json!({ "durable": true, "arguments": {
        "x-queue-type": "quorum", "x-delivery-limit": 7, "x-dead-letter-exchange": "elsewhere",
        "x-max-length": 1000, "x-overflow": "reject-publish",
    }});
    let drops_the_oldest = json!({ "durable": true, "arguments": {
        "x-queue-type": "quorum", "x-max-length": 1000, "x-dead-letter-exchange": "elsewhere",
    }});
    let drops_what_comes_often = json!({ "durable": true, "arguments": {
        "x-queue-type": "quorum", "x-delivery-limit": 7,
    }});
    // Whatever it lacks beside, it is its type that is named in the end.
    let classic = json!({ "durable": true, "arguments": { "x-queue-type": "classic" } });
    let vhost = manage(
        vhost,
        vec![
            ("PUT", "/api/queues/{}/atomizer.atom.double", safe.clone()),
            ("PUT", "/api/queues/{}/atomizer.dead", safe),
            ("PUT", "/api/queues/{}/atomizer.atom.classic", classic),
            ("PUT", "/api/queues/{}/atomizer.atom.oldest", drops_the_oldest),
            ("PUT", "/api/queues/{}/atomizer.atom.often", drops_what_comes_often),
        ],
    )
    .await;
    let atomizer = serve(&vhost.url()).await;
    assert_eq!(soon(atomizer.call::<Double>(4).into_future()).await.unwrap(), 8);
    atomizer.drain().await.unwrap();

    let session = soon(rabbit(&vhost.url()).open(&node())).await.unwrap();
    for (atom, argument) in
        [("classic", "x-queue-type"), ("oldest", "x-max-length"), ("often", "x-delivery-limit")]
    {
        let source = Source::Atom(AtomId::from_static(atom));
        let error = soon(session.subscribe(source, 1.try_into().unwrap())).await.err().unwrap();
        assert!(error.to_string().contains(&format!("'{argument}'")), "{error}");
    }
    soon(session.close()).await;
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_that_would_not_be_kept_are_misconfigured() {
    let transient = json!({ "durable": true, "arguments": { "x-queue-type": "classic" } });
    let calls = vec![("PUT", "/api/queues/{}/atomizer.dead", transient)];
    let vhost = manage(vhost().await, calls).await;
    let error = soon(rabbit(&vhost.url()).open(&node())).await.unwrap_err();
    let OpenError::Misconfigured(reason) = &error else { panic!("{error:?}") };
    assert!(reason.contains("x-queue-type"), "{reason}");
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_named_where_nothing_is_made() {
    let vhost = vhost().await;
    let passive = || rabbit(&vhost.url()).topology(TopologyMode::Passive);
    let error = soon(passive().open(&node())).await.unwrap_err();
    let OpenError::Misconfigured(reason) = &error else { panic!("{error:?}") };
    assert!(reason.contains("no exchange 'atomizer'"), "{reason}");
    assert!(reason.contains("TopologyMode::Passive makes nothing"), "{reason}");

    // One who declares has been here, and made no queue for the atom.
    let session = soon(rabbit(&vhost.url()).open(&node())).await.unwrap();
    soon(session.close()).await;
    let session = soon(passive().open(&node())).await.unwrap();
    let sent = soon(session.send(&[to_double()])).await.remove(0);
    let Err(SendError::Refused(reason)) = &sent else { panic!("{sent:?}") };
    assert!(reason.contains("no queue 'atomizer.atom.double'"), "{reason}");
    // And when there is one, it is used.
    let atomizer = serve(&vhost.url()).await;
    assert_eq!(soon(session.send(&[to_double()])).await, [Ok(())]);
    atomizer.drain().await.unwrap();
    soon(session.close()).await;
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_looks_what_cannot_be_sent_is_refused() {
    let vhost = vhost().await;
    let session = soon(rabbit(&vhost.url()).open(&node())).await.unwrap();
    soon(session.close()).await;
    let session =
        soon(rabbit(&vhost.url()).topology(TopologyMode::None).open(&node())).await.unwrap();
    let sent = soon(session.send(&[to_double()])).await.remove(0);
    assert!(matches!(sent, Err(SendError::Refused(_))), "{sent:?}");
    soon(session.close()).await;
    blocking(move || drop(vhost)).await;
}
