//! A node of a test: a session with the steps that tests are made of, each bounded in time.

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use atomizer::{
    Address, AtomId, Census, Delivery, Electron, ElectronId, Envelope, Failure, FailureKind,
    Message, NodeId, Outcome, Payload, Properties, ReplyTo, ResultsId, SendError, Session,
    SettleError, Source, Subscription, Ticket,
};

use crate::World;

/// How long anything may take that should happen.
const SOON: Duration = Duration::from_secs(60);

pub(crate) const ATOM: AtomId = AtomId::from_static("conformance.atom");

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(SOON, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what} did not happen within {SOON:?}"),
    }
}

pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) session: Arc<dyn Session>,
}

impl Node {
    pub(crate) async fn new(world: &impl World, name: &str) -> Self {
        let id = NodeId::unique(name).expect("names in tests are valid");
        Self::again(world, &id).await
    }

    /// Opens one more session for a node. What was cut may take a moment to answer again.
    pub(crate) async fn again(world: &impl World, id: &NodeId) -> Self {
        let conductor = world.conductor();
        let opening = async {
            loop {
                match conductor.open(id).await {
                    Ok(session) => return session,
                    Err(atomizer::OpenError::Unreachable(_)) => tokio::task::yield_now().await,
                    Err(error) => panic!("failed to open a session: {error}"),
                }
            }
        };
        Self { id: id.clone(), session: soon("opening a session", opening).await }
    }

    pub(crate) async fn take(&self, window: usize) -> Taker {
        self.subscribe(Source::Atom(ATOM), window).await
    }

    pub(crate) async fn inbox(&self) -> Taker {
        self.subscribe(Source::Inbox, 16).await
    }

    /// Reads from a result address.
    pub(crate) async fn results(&self, id: &ResultsId) -> Taker {
        self.subscribe(Source::Results(id.clone()), 16).await
    }

    async fn subscribe(&self, source: Source, window: usize) -> Taker {
        let window = NonZeroUsize::new(window).expect("a window is not 0");
        let subscribed = soon("subscribing", self.session.subscribe(source, window)).await;
        Taker(subscribed.expect("the subscription is granted"))
    }

    pub(crate) async fn send(&self, electron: Electron) -> Result<(), SendError> {
        self.post(Address::Atom(electron.atom.clone()), electron.into()).await
    }

    pub(crate) async fn post(&self, to: Address, message: Message) -> Result<(), SendError> {
        let envelopes = [Envelope::new(to, message)];
        let mut results = soon("sending", self.session.send(&envelopes)).await;
        assert_eq!(results.len(), 1, "one result for each envelope");
        results.remove(0)
    }

    /// Sends an electron that must be safe, and returns its id.
    pub(crate) async fn send_text(&self, text: &str) -> ElectronId {
        let electron = electron(text);
        let id = electron.id;
        self.send(electron).await.expect("the electron is safe");
        id
    }

    pub(crate) async fn settle(
        &self,
        ticket: Ticket,
        emit: Vec<Envelope>,
    ) -> Result<(), SettleError> {
        self.settle_with(ticket, Outcome::done(emit)).await
    }

    pub(crate) async fn settle_with(
        &self,
        ticket: Ticket,
        outcome: Outcome,
    ) -> Result<(), SettleError> {
        let mut results = soon("settling", self.session.settle(vec![(ticket, outcome)])).await;
        assert_eq!(results.len(), 1, "one result for each settlement");
        results.remove(0)
    }

    /// Parks an electron with one more attempt counted: its changed form, and the new ticket.
    pub(crate) async fn park(&self, delivery: Delivery) -> (Arc<Electron>, Ticket) {
        let mut changed = Electron::clone(&electron_of(&delivery));
        changed.attempts += 1;
        changed.extra.insert("parked".into(), "yes".into());
        let changed = Arc::new(changed);
        let parked = self.try_park(delivery.ticket, Arc::clone(&changed)).await;
        (changed, parked.expect("it is parked"))
    }

    pub(crate) async fn try_park(
        &self,
        ticket: Ticket,
        changed: Arc<Electron>,
    ) -> Result<Ticket, SettleError> {
        soon("parking", self.session.park(ticket, changed)).await
    }

    /// Polls until the census fits.
    pub(crate) async fn census(&self, what: &str, fits: impl Fn(Census) -> bool) {
        let counting = async {
            while !fits(self.session.census(&ATOM).await.expect("the queue is counted")) {
                tokio::task::yield_now().await;
            }
        };
        soon(what, counting).await;
    }

    pub(crate) async fn close(&self) {
        soon("closing", self.session.close()).await;
    }
}

/// Receives one after the other.
pub(crate) struct Taker(pub(crate) Box<dyn Subscription>);

impl Taker {
    pub(crate) async fn one(&mut self) -> Delivery {
        let mut deliveries = soon("a delivery", self.up_to(1)).await;
        deliveries.remove(0)
    }

    pub(crate) async fn up_to(&mut self, max: usize) -> Vec<Delivery> {
        let max = NonZeroUsize::new(max).expect("not 0");
        let deliveries =
            soon("a delivery", self.0.next(max)).await.expect("the subscription lives");
        assert!(!deliveries.is_empty() && deliveries.len() <= max.get(), "{}", deliveries.len());
        deliveries
    }

    pub(crate) async fn electron(&mut self) -> (Arc<Electron>, Delivery) {
        let delivery = self.one().await;
        (electron_of(&delivery), delivery)
    }

    pub(crate) async fn answer(&mut self) -> (Arc<Properties>, Ticket) {
        let delivery = self.one().await;
        match delivery.message {
            Message::Answer(answer) => (answer, delivery.ticket),
            other => panic!("expected an answer, not {other:?}"),
        }
    }
}

pub(crate) fn electron(text: &str) -> Electron {
    Electron::new(ATOM, Payload::bytes(text.to_owned()))
}

pub(crate) fn electron_of(delivery: &Delivery) -> Arc<Electron> {
    match &delivery.message {
        Message::Electron(electron) => Arc::clone(electron),
        other => panic!("expected an electron, not {other:?}"),
    }
}

/// A failure as answer: what every conductor carries, however small its limit.
pub(crate) fn answer(electron: &Electron, node: &NodeId, reply_to: &ReplyTo) -> Envelope {
    let outcome = Err(Failure::new(FailureKind::Error, "on purpose"));
    let properties = Properties::new(electron, node.clone(), outcome);
    Envelope::new(Address::Reply(reply_to.clone()), properties.into())
}
