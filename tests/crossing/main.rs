//! The same programs over every conductor: what crosses crates.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

mod chaos;
mod crash;
mod dead;
mod fan_out;
mod payloads;
mod requirements;
mod watching;

use std::time::Duration;

use atomizer::{Conductor, EventKind, prelude::*};
use atomizer_atoms::{Estimate, MonteCarlo, Request, Toss};
use atomizer_rabbitmq::RabbitMq;
use atomizer_test_support::{Proxy, Vhost, shared};
use tokio::task::spawn_blocking;

const REQUEST: Request = Request { tosses: 1_000_000, batch: 1_000, seed: 7 };

async fn vhost() -> Vhost {
    spawn_blocking(|| shared().expect("a broker").vhost().unwrap()).await.unwrap()
}

fn rabbit(vhost: &Vhost) -> RabbitMq {
    RabbitMq::from_url(&vhost.url()).unwrap()
}

/// Spawner and tosses on each of two nodes with so many slots, asked by a third.
async fn estimate(conductor: impl Conductor + Clone, slots: usize) -> Estimate {
    let mut nodes = Vec::new();
    for _ in 0..2 {
        let builder = Atomizer::builder().conductor(conductor.clone());
        let builder = builder.atom(MonteCarlo::default()).atom(Toss).concurrency(slots);
        nodes.push(builder.start().await.unwrap());
    }
    let asker = Atomizer::builder().conductor(conductor).start().await.unwrap();
    let call = asker.call::<MonteCarlo>(REQUEST).deadline(Duration::from_secs(90));
    let estimate = call.await.unwrap();
    for node in [asker].into_iter().chain(nodes) {
        node.drain().await.unwrap();
    }
    estimate
}

#[tokio::test(flavor = "multi_thread")]
async fn an_estimate_is_the_same_in_memory_and_over_rabbitmq() {
    let vhost = vhost().await;
    let in_memory = estimate(Memory::new(), 4).await;
    let over_rabbitmq = estimate(rabbit(&vhost), 4).await;
    assert_eq!(in_memory, over_rabbitmq);
    assert_eq!(in_memory.tosses, REQUEST.tosses);
    assert_eq!(in_memory.electrons, 1_000);
    spawn_blocking(move || drop(vhost)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_spawners_finish_on_nodes_of_one_slot_over_rabbitmq() {
    let vhost = vhost().await;
    let (one, other) = tokio::join!(estimate(rabbit(&vhost), 1), estimate(rabbit(&vhost), 1));
    assert_eq!(one, other);
    spawn_blocking(move || drop(vhost)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_serves_memory_and_rabbitmq_at_once() {
    let vhost = vhost().await;
    let memory = Memory::new();
    let builder = Atomizer::builder().conductor(memory.clone()).conductor(rabbit(&vhost));
    let serving = builder.atom(MonteCarlo::default()).atom(Toss).start().await.unwrap();
    let in_memory = Atomizer::builder().conductor(memory).start().await.unwrap();
    let over_rabbitmq = Atomizer::builder().conductor(rabbit(&vhost)).start().await.unwrap();
    let (one, other) = tokio::join!(
        in_memory.call::<MonteCarlo>(REQUEST).into_future(),
        over_rabbitmq.call::<MonteCarlo>(REQUEST).into_future(),
    );
    assert_eq!(one.unwrap(), other.unwrap());
    for node in [in_memory, over_rabbitmq, serving] {
        node.drain().await.unwrap();
    }
    spawn_blocking(move || drop(vhost)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conductor_that_fails_fails_alone() {
    let vhost = vhost().await;
    let proxy = Proxy::start(vhost.node().address()).unwrap();
    let memory = Memory::new();
    let through = RabbitMq::from_url(&vhost.url_through(proxy.address())).unwrap();
    let builder = Atomizer::builder().conductor(memory.clone()).conductor(through);
    let serving = builder.atom(MonteCarlo::default()).atom(Toss).start().await.unwrap();
    let mut events = serving.events();
    proxy.refuse(true);
    proxy.cut();
    let lost = async {
        while let Some(event) = events.next().await {
            if matches!(event.unwrap().kind, EventKind::SessionLost { .. }) {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), lost).await.unwrap();
    let asker = Atomizer::builder().conductor(memory).start().await.unwrap();
    let in_memory = asker.call::<MonteCarlo>(REQUEST).await.unwrap();
    assert_eq!(in_memory.tosses, REQUEST.tosses, "the other conductor goes on");
    proxy.refuse(false);
    let asker = Atomizer::builder().conductor(rabbit(&vhost)).start().await.unwrap();
    let over_rabbitmq = asker.call::<MonteCarlo>(REQUEST).deadline(Duration::from_secs(90));
    assert_eq!(over_rabbitmq.await.unwrap(), in_memory, "and the failed one comes back");
    serving.drain().await.unwrap();
    spawn_blocking(move || drop((vhost, proxy))).await.unwrap();
}
