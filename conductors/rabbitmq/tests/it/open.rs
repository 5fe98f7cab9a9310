//! Opening: what is refused at once, and what is tried again.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use atomizer::{OpenError, StartError, prelude::*};
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
