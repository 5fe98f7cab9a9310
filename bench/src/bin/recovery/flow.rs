//! Electrons that flow: a node that sends them to itself through the broker, and the ledger of what became of them.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use atomizer::{Event, EventKind, EventStream, prelude::*};
use atomizer_bench::now;
use atomizer_rabbitmq::RabbitMq;
use futures::FutureExt as _;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::{interval, timeout},
};

/// One electron is sent in each.
const PERIOD: Duration = Duration::from_millis(10);
/// How many sends may wait for their confirm; so many are sent within 40 s.
const SENDS_MAX: usize = 4096;
/// How long anything that is waited for may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How soon a subscription that is brought nothing is looked at.
const WATCHDOG: Duration = Duration::from_secs(1);

/// What became of each electron, by its number.
#[derive(Debug, Default)]
struct Ledger {
    entries: Mutex<Entries>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Entries {
    sent: Vec<SystemTime>,
    confirmed: Vec<u64>,
    ran: HashMap<u64, SystemTime>,
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self) -> u64 {
        let sent = &mut self.lock().sent;
        sent.push(now());
        sent.len() as u64 - 1
    }

    fn confirm(&self, number: u64) {
        self.lock().confirmed.push(number);
        self.changed.notify_waiters();
    }

    fn ran(&self, number: u64) {
        self.lock().ran.entry(number).or_insert_with(now);
        self.changed.notify_waiters();
    }

    /// Waits until something can be said of the entries.
    async fn wait<T>(&self, what: &str, say: impl Fn(&Entries) -> Option<T>) -> Result<T> {
        let waiting = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if let Some(said) = say(&self.lock()) {
                    return said;
                }
                changed.await;
            }
        };
        timeout(PATIENCE, waiting).await.with_context(|| format!("waited too long: {what}"))
    }
}

#[derive(Deserialize, Serialize)]
struct Tick {
    number: u64,
    hold: bool,
}

/// An atom that notes that it ran, at once or when it may.
struct Note {
    ledger: Arc<Ledger>,
    gate: watch::Receiver<bool>,
}

impl Atom for Note {
    const ID: &'static str = "note";
    type Input = Tick;
    type Output = ();

    async fn process(&self, _cx: &Context, tick: Tick) -> Result<(), AtomError> {
        if tick.hold {
            self.gate.clone().wait_for(|open| *open).await?;
        }
        self.ledger.ran(tick.number);
        Ok(())
    }
}

/// A node, and the task that sends through it.
#[derive(Debug)]
pub(crate) struct Flow {
    node: Atomizer,
    events: EventStream,
    ledger: Arc<Ledger>,
    gate: watch::Sender<bool>,
    paused: Arc<AtomicBool>,
    sender: JoinSet<Result<()>>,
}

impl Flow {
    /// Starts a node, and waits until electrons flow through it.
    pub(crate) async fn start(url: &str) -> Result<Self> {
        let (ledger, gate) = (Arc::<Ledger>::default(), watch::Sender::new(false));
        let note = Note { ledger: Arc::clone(&ledger), gate: gate.subscribe() };
        let conductor = RabbitMq::from_url(url)?.watchdog(WATCHDOG);
        let node = Atomizer::builder().conductor(conductor).atom(note).start().await?;
        let events = node.events();
        let paused = Arc::new(AtomicBool::new(false));
        let mut sender = JoinSet::new();
        sender.spawn(send_all(node.clone(), Arc::clone(&ledger), Arc::clone(&paused)));
        let flow = Self { node, events, ledger, gate, paused, sender };
        flow.ledger
            .wait("electrons flow", |entries| (entries.ran.len() >= 20).then_some(()))
            .await?;
        Ok(flow)
    }

    /// Sends an electron that runs until it may end.
    pub(crate) async fn hold_one(&self) -> Result<()> {
        let number = self.ledger.send();
        self.node.send::<Note>(Tick { number, hold: true }).await?;
        self.ledger.confirm(number);
        Ok(())
    }

    pub(crate) fn let_go(&self) {
        self.gate.send_replace(true);
    }

    /// Sends nothing more for now, and waits until nothing is in the queue.
    pub(crate) async fn pause(&self) -> Result<()> {
        self.paused.store(true, Ordering::Relaxed);
        self.ledger.wait("what was sent has run", all_ran).await
    }

    pub(crate) fn resume(&self) {
        self.paused.store(false, Ordering::Relaxed);
    }

    /// Waits until no send was confirmed for half a second, though there were sends.
    pub(crate) async fn is_stuck(&self) -> Result<()> {
        const STUCK: Duration = Duration::from_millis(500);
        let waiting = async {
            loop {
                let confirmed = self.ledger.lock().confirmed.len();
                tokio::time::sleep(STUCK).await;
                if self.ledger.lock().confirmed.len() == confirmed {
                    return;
                }
            }
        };
        timeout(PATIENCE, waiting).await.context("the broker does not block what is sent")
    }

    /// Waits for the event that tells of a fault that began at a moment; returns when it was.
    pub(crate) async fn noticed(
        &mut self,
        since: SystemTime,
        by: fn(&EventKind) -> bool,
        says: &str,
    ) -> Result<SystemTime> {
        let noticing = async {
            loop {
                let event = self.events.next().await.context("the node ended")?;
                if let Ok(Event { at, kind, .. }) = event
                    && at >= since
                    && by(&kind)
                {
                    if !format!("{kind:?}").contains(says) {
                        bail!("not the fault that was meant ({says}): {kind:?}");
                    }
                    return Ok(at);
                }
            }
        };
        timeout(PATIENCE, noticing).await.context("nobody noticed the fault")?
    }

    /// Waits until an electron has run that was sent after a moment; returns how long after it.
    pub(crate) async fn flows_again(&self, since: SystemTime) -> Result<Duration> {
        let first = |entries: &Entries| {
            let from = entries.sent.partition_point(|sent| *sent < since) as u64;
            let ran = entries.ran.iter().filter(|(number, _)| **number >= from);
            ran.map(|(_, at)| *at).min()
        };
        let at = self.ledger.wait("electrons flow again", first).await?;
        Ok(at.duration_since(since)?)
    }

    /// What the node told since the fault was noticed, but for the electrons that came and went.
    pub(crate) fn told(&mut self) -> String {
        let events = std::iter::from_fn(|| self.events.next().now_or_never().flatten());
        let events = events.filter_map(Result::ok).filter(|event| {
            use EventKind::{Completed, Received, Started, Suspected};
            !matches!(
                event.kind,
                Completed { .. } | Received { .. } | Started { .. } | Suspected { .. }
            )
        });
        events.map(|event| format!("\n  {event}")).collect()
    }

    /// Stops sending, waits for what is under way, and returns how many electrons were confirmed and never ran.
    pub(crate) async fn end(mut self) -> Result<usize> {
        self.paused.store(true, Ordering::Relaxed);
        self.let_go();
        // In the end either all has run, or the rest is lost.
        drop(self.ledger.wait("what was confirmed has run", all_ran).await);
        self.sender.shutdown().await;
        let lost = {
            let entries = self.ledger.lock();
            entries.confirmed.iter().filter(|number| !entries.ran.contains_key(number)).count()
        };
        self.node.drain().await?;
        Ok(lost)
    }
}

/// All that was sent is confirmed, and has run.
fn all_ran(entries: &Entries) -> Option<()> {
    let confirmed = entries.confirmed.len() == entries.sent.len();
    (confirmed && entries.sent.len() == entries.ran.len()).then_some(())
}

/// Sends one electron after the other, whether the ones before are confirmed or not.
async fn send_all(node: Atomizer, ledger: Arc<Ledger>, paused: Arc<AtomicBool>) -> Result<()> {
    let mut ticks = interval(PERIOD);
    let mut sends = JoinSet::new();
    loop {
        ticks.tick().await;
        while let Some(sent) = sends.try_join_next() {
            sent?;
        }
        if paused.load(Ordering::Relaxed) || sends.len() >= SENDS_MAX {
            continue;
        }
        let (node, ledger) = (node.clone(), Arc::clone(&ledger));
        let number = ledger.send();
        sends.spawn(async move {
            // It fails after half a minute, which a broker may need to begin on a busy machine.
            while node.send::<Note>(Tick { number, hold: false }).await.is_err() {}
            ledger.confirm(number);
        });
    }
}
