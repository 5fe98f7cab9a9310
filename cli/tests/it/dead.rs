//! `dead list`, `show` and `purge`, and payloads that are edited.

use std::fs;

use atomizer::ElectronId;
use serde_json::{Value, json};

use crate::harness::Place;

fn letters(messages: &[&str]) -> Vec<String> {
    messages.iter().map(|message| (*message).to_owned()).collect()
}

/// Counts the dead letters by cause, most frequent first.
async fn causes(place: &Place) -> Vec<Value> {
    place.run(&["dead", "list", "--json"]).await.ok().json()
}

async fn ready(place: &Place, queue: &'static str) -> u64 {
    let depth = place.with(move |vhost| vhost.queue_depth(queue).unwrap()).await;
    depth.map_or(0, |depth| depth.ready)
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_are_listed_by_cause_and_one_by_one() {
    let place = Place::new().await;
    let ran = place.run(&["dead", "list"]).await.ok();
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("", "there are none\n"));
    let messages = ["no 1", "account 7 is closed", "account 12\nis closed", "account 9 is closed"];
    let ids = place.bury(&letters(&messages)).await;
    let causes = causes(&place).await;
    assert_eq!(causes.len(), 3, "the line break tells one apart: {causes:?}");
    let closed = &causes[0];
    assert_eq!((&closed["count"], &closed["atom"]), (&json!(2), &json!("double")));
    assert_eq!(closed["detail"], json!("account # is closed"));
    assert_eq!(closed["example"], json!(ids[1].to_string()));
    assert!(closed["oldest"].as_str() <= closed["newest"].as_str());

    let key = closed["cause"].as_str().unwrap();
    let each = ["dead", "list", "--each", "--cause", key, "--json"];
    let each = place.run(&each).await.ok().json();
    let listed: Vec<_> = each.iter().map(|letter| letter["id"].clone()).collect();
    assert_eq!(listed, [json!(ids[1].to_string()), json!(ids[3].to_string())]);
    assert_eq!(each[0]["detail"], json!("account 7 is closed"));

    let text = place.run(&["dead", "list"]).await.ok().stdout;
    assert_eq!(text.lines().count(), 4, "a line each, and a title: {text}");
    assert!(text.contains("account #\\nis closed"), "{text}");
    let none = place.run(&["dead", "list", "--each", "--atom", "other"]).await.ok();
    assert_eq!(none.stdout, "");
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_is_shown_with_its_payload_and_history() {
    let place = Place::new().await;
    let ids = place.bury(&letters(&["first", "no luck"])).await;
    let id = ids[1].to_string();
    let text = place.run(&["dead", "show", &id]).await.ok().stdout;
    for part in [&id, "double", "error: no luck", "payload   1 bytes\n1\n"] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    let shown = place.run(&["dead", "show", &id, "--json"]).await.ok().json();
    assert_eq!((&shown[0]["payload"], &shown[0]["attempts"]), (&json!(1), &json!(1)));
    assert_eq!(shown[0]["history"][0]["message"], json!("no luck"));
    let other = ElectronId::new().to_string();
    place.run(&["dead", "show", &other]).await.failed_with(1, "there is no dead letter");
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_chosen_is_purged() {
    let place = Place::new().await;
    let ids = place.bury(&letters(&["one", "two", "one", "three"])).await;
    place.run(&["dead", "purge", "--all"]).await.failed_with(2, "say --yes");
    assert_eq!(ready(&place, "atomizer.dead").await, 4);
    let causes = causes(&place).await;
    let key = causes[0]["cause"].as_str().unwrap();
    let purge = ["dead", "purge", "--cause", key, "--yes", "--json"];
    let purged = place.run(&purge).await.ok().json();
    assert_eq!(purged[0]["done"], json!(2));
    let id = ids[1].to_string();
    let ran = place.run(&["dead", "purge", &id, "--yes"]).await.ok();
    assert_eq!(ran.stdout, "1 removed\n");
    place.run(&["dead", "purge", &id, "--yes"]).await.failed_with(1, "no such dead letter");
    assert_eq!(ready(&place, "atomizer.dead").await, 1);
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_is_put_right_and_sent_back() {
    let place = Place::new().await;
    let node = place.serve().await;
    node.drain().await.unwrap();
    let ids = place.bury(&letters(&["no", "no", "no"])).await;
    let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
    let requeue = |id: usize| vec!["dead", "requeue", ids[id].as_str()];
    let with = |id, more: &[&'static str]| [requeue(id), more.to_vec()].concat();
    place.run(&with(0, &["--payload", "{"])).await.failed_with(2, "the input is no JSON");
    let ran = place.run_with(&with(0, &["--payload", "-"]), "70", &[]).await.ok();
    assert_eq!(ran.stdout, "1 sent back\n");
    place.run(&requeue(0)).await.failed_with(1, "no such dead letter");

    let edit = with(1, &["--edit"]);
    let ran = place.run_with(&edit, "", &[("EDITOR", "true")]).await.ok();
    assert!(ran.stderr.contains("nothing was changed"), "{ran:?}");
    place.run_with(&edit, "", &[("EDITOR", "false")]).await.failed_with(1, "false failed");
    let broken = place.run_with(&edit, "", &[("EDITOR", "echo oops >")]).await;
    let broken = broken.failed_with(2, "is no JSON: expected value at line 1 column 1");
    let kept = broken.stderr.split_whitespace().find(|word| word.ends_with(".json")).unwrap();
    assert_eq!(fs::read_to_string(kept).unwrap(), "oops\n", "it can be put right");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(fs::metadata(kept).unwrap().permissions().mode() & 0o777, 0o600);
    }
    fs::remove_file(kept).unwrap();
    place.run_with(&edit, "", &[("EDITOR", "echo 71 >")]).await.ok();
    place.run(&requeue(2)).await.ok();
    assert_eq!(ready(&place, "atomizer.dead").await, 0);
    assert_eq!(ready(&place, "atomizer.atom.double").await, 3);
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_sent_back_stays_and_exits_1() {
    let place = Place::new().await;
    place.bury(&letters(&["no"])).await;
    let nonsense = json!({
        "properties": {}, "routing_key": "atomizer.dead", "payload": "nonsense",
        "payload_encoding": "string",
    });
    place.manage("POST", "/api/exchanges/{}/amq.default/publish", nonsense).await;
    let ran = place.run(&["dead", "requeue", "--all"]).await;
    let ran = ran.failed_with(1, "1 could not be sent back, and stay");
    assert_eq!(ran.stdout, "1 sent back\n");
    let causes = causes(&place).await;
    assert_eq!((&causes[0]["count"], &causes[0]["reason"]), (&json!(1), &json!("unreadable")));
    let id = causes[0]["example"].as_str().unwrap();
    let shown = place.run(&["dead", "show", id, "--json"]).await.ok().json();
    assert_eq!(shown[0]["payload_text"], json!("nonsense"));
    let edit = ["dead", "requeue", id, "--edit"];
    place.run_with(&edit, "", &[("EDITOR", "true")]).await.failed_with(1, "is no electron");
    place.leave().await;
}
