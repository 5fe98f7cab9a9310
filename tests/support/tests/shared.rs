//! The shared broker: virtual hosts, users, and what a virtual host tells about itself.

use std::error::Error;

use atomizer_test_support::{Permissions, shared};
use serde_json::json;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

#[test]
fn a_virtual_host_is_fresh_tells_what_is_in_it_and_goes() -> Result {
    let node = shared()?;
    let vhost = node.vhost()?;
    assert!(vhost.queues()?.is_empty());
    assert!(vhost.url().ends_with(&format!("/{}", vhost.name())));

    let name = vhost.name().to_owned();
    let put = |path: &str, body| node.manage("PUT", path, Some(&body));
    put(
        &format!("/api/queues/{name}/jobs"),
        json!({ "durable": true, "arguments": { "x-queue-type": "quorum", "x-max-length": 9 } }),
    )?;
    put(
        &format!("/api/exchanges/{name}/events"),
        json!({ "type": "topic", "durable": true }),
    )?;
    node.manage(
        "POST",
        &format!("/api/bindings/{name}/e/events/q/jobs"),
        Some(&json!({ "routing_key": "a.*" })),
    )?;

    let [queue] = &vhost.queues()?[..] else {
        return Err("there should be one queue".into());
    };
    assert_eq!((&*queue.name, &*queue.kind), ("jobs", "quorum"));
    assert!(queue.durable && !queue.exclusive && !queue.auto_delete);
    assert_eq!(queue.arguments.get("x-max-length"), Some(&json!(9)));
    let exchanges = vhost.exchanges()?;
    assert!(
        exchanges
            .iter()
            .any(|e| e.name == "events" && e.kind == "topic" && e.durable)
    );
    let bindings = vhost.bindings()?;
    assert!(bindings.iter().any(|b| b.source == "events"
        && b.destination == "jobs"
        && b.destination_kind == "queue"
        && b.routing_key == "a.*"));

    drop(vhost);
    assert!(
        node.manage("GET", &format!("/api/vhosts/{name}"), None)
            .is_err()
    );
    Ok(())
}

#[test]
fn two_virtual_hosts_have_different_names() -> Result {
    let node = shared()?;
    let (one, other) = (node.vhost()?, node.vhost()?);
    assert_ne!(one.name(), other.name());
    Ok(())
}

#[test]
fn a_user_gets_the_permissions_it_is_given() -> Result {
    let node = shared()?;
    let vhost = node.vhost()?;
    let user = format!("reader-{}", vhost.name());
    node.add_user(
        &user,
        "se/cret",
        vhost.name(),
        &Permissions::new("^$", "^$", ".*"),
    )?;
    let path = format!("/api/permissions/{}/{user}", vhost.name());
    let permissions = node.manage("GET", &path, None)?;
    assert_eq!(permissions.get("configure"), Some(&json!("^$")));
    assert_eq!(permissions.get("read"), Some(&json!(".*")));
    assert!(vhost.url_as(&user, "se/cret").contains(":se%2Fcret@"));
    node.delete_user(&user)?;
    Ok(())
}

#[test]
fn rabbitmqctl_reaches_the_broker() -> Result {
    let node = shared()?;
    assert!(node.ctl(&["status"])?.contains(node.version()));
    assert!(node.ctl(&["no_such_command"]).is_err());
    let vhost = node.vhost()?;
    assert!(vhost.connections()?.is_empty());
    vhost.close_connections("none is open, and that is no error")?;
    Ok(())
}
