//! Several addresses: which is taken, and what the others cost.

use std::{
    io::Read,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use atomizer::{Conductor, EventKind, NodeId, OpenError, prelude::*};
use atomizer_test_support::{Proxy, Vhost};

use crate::support::{Double, blocking, rabbit, soon, until, vhost};

/// A URL of all these addresses, with the login that every broker knows.
fn url(addresses: &[SocketAddr], vhost: &str) -> String {
    let hosts: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    format!("amqp://guest:guest@{}/{vhost}", hosts.join(","))
}

/// Bound and closed: nobody listens there.
fn refusing() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Accepts and says nothing. Every client that gives up is told of.
fn silent() -> (SocketAddr, mpsc::Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tx, gone) = mpsc::channel();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, tx): (TcpStream, _) = (client.unwrap(), tx.clone());
            thread::spawn(move || {
                // It sends the 8 bytes of its header, and then waits for ours.
                while matches!(client.read(&mut [0; 64]), Ok(1..)) {}
                tx.send(()).ok();
            });
        }
    });
    (address, gone)
}

/// Opens a session and closes it again; returns how long opening took.
async fn open(conductor: &dyn Conductor) -> Result<Duration, OpenError> {
    let begun = Instant::now();
    let session = soon(conductor.open(&NodeId::unique("node").unwrap())).await?;
    let took = begun.elapsed();
    soon(session.close()).await;
    Ok(took)
}

async fn proxies(vhost: Vhost) -> (Vhost, [Proxy; 2]) {
    let address = vhost.node().address();
    let proxies = [Proxy::start(address).unwrap(), Proxy::start(address).unwrap()];
    (vhost, proxies)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_session_begins_at_the_next_address() {
    let (vhost, proxies) = proxies(vhost().await).await;
    let url = url(&proxies.each_ref().map(Proxy::address), vhost.name());
    // Those that events go out on would be counted too.
    let conductor = rabbit(&url).without_events();
    let atomizer = Atomizer::builder().conductor(conductor).atom(Double).start().await.unwrap();
    let mut events = atomizer.events();
    let connections = || proxies.each_ref().map(Proxy::connections);
    let first = connections();
    assert!([[0, 2], [2, 0]].contains(&first), "both are to one address: {first:?}");
    for round in 0..4 {
        let before = connections();
        proxies.iter().for_each(Proxy::cut);
        until(&mut events, |event| matches!(event, EventKind::SessionOpened)).await;
        let [a, b] = before;
        assert_eq!(connections(), [b, a], "it goes on to the other, round {round}");
        assert_eq!(soon(atomizer.call::<Double>(round).into_future()).await.unwrap(), 2 * round);
    }
    atomizer.drain().await.unwrap();
    blocking(move || drop((vhost, proxies))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_and_a_refusing_address_cost_a_bounded_time_and_leave_nothing() {
    let vhost = vhost().await;
    let (silent, gone) = silent();
    let conductor = rabbit(&url(&[silent, refusing(), vhost.node().address()], vhost.name()));
    // It begins anywhere; three in a row have seen all.
    for _ in 0..3 {
        let took = open(&conductor).await.unwrap();
        assert!(took < Duration::from_secs(4), "2 s for the silent one: {took:?}");
    }
    // Both connections of a session. Given up means hung up, or threads and sockets would add up.
    blocking(move || {
        for _ in 0..2 {
            gone.recv_timeout(Duration::from_secs(10)).expect("the client hangs up");
        }
    })
    .await;
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_names_each_address_and_why() {
    let (vhost, proxies) = proxies(vhost().await).await;
    let [one, other] = proxies.each_ref().map(Proxy::address);
    let refusing = refusing();
    // One may come up with a virtual host of that name.
    let conductor = rabbit(&url(&[one, refusing], "no-such-vhost"));
    let error = open(&conductor).await.unwrap_err();
    let OpenError::Unreachable(reason) = error else { panic!("{error:?}") };
    for part in [&one.to_string(), &refusing.to_string(), "no-such-vhost", "refused"] {
        assert!(reason.contains(part), "{part} is in {reason:?}");
    }
    // All of them say no.
    let wrong = url(&[one, other], vhost.name()).replace("guest:guest", "guest:wr0ng");
    let error = open(&rabbit(&wrong)).await.unwrap_err();
    let OpenError::Refused(reason) = error else { panic!("{error:?}") };
    for part in [&one.to_string(), &other.to_string(), "ACCESS_REFUSED"] {
        assert!(reason.contains(part), "{part} is in {reason:?}");
    }
    assert!(!reason.contains("wr0ng"), "{reason}");
    blocking(move || drop((vhost, proxies))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_succeeds_within_its_time_with_a_silent_address() {
    let vhost = vhost().await;
    let (silent, _gone) = silent();
    let conductor = rabbit(&url(&[silent, vhost.node().address()], vhost.name()));
    // Clones go on where the last one stopped: at the silent address by the second time.
    for _ in 0..2 {
        let builder = Atomizer::builder()
            .conductor(conductor.clone())
            .connect_timeout(Duration::from_secs(5));
        soon(builder.start()).await.unwrap().drain().await.unwrap();
    }
    blocking(move || drop(vhost)).await;
}
