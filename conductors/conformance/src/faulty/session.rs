//! A session that misbehaves, and its subscriptions.

use std::{fmt, num::NonZeroUsize, sync::Arc};

use async_trait::async_trait;
use atomizer::{
    Address, AtomId, Census, Delivery, Electron, Envelope, Limits, Message, Outcome, ReplyTo,
    ResultsId, SendError, Session, SessionError, SettleError, Source, Subscription, Ticket,
};

use super::{
    Fault, Faults, ON_PURPOSE, Op,
    life::{Life, PARKED},
    lost,
};

pub(super) struct FaultySession {
    life: Arc<Life>,
    faults: Faults,
    limits: Limits,
    reply_to: ReplyTo,
}

impl FaultySession {
    pub(super) fn new(inner: Arc<dyn Session>, faults: Faults) -> Self {
        let (limits, reply_to) = (inner.limits(), inner.reply_to());
        let life = Arc::new(Life::new(inner));
        faults.add_session(&life);
        Self { life, faults, limits, reply_to }
    }

    pub(super) fn life(&self) -> &Life {
        &self.life
    }

    /// Settles a batch; where there is an error, what would emit something gets that instead.
    async fn settle_all(
        &self,
        batch: Vec<(Ticket, Outcome)>,
        instead: Option<SendError>,
    ) -> Vec<Result<(), SettleError>> {
        let mut places = Vec::with_capacity(batch.len());
        let mut beneath = Vec::with_capacity(batch.len());
        for (ticket, outcome) in batch {
            let channel = ticket.channel();
            let known = match (self.life.unwrap(ticket), outcome, &instead) {
                (Err(error), ..) => Some(error),
                (Ok(ticket), Outcome::Done { emit, .. }, Some(error)) if !emit.is_empty() => {
                    Some(not_safe(ticket, emit, error))
                }
                (Ok(ticket), outcome, _) => {
                    beneath.push((ticket, outcome));
                    None
                }
            };
            places.push((channel, known));
        }
        let settled = self.life.within(|inner| async move { inner.settle(beneath).await }).await;
        let (settled, error) = match settled {
            Ok(settled) => (settled, SessionError::lost("there is no result")),
            Err(error) => (Vec::new(), error),
        };
        let mut settled = settled.into_iter();
        let result = |(channel, known): (u32, Option<SettleError>)| {
            let result = match known {
                Some(error) => Err(error),
                None => settled.next().unwrap_or_else(|| Err(SettleError::Unknown(error.clone()))),
            };
            result.map_err(|error| self.life.unsettled(channel, error))
        };
        places.into_iter().map(result).collect()
    }
}

/// Sends nothing of it.
fn not_safe(ticket: Ticket, emit: Vec<Envelope>, error: &SendError) -> SettleError {
    let failed = emit.into_iter().map(|one| (one, error.clone()));
    SettleError::NotSafe { ticket, failed: failed.collect() }
}

fn not_taken() -> SendError {
    SendError::NotTaken(ON_PURPOSE.to_owned())
}

fn refused() -> SendError {
    SendError::Refused(ON_PURPOSE.to_owned())
}

/// Keeps a ticket from giving its delivery back.
fn keep(ticket: Ticket) {
    let _in_the_table = ticket.take();
}

fn unknown() -> SettleError {
    SettleError::Unknown(lost())
}

#[async_trait]
impl Session for FaultySession {
    async fn make_results(&self, id: &ResultsId) -> Result<ReplyTo, SendError> {
        let make = |inner: Arc<dyn Session>| async move { inner.make_results(id).await };
        let made = self.life.within(make).await;
        made.unwrap_or_else(|error| Err(SendError::Unknown(error.to_string())))
    }

    fn limits(&self) -> Limits {
        self.faults.now(Op::Limits);
        self.limits
    }

    fn reply_to(&self) -> ReplyTo {
        self.faults.now(Op::ReplyTo);
        self.reply_to.clone()
    }

    async fn subscribe(
        &self,
        source: Source,
        window: NonZeroUsize,
    ) -> Result<Box<dyn Subscription>, SessionError> {
        let fault = self.faults.before(Op::Subscribe).await;
        match fault {
            Some(Fault::Error) => return Err(lost()),
            Some(Fault::EndSession) => drop(self.life.end(&lost())),
            _ => {}
        }
        let subscribe =
            |inner: Arc<dyn Session>| async move { inner.subscribe(source, window).await };
        let inner = self.life.within(subscribe).await??;
        if self.faults.after(Op::Subscribe, fault).await {
            return Err(lost());
        }
        Ok(Box::new(FaultySubscription {
            inner: Some(inner),
            channel: self.life.channel(),
            life: Arc::clone(&self.life),
            faults: self.faults.clone(),
        }))
    }

    async fn send(&self, envelopes: &[Envelope]) -> Vec<Result<(), SendError>> {
        let fault = self.faults.before(Op::Send).await;
        let all = |error: SendError| vec![Err(error); envelopes.len()];
        let unknown = |error: SessionError| all(SendError::Unknown(error.to_string()));
        match fault {
            Some(Fault::Error) => return unknown(lost()),
            Some(Fault::NotTaken) => return all(not_taken()),
            Some(Fault::Refuse) => return all(refused()),
            Some(Fault::EndSession) => drop(self.life.end(&lost())),
            _ => {}
        }
        let send = |inner: Arc<dyn Session>| async move {
            if fault == Some(Fault::Twice) {
                drop(inner.send(envelopes).await);
            }
            inner.send(envelopes).await
        };
        let mut results = self.life.within(send).await.unwrap_or_else(unknown);
        if self.faults.after(Op::Send, fault).await {
            return unknown(lost());
        }
        if fault == Some(Fault::Fewer) {
            results.pop();
        }
        results
    }

    async fn settle(&self, batch: Vec<(Ticket, Outcome)>) -> Vec<Result<(), SettleError>> {
        let fault = self.faults.before(Op::Settle).await;
        let count = batch.len();
        let all = |error: fn() -> SettleError| (0..count).map(|_| Err(error())).collect();
        match fault {
            Some(Fault::Error) => {
                batch.into_iter().for_each(|(ticket, _)| keep(ticket));
                return all(unknown);
            }
            Some(Fault::Drop) => return all(unknown),
            Some(Fault::Stale) => return all(|| SettleError::Stale),
            Some(Fault::EndSession) => {
                self.life.end(&lost());
                return all(unknown);
            }
            _ => {}
        }
        let instead = match fault {
            Some(Fault::NotTaken) => Some(not_taken()),
            Some(Fault::Refuse) => Some(refused()),
            _ => None,
        };
        let mut results = self.settle_all(batch, instead).await;
        if self.faults.after(Op::Settle, fault).await {
            return all(unknown);
        }
        if fault == Some(Fault::Fewer) {
            results.pop();
        }
        results
    }

    async fn park(&self, ticket: Ticket, changed: Arc<Electron>) -> Result<Ticket, SettleError> {
        let fault = self.faults.before(Op::Park).await;
        match fault {
            Some(Fault::Error) => {
                keep(ticket);
                return Err(unknown());
            }
            Some(Fault::Drop) => return Err(unknown()),
            Some(Fault::Stale) => return Err(SettleError::Stale),
            Some(Fault::NotTaken) => {
                let to = Address::Atom(changed.atom.clone());
                let envelope = Envelope::new(to, Message::Electron(changed));
                return Err(not_safe(ticket, vec![envelope], &not_taken()));
            }
            Some(Fault::EndSession) => {
                self.life.end(&lost());
                return Err(unknown());
            }
            _ => {}
        }
        let channel = ticket.channel();
        let ticket = self.life.unwrap(ticket)?;
        let parked = self.life.within(|inner| async move { inner.park(ticket, changed).await });
        let parked = parked.await.map_err(SettleError::Unknown)?;
        let mut ticket = parked.map_err(|error| self.life.unsettled(channel, error))?;
        if !self.life.wrap(PARKED, &mut ticket) {
            return Err(SettleError::Unknown(self.life.error()));
        }
        match self.faults.after(Op::Park, fault).await {
            true => Err(unknown()),
            false => Ok(ticket),
        }
    }

    async fn census(&self, atom: &AtomId) -> Result<Census, SessionError> {
        let fault = self.faults.before(Op::Census).await;
        match fault {
            Some(Fault::Error) => return Err(lost()),
            Some(Fault::EndSession) => drop(self.life.end(&lost())),
            _ => {}
        }
        let census = self.life.within(|inner| async move { inner.census(atom).await }).await??;
        match self.faults.after(Op::Census, fault).await {
            true => Err(lost()),
            false => Ok(census),
        }
    }

    fn is_blocked(&self) -> bool {
        self.life.is_blocked()
    }

    async fn ended(&self) -> SessionError {
        let fault = self.faults.before(Op::Ended).await;
        if fault == Some(Fault::EndSession) {
            self.life.end(&lost());
        }
        let ended = self.life.within(|inner| async move { inner.ended().await }).await;
        self.faults.after(Op::Ended, fault).await;
        ended.unwrap_or_else(|error| error)
    }

    async fn close(&self) {
        let fault = self.faults.before(Op::Close).await;
        if fault == Some(Fault::EndSession) {
            self.life.end(&lost());
        }
        // One that has ended has nothing to close.
        drop(self.life.within(|inner| async move { inner.close().await }).await);
        self.faults.after(Op::Close, fault).await;
    }
}

impl Drop for FaultySession {
    fn drop(&mut self) {
        self.life.end(&SessionError::Closed);
    }
}

impl fmt::Debug for FaultySession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultySession({:?})", self.life)
    }
}

struct FaultySubscription {
    /// Gone when it, or its session, was ended by a fault.
    inner: Option<Box<dyn Subscription>>,
    channel: u32,
    life: Arc<Life>,
    faults: Faults,
}

impl FaultySubscription {
    async fn take(&mut self, max: NonZeroUsize) -> Result<Vec<Delivery>, SessionError> {
        let Some(inner) = &mut self.inner else {
            return Err(self.life.reason().unwrap_or_else(lost));
        };
        let taken = tokio::select! {
            biased;
            error = self.life.ended() => Err(error),
            taken = inner.next(max) => return self.wrap(taken?),
        };
        self.inner = None;
        taken
    }

    fn wrap(&self, mut deliveries: Vec<Delivery>) -> Result<Vec<Delivery>, SessionError> {
        let mut wrap = |delivery: &mut Delivery| self.life.wrap(self.channel, &mut delivery.ticket);
        match deliveries.iter_mut().all(&mut wrap) {
            true => Ok(deliveries),
            false => Err(self.life.error()),
        }
    }
}

#[async_trait]
impl Subscription for FaultySubscription {
    async fn next(&mut self, max: NonZeroUsize) -> Result<Vec<Delivery>, SessionError> {
        let fault = self.faults.before(Op::Next).await;
        match fault {
            Some(Fault::Error) => return Err(lost()),
            Some(Fault::Fewer) => return Ok(Vec::new()),
            Some(Fault::EndSubscription) => {
                self.inner = None;
                self.life.end_channel(self.channel);
                return Err(lost());
            }
            Some(Fault::EndSession) => drop(self.life.end(&lost())),
            _ => {}
        }
        let deliveries = self.take(max).await?;
        match self.faults.after(Op::Next, fault).await {
            true => Err(lost()),
            false => Ok(deliveries),
        }
    }

    async fn stop(&mut self) {
        let fault = self.faults.before(Op::Stop).await;
        if fault == Some(Fault::EndSession) {
            self.life.end(&lost());
        }
        if let Some(inner) = &mut self.inner {
            tokio::select! {
                biased;
                _ = self.life.ended() => {}
                () = inner.stop() => {}
            }
        }
        self.faults.after(Op::Stop, fault).await;
    }
}
