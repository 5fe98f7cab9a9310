//! Dead letters: what is done with them, and that none is lost or doubled by it.

use std::{
    collections::{BTreeMap, HashSet},
    num::{NonZeroU32, NonZeroUsize},
    time::{Duration, Instant},
};

use atomizer::{
    Address, AtomId, CauseKey, Conductor, DeadLetter, Electron, ElectronId, Envelope, EventKind,
    Failure, FailureKind, LetterId, Message, NodeId, Payload, Reason, prelude::*,
};
use atomizer_rabbitmq::{
    Clearing, DeadLettersError, Listing, Progress, RabbitMq, Requeue, Selection,
};
use atomizer_test_support::Proxy;
use futures::{StreamExt, future::join_all};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{
        BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, BasicRejectOptions,
        ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};

use crate::support::{Double, blocking, rabbit, serve, soon, until, vhost};

const DOUBLE: AtomId = AtomId::from_static("double");
const HALVE: AtomId = AtomId::from_static("halve");

/// A channel of another program, which waits for confirms.
async fn channel(url: &str) -> (Connection, Channel) {
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    (connection, channel)
}

fn dead_letter(atom: &AtomId, number: u64, message: &str) -> Electron {
    let mut electron = Electron::new(atom.clone(), Payload::json(number.to_string()));
    electron.attempts = 1;
    electron.history.push(Failure::new(FailureKind::Error, message));
    electron
}

/// Buries electrons, and returns their ids in order.
async fn bury(conductor: &RabbitMq, electrons: Vec<Electron>) -> Vec<ElectronId> {
    let session = conductor.open(&NodeId::unique("undertaker").unwrap()).await.unwrap();
    let ids = electrons.iter().map(|electron| electron.id).collect();
    let envelopes: Vec<_> = electrons
        .into_iter()
        .map(|electron| Envelope::new(Address::DeadLetter(electron.atom.clone()), electron.into()))
        .collect();
    for sent in session.send(&envelopes).await {
        sent.unwrap();
    }
    session.close().await;
    ids
}

/// Buries so many that died alike.
async fn bury_many(conductor: &RabbitMq, many: u64) -> Vec<ElectronId> {
    let electrons = (0..many).map(|number| dead_letter(&DOUBLE, number, &format!("no {number}")));
    bury(conductor, electrons.collect()).await
}

async fn all(mut listing: Listing) -> Vec<DeadLetter> {
    let mut letters = Vec::new();
    while let Some(letter) = soon(listing.next()).await {
        letters.push(letter.unwrap());
    }
    letters
}

fn ids(letters: &[DeadLetter]) -> Vec<LetterId> {
    letters.iter().map(|letter| letter.id).collect()
}

/// Says where two lists differ first: they are long.
fn assert_same(these: &[LetterId], those: &[LetterId], when: &str) {
    assert_eq!(these.len(), those.len(), "{when}");
    let differs = these.iter().zip(those).position(|(this, that)| this != that);
    assert_eq!(differs, None, "{when}");
}

fn assert_each_once(arrived: &BTreeMap<String, u32>, ids: &[ElectronId]) {
    let expected: BTreeMap<_, _> = ids.iter().map(|id| (id.to_string(), 1)).collect();
    let twice = arrived.values().filter(|count| **count > 1).count();
    assert_eq!((arrived.len(), twice), (expected.len(), 0), "how many, and how many twice");
    assert!(*arrived == expected, "other ids");
}

fn letter_ids(ids: &[ElectronId]) -> Vec<LetterId> {
    ids.iter().copied().map(LetterId::from).collect()
}

/// Takes everything out of the queue of an atom, and counts it by id.
async fn arrived(url: &str, atom: &AtomId) -> BTreeMap<String, u32> {
    let (connection, channel) = channel(url).await;
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let queue = format!("atomizer.atom.{atom}");
    let ready = ready(&channel, &queue).await;
    let consuming =
        channel.basic_consume(queue.as_str().into(), "all".into(), options, FieldTable::default());
    let mut consumer = consuming.await.unwrap();
    let mut counts = BTreeMap::new();
    for _ in 0..ready {
        let delivery = soon(consumer.next()).await.unwrap().unwrap();
        let id = delivery.properties.message_id().as_ref().unwrap().to_string();
        *counts.entry(id).or_default() += 1;
    }
    connection.close(200, "done".into()).await.unwrap();
    counts
}

async fn ready(channel: &Channel, queue: &str) -> u64 {
    let options = QueueDeclareOptions { passive: true, ..Default::default() };
    let declaring = channel.queue_declare(queue.into(), options, FieldTable::default());
    soon(declaring).await.unwrap().message_count().into()
}

fn fast() -> Requeue {
    Requeue::default()
}

fn per_second(electrons: u32) -> Requeue {
    fast().rate(NonZeroU32::new(electrons).unwrap(), Duration::from_secs(1))
}

async fn finish(clearing: Clearing) -> Progress {
    soon(clearing.finish()).await.unwrap()
}

/// Declares the queue of dead letters as some operator might, before any node does.
async fn declare_by_hand(url: &str, queue: &str, arguments: &[(&str, AMQPValue)]) {
    let (connection, channel) = channel(url).await;
    let mut table = FieldTable::default();
    table.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.into(), options, table).await.unwrap();
    connection.close(200, "done".into()).await.unwrap();
}

async fn publish(channel: &Channel, key: &str, body: &str, properties: BasicProperties) {
    let (exchange, options) = ("atomizer".into(), BasicPublishOptions::default());
    let publishing =
        channel.basic_publish(exchange, key.into(), options, body.as_bytes(), properties);
    publishing.await.unwrap().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_without_dead_letters_has_none() {
    let vhost = vhost().await;
    let dead = rabbit(&vhost.url()).dead_letters();
    assert_eq!(all(dead.list(Selection::all())).await.len(), 0, "no queue");
    assert_eq!(soon(dead.census()).await.unwrap().ready, 0);
    assert_eq!(finish(dead.purge(Selection::all())).await.done, 0);
    serve(&vhost.url()).await.drain().await.unwrap();
    assert_eq!(all(dead.list(Selection::all())).await.len(), 0, "an empty queue");
    assert_eq!(finish(dead.requeue(Selection::all(), fast())).await.done, 0);
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listing_thirty_times_loses_nothing() {
    let vhost = vhost().await;
    let conductor = rabbit(&vhost.url());
    let limit = ("x-delivery-limit", AMQPValue::LongLongInt(20));
    declare_by_hand(&vhost.url(), "atomizer.dead", &[limit]).await;
    // A node refuses a queue that is not as it should be, so these come from elsewhere.
    let (connection, channel) = channel(&vhost.url()).await;
    let mut buried = Vec::new();
    let mut confirms = Vec::new();
    for number in 0..300 {
        let id = ElectronId::new();
        buried.push(LetterId::from(id));
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_message_id(id.to_string().into())
            .with_app_id("some other program".into());
        let key = "atomizer.dead".into();
        let body = format!("{number}").into_bytes();
        let options = BasicPublishOptions::default();
        let publishing = channel.basic_publish("".into(), key, options, &body, properties);
        confirms.push(publishing.await.unwrap());
    }
    for confirm in confirms {
        assert!(confirm.await.unwrap().is_ack());
    }
    connection.close(200, "done".into()).await.unwrap();
    let dead = conductor.dead_letters();
    // Those that are written anew come at the end.
    let mut expected = buried.clone();
    expected.sort();
    for round in 0..30 {
        let mut listed = ids(&all(dead.list(Selection::all())).await);
        listed.sort();
        assert_same(&listed, &expected, &format!("in round {round}"));
    }
    // Half a listing uses up as much.
    for _ in 0..30 {
        let mut listing = dead.list(Selection::all());
        soon(listing.next()).await.unwrap().unwrap();
        soon(listing.close()).await;
    }
    let listed = all(dead.list_whole(Selection::all())).await;
    let all_listed: HashSet<_> = ids(&listed).into_iter().collect();
    assert_eq!((listed.len(), all_listed.len()), (300, 300));
    for letter in listed {
        let Some(Message::Unreadable(unreadable)) = letter.message else {
            panic!("it has no atom")
        };
        let body = &unreadable.wire.body;
        let number: usize = String::from_utf8_lossy(body).parse().unwrap();
        assert_eq!(buried[number], letter.id, "each has its own payload still");
    }
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_buries_is_shown_with_payload_and_history() {
    let vhost = vhost().await;
    let atomizer = serve(&vhost.url()).await;
    let policy = Policy::retry(2).backoff(Backoff::none());
    let call = atomizer.call::<Double>(u64::MAX).policy(policy);
    soon(call.into_future()).await.unwrap_err();
    let dead = rabbit(&vhost.url()).dead_letters();
    let listed = all(dead.list(Selection::all())).await;
    let [summary] = &listed[..] else { panic!("one letter: {listed:?}") };
    assert!(summary.message.is_none());
    let letter = soon(dead.show(summary.id)).await.unwrap().unwrap();
    assert_eq!(letter.reason, Reason::Failed(FailureKind::Error));
    assert_eq!((letter.detail.as_str(), letter.attempts), ("too large to double", 3));
    assert_eq!(letter.cause().to_string(), "double: error: too large to double");
    let attempts: Vec<_> = letter.history.iter().map(|failure| failure.attempt).collect();
    assert_eq!(attempts, [1, 2, 3]);
    let node = atomizer.node();
    assert!(letter.history.iter().all(|failure| failure.node.as_ref() == Some(node)));
    assert!(letter.died_at.unwrap().elapsed().unwrap() < Duration::from_secs(90));
    let Some(Message::Electron(electron)) = letter.message else { panic!("an electron") };
    assert_eq!(electron.payload.body, u64::MAX.to_string().as_bytes());
    assert!(soon(dead.show(ElectronId::new().into())).await.unwrap().is_none());
    atomizer.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_brokers_own_letters_and_unreadable_ones_are_shown_with_their_reason() {
    let vhost = vhost().await;
    let atomizer = serve(&vhost.url()).await;
    let mut events = atomizer.events();
    let (_connection, channel) = channel(&vhost.url()).await;
    let positron = BasicProperties::default().with_type("positron".into());
    publish(&channel, "atom.double", "from the future", positron).await;
    until(&mut events, |kind| matches!(kind, EventKind::Unreadable { .. })).await;
    atomizer.drain().await.unwrap();
    // Nobody serves the atom now, and this one does not wait.
    let expiring = BasicProperties::default()
        .with_expiration("1".into())
        .with_reply_to("some.queue".into())
        .with_delivery_mode(2);
    publish(&channel, "atom.double", "21", expiring).await;
    // And this one comes back too often.
    let limited = [
        ("x-delivery-limit", AMQPValue::LongLongInt(1)),
        ("x-dead-letter-exchange", AMQPValue::LongString("atomizer".into())),
        ("x-dead-letter-routing-key", AMQPValue::LongString("dead".into())),
    ];
    declare_by_hand(&vhost.url(), "atomizer.atom.halve", &limited).await;
    let (queue, key) = ("atomizer.atom.halve".into(), "atom.halve".into());
    let (options, none) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind(queue, "atomizer".into(), key, options, none).await.unwrap();
    let (id, body) = (ElectronId::new(), b"42");
    let named = BasicProperties::default().with_message_id(id.to_string().into());
    let (key, options) = ("atomizer.atom.halve".into(), BasicPublishOptions::default());
    channel.basic_publish("".into(), key, options, body, named).await.unwrap();
    let dead = rabbit(&vhost.url()).dead_letters();
    let deadline = Instant::now() + Duration::from_secs(60);
    while soon(dead.census()).await.unwrap().ready < 3 {
        assert!(Instant::now() < deadline, "three letters");
        let queue = "atomizer.atom.halve".into();
        if let Some(got) = channel.basic_get(queue, BasicGetOptions::default()).await.unwrap() {
            let back = BasicRejectOptions { requeue: true };
            channel.basic_reject(got.delivery.delivery_tag, back).await.unwrap();
        }
    }
    // More often than it takes for letters to be written anew, which must not change what they say.
    for round in 0..12 {
        let listed = all(dead.list(Selection::all())).await;
        let mut said: Vec<_> = listed
            .iter()
            .map(|letter| (letter.cause().to_string(), letter.died_at.is_some()))
            .collect();
        said.sort();
        let expected = [
            ("double: expired in atomizer.atom.double".to_owned(), true),
            ("double: unreadable: unknown type \"positron\"".to_owned(), true),
            ("halve: delivery_limit in atomizer.atom.halve".to_owned(), true),
        ];
        assert_eq!(said, expected, "in round {round}");
    }
    // What can be sent back is; nobody told who asked for the first of them.
    let sent = finish(dead.requeue(Selection::all(), fast())).await;
    assert_eq!((sent.done, sent.refused, sent.kept), (2, 1, 0));
    let get = async |queue: &str| {
        channel.basic_get(queue.into(), BasicGetOptions::default()).await.unwrap().unwrap().delivery
    };
    let halve = get("atomizer.atom.halve").await;
    assert_eq!(halve.data, body);
    assert_eq!(halve.properties.message_id().as_ref().unwrap().as_str(), id.to_string());
    let double = get("atomizer.atom.double").await;
    assert_eq!(double.data, b"21");
    assert_eq!(double.properties.reply_to().as_ref().unwrap().as_str(), "some.queue");
    for delivery in [halve, double] {
        let headers = delivery.properties.headers().as_ref().unwrap().inner();
        assert!(headers.keys().all(|name| !name.as_str().contains("dead")), "{headers:?}");
        assert!(!headers.contains_key("x-death"), "{headers:?}");
    }
    blocking(move || drop(vhost)).await;
}

/// Sends all back at a rate, and stops in between: once by the handle, once by dropping it.
async fn sent_back_in_three_parts(many: u64, rate: u32) {
    let vhost = vhost().await;
    let conductor = rabbit(&vhost.url());
    let buried = bury_many(&conductor, many).await;
    let dead = conductor.dead_letters();
    let begun = Instant::now();
    let a_third = async |clearing: &mut Clearing| {
        while soon(clearing.next()).await.expect("it goes on").done < many / 3 {}
    };
    let mut first = dead.requeue(Selection::all(), per_second(rate));
    a_third(&mut first).await;
    first.stop();
    let first = finish(first).await;
    assert!(first.done < many && first.total == many, "{first:?}");
    let mut second = dead.requeue(Selection::all(), per_second(rate));
    a_third(&mut second).await;
    drop(second);
    // It finishes its window by itself, and gives back the rest: then it is seen again.
    let (connection, channel) = channel(&vhost.url()).await;
    while ready(&channel, "atomizer.atom.double").await < many {
        finish(dead.requeue(Selection::all(), per_second(rate))).await;
    }
    connection.close(200, "done".into()).await.unwrap();
    let least = Duration::from_secs(many) / rate;
    let took = begun.elapsed();
    assert!(took > least.mul_f64(0.9), "{took:?} is faster than allowed");
    println!("electrons={many} rate={rate} took_s={:.1}", took.as_secs_f64());
    assert_each_once(&arrived(&vhost.url(), &DOUBLE).await, &buried);
    assert_eq!(all(dead.list(Selection::all())).await.len(), 0);
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_back_at_a_rate_and_stopped_twice_arrives_once() {
    sent_back_in_three_parts(900, 300).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a while: run it by hand"]
async fn ten_thousand_that_are_sent_back_at_a_rate_and_stopped_twice_arrive_once() {
    sent_back_in_three_parts(10_000, 1_000).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: run it by hand"]
async fn how_long_ten_thousand_take() {
    let vhost = vhost().await;
    let conductor = rabbit(&vhost.url());
    let buried = bury_many(&conductor, 10_000).await;
    let dead = conductor.dead_letters();
    let per_second = |begun: Instant| 10_000.0 / begun.elapsed().as_secs_f64();
    for round in 0..10 {
        let begun = Instant::now();
        assert_eq!(all(dead.list(Selection::all())).await.len(), 10_000);
        println!("round={round} listed_per_s={:.0}", per_second(begun));
    }
    let (connection, channel) = channel(&vhost.url()).await;
    let begun = Instant::now();
    for _ in 0..10_000 {
        let getting = channel.basic_get("atomizer.dead".into(), BasicGetOptions::default());
        getting.await.unwrap().unwrap();
    }
    println!("got_one_by_one_per_s={:.0}", per_second(begun));
    connection.close(200, "done".into()).await.unwrap();
    let begun = Instant::now();
    while finish(dead.requeue(Selection::all(), fast())).await.done < 10_000 {}
    println!("sent_back_per_s={:.0}", per_second(begun));
    assert_each_once(&arrived(&vhost.url(), &DOUBLE).await, &buried);
    bury_many(&conductor, 10_000).await;
    let begun = Instant::now();
    assert_eq!(finish(dead.purge(Selection::all())).await.done, 10_000);
    println!("purged_per_s={:.0}", per_second(begun));
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_selected_stays_where_it_is() {
    let vhost = vhost().await;
    let conductor = rabbit(&vhost.url());
    let electrons = (0..400).map(|number| match number % 4 {
        0 => dead_letter(&HALVE, number, "odd"),
        1 => dead_letter(&DOUBLE, number, "account 7 is closed"),
        _ => dead_letter(&DOUBLE, number, &format!("{number} is too large")),
    });
    let buried = bury(&conductor, electrons.collect()).await;
    let dead = conductor.dead_letters();
    let every_fourth =
        |which: usize| -> Vec<_> { buried.iter().copied().skip(which).step_by(4).collect() };
    let letters = all(dead.list(Selection::all())).await;
    let mut causes: BTreeMap<CauseKey, (String, u32)> = BTreeMap::new();
    for cause in letters.iter().map(DeadLetter::cause) {
        causes.entry(cause.key()).or_insert_with(|| (cause.to_string(), 0)).1 += 1;
    }
    let count = |text: &str| causes.values().find(|(cause, _)| cause == text).unwrap().1;
    assert_eq!(count("halve: error: odd"), 100);
    assert_eq!(count("double: error: account # is closed"), 100);
    assert_eq!(count("double: error: # is too large"), 200);

    let closed = letters[1].cause().key();
    let selection = Selection::all().cause(closed);
    let listed = ids(&all(dead.list(selection.clone())).await);
    assert_same(&listed, &letter_ids(&every_fourth(1)), "those alone");
    let sent = finish(dead.requeue(selection, fast())).await;
    assert_eq!((sent.total, sent.done, sent.kept), (400, 100, 300));
    assert_each_once(&arrived(&vhost.url(), &DOUBLE).await, &every_fourth(1));

    let purged = finish(dead.purge(Selection::all().atom(HALVE))).await;
    assert_eq!((purged.done, purged.kept), (100, 200));
    let left: Vec<_> = (buried.iter().copied().enumerate())
        .filter(|(number, _)| number % 4 > 1)
        .map(|(_, id)| id)
        .collect();
    // The broker may line them up otherwise: while it removes letters it gathers what is given back.
    let (mut listed, mut expected) =
        (ids(&all(dead.list(Selection::all())).await), letter_ids(&left));
    listed.sort();
    expected.sort();
    assert_same(&listed, &expected, "those that are left");

    let one = finish(dead.purge(Selection::id(left[7]))).await;
    assert_eq!(one.done, 1);
    let listed = ids(&all(dead.list(Selection::all())).await);
    assert_eq!((listed.len(), listed.contains(&left[7].into())), (199, false));
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_back_has_all_its_attempts_and_dies_again_only_once() {
    let vhost = vhost().await;
    let conductor = rabbit(&vhost.url());
    let atomizer = serve(&vhost.url()).await;
    let policy = Policy::retry(2).backoff(Backoff::none());
    let calls = (0..50).map(|_| atomizer.call::<Double>(u64::MAX).policy(policy).into_future());
    let failed = soon(join_all(calls)).await;
    assert!(failed.iter().all(Result::is_err));
    let dead = conductor.dead_letters();
    let before = all(dead.list(Selection::all())).await;
    assert_eq!(before.len(), 50);
    // So slow that the first are dead again before the last are sent back.
    let sent = finish(dead.requeue(Selection::all(), per_second(100))).await;
    assert_eq!(sent.done, 50);
    let deadline = Instant::now() + Duration::from_secs(60);
    let after = loop {
        let after = all(dead.list(Selection::all())).await;
        if after.len() >= 50 {
            break after;
        }
        assert!(Instant::now() < deadline, "all die again");
    };
    let (mut before, mut again) = (ids(&before), ids(&after));
    before.sort();
    again.sort();
    assert_same(&before, &again, "under the same ids");
    for letter in &after {
        assert_eq!((letter.attempts, letter.history.len()), (3, 3), "all attempts anew");
    }
    // With another payload it succeeds.
    let mut events = atomizer.events();
    let edited = dead.requeue_edited(after[7].id, Payload::json("21"));
    assert_eq!(finish(edited).await.done, 1);
    let done = until(&mut events, |kind| matches!(kind, EventKind::Completed { .. })).await;
    let EventKind::Completed { electron, .. } = done else { panic!("{done}") };
    assert_eq!(LetterId::from(electron), after[7].id);
    assert_eq!(all(dead.list(Selection::all())).await.len(), 49);
    atomizer.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_operators_at_once_lose_and_double_nothing() {
    let vhost = vhost().await;
    let conductor = rabbit(&vhost.url());
    serve(&vhost.url()).await.drain().await.unwrap();
    let mut buried = bury_many(&conductor, 500).await;
    let dead = conductor.dead_letters();
    // One lists over and over, one more node buries, and two send back.
    let listing = async {
        for _ in 0..10 {
            let listed = ids(&all(dead.list(Selection::all())).await);
            let different: HashSet<_> = listed.iter().collect();
            assert_eq!(different.len(), listed.len(), "none twice in one list");
        }
    };
    let sending = async || finish(dead.requeue(Selection::all(), per_second(300))).await.done;
    let (more, _, _, ()) = tokio::join!(bury_many(&conductor, 500), sending(), sending(), listing);
    buried.extend(more);
    let (connection, channel) = channel(&vhost.url()).await;
    while ready(&channel, "atomizer.atom.double").await < 1_000 {
        finish(dead.requeue(Selection::all(), fast())).await;
    }
    connection.close(200, "done".into()).await.unwrap();
    assert_each_once(&arrived(&vhost.url(), &DOUBLE).await, &buried);
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_that_is_dropped_gives_everything_back() {
    let vhost = vhost().await;
    let conductor = rabbit(&vhost.url());
    let buried = letter_ids(&bury_many(&conductor, 600).await);
    let dead = conductor.dead_letters();
    let mut listing = dead.list(Selection::all());
    for id in &buried[..300] {
        assert_eq!(soon(listing.next()).await.unwrap().unwrap().id, *id);
    }
    assert!(soon(dead.census()).await.unwrap().ready <= 300, "it holds what it has seen");
    drop(listing);
    let given_back = async { while dead.census().await.unwrap().ready < 600 {} };
    soon(given_back).await;
    assert_same(&ids(&all(dead.list(Selection::all())).await), &buried, "in its old order");
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_lost_is_an_error_that_tells_how_far_it_came() {
    let vhost = vhost().await;
    let buried = bury_many(&rabbit(&vhost.url()), 500).await;
    let proxy = Proxy::start(vhost.node().address()).unwrap();
    let dead = rabbit(&vhost.url_through(proxy.address())).dead_letters();
    let window = NonZeroUsize::new(16).unwrap();
    let mut clearing = dead.requeue(Selection::all(), per_second(200).window(window));
    while soon(clearing.next()).await.unwrap().done < 100 {}
    let mut listing =
        rabbit(&vhost.url_through(proxy.address())).dead_letters().list(Selection::all());
    proxy.cut();
    let error = soon(clearing.finish()).await.unwrap_err();
    let DeadLettersError::Interrupted { progress, .. } = error else { panic!("{error:?}") };
    assert!((100..500).contains(&progress.done), "{progress:?}");
    // It may have had some already.
    while let Some(Ok(_)) = soon(listing.next()).await {}
    let dead = rabbit(&vhost.url()).dead_letters();
    let (connection, channel) = channel(&vhost.url()).await;
    let all_back = async {
        while ready(&channel, "atomizer.atom.double").await < 500
            || ready(&channel, "atomizer.dead").await > 0
        {
            finish(dead.requeue(Selection::all(), fast())).await;
        }
    };
    soon(all_back).await;
    connection.close(200, "done".into()).await.unwrap();
    let arrived = arrived(&vhost.url(), &DOUBLE).await;
    assert_eq!(arrived.len(), buried.len(), "none is lost");
    let twice = arrived.values().filter(|count| **count > 1).count();
    assert!(twice <= window.get() && arrived.values().all(|count| *count < 3), "{twice} twice");
    // A broker that cannot be reached is an error, too.
    proxy.refuse(true);
    let dead = rabbit(&vhost.url_through(proxy.address())).dead_letters();
    let error = soon(dead.list(Selection::all()).next()).await.unwrap().unwrap_err();
    assert!(matches!(error, DeadLettersError::Open(_)), "{error:?}");
    blocking(move || drop((vhost, proxy))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_sent_back_stays_and_is_counted() {
    let vhost = vhost().await;
    let conductor = rabbit(&vhost.url()).payload_bytes_max(100);
    let buried = bury_many(&conductor, 3).await;
    let dead = conductor.dead_letters();
    let long = Payload::json("1".repeat(101));
    let refused = finish(dead.requeue_edited(buried[1].into(), long)).await;
    assert_eq!((refused.done, refused.refused), (0, 1));
    assert_eq!(ids(&all(dead.list(Selection::all())).await), letter_ids(&buried));
    blocking(move || drop(vhost)).await;
}
