//! One subscription of a node, kept alive over sessions.

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use tokio::{
    sync::{oneshot, watch},
    time::sleep,
};

use crate::{
    AtomId, Delivery, EventKind, SessionError, Source, Subscription,
    ask::Asker,
    link::{Fault, Link, STOP_TIMEOUT, SharedSession, backoff, guard},
    metrics::{self, Level},
    node::Node,
};

pub(crate) struct Intake {
    node: Arc<Node>,
    link: Arc<Link>,
    source: Source,
    window: NonZeroUsize,
    sessions: watch::Receiver<Option<SharedSession>>,
    state: State,
    pauses: Box<dyn Iterator<Item = Duration> + Send>,
    /// How often in a row subscribing failed.
    refusals: u32,
    /// How much may be held, while there is a subscription to an atom.
    open_window: Option<Level>,
    /// Told once, when the first subscription was made or refused.
    tried: Option<oneshot::Sender<()>>,
}

/// Futures live here rather than on the stack of [`Intake::next`], which is dropped and called again.
enum State {
    NoSession,
    Subscribing(SharedSession, BoxFuture<'static, Result<Box<dyn Subscription>, SessionError>>),
    Open(SharedSession, Box<dyn Subscription>),
    Pausing(BoxFuture<'static, ()>),
}

/// What an intake has to tell.
pub(crate) enum Taken {
    Deliveries(Vec<Delivery>),
    /// The subscription was lost: tickets that came through it are stale.
    Lost,
    /// What was sent here before this subscription may be lost.
    Missed,
}

impl Intake {
    pub(crate) fn new(
        asker: &Asker,
        source: Source,
        window: NonZeroUsize,
        tried: oneshot::Sender<()>,
    ) -> Self {
        let Asker { node, link } = asker.clone();
        let open_window = match &source {
            Source::Atom(atom) => Some(metrics::window(atom, link.id())),
            Source::Inbox | Source::Results(_) => None,
        };
        Self {
            sessions: link.sessions(),
            open_window,
            node,
            link,
            source,
            window,
            state: State::NoSession,
            pauses: Box::new(backoff()),
            refusals: 0,
            tried: Some(tried),
        }
    }

    /// Waits for at most `max` deliveries, over as many sessions as that takes.
    ///
    /// Cancel safe.
    pub(crate) async fn next(&mut self, max: NonZeroUsize) -> Taken {
        loop {
            match &mut self.state {
                State::NoSession => {
                    let Ok(session) =
                        self.sessions.wait_for(Option::is_some).await.map(|held| held.clone())
                    else {
                        // The link is gone, and with it the node.
                        return std::future::pending().await;
                    };
                    if let Some(session) = session {
                        self.state = self.subscribe(session);
                    }
                }
                State::Subscribing(session, subscribing) => match subscribing.await {
                    Ok(subscription) => {
                        let session = Arc::clone(session);
                        let missed = subscription.may_have_missed();
                        self.subscribed();
                        self.state = State::Open(session, subscription);
                        if missed {
                            return Taken::Missed;
                        }
                    }
                    Err(error) => {
                        let session = Arc::clone(session);
                        self.refused(&session, &error);
                        self.lost(&error);
                    }
                },
                State::Open(session, subscription) => {
                    let next = guard(None, subscription.next(max));
                    let replaced = |now: &Option<SharedSession>| {
                        !now.as_ref().is_some_and(|now| Arc::ptr_eq(now, session))
                    };
                    let taken = tokio::select! {
                        biased;
                        // First: a subscription may miss that its session has ended, or is not trusted any more,
                        // and deliver what cannot be settled.
                        _ = self.sessions.wait_for(replaced) => {
                            Err(SessionError::lost("the session has ended"))
                        }
                        taken = next => taken.unwrap_or_else(|fault| {
                            Err(SessionError::lost(self.link.caught(&fault)))
                        }),
                    };
                    match taken {
                        // Not taken for an answer: asked again at once it would be a hot loop.
                        Ok(deliveries) if deliveries.is_empty() => {
                            self.lost(&SessionError::lost("a delivery of nothing"));
                            return Taken::Lost;
                        }
                        Ok(deliveries) => return Taken::Deliveries(deliveries),
                        Err(error) => {
                            self.lost(&error);
                            return Taken::Lost;
                        }
                    }
                }
                State::Pausing(pause) => {
                    pause.await;
                    self.state = State::NoSession;
                }
            }
        }
    }

    fn subscribe(&self, session: SharedSession) -> State {
        let (source, window) = (self.source.clone(), self.window);
        let (subscriber, link) = (Arc::clone(&session), Arc::clone(&self.link));
        let subscribing =
            Box::pin(
                async move { link.ask(&subscriber, subscriber.subscribe(source, window)).await? },
            );
        State::Subscribing(session, subscribing)
    }

    /// Takes no more. A conductor that does not answer is not waited for.
    pub(crate) async fn stop(&mut self) {
        self.set_window(0);
        let stopping = guard(STOP_TIMEOUT, async {
            if let State::Subscribing(_, subscribing) = &mut self.state {
                // It may come into being all the same, and would hold what is meant for others.
                if let Ok(mut subscription) = subscribing.await {
                    subscription.stop().await;
                }
                self.state = State::NoSession;
            }
            if let State::Open(_, subscription) = &mut self.state {
                subscription.stop().await;
            }
        });
        if let Err(fault) = stopping.await {
            let conductor = self.link.id();
            tracing::warn!(%conductor, source = ?self.source, %fault, "failed to stop a subscription");
        }
    }

    /// A session that has ended says so. One that does not, and refuses what is the node's own again and again,
    /// is of no use all the same.
    fn refused(&mut self, session: &SharedSession, error: &SessionError) {
        const REFUSALS_MAX: u32 = 5;
        self.refusals += 1;
        if self.source == Source::Inbox && self.refusals.is_multiple_of(REFUSALS_MAX) {
            self.link.distrust(session, &Fault::Useless(error.to_string()));
        }
    }

    fn subscribed(&mut self) {
        self.refusals = 0;
        self.pauses = Box::new(backoff());
        drop(self.tried.take());
        self.set_window(self.window.get());
        let atom = self.atom();
        tracing::debug!(conductor = %self.link.id(), source = ?self.source, "subscribed");
        self.node.events.emit(Some(self.link.id()), || EventKind::Subscribed { atom });
    }

    fn lost(&mut self, error: &SessionError) {
        // Closing in order is no fault to be told of.
        if !matches!(error, SessionError::Closed) {
            self.link.metrics.subscriptions_lost.increment(1);
            let atom = self.atom();
            let conductor = self.link.id();
            tracing::warn!(%conductor, source = ?self.source, %error, "subscription lost");
            self.node.events.emit(Some(conductor), || EventKind::SubscriptionLost {
                atom,
                error: error.to_string(),
            });
        }
        drop(self.tried.take());
        self.set_window(0);
        let pause = self.pauses.next().expect("the backoff has no end");
        self.state = State::Pausing(Box::pin(sleep(pause)));
    }

    fn set_window(&mut self, electrons: usize) {
        if let Some(window) = &mut self.open_window {
            window.set(electrons);
        }
    }

    fn atom(&self) -> Option<AtomId> {
        match &self.source {
            Source::Atom(atom) => Some(atom.clone()),
            Source::Inbox | Source::Results(_) => None,
        }
    }
}
