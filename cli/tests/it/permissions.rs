//! The command of users with the least permissions, as `docs/topology.md` has them.

use atomizer_test_support::Permissions;

use crate::harness::{PASSWORD, Place, soon};

/// The URL of a user of his own.
async fn user(place: &Place, role: &str, [configure, write, read]: [&str; 3]) -> (String, String) {
    let permissions = Permissions::new(configure, write, read);
    let role = role.to_owned();
    place
        .with(move |vhost| {
            let name = format!("{role}-of-{}", vhost.name());
            vhost.node().add_user(&name, PASSWORD, vhost.name(), &permissions).unwrap();
            (vhost.url_as(&name, PASSWORD), name)
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_and_operators_need_no_more_than_they_are_given() {
    let place = Place::new().await;
    let node = place.serve().await;
    place.bury(&["no".to_owned()]).await;
    let caller =
        [r"^atomizer\.inbox\.", r"^atomizer($|\.events$|\.delay\.)", r"^atomizer\.inbox\."];
    let (url, caller) = user(&place, "caller", caller).await;
    assert_eq!(place.run(&["call", "double", "21", "--url", &url]).await.ok().stdout, "42\n");
    place.run(&["send", "double", "21", "--url", &url]).await.ok();
    let operator = ["^$", r"^(atomizer|amq\.default)$", r"^atomizer\.dead$"];
    let (url, operator) = user(&place, "operator", operator).await;
    let listed = place.run(&["dead", "list", "--url", &url, "--json"]).await.ok().json();
    assert_eq!(listed.len(), 1);
    let ran = place.run(&["dead", "requeue", "--all", "--url", &url]).await.ok();
    assert_eq!(ran.stdout, "1 sent back\n");
    soon(node.drain()).await.unwrap();
    place
        .with(move |vhost| {
            for name in [caller, operator] {
                vhost.node().delete_user(&name).unwrap();
            }
        })
        .await;
    place.leave().await;
}
