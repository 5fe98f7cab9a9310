//! What is held for long: parked when it runs, put back when it does not; and parents never use up a window.

use std::{
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use atomizer::{
    Address, AtomId, Census, Conductor, ConductorId, Electron, Envelope, EventKind, Limits,
    Message, NodeId, OpenError, Outcome, ReplyTo, SendError, Session, SessionError, SettleError,
    Source, Subscription, Ticket, prelude::*,
};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
};

use crate::atoms::{Gated, started, until};

/// A conductor through which nothing may be held for longer than a second, and that parks as it is told.
#[derive(Clone, Debug)]
struct Impatient {
    memory: Memory,
    parks: Arc<AtomicUsize>,
    /// How many are declined first.
    declines: Arc<AtomicUsize>,
    /// A permit for each that may go on.
    gate: Arc<Semaphore>,
    /// Nothing is settled while this is so.
    blocked: watch::Sender<bool>,
}

impl Impatient {
    fn new(declines: usize, open: usize) -> Self {
        let declines = Arc::new(AtomicUsize::new(declines));
        let gate = Arc::new(Semaphore::new(open));
        let blocked = watch::Sender::new(false);
        Self { memory: Memory::new(), parks: Arc::default(), declines, gate, blocked }
    }
}

#[async_trait]
impl Conductor for Impatient {
    fn id(&self) -> &ConductorId {
        self.memory.id()
    }

    async fn open(&self, node: &NodeId) -> Result<Arc<dyn Session>, OpenError> {
        let session = self.memory.open(node).await?;
        Ok(Arc::new(ImpatientSession { session, conductor: self.clone() }))
    }
}

#[derive(Debug)]
struct ImpatientSession {
    session: Arc<dyn Session>,
    conductor: Impatient,
}

#[async_trait]
impl Session for ImpatientSession {
    fn limits(&self) -> Limits {
        self.session.limits().hold_max(Duration::from_secs(1))
    }

    fn reply_to(&self) -> ReplyTo {
        self.session.reply_to()
    }

    async fn subscribe(
        &self,
        source: Source,
        window: NonZeroUsize,
    ) -> Result<Box<dyn Subscription>, SessionError> {
        self.session.subscribe(source, window).await
    }

    async fn send(&self, envelopes: &[Envelope]) -> Vec<Result<(), SendError>> {
        self.session.send(envelopes).await
    }

    async fn settle(&self, batch: Vec<(Ticket, Outcome)>) -> Vec<Result<(), SettleError>> {
        let mut blocked = self.conductor.blocked.subscribe();
        blocked.wait_for(|blocked| !blocked).await.expect("its sender lives");
        self.session.settle(batch).await
    }

    async fn park(&self, ticket: Ticket, changed: Arc<Electron>) -> Result<Ticket, SettleError> {
        let Impatient { parks, declines, gate, .. } = &self.conductor;
        parks.fetch_add(1, Ordering::SeqCst);
        gate.acquire().await.expect("it is not closed").forget();
        let less = |count: usize| count.checked_sub(1);
        if declines.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
            let to = Address::Atom(changed.atom.clone());
            let copy = Envelope::new(to, Message::Electron(changed));
            let failed = vec![(copy, SendError::NotTaken("a test".to_owned()))];
            return Err(SettleError::NotSafe { ticket, failed });
        }
        self.session.park(ticket, changed).await
    }

    async fn census(&self, atom: &AtomId) -> Result<Census, SessionError> {
        self.session.census(atom).await
    }

    fn is_blocked(&self) -> bool {
        *self.conductor.blocked.borrow()
    }

    async fn ended(&self) -> SessionError {
        self.session.ended().await
    }

    async fn close(&self) {
        self.session.close().await;
    }
}

fn parked(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Parked { .. })
}

#[tokio::test(start_paused = true)]
async fn what_runs_for_long_is_parked_once() {
    let (impatient, gated) = (Impatient::new(0, 100), Gated::new(Options::default()));
    let builder = Atomizer::builder().conductor(impatient.clone()).atom(gated.clone());
    let node = builder.start().await.unwrap();
    let mut events = node.events();
    let call = tokio::spawn(node.call::<Gated>(1).into_future());
    until(&mut events, parked).await;
    tokio::time::advance(Duration::from_secs(100)).await;
    gated.open(1);
    assert_eq!(call.await.unwrap().unwrap(), 1);
    assert_eq!(impatient.parks.load(Ordering::SeqCst), 1);
    node.drain().await.unwrap();
    impatient.memory.cut();
    drop(node);
    while let Some(event) = events.next().await {
        assert!(!started(&event.unwrap().kind), "it ran once");
    }
}

#[tokio::test(start_paused = true)]
async fn parking_that_is_declined_is_tried_again() {
    let (impatient, gated) = (Impatient::new(3, 100), Gated::new(Options::default()));
    let builder = Atomizer::builder().conductor(impatient.clone()).atom(gated.clone());
    let node = builder.start().await.unwrap();
    let mut events = node.events();
    let call = tokio::spawn(node.call::<Gated>(1).into_future());
    until(&mut events, parked).await;
    assert_eq!(impatient.parks.load(Ordering::SeqCst), 4);
    gated.open(1);
    assert_eq!(call.await.unwrap().unwrap(), 1);
    node.drain().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_run_that_ends_while_it_is_parked_is_settled_afterwards() {
    for declines in [0, 1] {
        let (impatient, gated) = (Impatient::new(declines, 0), Gated::new(Options::default()));
        let builder = Atomizer::builder().conductor(impatient.clone()).atom(gated.clone());
        let node = builder.start().await.unwrap();
        let mut events = node.events();
        let call = tokio::spawn(node.call::<Gated>(1).into_future());
        until(&mut events, started).await;
        while impatient.parks.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // Others are not held up by it.
        gated.open(2);
        assert_eq!(node.call::<Gated>(2).await.unwrap(), 2);
        impatient.gate.add_permits(1);
        let mut drained = Vec::new();
        node.drain().await.unwrap();
        assert_eq!(call.await.unwrap().unwrap(), 1);
        drop(node);
        while let Some(event) = events.next().await {
            drained.push(event.unwrap().kind);
        }
        let settled = |kind: &&EventKind| matches!(kind, EventKind::Completed { .. });
        assert_eq!(drained.iter().filter(settled).count(), 2, "{drained:?}");
    }
}

/// A broker that is short of memory is no dead one: what is finished waits for it, and is not run again.
#[tokio::test(start_paused = true)]
async fn a_session_that_is_blocked_for_long_is_kept() {
    let (impatient, gated) = (Impatient::new(0, 100), Gated::new(Options::default()));
    let builder = Atomizer::builder().conductor(impatient.clone()).atom(gated.clone());
    let node = builder.start().await.unwrap();
    let mut events = node.events();
    node.send::<Gated>(1).await.unwrap();
    until(&mut events, started).await;
    impatient.blocked.send_replace(true);
    gated.open(2);
    tokio::time::sleep(Duration::from_secs(60 * 60)).await;
    impatient.blocked.send_replace(false);
    until(&mut events, |kind| matches!(kind, EventKind::Completed { .. })).await;
    node.drain().await.unwrap();
    drop(node);
    while let Some(event) = events.next().await {
        let kind = event.unwrap().kind;
        assert!(!started(&kind), "it ran once: {kind:?}");
    }
    assert_eq!(gated.gate.available_permits(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_long_goes_back_to_the_end_of_its_queue() {
    let impatient = Impatient::new(0, 100);
    let gated = Gated::new(Options::default().concurrency(1).prefetch(2));
    let builder = Atomizer::builder().conductor(impatient.clone()).atom(gated.clone());
    let node = builder.start().await.unwrap();
    let mut events = node.events();
    let mut calls = JoinSet::new();
    for number in 0..3 {
        calls.spawn(node.call::<Gated>(number).into_future());
    }
    let handed_on = |kind: &EventKind| matches!(kind, EventKind::HandedOn { .. });
    let first = until(&mut events, handed_on).await.kind;
    let second = until(&mut events, handed_on).await.kind;
    let ids = [&first, &second].map(|kind| match kind {
        EventKind::HandedOn { electron, attempt, .. } => (*electron, *attempt),
        kind => panic!("{kind:?}"),
    });
    assert_ne!(ids[0].0, ids[1].0, "the other one had its turn in between");
    assert_eq!((ids[0].1, ids[1].1), (1, 1), "no attempt is counted");
    gated.open(3);
    while let Some(answer) = calls.join_next().await {
        answer.unwrap().unwrap();
    }
    assert_eq!(gated.running_most.load(Ordering::SeqCst), 1);
    node.drain().await.unwrap();
}

/// Asks itself for the two numbers before, and holds one delivery at a time.
struct Narrow;

impl Atom for Narrow {
    const ID: &'static str = "narrow";
    const KIND: Kind = Kind::Spawner;
    type Input = u64;
    type Output = u64;

    fn options(&self) -> Options {
        Options::default().concurrency(1).prefetch(1)
    }

    async fn process(&self, cx: &Context, n: u64) -> Result<u64> {
        match n {
            0 | 1 => Ok(n),
            n => Ok(cx.fan_out::<Self>([n - 1, n - 2]).fold(0, |sum, part| sum + part).await?),
        }
    }
}

#[tokio::test]
async fn an_atom_that_spawns_itself_finishes_with_a_window_of_one() {
    let node = Atomizer::builder().conductor(Memory::new()).atom(Narrow).start().await.unwrap();
    assert_eq!(node.call::<Narrow>(14).await.unwrap(), 377);
    node.drain().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn parents_that_cannot_be_parked_at_first_do_not_stand_still() {
    let impatient = Impatient::new(3, 10_000);
    let node = Atomizer::builder().conductor(impatient).atom(Narrow).start().await.unwrap();
    assert_eq!(node.call::<Narrow>(7).await.unwrap(), 13);
    node.drain().await.unwrap();
}
