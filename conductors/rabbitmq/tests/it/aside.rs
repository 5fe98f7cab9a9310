//! What cannot be published where it goes holds up nothing else.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use atomizer::{EventKind, prelude::*};
use atomizer_test_support::Proxy;
use tokio::{sync::Semaphore, task::JoinSet};

use crate::support::{Double, blocking, delete_queue, lose_leader, rabbit, soon, until, vhost};

/// Answers when it may.
struct Gate(Arc<Semaphore>);

impl Atom for Gate {
    const ID: &'static str = "gate";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, number: u64) -> Result<u64> {
        self.0.acquire().await?.forget();
        Ok(number)
    }
}

/// So many that RabbitMQ reads no more from their channel: it lets 32 be unconfirmed.
const STUCK: usize = 60;

/// RabbitMQ leaves such an inbox behind when brokers are lost while they make it, and its asker may be lost as well.
#[tokio::test(flavor = "multi_thread")]
async fn answers_to_an_inbox_without_a_leader_hold_up_no_others() {
    let vhost = Arc::new(vhost().await);
    let proxy = Arc::new(Proxy::start(vhost.node().address()).unwrap());
    let gate = Arc::new(Semaphore::new(0));
    let worker = Atomizer::builder().conductor(rabbit(&vhost.url())).concurrency(2 * STUCK);
    let worker = worker.atom(Gate(Arc::clone(&gate))).atom(Double).start().await.unwrap();
    let mut working = worker.events();
    let away = rabbit(&vhost.url_through(proxy.address()));
    let away = Atomizer::builder().conductor(away).start().await.unwrap();
    let mut stuck = JoinSet::new();
    for number in 0..STUCK as u64 {
        stuck.spawn(away.call::<Gate>(number).into_future());
    }
    for _ in 0..STUCK {
        until(&mut working, |kind| matches!(kind, EventKind::Started { .. })).await;
    }
    let mut asking = away.events();
    proxy.refuse(true);
    proxy.cut();
    until(&mut asking, |kind| matches!(kind, EventKind::SessionLost { .. })).await;
    let inbox = format!("atomizer.inbox.{}", away.node());
    lose_leader(&vhost, &inbox).await;

    let asker = Atomizer::builder().conductor(rabbit(&vhost.url())).start().await.unwrap();
    assert_eq!(soon(asker.call::<Double>(1).into_future()).await.unwrap(), 2);
    // What comes again runs again.
    gate.add_permits(1000 * STUCK);
    let begun = Instant::now();
    let (mut slowest, mut answered) = (Duration::ZERO, 0);
    while begun.elapsed() < Duration::from_secs(15) {
        let asked = Instant::now();
        assert_eq!(soon(asker.call::<Double>(answered).into_future()).await.unwrap(), 2 * answered);
        slowest = slowest.max(asked.elapsed());
        answered += 1;
    }
    println!("{answered} answers, the slowest after {slowest:?}");
    assert!(slowest < Duration::from_secs(10), "{slowest:?}");

    // Where there is no inbox any more, nobody waits for an answer.
    let mut working = worker.events();
    delete_queue(&vhost, &inbox).await;
    for _ in 0..STUCK {
        until(&mut working, |kind| matches!(kind, EventKind::Completed { unclaimed: Some(_), .. }))
            .await;
    }
    stuck.shutdown().await;
    asker.drain().await.unwrap();
    worker.drain().await.unwrap();
    drop(away);
    blocking(move || drop((vhost, proxy))).await;
}
