//! A private broker: its start, its crashes and its end.

use std::error::Error;
use std::io::{BufRead as _, BufReader};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use atomizer_test_support::{Broker, Node, Vhost};
use serde_json::json;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until the condition holds, which nobody announces.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn declare(vhost: &Vhost, queue: &str, kind: &str) -> Result {
    vhost.node().manage(
        "PUT",
        &format!("/api/queues/{}/{queue}", vhost.name()),
        Some(&json!({ "durable": true, "arguments": { "x-queue-type": kind } })),
    )?;
    Ok(())
}

fn publish(vhost: &Vhost, queue: &str) -> Result {
    let message = json!({
        "routing_key": queue,
        "payload": "electron",
        "payload_encoding": "string",
        "properties": { "delivery_mode": 2 },
    });
    let answer = vhost.node().manage(
        "POST",
        &format!("/api/exchanges/{}/amq.default/publish", vhost.name()),
        Some(&message),
    )?;
    assert_eq!(answer, json!({ "routed": true }));
    Ok(())
}

fn is_process(pid: &str) -> bool {
    // A process that has ended and was not waited for yet is dead all the same.
    let state =
        Command::new("ps").args(["-o", "stat=", "-p", pid]).output().expect("ps is everywhere");
    let state = String::from_utf8_lossy(&state.stdout);
    !state.trim().is_empty() && !state.trim().starts_with('Z')
}

#[test]
fn what_is_durable_outlives_a_crash_and_a_restart() -> Result {
    let broker = Broker::start()?;
    assert!(broker.version().starts_with(|c: char| c.is_ascii_digit()));
    let vhost = broker.vhost()?;
    declare(&vhost, "steady", "classic")?;
    declare(&vhost, "replicated", "quorum")?;
    publish(&vhost, "steady")?;
    publish(&vhost, "replicated")?;

    broker.flush()?;
    broker.kill()?;
    assert_eq!(broker.pid(), None);
    assert!(TcpStream::connect(broker.address()).is_err());
    broker.start_again()?;
    broker.restart()?;

    for queue in ["steady", "replicated"] {
        let depth = vhost.queue_depth(queue)?.ok_or("the queue is gone")?;
        assert_eq!((depth.ready, depth.unacknowledged), (1, 0), "{queue}");
    }
    assert_eq!(vhost.queue_depth("other")?, None);

    let folder = broker.folder().to_owned();
    let pid = broker.pid().ok_or("it does not run")?.to_string();
    drop(broker);
    assert!(!folder.exists());
    assert!(!is_process(&pid));
    Ok(())
}

#[test]
fn a_paused_broker_keeps_its_sockets_and_says_nothing() -> Result {
    let broker = Broker::start()?;
    broker.pause()?;
    // The system accepts on its behalf.
    let stream = TcpStream::connect(broker.address())?;
    stream.set_read_timeout(Some(Duration::from_millis(300)))?;
    std::io::Write::write_all(&mut &stream, b"AMQP\0\0\x09\x01")?;
    assert!(std::io::Read::read(&mut &stream, &mut [0]).is_err());
    broker.resume()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    assert_eq!(std::io::Read::read(&mut &stream, &mut [0])?, 1);
    broker.pause()?;
    // Stopping works on a paused one too.
    broker.stop()?;
    assert!(broker.pause().is_err());
    Ok(())
}

#[test]
fn nothing_is_left_of_the_broker_of_a_killed_process() -> Result {
    let mut holder = Command::new(env!("CARGO_BIN_EXE_hold-broker"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = holder.stdout.take().ok_or("no output")?;
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    let (broker_pid, description) = line.trim().split_once(' ').ok_or("no broker")?;
    let node = Node::from_description(description)?;
    let epmd_pid = std::fs::read_to_string(node.folder().join("epmd.pid"))?;
    assert!(is_process(broker_pid) && is_process(epmd_pid.trim()));

    holder.kill()?;
    holder.wait()?;

    eventually("the broker dies", || !is_process(broker_pid));
    eventually("its epmd dies", || !is_process(epmd_pid.trim()));
    eventually("its folder vanishes", || !Path::new(node.folder()).exists());
    Ok(())
}
