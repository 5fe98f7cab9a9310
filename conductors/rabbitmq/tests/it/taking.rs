//! What is removed for good before the work begins, and what is left when nothing is taken any more.

use std::{collections::HashSet, num::NonZeroUsize, sync::Arc, time::Duration};

use atomizer::{
    Address, AtomId, Conductor, Delivery, Electron, ElectronId, Envelope, Message, NodeId, Outcome,
    Payload, Session, SettleError, Source, Ticket,
};
use atomizer_test_support::Broker;

use crate::support::{blocking, rabbit, soon, vhost};

const ATOM: AtomId = AtomId::from_static("taken");

async fn send(session: &dyn Session, count: usize) -> Vec<ElectronId> {
    let electrons: Vec<_> = (0..count).map(|_| Electron::new(ATOM, Payload::json("1"))).collect();
    let ids = electrons.iter().map(|electron| electron.id).collect();
    let envelope = |electron: Electron| Envelope::new(Address::Atom(ATOM), electron.into());
    let envelopes: Vec<_> = electrons.into_iter().map(envelope).collect();
    for sent in session.send(&envelopes).await {
        sent.unwrap();
    }
    ids
}

fn id(delivery: &Delivery) -> ElectronId {
    match &delivery.message {
        Message::Electron(electron) => electron.id,
        other => panic!("an electron was expected: {other:?}"),
    }
}

async fn take(session: &dyn Session, tickets: impl IntoIterator<Item = Ticket>) {
    let batch = tickets.into_iter().map(|ticket| (ticket, Outcome::take())).collect();
    let taken: Result<Vec<()>, SettleError> =
        soon(session.settle(batch)).await.into_iter().collect();
    taken.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_does_not_come_again_after_a_crash() {
    const COUNT: NonZeroUsize = NonZeroUsize::new(200).unwrap();
    let broker = Arc::new(blocking(|| Broker::start().unwrap()).await);
    let conductor = rabbit(&broker.url("/"));
    let session = conductor.open(&NodeId::unique("node").unwrap()).await.unwrap();
    let mut subscription = session.subscribe(Source::Atom(ATOM), COUNT).await.unwrap();
    send(&*session, COUNT.get()).await;
    let mut deliveries = Vec::new();
    while deliveries.len() < COUNT.get() {
        deliveries.extend(soon(subscription.next(COUNT)).await.unwrap());
    }
    let crashed = Arc::clone(&broker);
    blocking(move || crashed.flush().unwrap()).await;
    // Above a hole each is acknowledged by itself: far more than RabbitMQ hands to the queue at once.
    let held = deliveries.remove(0);
    take(&*session, deliveries.into_iter().map(|delivery| delivery.ticket)).await;
    let crashed = Arc::clone(&broker);
    blocking(move || {
        crashed.kill().unwrap();
        crashed.start_again().unwrap();
    })
    .await;
    let session = conductor.open(&NodeId::unique("node").unwrap()).await.unwrap();
    let mut subscription = session.subscribe(Source::Atom(ATOM), COUNT).await.unwrap();
    let again = soon(subscription.next(NonZeroUsize::MIN)).await.unwrap().remove(0);
    assert_eq!(id(&again), id(&held), "only this was not taken");
    // What else came back with it is ahead of this.
    let last = send(&*session, 1).await;
    let next = soon(subscription.next(NonZeroUsize::MIN)).await.unwrap().remove(0);
    assert_eq!(id(&next), last[0], "nothing else came back");
    session.close().await;
    blocking(move || drop(broker)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_behind_what_is_taken_comes_once_and_counts_for_nothing() {
    const WATCHDOG: Duration = Duration::from_millis(100);
    let vhost = Arc::new(vhost().await);
    let conductor = rabbit(&vhost.url()).watchdog(WATCHDOG);
    let session = conductor.open(&NodeId::unique("node").unwrap()).await.unwrap();
    let one = NonZeroUsize::MIN;
    let mut subscription = session.subscribe(Source::Atom(ATOM), one).await.unwrap();
    let mut waiting: HashSet<_> = send(&*session, 20).await.into_iter().collect();
    while !waiting.is_empty() {
        let delivery = soon(subscription.next(one)).await.unwrap().remove(0);
        assert!(waiting.remove(&id(&delivery)), "it came twice");
        if waiting.len() == 10 {
            // The window is full, whatever taking has fetched and given back.
            let waited = tokio::time::timeout(20 * WATCHDOG, subscription.next(one)).await;
            assert!(waited.is_err(), "{waited:?}");
        }
        take(&*session, [delivery.ticket]).await;
    }
    session.close().await;
    blocking(move || drop(vhost)).await;
}

/// A process that reads results now and then would come to the end of the channels that its broker grants.
#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_that_is_over_leaves_no_channel() {
    const WINDOW: NonZeroUsize = NonZeroUsize::new(100).unwrap();
    let vhost = Arc::new(vhost().await);
    let until_there_are = async |channels: usize| {
        let counted = async || {
            let vhost = Arc::clone(&vhost);
            blocking(move || vhost.channels().unwrap().len()).await
        };
        soon(async { while counted().await != channels {} }).await;
    };
    let session = rabbit(&vhost.url()).open(&NodeId::unique("node").unwrap()).await.unwrap();
    // That of what is published.
    until_there_are(1).await;
    send(&*session, 20).await;
    let mut held = Vec::new();
    for stops in [true, false] {
        let mut subscription = session.subscribe(Source::Atom(ATOM), WINDOW).await.unwrap();
        held.append(&mut soon(subscription.next(NonZeroUsize::MIN)).await.unwrap());
        if stops {
            soon(subscription.stop()).await;
        }
    }
    // What was handed out can be settled, so its channel is there.
    until_there_are(1 + held.len()).await;
    let batch = held.into_iter().map(|delivery| (delivery.ticket, Outcome::done(Vec::new())));
    for settled in soon(session.settle(batch.collect())).await {
        settled.unwrap();
    }
    until_there_are(1).await;
    session.close().await;
    blocking(move || drop(vhost)).await;
}
