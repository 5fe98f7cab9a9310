//! What is parked: where it lies, what becomes of it, and what is left behind.

use std::{collections::HashSet, num::NonZeroUsize, sync::Arc, time::Duration};

use atomizer::{
    Address, AtomId, Conductor, Delivery, Electron, Envelope, Message, NodeId, Outcome, Payload,
    Session, SettleError, Source, Subscription, Ticket,
};
use atomizer_rabbitmq::RabbitMq;
use atomizer_test_support::{Depth, Permissions, Proxy, Vhost, shared};
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::timeout};

use crate::support::{PATIENCE, blocking, impatient, rabbit, soon, vhost};

const ATOM: AtomId = AtomId::from_static("parked");
const QUEUE: &str = "atomizer.atom.parked";

async fn open(url: &str) -> Arc<dyn Session> {
    open_with(rabbit(url)).await
}

async fn open_with(conductor: RabbitMq) -> Arc<dyn Session> {
    let node = NodeId::unique("node").unwrap();
    soon(conductor.open(&node)).await.unwrap()
}

async fn take(session: &dyn Session, window: usize) -> Box<dyn Subscription> {
    let window = NonZeroUsize::new(window).unwrap();
    soon(session.subscribe(Source::Atom(ATOM), window)).await.unwrap()
}

async fn next(subscription: &mut Box<dyn Subscription>) -> (Electron, Delivery) {
    let delivery = soon(subscription.next(NonZeroUsize::MIN)).await.unwrap().remove(0);
    let Message::Electron(electron) = &delivery.message else { panic!("{delivery:?}") };
    (Electron::clone(electron), delivery)
}

async fn send(session: &dyn Session) -> Electron {
    send_to(session, ATOM).await
}

async fn send_to(session: &dyn Session, atom: AtomId) -> Electron {
    let electron = Electron::new(atom.clone(), Payload::json("1"));
    let envelopes = [Envelope::new(Address::Atom(atom), electron.clone().into())];
    soon(session.send(&envelopes)).await.remove(0).unwrap();
    electron
}

/// Sends an electron, takes it and parks it with one more attempt.
async fn park(session: &dyn Session, from: &mut Box<dyn Subscription>) -> (Electron, Ticket) {
    send(session).await;
    let (mut changed, delivery) = next(from).await;
    changed.attempts += 1;
    let parked = soon(session.park(delivery.ticket, Arc::new(changed.clone()))).await;
    (changed, parked.unwrap())
}

async fn settle(session: &dyn Session, ticket: Ticket) -> Result<(), SettleError> {
    soon(session.settle(vec![(ticket, Outcome::done(Vec::new()))])).await.remove(0)
}

/// Names on the virtual host that have to do with leases.
fn leases(vhost: &Vhost) -> (Vec<String>, Vec<String>) {
    let lease = |name: &String| name.contains(".lease.");
    let queues = vhost.queues().unwrap().into_iter().map(|queue| queue.name).filter(lease);
    let exchanges = vhost.exchanges().unwrap().into_iter().map(|it| it.name).filter(lease);
    (queues.collect(), exchanges.collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_parked_lies_in_a_lease_queue_that_gives_it_back() {
    let vhost = vhost().await;
    let session = open(&vhost.url()).await;
    let mut taker = take(&*session, 1).await;
    let (_, ticket) = park(&*session, &mut taker).await;
    let vhost = blocking(move || {
        let (queues, exchanges) = leases(&vhost);
        assert_eq!(queues, exchanges, "each with an exchange of its name");
        assert_eq!(queues.len(), 1);
        let held = Depth { ready: 0, unacknowledged: 1 };
        assert_eq!(vhost.queue_depth(&queues[0]).unwrap(), Some(held));
        assert_eq!(vhost.queue_depth(QUEUE).unwrap(), Some(Depth::default()));
        let queue = vhost.queues().unwrap().into_iter().find(|queue| queue.name == queues[0]);
        let queue = queue.unwrap();
        assert_eq!((queue.kind.as_str(), queue.durable), ("quorum", true));
        assert_eq!(queue.arguments["x-dead-letter-exchange"], json!("atomizer"));
        assert!(!queue.arguments.contains_key("x-dead-letter-routing-key"), "each has its own");
        assert_eq!(queue.arguments["x-dead-letter-strategy"], json!("at-least-once"));
        assert_eq!(queue.arguments["x-overflow"], json!("reject-publish"));
        let number = |name: &str| queue.arguments[name].as_u64().unwrap();
        assert!(number("x-message-ttl") * 100 < number("x-expires"), "nothing expires with it");
        let exchange = vhost.exchanges().unwrap().into_iter().find(|it| it.name == queues[0]);
        assert!(exchange.unwrap().auto_delete, "it goes with the queue");
        vhost
    })
    .await;
    settle(&*session, ticket).await.unwrap();
    session.close().await;
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_electron_on_a_connection_that_is_cut_goes_back_to_its_queue() {
    let vhost = vhost().await;
    let proxy = Proxy::start(vhost.node().address()).unwrap();
    let session = open(&vhost.url_through(proxy.address())).await;
    let (changed, ticket) = park(&*session, &mut take(&*session, 1).await).await;
    proxy.refuse(true);
    proxy.cut();
    soon(session.ended()).await;
    assert!(settle(&*session, ticket).await.is_err());
    let other = open(&vhost.url()).await;
    let mut taker = take(&*other, 1).await;
    loop {
        let (electron, delivery) = next(&mut taker).await;
        assert!(delivery.redeliveries > 0);
        settle(&*other, delivery.ticket).await.unwrap();
        // The old form may come first: its removal was sent, and is not known to have arrived.
        if electron == changed {
            break;
        }
    }
    other.close().await;
    let vhost = blocking(move || {
        let (queues, _) = leases(&vhost);
        assert_eq!(vhost.queue_depth(&queues[0]).unwrap(), Some(Depth::default()));
        vhost
    })
    .await;
    blocking(move || drop((vhost, proxy))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_session_leaves_no_lease_queue() {
    let vhost = Arc::new(vhost().await);
    let session = open(&vhost.url()).await;
    let mut taker = take(&*session, 1).await;
    let (_, settled) = park(&*session, &mut taker).await;
    let (_, dropped) = park(&*session, &mut taker).await;
    let (_, held) = park(&*session, &mut taker).await;
    settle(&*session, settled).await.unwrap();
    drop(dropped);
    let (again, delivery) = next(&mut taker).await;
    assert_eq!(again.attempts, 1);
    settle(&*session, delivery.ticket).await.unwrap();
    let looking = Arc::clone(&vhost);
    assert_eq!(blocking(move || leases(&looking).0.len()).await, 1);
    session.close().await;
    assert!(settle(&*session, held).await.is_err());
    blocking(move || {
        assert_eq!(leases(&vhost), (Vec::new(), Vec::new()));
        let back = Depth { ready: 1, unacknowledged: 0 };
        assert_eq!(vhost.queue_depth(QUEUE).unwrap(), Some(back), "what was held went back");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_queue_that_holds_something_outlives_its_session() {
    let vhost = Arc::new(vhost().await);
    let session = open(&vhost.url()).await;
    let _held = park(&*session, &mut take(&*session, 1).await).await;
    // Without its queue there is nowhere to give it back to.
    let deleting = Arc::clone(&vhost);
    blocking(move || {
        let path = format!("/api/queues/{}/{QUEUE}", deleting.name());
        deleting.node().manage("DELETE", &path, None).unwrap();
    })
    .await;
    session.close().await;
    let looking = Arc::clone(&vhost);
    assert_eq!(blocking(move || leases(&looking).0.len()).await, 1);
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_declare_a_lease_queue_keeps_the_ticket() {
    let vhost = blocking(|| {
        let broker = shared().unwrap();
        let vhost = broker.vhost().unwrap();
        let own = Permissions::new(
            r"^atomizer(\.dead|\.due|\.lost|\.inbox\..*|\.atom\..*)?$",
            ".*",
            ".*",
        );
        broker.add_user("worker", "secret", vhost.name(), &own).unwrap();
        vhost
    })
    .await;
    let session = open(&vhost.url_as("worker", "secret")).await;
    let mut taker = take(&*session, 1).await;
    let sent = send(&*session).await;
    let (electron, delivery) = next(&mut taker).await;
    assert_eq!(electron, sent);
    let parked = soon(session.park(delivery.ticket, Arc::new(electron))).await;
    let Err(SettleError::NotSafe { ticket, failed }) = parked else {
        panic!("expected a refusal, not {parked:?}")
    };
    assert!(failed[0].1.to_string().contains("ACCESS_REFUSED"), "{failed:?}");
    settle(&*session, ticket).await.unwrap();
    session.close().await;
    blocking(move || {
        vhost.node().delete_user("worker").unwrap();
        drop(vhost);
    })
    .await;
}

/// Takes what waits in the queue: the application id of each message, by which a copy is known that the broker
/// itself led back from the lease queue.
fn application_ids(vhost: &Vhost) -> Vec<String> {
    let path = format!("/api/queues/{}/{QUEUE}/get", vhost.name());
    let get = json!({ "count": 100, "ackmode": "ack_requeue_false", "encoding": "auto" });
    let messages = vhost.node().manage("POST", &path, Some(&get)).unwrap();
    let id = |message: &Value| message["properties"]["app_id"].as_str().unwrap_or("").to_owned();
    messages.as_array().unwrap().iter().map(id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_parking_is_given_back_by_the_session_itself() {
    let vhost = Arc::new(vhost().await);
    let session = open(&vhost.url()).await;
    let mut copies = 0;
    for polls in (0..16).map(|power| 1 << power) {
        let mut taker = take(&*session, 1).await;
        send(&*session).await;
        let (electron, delivery) = next(&mut taker).await;
        taker.stop().await;
        tokio::select! {
            biased;
            parked = session.park(delivery.ticket, Arc::new(electron)) => drop(parked.unwrap()),
            () = async { for _ in 0..polls { tokio::task::yield_now().await; } } => {}
        }
        let back = async {
            loop {
                let looking = Arc::clone(&vhost);
                let ids = blocking(move || application_ids(&looking)).await;
                if !ids.is_empty() {
                    return ids;
                }
            }
        };
        let ids = soon(back).await;
        let by_us = |id: &String| ["", "atomizer/parked"].contains(&id.as_str());
        assert!(ids.len() == 1 && by_us(&ids[0]), "not with the mark of its copy: {ids:?}");
        copies += usize::from(!ids[0].is_empty());
    }
    assert!(copies > 0, "some were dropped when the copy was under way");
    session.close().await;
    blocking(move || {
        assert_eq!(
            leases(&vhost),
            (Vec::new(), Vec::new()),
            "nothing is left that is not known of"
        );
    })
    .await;
}

/// Sends, takes and parks one electron, unless the session ends.
async fn try_to_park(session: &dyn Session) -> Option<Ticket> {
    let source = Source::Atom(ATOM);
    let mut taker = session.subscribe(source, NonZeroUsize::MIN).await.ok()?;
    let envelopes =
        [Envelope::new(Address::Atom(ATOM), Electron::new(ATOM, Payload::json("1")).into())];
    session.send(&envelopes).await.remove(0).ok()?;
    let delivery = taker.next(NonZeroUsize::MIN).await.ok()?.remove(0);
    let Message::Electron(electron) = delivery.message else { return None };
    session.park(delivery.ticket, electron).await.ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn parking_goes_on_when_a_lease_queue_was_deleted() {
    let vhost = Arc::new(vhost().await);
    let mut session = open(&vhost.url()).await;
    let _lost = park(&*session, &mut take(&*session, 1).await).await;
    let deleting = Arc::clone(&vhost);
    blocking(move || {
        let path = format!("/api/queues/{}/{}", deleting.name(), leases(&deleting).0[0]);
        deleting.node().manage("DELETE", &path, None).unwrap();
    })
    .await;
    let parked = async {
        loop {
            if let Some(ticket) = try_to_park(&*session).await {
                return ticket;
            }
            // It was not told in time, and published to what is not there: that costs the session.
            session.close().await;
            session = open(&vhost.url()).await;
        }
    };
    let ticket = soon(parked).await;
    settle(&*session, ticket).await.unwrap();
    session.close().await;
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_in_the_middle_of_much_parking_loses_nothing() {
    cut_in_the_middle_of_parking(RabbitMq::HOLD_MAX).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_in_the_middle_of_much_renewing_loses_nothing() {
    cut_in_the_middle_of_parking(Duration::from_millis(1)).await;
}

/// Parks much, settles a third of it, gives back a third, and is cut off.
async fn cut_in_the_middle_of_parking(hold_max: Duration) {
    const COUNT: usize = 300;
    let vhost = vhost().await;
    let proxy = Proxy::start(vhost.node().address()).unwrap();
    let sender = open(&vhost.url()).await;
    let mut left = HashSet::new();
    for _ in 0..COUNT {
        left.insert(send(&*sender).await.id);
    }
    let session = open_with(rabbit(&vhost.url_through(proxy.address())).hold_max(hold_max)).await;
    let mut taker = take(&*session, 20).await;
    let mut parking = JoinSet::new();
    let mut held = Vec::new();
    let mut number = 0;
    let until_the_cut = async {
        while let Ok(deliveries) = taker.next(NonZeroUsize::new(20).unwrap()).await {
            for delivery in deliveries {
                let Message::Electron(electron) = delivery.message else { panic!("no electron") };
                let (session, id) = (Arc::clone(&session), electron.id);
                parking.spawn(async move { (id, session.park(delivery.ticket, electron).await) });
            }
            while let Some(Ok((id, parked))) = parking.try_join_next() {
                let Ok(ticket) = parked else { continue };
                number += 1;
                if number % 3 == 0 {
                    if settle(&*session, ticket).await.is_ok() {
                        left.remove(&id);
                    }
                } else if number % 3 == 1 {
                    held.push(ticket);
                }
                if number == COUNT / 2 {
                    proxy.refuse(true);
                    proxy.cut();
                }
            }
        }
    };
    soon(until_the_cut).await;
    drop((held, parking));
    let other = open(&vhost.url()).await;
    let mut taker = take(&*other, 20).await;
    while !left.is_empty() {
        let (electron, delivery) = next(&mut taker).await;
        settle(&*other, delivery.ticket).await.unwrap();
        left.remove(&electron.id);
    }
    other.close().await;
    sender.close().await;
    blocking(move || drop((vhost, proxy))).await;
}

/// Waits until the server has taken a delivery from who held it for too long.
pub(crate) async fn patience_ends(url: &str) {
    let session = open(url).await;
    let atom = AtomId::from_static("impatience");
    send_to(&*session, atom.clone()).await;
    let mut taker = soon(session.subscribe(Source::Atom(atom), NonZeroUsize::MIN)).await.unwrap();
    let held = next(&mut taker).await;
    let error = soon(taker.next(NonZeroUsize::MIN)).await.unwrap_err().to_string();
    assert!(error.contains("PRECONDITION_FAILED") || error.contains("ended"), "{error}");
    drop((held, taker));
    session.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_parked_is_renewed_before_the_server_loses_its_patience() {
    const COUNT: usize = 100;
    let broker = impatient().await;
    let url = broker.url("/");
    let session = open_with(rabbit(&url).hold_max(PATIENCE / 3)).await;
    let mut taker = take(&*session, 1).await;
    let mut parked = Vec::new();
    for _ in 0..COUNT {
        parked.push(park(&*session, &mut taker).await.1);
    }
    for _ in 0..3 {
        patience_ends(&url).await;
    }
    let dropped = parked.pop();
    let batch = parked.into_iter().map(|ticket| (ticket, Outcome::done(Vec::new())));
    for settled in soon(session.settle(batch.collect())).await {
        settled.expect("the ticket is good still");
    }
    drop(dropped);
    let (electron, delivery) = next(&mut taker).await;
    assert_eq!(electron.attempts, 1, "it was given back as it was changed");
    settle(&*session, delivery.ticket).await.unwrap();
    let last = send(&*session).await;
    let (electron, delivery) = next(&mut taker).await;
    assert_eq!(electron, last, "nothing came a second time, on a channel that was never closed");
    settle(&*session, delivery.ticket).await.unwrap();
    session.close().await;
    blocking(move || {
        let left = broker.ctl(&["-q", "list_queues", "name", "messages"]).unwrap();
        assert!(!left.contains(".lease."), "the lease queue was known to be empty: {left}");
        drop(broker);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_settled_or_given_back_while_it_is_renewed_is_so_once() {
    const COUNT: usize = 200;
    let vhost = Arc::new(vhost().await);
    // All that is parked is renewed all the time.
    let session = open_with(rabbit(&vhost.url()).hold_max(Duration::ZERO)).await;
    let mut taker = take(&*session, 1).await;
    let (mut left, mut held) = (HashSet::new(), Vec::new());
    for number in 0..COUNT {
        left.insert(send(&*session).await.id);
        // This one, or one that was given back.
        let (electron, delivery) = next(&mut taker).await;
        let id = electron.id;
        let ticket = soon(session.park(delivery.ticket, Arc::new(electron))).await.unwrap();
        match number % 3 {
            0 => held.push((id, ticket)),
            1 => drop(ticket),
            _ => {
                settle(&*session, ticket).await.unwrap();
                assert!(left.remove(&id), "it came once");
            }
        }
    }
    for (id, ticket) in held {
        settle(&*session, ticket).await.unwrap();
        assert!(left.remove(&id), "it came once");
    }
    while !left.is_empty() {
        let (electron, delivery) = next(&mut taker).await;
        assert!(left.remove(&electron.id), "it came once");
        settle(&*session, delivery.ticket).await.unwrap();
    }
    session.close().await;
    blocking(move || {
        assert_eq!(leases(&vhost), (Vec::new(), Vec::new()), "it was known to be empty");
        assert_eq!(vhost.queue_depth(QUEUE).unwrap(), Some(Depth::default()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_dropped_while_it_renews_loses_nothing() {
    const COUNT: usize = 100;
    let vhost = vhost().await;
    let session = open_with(rabbit(&vhost.url()).hold_max(Duration::ZERO)).await;
    let mut taker = take(&*session, 1).await;
    let mut left = HashSet::new();
    let mut held = Vec::new();
    for _ in 0..COUNT {
        let (electron, ticket) = park(&*session, &mut taker).await;
        left.insert(electron.id);
        held.push(ticket);
    }
    drop((session, taker));
    let other = open(&vhost.url()).await;
    let mut taker = take(&*other, 20).await;
    while !left.is_empty() {
        let (electron, delivery) = next(&mut taker).await;
        assert!(delivery.redeliveries > 0, "a redelivery is known as one");
        settle(&*other, delivery.ticket).await.unwrap();
        left.remove(&electron.id);
    }
    drop(held);
    other.close().await;
    blocking(move || drop(vhost)).await;
}

/// The first to park in a session makes the lease queue and its consumer. A consumer of which nobody knows would hold
/// what is parked from then on.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_parks_on_when_its_first_parking_was_dropped_at_any_moment() {
    const MOMENTS: u32 = 60;
    let vhost = vhost().await;
    let mut parked = 0;
    for moment in 0..MOMENTS {
        let session = open(&vhost.url()).await;
        let mut taker = take(&*session, 1).await;
        send(&*session).await;
        let (electron, delivery) = next(&mut taker).await;
        let spent = Duration::from_micros(250) * moment;
        let parking = session.park(delivery.ticket, Arc::new(electron));
        if let Ok(ticket) = timeout(spent, parking).await {
            parked += 1;
            drop(ticket);
        }
        for _ in 0..2 {
            let (electron, delivery) = next(&mut taker).await;
            let parking = session.park(delivery.ticket, Arc::new(electron));
            // Far sooner than a parking that waits in vain gives up.
            let ticket = timeout(Duration::from_secs(15), parking).await;
            drop(ticket.expect("its copy arrives").unwrap());
        }
        let (_, delivery) = next(&mut taker).await;
        settle(&*session, delivery.ticket).await.unwrap();
        session.close().await;
    }
    assert!(parked < MOMENTS, "some were dropped");
    blocking(move || drop(vhost)).await;
}
