//! Faults that nobody is told of: everything looks well, and nothing moves. Each is noticed, and work flows again.

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use atomizer::{
    Address, AtomId, Conductor, Electron, Envelope, EventKind, NodeId, Outcome, Payload, Source,
    prelude::*,
};
use atomizer_test_support::{Broker, Node, Permissions, Proxy, Vhost};
use futures::FutureExt;
use serde_json::json;
use tokio::task::JoinSet;

use crate::support::{Double, blocking, rabbit, serve, soon, until, vhost};

/// Asks for the doubles of so many numbers at once, and has all the right answers.
async fn ask(asker: &Atomizer, numbers: std::ops::Range<u64>) {
    let calls: JoinSet<_> = numbers
        .map(|number| {
            let call = asker.call::<Double>(number).into_future();
            async move { (number, call.await) }
        })
        .collect();
    for (number, answer) in soon(calls.join_all()).await {
        assert_eq!(answer.unwrap(), number * 2);
    }
}

async fn ctl(node: &Node, expression: String) {
    let node = node.clone();
    blocking(move || node.ctl(&["eval", &expression]).unwrap()).await;
}

/// Has the broker forget the consumers of a queue, without a word to their channels.
async fn forget_consumers(vhost: &Vhost, queue: &str) {
    let expression = format!(
        "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"{}\">>, queue, <<\"{queue}\">>)),
         [{{ok, _, _}} = ra:process_command(amqqueue:get_pid(Q),
             rabbit_fifo:make_checkout({{element(2, C), element(1, C)}}, cancel, #{{}}))
          || C <- rabbit_amqqueue:consumers(Q)].",
        vhost.name()
    );
    ctl(vhost.node(), expression).await;
}

/// "Connected, messages ready, nothing arrives": the disease of workers that look alive.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_consumer_the_broker_forgot_consumes_again() {
    let vhost = Arc::new(vhost().await);
    let conductor = rabbit(&vhost.url()).watchdog(Duration::from_secs(1));
    let worker = Atomizer::builder().conductor(conductor).atom(Double).start().await.unwrap();
    let asker = Atomizer::builder().conductor(rabbit(&vhost.url())).start().await.unwrap();
    ask(&asker, 0..10).await;
    let mut events = worker.events();
    forget_consumers(&vhost, "atomizer.atom.double").await;
    let lost = |kind: &EventKind| matches!(kind, EventKind::SubscriptionLost { atom: Some(_), .. });
    let EventKind::SubscriptionLost { error, .. } = until(&mut events, lost).await else {
        unreachable!("it was waited for")
    };
    assert!(error.contains("forgotten"), "{error}");
    ask(&asker, 10..20).await;
    asker.drain().await.unwrap();
    worker.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

/// A worker that is busy takes anew all the time, and the broker must have time to answer all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_is_asked_all_the_time_is_watched_too() {
    let vhost = Arc::new(vhost().await);
    let conductor = rabbit(&vhost.url()).watchdog(Duration::from_millis(100));
    let session = conductor.open(&NodeId::unique("node").unwrap()).await.unwrap();
    let (atom, one) = (AtomId::from_static("busy"), NonZeroUsize::MIN);
    let mut subscription = session.subscribe(Source::Atom(atom), one).await.unwrap();
    forget_consumers(&vhost, "atomizer.atom.busy").await;
    let bitten = async {
        loop {
            if let Some(taken) = subscription.next(one).now_or_never() {
                return taken;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let error = soon(bitten).await.unwrap_err();
    assert!(error.to_string().contains("forgotten"), "{error}");
    session.close().await;
    blocking(move || drop(vhost)).await;
}

/// What is out fills the window: that nothing arrives is as it should be.
#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_whose_window_is_full_is_left_alone() {
    let vhost = Arc::new(vhost().await);
    let conductor = rabbit(&vhost.url()).watchdog(Duration::from_millis(100));
    let session = conductor.open(&NodeId::unique("node").unwrap()).await.unwrap();
    let (atom, one) = (AtomId::from_static("held"), NonZeroUsize::MIN);
    let mut subscription = session.subscribe(Source::Atom(atom.clone()), one).await.unwrap();
    let envelope = || {
        let electron = Electron::new(atom.clone(), Payload::json("1"));
        Envelope::new(Address::Atom(atom.clone()), electron.into())
    };
    let sent = session.send(&[envelope(), envelope()]).await;
    assert!(sent.iter().all(Result::is_ok), "{sent:?}");
    let first = soon(subscription.next(one)).await.unwrap().remove(0);
    let looks = 20 * Duration::from_millis(100);
    let waited = tokio::time::timeout(looks, subscription.next(one)).await;
    assert!(waited.is_err(), "{waited:?}");
    let settled = session.settle(vec![(first.ticket, Outcome::done(Vec::new()))]).await;
    assert!(settled.iter().all(Result::is_ok), "{settled:?}");
    soon(subscription.next(one)).await.unwrap();
    session.close().await;
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_connection_is_noticed_by_its_heartbeat() {
    let vhost = Arc::new(vhost().await);
    let proxy = Arc::new(Proxy::start(vhost.node().address()).unwrap());
    let url = format!("{}?heartbeat=1", vhost.url_through(proxy.address()));
    let (worker, asker) = (serve(&url).await, serve_nothing(&vhost.url()).await);
    ask(&asker, 0..10).await;
    let mut events = worker.events();
    proxy.stall(true);
    until(&mut events, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
    proxy.stall(false);
    ask(&asker, 10..20).await;
    asker.drain().await.unwrap();
    worker.drain().await.unwrap();
    blocking(move || drop((vhost, proxy))).await;
}

async fn serve_nothing(url: &str) -> Atomizer {
    Atomizer::builder().conductor(rabbit(url)).start().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_freezes_and_thaws_is_used_again() {
    let broker = Arc::new(blocking(|| Broker::start().unwrap()).await);
    let url = format!("{}?heartbeat=1", broker.url("/"));
    let (worker, asker) = (serve(&url).await, serve_nothing(&url).await);
    ask(&asker, 0..10).await;
    let (mut working, mut asking) = (worker.events(), asker.events());
    let mut asking_meanwhile = JoinSet::new();
    asking_meanwhile.spawn(ask_later(asker.clone()));
    let frozen = Arc::clone(&broker);
    blocking(move || frozen.pause().unwrap()).await;
    for events in [&mut working, &mut asking] {
        until(events, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
    }
    let thawed = Arc::clone(&broker);
    blocking(move || thawed.resume().unwrap()).await;
    soon(asking_meanwhile.join_next()).await.unwrap().unwrap();
    ask(&asker, 10..20).await;
    asker.drain().await.unwrap();
    worker.drain().await.unwrap();
    blocking(move || drop(broker)).await;
}

async fn ask_later(asker: Atomizer) {
    ask(&asker, 100..200).await;
}

/// A resource alarm: the broker reads nothing from who publishes, and says so once.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_short_of_memory_slows_the_sender_and_loses_nothing() {
    let broker = Arc::new(blocking(|| Broker::start().unwrap()).await);
    let (worker, asker) = (serve(&broker.url("/")).await, serve_nothing(&broker.url("/")).await);
    ask(&asker, 0..10).await;
    let mut events = asker.events();
    let alarm = "{{resource_limit, memory, node()}, []}";
    ctl(&broker, format!("rabbit_alarm:set_alarm({alarm}).")).await;
    let mut blocked = JoinSet::new();
    blocked.spawn(ask_later(asker.clone()));
    // The fault has bitten when the broker says that it blocks the connection.
    let witness = Arc::clone(&broker);
    let biting = async {
        loop {
            let witness = Arc::clone(&witness);
            let listed =
                blocking(move || witness.ctl(&["list_connections", "state", "--silent"]).unwrap());
            if listed.await.contains("blocked") {
                return;
            }
        }
    };
    soon(biting).await;
    assert!(blocked.try_join_next().is_none(), "nothing is answered meanwhile");
    ctl(&broker, "rabbit_alarm:clear_alarm({resource_limit, memory, node()}).".to_owned()).await;
    soon(blocked.join_next()).await.unwrap().unwrap();
    ask(&asker, 10..20).await;
    asker.drain().await.unwrap();
    worker.drain().await.unwrap();
    drop(asker);
    while let Some(event) = events.next().await {
        let lost = event.is_ok_and(|event| matches!(event.kind, EventKind::SessionLost { .. }));
        assert!(!lost, "a blocked session is kept");
    }
    blocking(move || drop(broker)).await;
}

/// What waits for a broker that is short of memory says so, for whoever else has an eye on the time.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_says_when_its_broker_blocks_it() {
    let broker = Arc::new(blocking(|| Broker::start().unwrap()).await);
    let session = rabbit(&broker.url("/")).open(&NodeId::unique("node").unwrap()).await.unwrap();
    assert!(!session.is_blocked());
    let alarm = "{{resource_limit, memory, node()}, []}";
    ctl(&broker, format!("rabbit_alarm:set_alarm({alarm}).")).await;
    let atom = AtomId::from_static("blocked");
    let electron = Electron::new(atom.clone(), Payload::json("1"));
    let envelopes = [Envelope::new(Address::Atom(atom), electron.into())];
    let is = async |blocked: bool| {
        while session.is_blocked() != blocked {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let blocked = async {
        soon(is(true)).await;
        ctl(&broker, "rabbit_alarm:clear_alarm({resource_limit, memory, node()}).".to_owned())
            .await;
        soon(is(false)).await;
    };
    let (sent, ()) = tokio::join!(session.send(&envelopes), blocked);
    assert!(sent.iter().all(Result::is_ok), "{sent:?}");
    session.close().await;
    blocking(move || drop(broker)).await;
}

/// A full queue declines what is published. The sender waits for room, and its session is not thrown away over and
/// over for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_slows_the_sender_and_loses_nothing() {
    const SENT: u64 = 2000;
    let vhost = Arc::new(vhost().await);
    let policy = json!({
        "pattern": "^atomizer\\.atom\\.double$", "apply-to": "queues",
        "definition": { "max-length": 5 },
    });
    let (limited, path) = (Arc::clone(&vhost), format!("/api/policies/{}/short", vhost.name()));
    blocking(move || limited.node().manage("PUT", &path, Some(&policy)).unwrap()).await;
    let sender = serve_nothing(&vhost.url()).await;
    let mut events = sender.events();
    let mut asking = JoinSet::new();
    let asker = sender.clone();
    asking.spawn(async move { ask(&asker, 0..SENT).await });
    let worker = serve(&vhost.url()).await;
    asking.join_next().await.unwrap().unwrap();
    sender.drain().await.unwrap();
    worker.drain().await.unwrap();
    drop(sender);
    let mut lost = 0;
    while let Some(event) = events.next().await {
        let session = event.is_ok_and(|event| matches!(event.kind, EventKind::SessionLost { .. }));
        lost += u32::from(session);
    }
    assert!(lost <= 1, "{lost} sessions were given up for it");
    blocking(move || drop(vhost)).await;
}

/// The server closes the channel of whoever publishes to what is not there (404).
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_exchange_is_made_again() {
    let vhost = Arc::new(vhost().await);
    let (worker, asker) = (serve(&vhost.url()).await, serve_nothing(&vhost.url()).await);
    ask(&asker, 0..10).await;
    let mut events = asker.events();
    let deleted = Arc::clone(&vhost);
    blocking(move || {
        let path = format!("/api/exchanges/{}/atomizer", deleted.name());
        deleted.node().manage("DELETE", &path, None).unwrap();
    })
    .await;
    let mut asking = JoinSet::new();
    asking.spawn(ask_later(asker.clone()));
    let lost = until(&mut events, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
    assert!(format!("{lost:?}").contains("NOT_FOUND"), "{lost:?}");
    soon(asking.join_next()).await.unwrap().unwrap();
    asker.drain().await.unwrap();
    worker.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

/// An operator takes a permission away and gives it back (403, and 530 when a connection is made).
#[tokio::test(flavor = "multi_thread")]
async fn a_permission_that_is_taken_and_given_back_costs_time_only() {
    let vhost = Arc::new(vhost().await);
    let user = format!("user-{}", vhost.name());
    let permit = async |permissions: Permissions| {
        let (vhost, user) = (Arc::clone(&vhost), user.clone());
        let add = move || {
            vhost.node().add_user(&user, "secret", vhost.name(), &permissions).unwrap();
        };
        blocking(add).await;
    };
    permit(Permissions::all()).await;
    let worker = serve(&vhost.url()).await;
    let asker = serve_nothing(&vhost.url_as(&user, "secret")).await;
    ask(&asker, 0..10).await;
    let mut events = asker.events();
    permit(Permissions::none()).await;
    let closing = Arc::clone(&vhost);
    blocking(move || closing.close_connections("a test").unwrap()).await;
    until(&mut events, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
    let refused = until(&mut events, |kind| matches!(kind, EventKind::OpenFailed { .. })).await;
    assert!(!format!("{refused:?}").contains("secret"), "{refused:?}");
    let mut asking = JoinSet::new();
    asking.spawn(ask_later(asker.clone()));
    permit(Permissions::all()).await;
    soon(asking.join_next()).await.unwrap().unwrap();
    asker.drain().await.unwrap();
    worker.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}
