//! `send` and `call`.

use std::{
    fs,
    time::{Duration, Instant},
};

use atomizer::ElectronId;
use serde_json::json;

use crate::harness::{Place, Running, blocking, soon};

#[tokio::test(flavor = "multi_thread")]
async fn a_call_prints_the_output_however_the_input_is_given() {
    let place = Place::new().await;
    let node = place.serve().await;
    assert_eq!(place.run(&["call", "double", "21"]).await.ok().stdout, "42\n");
    assert_eq!(place.run_with(&["call", "double", "-"], " 4\n", &[]).await.ok().stdout, "8\n");
    let file = std::env::temp_dir().join(format!("{}.json", ElectronId::new()));
    fs::write(&file, "5\n").unwrap();
    let at_file = format!("@{}", file.display());
    assert_eq!(place.run(&["call", "double", &at_file]).await.ok().stdout, "10\n");
    fs::remove_file(&file).unwrap();
    let ran = place.run(&["--json", "call", "double", "1", "--timeout", "30s"]).await.ok();
    let answer = &ran.json()[0];
    assert_eq!((&answer["atom"], &answer["output"]), (&json!("double"), &json!(2)));
    answer["id"].as_str().unwrap().parse::<ElectronId>().unwrap();
    assert_eq!(ran.stderr, "", "there is nothing to warn of");
    // Before the verb, after it, and it goes before the environment.
    let nowhere = [("ATOMIZER_URL", "amqp://127.0.0.1:1")];
    for arguments in [
        ["--url", &place.url(), "call", "double", "3"],
        ["call", "double", "3", "--url", &place.url()],
    ] {
        assert_eq!(place.run_with(&arguments, "", &nowhere).await.ok().stdout, "6\n");
    }
    soon(node.drain()).await.unwrap();
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_fails_says_why_and_exits_1() {
    let place = Place::new().await;
    let node = place.serve().await;
    let large = u64::MAX.to_string();
    let ran = place.run(&["call", "double", &large]).await.failed_with(1, "too large to double");
    assert_eq!(ran.stdout, "");
    let ran = place.run(&["call", "double", &large, "--json", "--retry", "1"]).await.ended_with(1);
    let failure = &ran.json()[0]["failure"];
    assert_eq!((&failure["kind"], &failure["attempt"]), (&json!("error"), &json!(2)));
    place.run(&["call", "double", "-1"]).await.failed_with(1, "undecodable");
    soon(node.drain()).await.unwrap();
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_is_safe_when_its_id_is_printed() {
    let place = Place::new().await;
    let node = place.serve().await;
    soon(node.drain()).await.unwrap();
    let ran = place.run(&["send", "double", "7"]).await.ok();
    ran.stdout.trim().parse::<ElectronId>().unwrap();
    assert!(ran.stderr.contains("nobody serves double at the moment"), "{ran:?}");
    let id = ElectronId::new().to_string();
    let arguments = ["send", "double", "7", "--id", &id, "--json", "--requeue", "2"];
    let ran = place.run(&arguments).await.ok();
    assert_eq!(ran.json(), [json!({ "id": id, "atom": "double" })]);
    assert!(ran.stderr.contains("where 1 wait already"), "{ran:?}");
    let depth = place.with(|vhost| vhost.queue_depth("atomizer.atom.double").unwrap()).await;
    assert_eq!(depth.unwrap().ready, 2);
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_atom_that_is_misspelt_gets_no_queue_unless_it_is_asked_for() {
    let place = Place::new().await;
    for verb in ["send", "call"] {
        let ran = place.run(&[verb, "duoble", "7"]).await;
        ran.failed_with(1, "there is no queue atomizer.atom.duoble");
    }
    let (queues, exchanges) =
        place.with(|vhost| (vhost.queues().unwrap(), vhost.exchanges().unwrap())).await;
    assert_eq!(queues, [], "nothing was made");
    assert!(exchanges.iter().all(|exchange| !exchange.name.starts_with("atomizer")));
    let ran = place.run(&["send", "duoble", "7", "--declare"]).await.ok();
    assert!(ran.stderr.contains("warning: no node has served duoble so far"), "{ran:?}");
    let depth = place.with(|vhost| vhost.queue_depth("atomizer.atom.duoble").unwrap()).await;
    assert_eq!(depth.unwrap().ready, 1);
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_for_later_comes_later() {
    let place = Place::new().await;
    let node = place.serve().await;
    soon(node.drain()).await.unwrap();
    let later = ["send", "double", "7", "--after", "1s"];
    // What delays need is not there yet.
    place.run(&later).await.failed_with(1, "--declare makes what is missing");
    let begun = Instant::now();
    place.run(&[&later[..], &["--declare"]].concat()).await.ok();
    soon(async {
        while place.run(&["queues", "double", "--json"]).await.ok().json()[0]["ready"] == 0 {}
    })
    .await;
    assert!(begun.elapsed() >= Duration::from_secs(1));
    place.run(&later).await.ok();
    place.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_interrupted_exits_130() {
    let place = Place::new().await;
    let node = place.serve().await;
    soon(node.drain()).await.unwrap();
    let url = place.url();
    let ran = blocking(move || {
        let mut running = Running::start(&["call", "double", "1", "--url", &url]);
        running.wait_for("no answer yet");
        running.interrupt();
        running.end()
    })
    .await
    .ended_with(130);
    assert!(ran.stderr.contains("goes its way"), "{ran:?}");
    let limited = ["call", "double", "1", "--timeout", "100ms"];
    place.run(&limited).await.failed_with(1, "within 100ms");
    place.leave().await;
}
