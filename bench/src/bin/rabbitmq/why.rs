//! How long the story of one electron takes to be found among many events.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use atomizer::{ElectronId, Monitor, Whereabouts, prelude::*};
use atomizer_bench::median;
use atomizer_rabbitmq::RabbitMq;
use tokio::task::JoinSet;

/// How many events are kept of each call: sent, received, started, completed.
const EVENTS_OF_A_CALL: u64 = 4;
/// How long the electron lives whose story is told: long enough for many events of others.
const LIFE: Duration = Duration::from_millis(800);
const IN_FLIGHT: u64 = 256;
/// How often it is told.
const TIMES: usize = 5;

struct Nap;

impl Atom for Nap {
    const ID: &'static str = "nap";
    type Input = ();
    type Output = ();

    async fn process(&self, _cx: &Context, (): ()) -> Result<(), AtomError> {
        tokio::time::sleep(LIFE).await;
        Ok(())
    }
}

struct Echo;

impl Atom for Echo {
    const ID: &'static str = "echo";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, number: u64) -> Result<u64, AtomError> {
        Ok(number)
    }
}

/// What was found, and how fast.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) events: u64,
    /// How many calls of others ended in the life of the electron, as events.
    pub(crate) life_events: u64,
    pub(crate) median_s: f64,
}

/// Has so many events kept, and tells the story of an electron from the middle of them.
pub(crate) async fn measure(url: &str, events: u64) -> Result<Found> {
    let rabbit = RabbitMq::from_url(url)?;
    let server = Atomizer::builder().conductor(rabbit.clone()).atom(Nap).atom(Echo).start().await?;
    let client = Atomizer::builder().conductor(rabbit.clone()).start().await?;
    let (electron, life_calls) = call_all(&client, events / EVENTS_OF_A_CALL).await?;
    client.drain().await?;
    server.drain().await?;
    let monitor = Monitor::new(&rabbit)?;
    let mut seconds = Vec::new();
    for _ in 0..TIMES {
        let begun = Instant::now();
        let story = monitor.story(electron).await?;
        seconds.push(begun.elapsed().as_secs_f64());
        let told: Vec<_> = story.events.iter().map(|event| event.kind.name()).collect();
        ensure!(told == ["sent", "received", "started", "completed"], "{told:?}");
        ensure!(matches!(story.whereabouts, Whereabouts::Done { .. }), "{story:?}");
    }
    let life_events = life_calls * EVENTS_OF_A_CALL;
    Ok(Found { events, life_events, median_s: median(seconds) })
}

/// Makes so many calls, and half-way the one whose story is told. Returns it, and how many ended while it lived.
async fn call_all(client: &Atomizer, calls: u64) -> Result<(ElectronId, u64)> {
    let made = Arc::new(AtomicU64::new(0));
    let mut callers = JoinSet::new();
    for _ in 0..IN_FLIGHT {
        let (client, made) = (client.clone(), Arc::clone(&made));
        callers.spawn(async move {
            while let number @ 0.. = made.fetch_add(1, Ordering::Relaxed)
                && number < calls
            {
                client.call::<Echo>(number).await?;
            }
            anyhow::Ok(())
        });
    }
    while made.load(Ordering::Relaxed) < calls / 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let nap = client.call::<Nap>(());
    let electron = nap.electron().context("it has an id")?;
    let before = made.load(Ordering::Relaxed);
    nap.await?;
    let life = made.load(Ordering::Relaxed).min(calls) - before;
    while let Some(ended) = callers.join_next().await {
        ended??;
    }
    Ok((electron, life))
}
