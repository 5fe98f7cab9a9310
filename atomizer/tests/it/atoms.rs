//! Atoms that tests are made of.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use atomizer::{Builder, Event, EventKind, EventStream, prelude::*};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

/// Does as it is told.
pub(crate) struct Obedient;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    Echo(String),
    Fail(String),
    Panic(String),
    Sleep(Duration),
    Large(usize),
}

impl Atom for Obedient {
    const ID: &'static str = "obedient";
    type Input = Order;
    type Output = String;

    async fn process(&self, _cx: &Context, order: Order) -> Result<String> {
        match order {
            Order::Echo(text) => Ok(text),
            Order::Fail(text) => Err(AtomError::msg(text)),
            Order::Panic(text) => panic!("{text}"),
            Order::Sleep(time) => {
                tokio::time::sleep(time).await;
                Ok("slept".to_owned())
            }
            Order::Large(bytes) => Ok("x".repeat(bytes)),
        }
    }
}

/// Counts how many run at once, and waits at a gate until it is let through.
#[derive(Clone)]
pub(crate) struct Gated {
    pub(crate) gate: Arc<Semaphore>,
    pub(crate) running: Arc<AtomicUsize>,
    pub(crate) running_most: Arc<AtomicUsize>,
    pub(crate) options: Options,
}

impl Gated {
    pub(crate) fn new(options: Options) -> Self {
        Self {
            gate: Arc::new(Semaphore::new(0)),
            running: Arc::default(),
            running_most: Arc::default(),
            options,
        }
    }

    /// Lets so many through, once each.
    pub(crate) fn open(&self, count: usize) {
        self.gate.add_permits(count);
    }
}

impl Atom for Gated {
    const ID: &'static str = "gated";
    type Input = u64;
    type Output = u64;

    fn options(&self) -> Options {
        self.options.clone()
    }

    async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
        let now = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.running_most.fetch_max(now, Ordering::SeqCst);
        self.gate.acquire().await?.forget();
        self.running.fetch_sub(1, Ordering::SeqCst);
        Ok(input)
    }
}

/// Asks itself for the two numbers before.
pub(crate) struct Fibonacci;

impl Atom for Fibonacci {
    const ID: &'static str = "fibonacci";
    const KIND: Kind = Kind::Spawner;
    type Input = u64;
    type Output = u64;

    async fn process(&self, cx: &Context, n: u64) -> Result<u64> {
        match n {
            0 | 1 => Ok(n),
            n => Ok(cx.fan_out::<Self>([n - 1, n - 2]).fold(0, |sum, part| sum + part).await?),
        }
    }
}

/// Waits for an event that fits.
pub(crate) async fn until(events: &mut EventStream, fits: impl Fn(&EventKind) -> bool) -> Event {
    let found = async {
        loop {
            let event = events.next().await.expect("the node lives").expect("the test keeps up");
            if fits(&event.kind) {
                return event;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), found).await.expect("the event comes")
}

pub(crate) fn started(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Started { .. })
}

/// Starts a node, and sees its events from the first on.
pub(crate) async fn watched(builder: Builder) -> (Atomizer, EventStream) {
    let (hand_over, events) = tokio::sync::oneshot::channel();
    let builder = builder.watch(|events| hand_over.send(events).expect("the test waits for it"));
    (builder.start().await.unwrap(), events.await.unwrap())
}
