//! The shared broker: virtual hosts, users, and what a virtual host tells about itself.

use std::error::Error;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use atomizer_test_support::{Permissions, Vhost, shared};
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
    put(&format!("/api/exchanges/{name}/events"), json!({ "type": "topic", "durable": true }))?;
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
    assert!(exchanges.iter().any(|e| e.name == "events" && e.kind == "topic" && e.durable));
    let bindings = vhost.bindings()?;
    assert!(bindings.iter().any(|b| b.source == "events"
        && b.destination == "jobs"
        && b.destination_kind == "queue"
        && b.routing_key == "a.*"));

    drop(vhost);
    assert!(node.manage("GET", &format!("/api/vhosts/{name}"), None).is_err());
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
    node.add_user(&user, "se/cret", vhost.name(), &Permissions::new("^$", "^$", ".*"))?;
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

#[test]
fn connections_are_seen_and_closed() -> Result {
    let vhost = shared()?.vhost()?;
    let mut client = connect(&vhost)?;
    assert_eq!(vhost.connections()?.len(), 1);
    vhost.close_connections("by the test")?;
    // connection.close
    assert_eq!(receive(&mut client)?.get(..4), Some(&[0, 10, 0, 50][..]));
    Ok(())
}

/// Opens a connection by hand, as in the section "connection" of AMQP 0-9-1.
fn connect(vhost: &Vhost) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(vhost.node().address())?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"AMQP\0\0\x09\x01")?;
    receive(&mut stream)?;
    // start-ok: no properties, PLAIN, guest and guest, en_US
    send(&mut stream, b"\0\x0a\0\x0b\0\0\0\0\x05PLAIN\0\0\0\x0c\0guest\0guest\x05en_US")?;
    receive(&mut stream)?;
    // tune-ok: 2047 channels, 128 KiB per frame, no heartbeat
    send(&mut stream, b"\0\x0a\0\x1f\x07\xff\0\x02\0\0\0\0")?;
    let mut open = b"\0\x0a\0\x28".to_vec();
    open.push(u8::try_from(vhost.name().len())?);
    open.extend_from_slice(vhost.name().as_bytes());
    open.extend_from_slice(&[0, 0]);
    send(&mut stream, &open)?;
    receive(&mut stream)?;
    Ok(stream)
}

fn send(stream: &mut TcpStream, method: &[u8]) -> Result {
    let mut frame = vec![1, 0, 0];
    frame.extend_from_slice(&u32::try_from(method.len())?.to_be_bytes());
    frame.extend_from_slice(method);
    frame.push(0xce);
    stream.write_all(&frame)?;
    Ok(())
}

fn receive(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut head = [0; 7];
    stream.read_exact(&mut head)?;
    let [_, _, _, length @ ..] = head;
    let mut rest = vec![0; usize::try_from(u32::from_be_bytes(length))? + 1];
    stream.read_exact(&mut rest)?;
    Ok(rest)
}
