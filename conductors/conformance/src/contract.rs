//! The rules, one function each. [`conformance_tests!`](crate::conformance_tests) calls them all.

#![expect(clippy::missing_panics_doc, reason = "a rule that is broken panics: these are tests")]

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use atomizer::{
    Address, Cancel, Delivery, Electron, ElectronId, Envelope, Extra, Failure, FailureKind,
    Message, Outcome, Parent, Payload, Properties, ReplyTo, ResultsId, SendError, SettleError,
    Ticket,
};

use crate::{
    World,
    node::{ATOM, Node, Taker, answer, electron, electron_of, soon},
};

/// Everything in an electron arrives, headers that nobody knows included.
pub async fn what_is_sent_arrives_as_it_was(world: &impl World) {
    let node = Node::new(world, "node").await;
    let mut sent = electron("body \u{0} ü");
    sent.correlation_id = Some("mine".into());
    sent.reply_to = Some(ReplyTo::new("somewhere"));
    sent.sender = Some(node.id.clone());
    sent.parent = Some(Parent::new(sent.id, u64::MAX));
    sent.attempts = 3;
    sent.time_limit = Some(Duration::from_millis(1500));
    sent.history = vec![Failure::new(FailureKind::Panic, "ouch \"ü\"")];
    sent.extra = Extra::from([
        ("traceparent".into(), "00-1-2-03".into()),
        ("unknown-number".into(), 7.into()),
        ("unknown-list".into(), vec!["a", "b"].into()),
    ]);
    node.send(sent.clone()).await.expect("the electron is safe");
    let (received, delivery) = node.take(1).await.electron().await;
    assert_eq!(*received, sent);
    assert_eq!(delivery.redeliveries, 0);
}

/// An electron is safe before any node has its atom.
pub async fn an_electron_waits_for_its_first_subscriber(world: &impl World) {
    let sender = Node::new(world, "sender").await;
    let id = sender.send_text("early").await;
    sender.close().await;
    let node = Node::new(world, "node").await;
    assert_eq!(node.take(1).await.electron().await.0.id, id);
}

/// Settled is settled, for every later session.
pub async fn what_is_settled_does_not_come_again(world: &impl World) {
    let node = Node::new(world, "node").await;
    node.send_text("settled").await;
    let delivery = node.take(1).await.one().await;
    node.settle(delivery.ticket, Vec::new()).await.expect("it is settled");
    node.close().await;
    only_comes_what_is_sent_now(world).await;
}

/// A marker sent now is all that is left.
async fn only_comes_what_is_sent_now(world: &impl World) {
    let node = Node::new(world, "later").await;
    let marker = node.send_text("marker").await;
    assert_eq!(node.take(1).await.electron().await.0.id, marker);
}

/// A ticket that is dropped gives its delivery back.
pub async fn a_dropped_ticket_releases(world: &impl World) {
    let node = Node::new(world, "node").await;
    let id = node.send_text("again").await;
    let mut taker = node.take(1).await;
    let (_, delivery) = taker.electron().await;
    drop(delivery);
    let (electron, delivery) = taker.electron().await;
    assert_eq!(electron.id, id);
    assert!(delivery.redeliveries > 0, "a redelivery is known as one");
}

/// A release changes nothing but the count of deliveries.
pub async fn a_release_leaves_the_electron_as_it_was(world: &impl World) {
    let node = Node::new(world, "node").await;
    let mut taker = node.take(1).await;
    node.send_text("again").await;
    let (before, delivery) = taker.electron().await;
    node.settle_with(delivery.ticket, Outcome::release()).await.expect("it is released");
    let (after, _) = taker.electron().await;
    assert_eq!(after, before);
}

/// No more is out than the window says; settling makes room.
pub async fn the_window_bounds_what_is_out(world: &impl World) {
    const WINDOW: usize = 3;
    let node = Node::new(world, "node").await;
    for number in 0..10 {
        node.send_text(&number.to_string()).await;
    }
    let mut taker = node.take(WINDOW).await;
    let mut out: Vec<Ticket> = Vec::new();
    let mut seen = 0;
    while seen < 10 {
        // With the window full nothing more would come, so room is made first.
        if out.len() == WINDOW {
            node.settle(out.remove(0), Vec::new()).await.expect("it is settled");
        }
        let deliveries = taker.up_to(10).await;
        seen += deliveries.len();
        out.extend(deliveries.into_iter().map(|delivery| delivery.ticket));
        assert!(out.len() <= WINDOW, "{} are out, the window is {WINDOW}", out.len());
    }
}

/// What a settlement emits reaches the inbox of the one who asked.
pub async fn an_answer_reaches_who_asked(world: &impl World) {
    let (asker, worker) = (Node::new(world, "asker").await, Node::new(world, "worker").await);
    let mut inbox = asker.inbox().await;
    let mut asked = electron("question");
    asked.reply_to = Some(asker.session.reply_to());
    let id = asked.id;
    asker.send(asked).await.expect("the electron is safe");
    let (question, delivery) = worker.take(1).await.electron().await;
    let reply_to = question.reply_to.clone().expect("an answer is asked for");
    let payload = Payload::json("42");
    let properties = Properties::new(&question, worker.id.clone(), Ok(payload.clone()));
    let answer = Envelope::new(Address::Reply(reply_to), properties.into());
    worker.settle(delivery.ticket, vec![answer]).await.expect("it is settled");
    let (answer, ticket) = inbox.answer().await;
    assert_eq!((answer.electron, &answer.node, &answer.outcome), (id, &worker.id, &Ok(payload)));
    asker.settle(ticket, Vec::new()).await.expect("it is settled");
}

/// An asker that is gone for good is `Unroutable`, and another outcome can be chosen.
pub async fn an_answer_that_nobody_can_receive_gives_the_ticket_back(world: &impl World) {
    let node = Node::new(world, "node").await;
    node.send_text("question").await;
    let (question, delivery) = node.take(1).await.electron().await;
    let gone = answer(&question, &node.id, &ReplyTo::new("nobody.is.here"));
    let ticket = not_safe(node.settle(delivery.ticket, vec![gone]).await, |error| {
        matches!(error, SendError::Unroutable(_))
    });
    node.settle(ticket, Vec::new()).await.expect("it is settled after all");
    node.close().await;
    only_comes_what_is_sent_now(world).await;
}

/// Takes the ticket out of a settlement that was not safe, for one reason.
fn not_safe(settled: Result<(), SettleError>, expected: impl Fn(&SendError) -> bool) -> Ticket {
    match settled {
        Err(SettleError::NotSafe { ticket, failed }) => {
            assert_eq!(failed.len(), 1, "{failed:?}");
            assert!(expected(&failed[0].1), "{failed:?}");
            ticket
        }
        other => panic!("expected the ticket back, not {other:?}"),
    }
}

/// Sending to nobody is an error, not a loss.
pub async fn an_unroutable_send_is_an_error(world: &impl World) {
    let node = Node::new(world, "node").await;
    let to = Address::Reply(ReplyTo::new("nobody.is.here"));
    let sent = node.post(to, electron("lost?").into()).await;
    assert!(matches!(sent, Err(SendError::Unroutable(_))), "{sent:?}");
}

/// A payload as large as the limit arrives byte for byte.
pub async fn the_largest_payload_gets_through(world: &impl World) {
    let node = Node::new(world, "node").await;
    let bytes = node.session.limits().payload_bytes_max;
    let mut large = electron("");
    large.payload = payload(bytes);
    let expected = large.payload.clone();
    node.send(large).await.expect("the electron is safe");
    let (received, delivery) = node.take(1).await.electron().await;
    assert!(received.payload == expected, "{} of {bytes} bytes", received.payload.body.len());
    node.settle(delivery.ticket, Vec::new()).await.expect("it is settled");
}

/// Bytes in a pattern that shows what is swapped or missing.
fn payload(bytes: usize) -> Payload {
    Payload::bytes((0..bytes).map(|at| (at % 251) as u8).collect::<Vec<_>>())
}

/// One byte more is refused before it is sent, and harms nothing.
pub async fn a_payload_over_the_limit_is_refused(world: &impl World) {
    let node = Node::new(world, "node").await;
    let bytes_max = node.session.limits().payload_bytes_max;
    let mut large = electron("");
    large.payload = payload(bytes_max + 1);
    let sent = node.send(large).await;
    assert_eq!(sent, Err(SendError::TooLarge { bytes: bytes_max + 1, bytes_max }));
    let next = node.send_text("next").await;
    assert_eq!(node.take(1).await.electron().await.0.id, next);
}

/// An answer that is too large can be replaced by one that says so.
pub async fn an_answer_over_the_limit_gives_the_ticket_back(world: &impl World) {
    let node = Node::new(world, "node").await;
    let mut inbox = node.inbox().await;
    node.send_text("question").await;
    let (question, delivery) = node.take(1).await.electron().await;
    let large = payload(node.session.limits().payload_bytes_max + 1);
    let to = Address::Reply(node.session.reply_to());
    let properties = Properties::new(&question, node.id.clone(), Ok(large));
    let envelope = Envelope::new(to, properties.into());
    let ticket = not_safe(node.settle(delivery.ticket, vec![envelope]).await, |error| {
        matches!(error, SendError::TooLarge { .. })
    });
    let smaller = answer(&question, &node.id, &node.session.reply_to());
    node.settle(ticket, vec![smaller]).await.expect("it is settled after all");
    assert_eq!(inbox.answer().await.0.electron, question.id);
}

/// A ticket of one session is stale in another, and its delivery goes back.
pub async fn a_ticket_is_good_for_its_session_only(world: &impl World) {
    let (one, other) = (Node::new(world, "one").await, Node::new(world, "other").await);
    let id = one.send_text("mine").await;
    let mut taker = one.take(1).await;
    let (_, delivery) = taker.electron().await;
    let settled = other.settle(delivery.ticket, Vec::new()).await;
    assert!(matches!(settled, Err(SettleError::Stale)), "{settled:?}");
    assert_eq!(taker.electron().await.0.id, id, "it was not removed");
}

/// A fault ends the session and says so; what was out comes again, and its tickets are of no use.
pub async fn a_lost_session_loses_nothing(world: &impl World) {
    let node = Node::new(world, "node").await;
    let mut taker = node.take(4).await;
    let mut sent = HashSet::new();
    for number in 0..4 {
        sent.insert(node.send_text(&number.to_string()).await);
    }
    let (_, delivery) = taker.electron().await;
    world.cut().await;
    soon("the end of the session", node.session.ended()).await;
    let next = async { while taker.0.next(std::num::NonZeroUsize::MIN).await.is_ok() {} };
    soon("the end of the subscription", next).await;
    let settled = node.settle(delivery.ticket, Vec::new()).await;
    assert!(settled.is_err(), "nothing can be settled any more");
    let again = Node::again(world, &node.id).await;
    let mut taker = again.take(4).await;
    for _ in 0..sent.len() {
        let (electron, delivery) = taker.electron().await;
        assert!(sent.contains(&electron.id));
        again.settle(delivery.ticket, Vec::new()).await.expect("it is settled");
        sent.remove(&electron.id);
    }
    assert!(sent.is_empty(), "{sent:?} did not come again");
}

/// Whatever is out when a session closes is delivered to others.
pub async fn a_closed_session_gives_everything_back(world: &impl World) {
    let (one, other) = (Node::new(world, "one").await, Node::new(world, "other").await);
    let mut sent = HashSet::new();
    for number in 0..5 {
        sent.insert(one.send_text(&number.to_string()).await);
    }
    let mut taker = one.take(5).await;
    let held = (taker.electron().await, taker.electron().await);
    one.close().await;
    drop(held);
    let mut taker = other.take(5).await;
    while !sent.is_empty() {
        let (electron, delivery) = taker.electron().await;
        sent.remove(&electron.id);
        other.settle(delivery.ticket, Vec::new()).await.expect("it is settled");
    }
}

/// Closing while everything else is under way ends it all with errors, and never hangs.
pub async fn a_session_can_be_closed_during_everything(world: &impl World) {
    let node = Node::new(world, "node").await;
    let mut taker = node.take(1).await;
    let mut inbox = node.inbox().await;
    node.send_text("held").await;
    let (_, held) = taker.electron().await;
    let session = Arc::clone(&node.session);
    let envelope = Envelope::new(Address::Atom(ATOM), electron("on its way").into());
    let envelopes = [envelope];
    let all = async {
        tokio::join!(
            taker.0.next(std::num::NonZeroUsize::MIN),
            inbox.0.next(std::num::NonZeroUsize::MIN),
            session.send(&envelopes),
            session.settle(vec![(held.ticket, Outcome::done(Vec::new()))]),
            session.ended(),
            session.close(),
        )
    };
    // Whether the send and the settlement were in time is not said; that they end is.
    let (taken, answered, _, _, _, ()) = soon("the end of everything", all).await;
    assert!(answered.is_err(), "there was no answer");
    drop(taken);
    let (sent, settled) = tokio::join!(session.send(&envelopes), session.settle(Vec::new()));
    assert!(sent[0].is_err() && settled.is_empty());
    node.close().await;
}

/// A node that opens again finds the answers that came while it was away.
pub async fn answers_wait_for_a_node_that_comes_back(world: &impl World) {
    let asker = Node::new(world, "asker").await;
    let reply_to = asker.session.reply_to();
    let mut asked = electron("question");
    asked.reply_to = Some(reply_to.clone());
    let id = asked.id;
    asker.send(asked).await.expect("the electron is safe");
    world.cut().await;
    soon("the end of the session", asker.session.ended()).await;
    let worker = Node::new(world, "worker").await;
    let (question, delivery) = worker.take(1).await.electron().await;
    let answer = answer(&question, &worker.id, &reply_to);
    worker.settle(delivery.ticket, vec![answer]).await.expect("the answer is safe");
    let asker = Node::again(world, &asker.id).await;
    assert_eq!(asker.session.reply_to(), reply_to, "the address is the same for each session");
    assert_eq!(asker.inbox().await.answer().await.0.electron, id);
}

/// Each electron goes to one subscriber only.
pub async fn subscribers_share(world: &impl World) {
    const COUNT: usize = 40;
    let (one, other) = (Node::new(world, "one").await, Node::new(world, "other").await);
    let (mut left, mut right) = (one.take(1).await, other.take(1).await);
    let mut seen = HashSet::new();
    for number in 0..COUNT {
        one.send_text(&number.to_string()).await;
    }
    while seen.len() < COUNT {
        let next = async {
            tokio::select! {
                delivery = left.one() => (&one, delivery),
                delivery = right.one() => (&other, delivery),
            }
        };
        let (node, delivery) = next.await;
        assert!(seen.insert(electron_of(&delivery).id), "it came twice");
        node.settle(delivery.ticket, Vec::new()).await.expect("it is settled");
    }
}

/// After a stop the rest goes to others, and what was handed out can still be settled.
pub async fn a_stopped_subscription_keeps_its_tickets(world: &impl World) {
    let stop = async |mut taker: Taker| {
        soon("stopping", taker.0.stop()).await;
        Some(taker)
    };
    only_what_was_handed_out_is_kept(world, stop).await;
}

/// So it does when nobody takes the time to stop it.
pub async fn a_dropped_subscription_keeps_its_tickets(world: &impl World) {
    let dropped = async |taker| {
        drop(taker);
        None
    };
    only_what_was_handed_out_is_kept(world, dropped).await;
}

async fn only_what_was_handed_out_is_kept(
    world: &impl World,
    end: impl AsyncFnOnce(Taker) -> Option<Taker>,
) {
    let (one, other) = (Node::new(world, "one").await, Node::new(world, "other").await);
    let mut sent = HashSet::new();
    for number in 0..6 {
        sent.insert(one.send_text(&number.to_string()).await);
    }
    let mut taker = one.take(4).await;
    let (kept, delivery) = taker.electron().await;
    let _ended = end(taker).await;
    sent.remove(&kept.id);
    let mut rest = other.take(6).await;
    while !sent.is_empty() {
        let (electron, delivery) = rest.electron().await;
        assert!(sent.remove(&electron.id), "{} was kept or came twice", electron.id);
        other.settle(delivery.ticket, Vec::new()).await.expect("it is settled");
    }
    one.settle(delivery.ticket, Vec::new()).await.expect("the ticket is still good");
}

/// Settling hands the tickets over before it waits: dropping the future undoes nothing.
pub async fn a_dropped_settlement_is_carried_out(world: &impl World) {
    let node = Node::new(world, "node").await;
    let mut inbox = node.inbox().await;
    node.send_text("question").await;
    let mut taker = node.take(1).await;
    let (question, delivery) = taker.electron().await;
    let emit = vec![answer(&question, &node.id, &node.session.reply_to())];
    let mut settling = node.session.settle(vec![(delivery.ticket, Outcome::done(emit))]);
    let polled_once =
        std::future::poll_fn(|cx| std::task::Poll::Ready(settling.as_mut().poll(cx).is_ready()));
    polled_once.await;
    drop(settling);
    assert_eq!(inbox.answer().await.0.electron, question.id);
    let next = node.send_text("next").await;
    assert_eq!(taker.electron().await.0.id, next, "the first was removed, and made room");
}

/// Each result is about the settlement in the same place.
pub async fn results_stand_in_the_order_of_the_batch(world: &impl World) {
    let node = Node::new(world, "node").await;
    for number in 0..3 {
        node.send_text(&number.to_string()).await;
    }
    let mut taker = node.take(3).await;
    let mut batch = Vec::new();
    for number in 0..3 {
        let (question, delivery) = taker.electron().await;
        let gone = answer(&question, &node.id, &ReplyTo::new("nobody.is.here"));
        let emit = if number == 1 { vec![gone] } else { Vec::new() };
        batch.push((delivery.ticket, Outcome::done(emit)));
    }
    let results = soon("settling", node.session.settle(batch)).await;
    let ok: Vec<_> = results.iter().map(Result::is_ok).collect();
    assert_eq!(ok, [true, false, true], "{results:?}");
}

/// Dead letters are always taken, electrons and what cannot be read alike.
pub async fn a_dead_letter_is_taken(world: &impl World) {
    let node = Node::new(world, "node").await;
    let id = node.send_text("dying").await;
    let (electron, delivery) = node.take(1).await.electron().await;
    assert_eq!(electron.id, id);
    let dead = Envelope::new(Address::DeadLetter(ATOM), Message::Electron(electron));
    node.settle(delivery.ticket, vec![dead]).await.expect("the dead letter is safe");
    node.close().await;
    only_comes_what_is_sent_now(world).await;
}

/// Many at once, in batches: each comes, and each once.
pub async fn many_electrons_come_once_each(world: &impl World) {
    const COUNT: usize = 1000;
    let node = Node::new(world, "node").await;
    let electrons: Vec<_> = (0..COUNT).map(|number| electron(&number.to_string())).collect();
    let mut expected: HashSet<_> = electrons.iter().map(|electron| electron.id).collect();
    let envelopes: Vec<_> = (electrons.into_iter())
        .map(|electron| Envelope::new(Address::Atom(ATOM), electron.into()))
        .collect();
    for sent in soon("sending", node.session.send(&envelopes)).await {
        sent.expect("the electron is safe");
    }
    let mut taker = node.take(64).await;
    while !expected.is_empty() {
        let mut batch = Vec::new();
        for delivery in taker.up_to(64).await {
            assert!(expected.remove(&electron_of(&delivery).id), "it came twice");
            batch.push((delivery.ticket, Outcome::done(Vec::new())));
        }
        for settled in soon("settling", node.session.settle(batch)).await {
            settled.expect("it is settled");
        }
    }
}

/// Parking holds an electron as it was changed, time and again; once settled it does not come again.
pub async fn a_parked_electron_can_be_settled(world: &impl World) {
    let node = Node::new(world, "node").await;
    let mut inbox = node.inbox().await;
    node.send_text("parked").await;
    let (_, delivery) = node.take(1).await.electron().await;
    let (changed, ticket) = node.park(delivery).await;
    let ticket = node.try_park(ticket, Arc::clone(&changed)).await.expect("it is parked again");
    let gone = answer(&changed, &node.id, &ReplyTo::new("nobody.is.here"));
    let ticket = not_safe(node.settle(ticket, vec![gone]).await, |error| {
        matches!(error, SendError::Unroutable(_))
    });
    let answer = answer(&changed, &node.id, &node.session.reply_to());
    node.settle(ticket, vec![answer]).await.expect("it is settled after all");
    let (answer, ticket) = inbox.answer().await;
    assert_eq!(answer.electron, changed.id);
    node.settle(ticket, Vec::new()).await.expect("it is settled");
    node.close().await;
    only_comes_what_is_sent_now(world).await;
}

/// A parked electron that is given back goes to its queue as it was changed, and was delivered before.
pub async fn a_parked_electron_is_given_back_changed(world: &impl World) {
    let node = Node::new(world, "node").await;
    let mut taker = node.take(1).await;
    node.send_text("dropped").await;
    let (changed, ticket) = node.park(taker.one().await).await;
    drop(ticket);
    let (electron, delivery) = taker.electron().await;
    assert_eq!(electron, changed);
    assert!(delivery.redeliveries > 0, "a redelivery is known as one");
    let (changed, ticket) = node.park(delivery).await;
    node.settle_with(ticket, Outcome::release()).await.expect("it is released");
    let (electron, delivery) = taker.electron().await;
    assert_eq!(electron, changed);
    assert!(delivery.redeliveries > 0, "a redelivery is known as one");
}

/// What is parked when its session is lost comes again, changed.
pub async fn a_lost_session_loses_nothing_that_is_parked(world: &impl World) {
    let node = Node::new(world, "node").await;
    let mut taker = node.take(1).await;
    let mut parked = Vec::new();
    for number in 0..3 {
        node.send_text(&number.to_string()).await;
        parked.push(node.park(taker.one().await).await);
    }
    world.cut().await;
    soon("the end of the session", node.session.ended()).await;
    let (parked, tickets): (Vec<_>, Vec<_>) = parked.into_iter().unzip();
    for ticket in tickets {
        assert!(node.settle(ticket, Vec::new()).await.is_err(), "nothing can be settled any more");
    }
    let again = Node::again(world, &node.id).await;
    let mut taker = again.take(1).await;
    let mut left = parked.clone();
    while !left.is_empty() {
        let (electron, delivery) = taker.electron().await;
        // That the old form was removed was sent, and may not have been carried out.
        assert!(parked.iter().any(|parked| parked.id == electron.id), "{electron:?}");
        assert!(delivery.redeliveries > 0, "a redelivery is known as one");
        left.retain(|parked| *parked != electron);
        again.settle(delivery.ticket, Vec::new()).await.expect("it is settled");
    }
}

/// What is parked when its session is closed goes to others, changed; its ticket is of no use any more.
pub async fn a_closed_session_gives_back_what_is_parked(world: &impl World) {
    let (one, other) = (Node::new(world, "one").await, Node::new(world, "other").await);
    one.send_text("parked").await;
    let (changed, ticket) = one.park(one.take(1).await.one().await).await;
    one.close().await;
    let (electron, delivery) = other.take(1).await.electron().await;
    assert_eq!(electron, changed);
    assert!(delivery.redeliveries > 0, "a redelivery is known as one");
    assert!(one.settle(ticket, Vec::new()).await.is_err(), "nothing can be settled any more");
    other.settle(delivery.ticket, Vec::new()).await.expect("it is settled");
    other.close().await;
    only_comes_what_is_sent_now(world).await;
}

/// Parking makes room in the window, for as many as there are.
pub async fn what_is_parked_does_not_count_against_the_window(world: &impl World) {
    const COUNT: usize = 20;
    let node = Node::new(world, "node").await;
    let mut taker = node.take(1).await;
    let mut parked = Vec::new();
    for number in 0..COUNT {
        node.send_text(&number.to_string()).await;
    }
    for _ in 0..COUNT {
        parked.push(node.park(taker.one().await).await);
    }
    let ids: HashSet<_> = parked.iter().map(|(electron, _)| electron.id).collect();
    assert_eq!(ids.len(), COUNT, "each came once");
    let batch = parked.into_iter().map(|(_, ticket)| (ticket, Outcome::done(Vec::new())));
    for settled in soon("settling", node.session.settle(batch.collect())).await {
        settled.expect("it is settled");
    }
    node.close().await;
    only_comes_what_is_sent_now(world).await;
}

/// What is too large is not parked, and the old ticket is still good.
pub async fn parking_over_the_limit_gives_the_ticket_back(world: &impl World) {
    let node = Node::new(world, "node").await;
    node.send_text("growing").await;
    let (electron, delivery) = node.take(1).await.electron().await;
    let mut large = Electron::clone(&electron);
    large.payload = payload(node.session.limits().payload_bytes_max + 1);
    let parked = node.try_park(delivery.ticket, Arc::new(large)).await;
    let ticket = not_safe(parked.map(drop), |error| matches!(error, SendError::TooLarge { .. }));
    node.settle(ticket, Vec::new()).await.expect("it is settled after all");
    node.close().await;
    only_comes_what_is_sent_now(world).await;
}

/// A ticket of one session cannot be parked in another, and its delivery goes back as it was.
pub async fn parking_is_for_tickets_of_the_session(world: &impl World) {
    let (one, other) = (Node::new(world, "one").await, Node::new(world, "other").await);
    one.send_text("mine").await;
    let mut taker = one.take(1).await;
    let (before, delivery) = taker.electron().await;
    let parked = other.try_park(delivery.ticket, Arc::clone(&before)).await;
    assert!(matches!(parked, Err(SettleError::Stale)), "{parked:?}");
    assert_eq!(taker.electron().await.0, before, "it was not removed");
}

/// However far parking got when its future is dropped, the electron comes again.
pub async fn a_dropped_parking_gives_the_electron_back(world: &impl World) {
    let node = Node::new(world, "node").await;
    let mut taker = node.take(1).await;
    for polls in (0..16).map(|power| 1 << power) {
        let id = node.send_text("parked").await;
        let (before, delivery) = until(&mut taker, &node, id).await;
        let mut changed = Electron::clone(&before);
        changed.attempts += 1;
        let parking = node.session.park(delivery.ticket, Arc::new(changed.clone()));
        tokio::select! {
            biased;
            parked = parking => drop(parked.expect("it is parked")),
            () = yields(polls) => {}
        }
        let (after, delivery) = until(&mut taker, &node, id).await;
        assert!(*after == changed || after == before, "{after:?}");
        node.settle(delivery.ticket, Vec::new()).await.expect("it is settled");
    }
}

async fn yields(count: usize) {
    for _ in 0..count {
        tokio::task::yield_now().await;
    }
}

/// Takes one electron; others, that came once more, are settled.
async fn until(taker: &mut Taker, node: &Node, id: ElectronId) -> (Arc<Electron>, Delivery) {
    loop {
        let (electron, delivery) = taker.electron().await;
        if electron.id == id {
            return (electron, delivery);
        }
        node.settle(delivery.ticket, Vec::new()).await.expect("it is settled");
    }
}

/// Taken is taken: no fault brings it back.
pub async fn what_is_taken_does_not_come_again(world: &impl World) {
    const COUNT: usize = 200;
    let node = Node::new(world, "node").await;
    let mut taker = node.take(COUNT).await;
    for number in 0..COUNT {
        node.send_text(&number.to_string()).await;
    }
    let mut batch = Vec::new();
    while batch.len() < COUNT {
        let deliveries = taker.up_to(COUNT).await;
        batch.extend(deliveries.into_iter().map(|delivery| (delivery.ticket, Outcome::take())));
    }
    // Without the first, no removal can stand for all of them.
    let first = batch.remove(0);
    for taken in soon("taking", node.session.settle(batch)).await {
        taken.expect("it is taken");
    }
    for taken in soon("taking", node.session.settle(vec![first])).await {
        taken.expect("it is taken");
    }
    world.cut().await;
    soon("the end of the session", node.session.ended()).await;
    only_comes_what_is_sent_now(world).await;
}

/// A census says what waits and who takes; soon, not at once.
pub async fn the_census_counts(world: &impl World) {
    let node = Node::new(world, "node").await;
    let count =
        |ready, subscribers| move |census| census == atomizer::Census::new(ready, subscribers);
    node.census("a census of nothing", count(0, 0)).await;
    for number in 0..3 {
        node.send_text(&number.to_string()).await;
    }
    node.census("a census of what waits", count(3, 0)).await;
    let mut one = node.take(1).await;
    let first = one.one().await;
    node.census("a census of what is left", count(2, 1)).await;
    let other = Node::new(world, "other").await;
    let mut two = other.take(1).await;
    let _second = two.one().await;
    node.census("a census of who takes", count(1, 2)).await;
    let (_, first) = node.park(first).await;
    let third = one.one().await;
    node.census("a census without what is parked", count(0, 2)).await;
    other.close().await;
    node.census("a census of what came back", count(1, 1)).await;
    for ticket in [first, third.ticket] {
        node.settle(ticket, Vec::new()).await.expect("it is settled");
    }
}

/// Where electrons can be kept back, they do not come before their time. Elsewhere there is nothing to see.
pub async fn a_delayed_electron_does_not_come_before_its_time(world: &impl World) {
    const DELAY: Duration = Duration::from_millis(300);
    let node = Node::new(world, "node").await;
    if node.session.limits().delay_max.is_zero() {
        return;
    }
    let mut taker = node.take(3).await;
    let delayed = electron("later");
    let id = delayed.id;
    let begun = Instant::now();
    let envelope = Envelope::new(Address::Atom(ATOM), delayed.into()).after(DELAY);
    for sent in soon("sending", node.session.send(&[envelope])).await {
        sent.expect("the electron is safe");
    }
    let next = node.send_text("now").await;
    let (electron, delivery) = taker.electron().await;
    assert_eq!(electron.id, next, "what is not kept back comes first");
    // What a settlement emits can be kept back as well.
    let again = Envelope::new(Address::Atom(ATOM), Message::Electron(electron)).after(DELAY * 2);
    node.settle(delivery.ticket, vec![again]).await.expect("it is settled");
    let (electron, delivery) = taker.electron().await;
    assert_eq!(electron.id, id);
    assert!(begun.elapsed() >= DELAY, "it came after {:?}", begun.elapsed());
    node.settle(delivery.ticket, Vec::new()).await.expect("it is settled");
    assert_eq!(taker.electron().await.0.id, next);
    assert!(begun.elapsed() >= DELAY * 2, "it came after {:?}", begun.elapsed());
}

/// What is sent to a result address is there for another process, when who asked and who answered are gone.
pub async fn a_result_address_keeps_outcomes_until_they_are_read(world: &impl World) {
    let id = ResultsId::from_static("conformance.results");
    let asker = Node::new(world, "asker").await;
    let made = soon("making a result address", asker.session.make_results(&id)).await;
    let address = made.expect("the address is there");
    let again = soon("making it again", asker.session.make_results(&id)).await;
    assert_eq!(again.as_ref(), Ok(&address), "it is there, and has the same name");
    let asked = electron("question");
    let outcome = answer(&asked, &asker.id, &address);
    asker.post(outcome.to.clone(), outcome.message.clone()).await.expect("the outcome is safe");
    asker.close().await;
    let reader = Node::new(world, "reader").await;
    let (seen, ticket) = reader.results(&id).await.answer().await;
    assert_eq!(seen.electron, asked.id);
    // Whoever was to read it is gone.
    drop(ticket);
    reader.close().await;
    let reader = Node::new(world, "reader").await;
    let mut results = reader.results(&id).await;
    let (seen, ticket) = results.answer().await;
    assert_eq!(seen.electron, asked.id, "it comes again");
    reader.settle(ticket, Vec::new()).await.expect("it is settled");
    let last = answer(&electron("last"), &reader.id, &address);
    reader.post(last.to.clone(), last.message.clone()).await.expect("the outcome is safe");
    let (seen, _) = results.answer().await;
    assert_ne!(seen.electron, asked.id, "what is read is gone");
}

/// Where there is a way to all nodes, it leads to each that takes electrons, and does not mind if there is none.
pub async fn what_is_for_all_nodes_reaches_each_that_takes_electrons(world: &impl World) {
    let asker = Node::new(world, "asker").await;
    let cancel = || Message::from(Cancel::new(asker.id.clone(), 3, vec![ElectronId::new()]));
    match asker.post(Address::Nodes, cancel()).await {
        Err(SendError::Refused(_)) => return,
        // To nobody.
        Ok(()) | Err(SendError::Unroutable(_)) => {}
        Err(error) => panic!("not sent: {error}"),
    }
    let workers = [Node::new(world, "worker").await, Node::new(world, "worker").await];
    let mut takers = Vec::new();
    for worker in &workers {
        takers.push((worker.inbox().await, worker.take(1).await));
    }
    let Message::Cancel(sent) = cancel() else { unreachable!("it is one") };
    asker.post(Address::Nodes, Message::Cancel(Arc::clone(&sent))).await.expect("it is sent");
    for (inbox, _) in &mut takers {
        let delivery = inbox.one().await;
        let Message::Cancel(heard) = &delivery.message else {
            panic!("not a cancel: {delivery:?}")
        };
        assert_eq!(*heard, sent);
    }
}
