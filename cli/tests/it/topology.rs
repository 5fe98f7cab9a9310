//! `topology`.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::harness::{Place, soon};

/// What a virtual host has of a namespace that is to stay, in the words of `topology print --json`.
async fn there(place: &Place) -> BTreeSet<String> {
    let (queues, exchanges, bindings) = place
        .with(|vhost| {
            (vhost.queues().unwrap(), vhost.exchanges().unwrap(), vhost.bindings().unwrap())
        })
        .await;
    let is_ours = |name: &str| {
        name.starts_with("atomizer")
            && !name.starts_with("atomizer.inbox.")
            && !name.starts_with("atomizer.lease.")
    };
    let mut there = BTreeSet::new();
    for queue in queues.into_iter().filter(|queue| is_ours(&queue.name)) {
        let queue = json!({ "kind": "queue", "name": queue.name, "arguments": queue.arguments });
        there.insert(queue.to_string());
    }
    for exchange in exchanges.into_iter().filter(|exchange| is_ours(&exchange.name)) {
        let exchange = json!({
            "kind": "exchange", "name": exchange.name, "type": exchange.kind,
            "arguments": exchange.arguments,
        });
        there.insert(exchange.to_string());
    }
    for binding in bindings.into_iter().filter(|binding| is_ours(&binding.source)) {
        let binding = json!({
            "kind": "binding", "source": binding.source, "destination": binding.destination,
            "to": binding.destination_kind, "key": binding.routing_key,
        });
        there.insert(binding.to_string());
    }
    there
}

async fn printed(place: &Place, more: &[&str]) -> BTreeSet<String> {
    let print = [&["topology", "print", "--json"], more].concat();
    place.run(&print).await.ok().json().iter().map(Value::to_string).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_printed_is_what_nodes_make_and_what_is_applied() {
    let place = Place::new().await;
    let node = place.serve().await;
    soon(node.send_after::<crate::harness::Double>(std::time::Duration::from_millis(50), 1))
        .await
        .unwrap();
    soon(node.result_address(&atomizer::ResultsId::from_static("weekly"))).await.unwrap();
    soon(node.drain()).await.unwrap();
    let needed = ["--atom", "double", "--results", "weekly", "--delays"];
    let printed = printed(&place, &needed).await;
    assert_eq!(printed, there(&place).await, "what nodes make");

    let fresh = Place::new().await;
    let check = [&["topology", "check"], &needed[..]].concat();
    fresh.run(&check).await.failed_with(1, "are missing or of no use");
    assert_eq!(there(&fresh).await, BTreeSet::new(), "to look makes nothing");
    fresh.run(&[&["topology", "apply"], &needed[..]].concat()).await.ok();
    assert_eq!(printed, there(&fresh).await, "what is applied");
    fresh.run(&[&["topology", "apply"], &needed[..]].concat()).await.ok();
    let management = fresh.management();
    let ran = fresh.run(&[&check[..], &["--management", &management]].concat()).await.ok();
    assert!(ran.stdout.contains("0 unknown"), "{ran:?}");
    fresh.leave().await;
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_or_different_is_named() {
    let place = Place::new().await;
    place.run(&["topology", "apply", "--atom", "double"]).await.ok();
    let longer = json!({ "durable": true, "arguments": {
        "x-queue-type": "quorum", "x-delivery-limit": 7, "x-dead-letter-exchange": "elsewhere",
    }});
    place.manage("DELETE", "/api/queues/{}/atomizer.atom.double", json!({})).await;
    place.manage("PUT", "/api/queues/{}/atomizer.atom.double", longer).await;
    let check = ["topology", "check", "--atom", "double"];
    place.run(&[&check[..], &["--delays"]].concat()).await.failed_with(1, "54 are missing");
    let ran = place.run(&check).await.ok();
    assert!(ran.stdout.contains("differs    queue atomizer.atom.double: "), "{ran:?}");
    assert!(ran.stdout.contains("x-delivery-limit"), "{ran:?}");
    // It is bound to nothing, which only the management API tells.
    let management = place.management();
    let with_bindings = [&check[..], &["--management", &management]].concat();
    let ran = place.run(&with_bindings).await.failed_with(1, "2 are missing or of no use");
    assert!(ran.stdout.contains("missing    binding atomizer -> queue"), "{ran:?}");
    place.run(&["topology", "apply", "--atom", "double"]).await.ok();
    place.run(&with_bindings).await.ok();

    let classic = json!({ "durable": true, "arguments": { "x-queue-type": "classic" } });
    place.manage("DELETE", "/api/queues/{}/atomizer.atom.double", json!({})).await;
    place.manage("PUT", "/api/queues/{}/atomizer.atom.double", classic).await;
    place.manage("DELETE", "/api/exchanges/{}/atomizer.lost", json!({})).await;
    let ran = place.run(&[&check[..], &["--json"]].concat()).await;
    let ran = ran.failed_with(1, "2 are missing or of no use");
    let found = |word: &str| {
        let objects = ran.json().into_iter().filter(|object| object["found"] == json!(word));
        objects.map(|object| object["name"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(found("missing"), [json!("atomizer.lost")]);
    assert_eq!(found("unsafe"), [json!("atomizer.atom.double")]);
    let apply = ["topology", "apply", "--atom", "double"];
    place.run(&apply).await.failed_with(1, "refused: PRECONDITION_FAILED");
    place.leave().await;
}
