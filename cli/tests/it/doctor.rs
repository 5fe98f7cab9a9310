//! `doctor`.

use atomizer_test_support::{Permissions, shared};
use serde_json::{Value, json};

use crate::harness::{PASSWORD, Place, Ran, blocking, command, run, soon};

/// What it found out in one check.
fn found(ran: &Ran, check: &str) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let findings = ran.json().into_iter().filter(|finding| finding["check"] == json!(check));
    findings.map(|finding| (text(&finding["level"]), text(&finding["what"]))).collect()
}

fn level(ran: &Ran, check: &str) -> String {
    let found = found(ran, check);
    found.first().unwrap_or_else(|| panic!("no {check}: {ran:#?}")).0.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn where_all_is_well_it_says_so_and_leaves_nothing_behind() {
    let place = Place::new().await;
    let before = place.with(|vhost| vhost.queues().unwrap()).await;
    let ran = place.run(&["doctor", "--json"]).await.ok();
    assert_eq!(level(&ran, "topology"), "note", "no node was here: {ran:#?}");
    assert_eq!(place.with(|vhost| vhost.queues().unwrap()).await, before);

    let node = place.serve().await;
    let ran = place.run(&["doctor", "--json", "--atom", "double"]).await.ok();
    for check in
        ["address", "heartbeat", "permissions", "clock", "topology", "atom", "dead letters"]
    {
        assert_eq!(level(&ran, check), "ok", "{check}: {ran:#?}");
    }
    let (_, address) = &found(&ran, "address")[0];
    assert!(address.contains("RabbitMQ ") && address.contains(" ms"), "{address}");
    soon(node.drain()).await.unwrap();
    let left = place.with(|vhost| vhost.queues().unwrap()).await;
    assert!(left.iter().all(|queue| !queue.name.contains(".inbox.")), "{left:?}");
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_named_with_what_to_do() {
    let place = Place::new().await;
    let node = place.serve().await;
    soon(node.drain()).await.unwrap();
    place.bury(&["no".to_owned()]).await;
    place.manage("DELETE", "/api/exchanges/{}/atomizer.lost", json!({})).await;
    let arguments = ["doctor", "--atom", "double", "--atom", "nothing"];
    let ran = place.run(&arguments).await.failed_with(1, "3 things are wrong");
    for part in [
        "exchange atomizer.lost is missing",
        "-> atomizer topology apply makes it",
        "nobody serves double",
        "nothing has no queue",
        "there are 1\n",
        "-> atomizer dead list says of what",
    ] {
        assert!(ran.stdout.contains(part), "{part:?} in {}", ran.stdout);
    }
    // One address of two.
    let url = place.url().replacen("127.0.0.1:", "127.0.0.1:1,127.0.0.1:", 1);
    let ran = place.run(&["doctor", "--json", "--url", &url]).await.ended_with(1);
    let levels: Vec<_> = found(&ran, "address").into_iter().map(|(level, _)| level).collect();
    assert_eq!(levels, ["wrong", "ok"]);
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_is_told_what_he_needs() {
    let place = Place::new().await;
    let node = place.serve().await;
    soon(node.drain()).await.unwrap();
    let (url, wrong, nowhere, alice) = place
        .with(|vhost| {
            let (node, alice) = (vhost.node(), format!("alice-of-{}", vhost.name()));
            node.add_user(&alice, PASSWORD, vhost.name(), &Permissions::none()).unwrap();
            let wrong = vhost.url_as(&alice, &format!("{PASSWORD}-not"));
            (vhost.url_as(&alice, PASSWORD), wrong, node.url_as(&alice, PASSWORD, "nowhere"), alice)
        })
        .await;
    let doctor = |url: String| {
        blocking(move || {
            let mut command = command(&["doctor"]);
            command.env("ATOMIZER_URL", url);
            run(command, "").ended_with(1).stdout
        })
    };
    assert!(doctor(wrong).await.contains("-> user or password is wrong"));
    assert!(doctor(nowhere).await.contains("-> there is no such virtual host"));
    let told = doctor(url).await;
    assert!(told.contains("an inbox may not be made"), "{told}");
    assert!(told.contains("configure for ^atomizer\\.inbox\\."), "{told}");
    assert!(told.contains("the broker's clock cannot be asked for"), "{told}");
    blocking(move || shared().unwrap().delete_user(&alice).unwrap()).await;
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_atom_that_nobody_serves_any_more_is_wrong_when_work_waits_for_it() {
    let place = Place::new().await;
    let node = place.serve().await;
    // Of a node that was never heard of nobody can say that it is gone.
    soon(async { while !place.run(&["nodes"]).await.ok().stdout.contains("double") {} }).await;
    soon(node.drain()).await.unwrap();
    place.run(&["doctor"]).await.ok();
    place.run(&["send", "double", "1"]).await.ok();
    let ran = place.run(&["doctor"]).await.ended_with(1);
    assert!(ran.stdout.contains("nobody serves double, and 1 electrons wait"), "{ran:#?}");
    assert!(ran.stdout.contains("no node is there that serves anything"), "{ran:#?}");
    let queues = place.run(&["queues"]).await.ok().stdout;
    assert!(queues.contains("nobody serves it"), "{queues}");
    place.leave().await;
}
