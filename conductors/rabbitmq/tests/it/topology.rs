//! What is on the broker, and what is left behind.

use serde_json::json;

use crate::support::{Double, blocking, serve, soon, vhost};

#[tokio::test(flavor = "multi_thread")]
async fn the_broker_holds_what_the_documentation_names_and_nothing_else() {
    let vhost = vhost().await;
    let atomizer = serve(&vhost.url()).await;
    soon(atomizer.call::<Double>(1).into_future()).await.unwrap();
    let node = atomizer.node().clone();
    let (vhost, mut queues, exchanges) = blocking(move || {
        let (queues, exchanges) = (vhost.queues().unwrap(), vhost.exchanges().unwrap());
        (vhost, queues, exchanges)
    })
    .await;
    queues.sort_by(|a, b| a.name.cmp(&b.name));
    let names: Vec<_> = queues.iter().map(|queue| queue.name.as_str()).collect();
    let inbox = format!("atomizer.inbox.{node}");
    assert_eq!(names, ["atomizer.atom.double", "atomizer.dead", &inbox]);
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
        ours.iter().all(|name| ["", "atomizer", "atomizer.due", "atomizer.lost"].contains(name)),
        "{ours:?}"
    );

    atomizer.drain().await.unwrap();
    let left = blocking(move || vhost.queues().unwrap()).await;
    assert!(left.iter().all(|queue| !queue.name.contains("inbox")), "the inbox is gone: {left:?}");
}
