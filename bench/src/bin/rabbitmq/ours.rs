//! What is measured: nodes, used as anyone would.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use atomizer::{Monitor, Position, Seen, prelude::*};
use atomizer_bench::now;
use atomizer_rabbitmq::RabbitMq;
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::{sync::Notify, task::JoinSet};

use crate::{PREFETCH, emptied::Emptied};

/// How many sends are in flight.
const SENDS_IN_FLIGHT: usize = 1024;

/// An input of 256 bytes, as JSON.
#[derive(Deserialize, Serialize)]
pub(crate) struct Job {
    number: u64,
    text: String,
}

impl Job {
    pub(crate) fn new(number: u64) -> Self {
        Self { number, text: "x".repeat(228) }
    }
}

/// An atom that notes when its first electron came, and how many came.
struct Noop(Arc<Tally>);

#[derive(Default)]
struct Tally {
    first: OnceLock<SystemTime>,
    count: AtomicU64,
    enough: u64,
    done: Notify,
}

impl Tally {
    fn up_to(enough: u64) -> Arc<Self> {
        Arc::new(Self { enough, ..Self::default() })
    }
}

impl Atom for Noop {
    const ID: &'static str = "noop";
    type Input = Job;
    type Output = Job;

    /// As many as the reference has: a window that is empty before the next deliveries are there costs either side
    /// the same.
    fn options(&self) -> Options {
        Options::default().prefetch(PREFETCH.into())
    }

    async fn process(&self, _cx: &Context, input: Job) -> Result<Job, AtomError> {
        self.0.first.get_or_init(now);
        if self.0.count.fetch_add(1, Ordering::Relaxed) + 1 == self.0.enough {
            self.0.done.notify_one();
        }
        Ok(input)
    }
}

/// Whether nodes have their events kept. The reference keeps none, so neither do we beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Events {
    Kept,
    NotKept,
}

fn rabbit(url: &str, events: Events) -> Result<RabbitMq> {
    let rabbit = RabbitMq::from_url(url)?;
    Ok(if events == Events::Kept { rabbit } else { rabbit.without_events() })
}

async fn serve(url: &str, events: Events, tally: Arc<Tally>) -> Result<Atomizer> {
    Ok(Atomizer::builder().conductor(rabbit(url, events)?).atom(Noop(tally)).start().await?)
}

async fn asker(url: &str, events: Events) -> Result<Atomizer> {
    Ok(Atomizer::builder().conductor(rabbit(url, events)?).start().await?)
}

/// Makes the queue of the atom, and whatever else a node makes.
pub(crate) async fn make_queues(url: &str) -> Result<()> {
    Ok(serve(url, Events::NotKept, Arc::default()).await?.drain().await?)
}

/// Checks that no event of so many calls was lost: each was sent, received, started and completed.
pub(crate) async fn check_events(url: &str, calls: u64) -> Result<()> {
    let monitor = Monitor::new(&rabbit(url, Events::Kept)?)?.from(Position::Start);
    let mut events = monitor.open().await?;
    let mut counts = BTreeMap::<_, u64>::new();
    loop {
        match events.next().await {
            Seen::Event(event) => *counts.entry(event.kind.name()).or_default() += 1,
            Seen::CaughtUp => break,
            other => anyhow::bail!("{other:?}"),
        }
    }
    for kind in ["sent", "received", "started", "completed"] {
        let count = counts.get(kind).copied().unwrap_or_default();
        ensure!(
            count == calls,
            "{count} of {calls} events are there that tell of {kind}: {counts:?}"
        );
    }
    ensure!(!counts.contains_key("events_lost"), "events were lost: {counts:?}");
    Ok(())
}

/// Sends until all is confirmed.
pub(crate) async fn publish(url: &str, electrons: u64) -> Result<Duration> {
    let node = asker(url, Events::NotKept).await?;
    let begun = Instant::now();
    stream::iter(0..electrons)
        .map(|number| node.send::<Noop>(Job::new(number)))
        .buffer_unordered(SENDS_IN_FLIGHT)
        .try_for_each(async |_| Ok(()))
        .await?;
    let took = begun.elapsed();
    node.drain().await?;
    Ok(took)
}

/// Works off what is there; returns when the first of them ran.
pub(crate) async fn drain(url: &str, electrons: u64, emptied: &Emptied<'_>) -> Result<SystemTime> {
    let tally = Tally::up_to(electrons);
    let node = serve(url, Events::NotKept, Arc::clone(&tally)).await?;
    tally.done.notified().await;
    emptied.wait()?;
    node.drain().await?;
    let count = tally.count.load(Ordering::Relaxed);
    ensure!(count == electrons, "{count} of {electrons} electrons ran");
    tally.first.get().copied().context("nothing ran")
}

/// Asks from one node for what runs on another.
pub(crate) async fn call(
    url: &str,
    calls: u64,
    in_flight: u64,
    events: Events,
) -> Result<Duration> {
    let (server, client) = (serve(url, events, Arc::default()).await?, asker(url, events).await?);
    let begun = Instant::now();
    let made = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..in_flight {
        let (client, made) = (client.clone(), Arc::clone(&made));
        clients.spawn(async move {
            loop {
                let number = made.fetch_add(1, Ordering::Relaxed);
                if number >= calls {
                    return anyhow::Ok(());
                }
                let output = client.call::<Noop>(Job::new(number)).await?;
                ensure!(output.number == number, "the answer is another's");
            }
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended??;
    }
    let took = begun.elapsed();
    client.drain().await?;
    server.drain().await?;
    Ok(took)
}
