//! Delays: on the broker's clock, never early, and through everything that the broker survives.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use atomizer::{
    Address, AtomId, CallError, Conductor, Electron, Envelope, EventKind, NodeId, Payload,
    SendError, Source, prelude::*,
};
use atomizer_test_support::Broker;
use futures::future::join_all;
use tokio::{sync::mpsc, task::JoinSet};

use crate::support::{
    Double, blocking, delete_queue, rabbit, serve, soon, until, until_it_holds, vhost,
};

/// Tells when it began, and for which number.
struct Note(mpsc::Sender<(u64, Instant)>);

impl Atom for Note {
    const ID: &'static str = "note";
    type Input = u64;
    type Output = ();

    async fn process(&self, _cx: &Context, number: u64) -> Result<()> {
        self.0.send((number, Instant::now())).await?;
        Ok(())
    }
}

async fn note(url: &str) -> (Atomizer, mpsc::Receiver<(u64, Instant)>) {
    let (noted, notes) = mpsc::channel(16 * 1024);
    let builder = Atomizer::builder().conductor(rabbit(url)).atom(Note(noted));
    (builder.start().await.unwrap(), notes)
}

/// Draws a delay from 50 ms to `max`, the same for the same number.
fn delay(number: u64, max: Duration) -> Duration {
    // The finaliser of SplitMix64: all bits of the number reach all bits of the result.
    let mut bits = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    bits = (bits ^ bits >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    let least = Duration::from_millis(50);
    let span = u64::try_from((max - least).as_micros()).unwrap();
    least + Duration::from_micros((bits ^ bits >> 31) % span)
}

/// Sends so many with random delays, restarts the broker, and returns how late each came, in order.
async fn lateness(count: u64, max: Duration) -> Vec<Duration> {
    let broker = Arc::new(blocking(|| Broker::start().unwrap()).await);
    let (atomizer, mut notes) = note(&broker.url("/")).await;
    // When sending began, and when it had ended: the delay runs from a moment in between.
    let sent = Arc::new(Mutex::new(HashMap::new()));
    let mut sending = JoinSet::new();
    for number in 0..count {
        if sending.len() == 256 {
            sending.join_next().await.unwrap().unwrap();
        }
        let (atomizer, sent) = (atomizer.clone(), Arc::clone(&sent));
        sending.spawn(async move {
            let begun = Instant::now();
            atomizer.send_after::<Note>(delay(number, max), number).await.unwrap();
            sent.lock().unwrap().insert(number, (begun, Instant::now()));
        });
    }
    sending.join_all().await;
    let restarted = Arc::clone(&broker);
    blocking(move || restarted.restart().unwrap()).await;
    let mut late = HashMap::new();
    // What was on its way from one rung to the next when the broker stopped is sent again by the broker, which waits
    // 180 s for a confirm (`dead_letter_worker_publisher_confirm_timeout`).
    let limit = max + Duration::from_secs(180 + 90);
    let coming = async {
        while late.len() < usize::try_from(count).unwrap() {
            let (number, at) = notes.recv().await.unwrap();
            let (begun, ended) = sent.lock().unwrap()[&number];
            let delay = delay(number, max);
            assert!(at >= begun + delay, "{number} came {:?} early", begun + delay - at);
            late.entry(number).or_insert(at.saturating_duration_since(ended + delay));
        }
    };
    tokio::time::timeout(limit, coming).await.expect("all of them come");
    atomizer.drain().await.unwrap();
    blocking(move || drop(broker)).await;
    let mut late: Vec<_> = late.into_values().collect();
    late.sort();
    late
}

#[tokio::test(flavor = "multi_thread")]
async fn electrons_with_random_delays_come_through_a_restart_and_none_is_early() {
    lateness(500, Duration::from_secs(12)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes two minutes; prints how late they come"]
async fn ten_thousand_delays_up_to_90_s_come_through_a_restart() {
    let late = lateness(10_000, Duration::from_secs(90)).await;
    let at = |part: f64| late[((late.len() - 1) as f64 * part) as usize].as_secs_f64();
    println!("late_p50_s={:.3} late_p99_s={:.3} late_max_s={:.3}", at(0.5), at(0.99), at(1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delay_that_is_too_long_is_refused_before_it_is_sent() {
    let vhost = vhost().await;
    let atomizer = serve(&vhost.url()).await;
    let days = |days: u64| Duration::from_secs(days * 24 * 60 * 60);
    atomizer.send_after::<Double>(days(30), 1).await.unwrap();
    let refused = atomizer.send_after::<Double>(days(31), 1).await.unwrap_err();
    assert!(
        matches!(refused, CallError::NotSent { source: SendError::Refused(_), .. }),
        "{refused:?}"
    );
    atomizer.drain().await.unwrap();
    let queues = blocking(move || vhost.queues().unwrap()).await;
    let rungs = queues.iter().filter(|queue| queue.name.starts_with("atomizer.delay."));
    assert_eq!(rungs.count(), 27);
}

/// Dead-lettering at least once keeps what has nowhere to go, and a few dozens of it hold up all the rest.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_for_a_deleted_queue_is_a_dead_letter_and_holds_up_nothing() {
    const LOST: u64 = 100;
    let vhost = Arc::new(vhost().await);
    let (atomizer, mut notes) = note(&vhost.url()).await;
    // Long enough for the slowest broker, and waited for once.
    let wait = Duration::from_secs(15);
    let begun = Instant::now();
    let lost = (0..LOST).map(|number| atomizer.send_after::<Double>(wait, number));
    for sent in join_all(lost).await {
        sent.unwrap();
    }
    atomizer.send_after::<Note>(wait, 7).await.unwrap();
    delete_queue(&vhost, "atomizer.atom.double").await;
    assert!(begun.elapsed() < wait, "they were not due before their queue was gone");
    assert_eq!(soon(notes.recv()).await.unwrap().0, 7);
    until_it_holds(&vhost, "atomizer.dead", LOST).await;
    atomizer.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delay_whose_queue_was_deleted_is_kept_all_the_same() {
    let vhost = Arc::new(vhost().await);
    let (atomizer, mut notes) = note(&vhost.url()).await;
    let wait = Duration::from_millis(32);
    atomizer.send_after::<Note>(wait, 1).await.unwrap();
    assert_eq!(soon(notes.recv()).await.unwrap().0, 1);
    // What is not acknowledged when the session ends comes again.
    until_it_holds(&vhost, "atomizer.atom.note", 0).await;
    let mut events = atomizer.events();
    delete_queue(&vhost, "atomizer.delay.5").await;
    soon(atomizer.send_after::<Note>(wait, 2)).await.unwrap();
    until(&mut events, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
    assert_eq!(soon(notes.recv()).await.unwrap().0, 2);
    atomizer.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

/// To the second, by the clock of this machine, which sends and receives.
#[tokio::test(flavor = "multi_thread")]
async fn a_delivery_says_when_its_electron_was_sent_or_due() {
    #[expect(clippy::disallowed_methods, reason = "compared with what the sender's clock showed")]
    let now = std::time::SystemTime::now;
    let vhost = vhost().await;
    let conductor = rabbit(&vhost.url());
    let session = conductor.open(&NodeId::unique("node").unwrap()).await.unwrap();
    let atom = AtomId::from_static("timed");
    let from_source = Source::Atom(atom.clone());
    let mut subscription = session.subscribe(from_source, 1.try_into().unwrap()).await.unwrap();
    for delay in [Duration::ZERO, Duration::from_secs(3)] {
        let electron = Electron::new(atom.clone(), Payload::json("1"));
        let to = Address::Atom(atom.clone());
        let earliest = now() + delay - Duration::from_secs(1);
        soon(session.send(&[Envelope::new(to, electron.into()).after(delay)]))
            .await
            .remove(0)
            .unwrap();
        let latest = now() + delay;
        let delivery = soon(subscription.next(1.try_into().unwrap())).await.unwrap().remove(0);
        let sent_at = delivery.sent_at.expect("it says so");
        assert!(earliest < sent_at && sent_at <= latest, "{earliest:?} {sent_at:?} {latest:?}");
        let done = (delivery.ticket, atomizer::Outcome::done(Vec::new()));
        soon(session.settle(vec![done])).await.remove(0).unwrap();
    }
    session.close().await;
    blocking(move || drop(vhost)).await;
}
