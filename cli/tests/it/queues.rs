//! `queues`.

use serde_json::json;

use crate::harness::{Place, soon};

#[tokio::test(flavor = "multi_thread")]
async fn queues_are_shown_with_what_waits_and_who_takes_from_them() {
    let place = Place::new().await;
    place.run(&["send", "lonely", "1", "--declare"]).await.ok();
    place.bury(&["no".to_owned()]).await;
    let node = place.serve().await;
    let named = ["queues", "double", "lonely", "nothing", "--json"];
    let queues = place.run(&named).await.ok().json();
    let row = |atom: Option<&str>, queue: &str, exists: bool, counts: [Option<u64>; 2]| {
        json!({
            "atom": atom, "queue": queue, "exists": exists, "ready": counts[0],
            "unacknowledged": null, "consumers": counts[1],
        })
    };
    assert_eq!(
        queues,
        [
            row(Some("double"), "atomizer.atom.double", true, [Some(0), Some(1)]),
            row(Some("lonely"), "atomizer.atom.lonely", true, [Some(1), Some(0)]),
            row(Some("nothing"), "atomizer.atom.nothing", false, [None, None]),
            row(None, "atomizer.dead", true, [Some(1), Some(0)]),
        ]
    );
    let text = place.run(&named[..4]).await.ok().stdout;
    for part in ["nobody serves it", "no node has served it so far", "see atomizer dead list"] {
        assert!(text.contains(part), "{text}");
    }
    let elsewhere = ["--namespace", "other", "queues", "double", "--json"];
    let queues = place.run(&elsewhere).await.ok().json();
    assert_eq!(
        (&queues[0]["queue"], &queues[0]["exists"]),
        (&json!("other.atom.double"), &json!(false))
    );

    let management = place.management();
    let all = ["queues", "--management", &management, "--json"];
    let queues = place.run(&all).await.ok().json();
    let ready: Vec<_> = queues.iter().map(|queue| (&queue["atom"], &queue["ready"])).collect();
    let (none, one) = (json!(0), json!(1));
    let expected = [(&json!("double"), &none), (&json!("lonely"), &one), (&json!(null), &one)];
    assert_eq!(ready, expected);
    assert!(queues.iter().all(|queue| queue["unacknowledged"].is_u64()), "{queues:?}");
    soon(node.drain()).await.unwrap();
    place.leave().await;
}
