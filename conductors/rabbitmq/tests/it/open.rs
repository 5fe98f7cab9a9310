//! Opening: what is refused at once, and what is tried again.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    thread,
    time::{Duration, Instant},
};

use atomizer::{Conductor, NodeId, OpenError, StartError, prelude::*};
use atomizer_test_support::{Permissions, Proxy, shared};

use crate::support::{Double, blocking, rabbit, soon, vhost};

async fn refused(url: &str) -> String {
    let builder = Atomizer::builder().conductor(rabbit(url)).connect_timeout(None);
    let error = soon(builder.start()).await.unwrap_err();
    let StartError::Open { source: source @ OpenError::Refused(_), .. } = error else {
        panic!("expected a refusal, not {error:?}")
    };
    source.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_refused_at_once_and_not_shown() {
    let vhost = vhost().await;
    let error = refused(&vhost.url_as("guest", "wr0ng")).await;
    assert!(error.contains("ACCESS_REFUSED"), "{error}");
    assert!(!error.contains("wr0ng"), "{error}");
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_virtual_host_is_refused_at_once() {
    let url = blocking(|| shared().unwrap().url("no-such-vhost")).await;
    let error = refused(&url).await;
    assert!(error.contains("no-such-vhost"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_permissions_is_refused_at_once() {
    let vhost = blocking(|| {
        let broker = shared().unwrap();
        let vhost = broker.vhost().unwrap();
        broker.add_user("nobody", "secret", vhost.name(), &Permissions::none()).unwrap();
        vhost
    })
    .await;
    let error = refused(&vhost.url_as("nobody", "secret")).await;
    assert!(error.contains("ACCESS_REFUSED"), "{error}");
    assert!(!error.contains("secret"), "{error}");
    blocking(move || {
        vhost.node().delete_user("nobody").unwrap();
        drop(vhost);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_broker_is_given_up_after_the_time_out() {
    // Bound and closed: nobody listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let timeout = Duration::from_secs(1);
    let url = format!("amqp://{address}");
    let begun = Instant::now();
    let builder = Atomizer::builder().conductor(rabbit(&url)).connect_timeout(timeout);
    let error = soon(builder.start()).await.unwrap_err();
    assert!(begun.elapsed() < timeout * 10, "{:?}", begun.elapsed());
    let StartError::Open { source: OpenError::Unreachable(reason), .. } = error else {
        panic!("expected it to be unreachable, not {error:?}")
    };
    assert!(reason.contains(&address.to_string()), "it says what was tried: {reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_starts_when_its_broker_comes_up() {
    let vhost = vhost().await;
    let proxy = Proxy::start(vhost.node().address()).unwrap();
    proxy.refuse(true);
    let (tx, rx) = tokio::sync::oneshot::channel();
    let builder = Atomizer::builder()
        .conductor(rabbit(&vhost.url_through(proxy.address())))
        .atom(Double)
        .connect_timeout(None)
        .watch(move |events| tx.send(events).unwrap());
    let tried = async {
        let mut events = rx.await.unwrap();
        let first = events.next().await.unwrap().unwrap();
        assert!(first.to_string().contains("next try in"), "{first}");
        proxy.refuse(false);
    };
    let (started, ()) = soon(async { tokio::join!(builder.start(), tried) }).await;
    let atomizer = started.unwrap();
    assert_eq!(soon(atomizer.call::<Double>(4).into_future()).await.unwrap(), 8);
    atomizer.drain().await.unwrap();
    blocking(move || drop((vhost, proxy))).await;
}

/// Says of itself what a RabbitMQ of this version says, to one connection after the other.
fn pretend(version: &str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let field = |name: &str, value: &str| {
        let (name_size, value_size) = (u8::try_from(name.len()).unwrap(), value.len() as u32);
        [&[name_size], name.as_bytes(), b"S", &value_size.to_be_bytes(), value.as_bytes()].concat()
    };
    let properties = [field("product", "RabbitMQ"), field("version", version)].concat();
    let start = [
        &[0, 10, 0, 10, 0, 9][..],
        &(properties.len() as u32).to_be_bytes(),
        &properties,
        b"\x00\x00\x00\x05PLAIN\x00\x00\x00\x05en_US",
    ]
    .concat();
    let frame = [&[1, 0, 0][..], &(start.len() as u32).to_be_bytes(), &start, &[0xce]].concat();
    thread::spawn(move || {
        let mut clients = Vec::new();
        for mut client in listener.incoming().flatten() {
            client.read_exact(&mut [0; 8]).unwrap();
            client.write_all(&frame).unwrap();
            clients.push(client);
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_too_old_is_refused_by_its_name() {
    let conductor = rabbit(&format!("amqp://{}", pretend("3.9.29")));
    let error = soon(conductor.open(&NodeId::unique("node").unwrap())).await.unwrap_err();
    let OpenError::Misconfigured(reason) = error else { panic!("{error:?}") };
    assert!(reason.contains("RabbitMQ 3.9.29 is too old: 3.10 or later is needed"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_knows_what_it_talks_to() {
    let vhost = vhost().await;
    let session = soon(rabbit(&vhost.url()).open(&NodeId::unique("node").unwrap())).await.unwrap();
    let shown = format!("{session:?}");
    assert!(shown.contains(&format!("RabbitMQ {}", vhost.node().version())), "{shown}");
    assert!(shown.contains(&vhost.node().address().to_string()), "{shown}");
    soon(session.close()).await;
    blocking(move || drop(vhost)).await;
}
