//! One conductor of a node: keeps a session open, and sends through whichever is open.
//!
//! Whatever a conductor is asked, it may fail, panic or never answer: [`guard`] makes an error of each. A
//! session that was caught at it is not trusted any more; it is let go of, and the next one opened.

use std::{
    fmt,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use backon::{BackoffBuilder, ExponentialBuilder};
use futures::FutureExt;
use rustc_hash::FxHashMap;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    AtomId, Conductor, ConductorId, Envelope, EventKind, EventLog, Limits, OpenError, Outcome,
    ReplyTo, ResultsId, SendError, Session, SessionError, SettleError, Ticket,
    cancel::Telling,
    clock,
    inline::Handing,
    metrics::{Level, OfLink},
    node::{Node, Stage},
    run::panic_message,
};

pub(crate) type SharedSession = Arc<dyn Session>;

/// How long a conductor may take over one request. A session that takes longer is let go of, unless it is blocked.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How often it is looked whether a session that has not answered is blocked.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How long stopping a subscription may take.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// So many panics of a conductor within the time are too many.
const PANICS_MAX: usize = 5;
const PANICS_WITHIN: Duration = Duration::from_secs(60);

pub(crate) struct Link {
    id: ConductorId,
    conductor: Arc<dyn Conductor>,
    /// The session that is open now. `None` while there is none.
    session: watch::Sender<Option<SharedSession>>,
    /// Where this node is answered, and how much an answer may be: known with the first session.
    inbox: OnceLock<(ReplyTo, Limits)>,
    /// Where the children of each atom are handed to that may run inline: all but singletons.
    handings: OnceLock<FxHashMap<AtomId, Handing>>,
    /// Children of which other nodes are to be told that nobody wants them.
    pub(crate) telling: Telling,
    give_up_after: Option<Duration>,
    faults: Faults,
    pub(crate) metrics: OfLink,
}

/// What a conductor was caught at.
#[derive(Default)]
struct Faults {
    /// Which session is not trusted any more, and why.
    distrusted: Mutex<Option<(Weak<dyn Session>, String)>>,
    /// Rung when a session is distrusted, or the conductor panicked too often.
    caught: Notify,
    panics: Mutex<Vec<Instant>>,
    gone: watch::Sender<bool>,
}

/// Why a conductor is given up.
#[derive(Clone, Debug)]
pub(crate) struct GaveUp {
    pub(crate) conductor: ConductorId,
    pub(crate) error: String,
    pub(crate) failures: u32,
    pub(crate) since: SystemTime,
}

/// How one request to a conductor went wrong.
#[derive(Debug)]
pub(crate) enum Fault {
    Panicked(String),
    NoAnswer(Duration),
    /// It has ended and does not say so.
    Useless(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Panicked(message) => write!(f, "panicked: {message}"),
            Self::NoAnswer(limit) => write!(f, "no answer within {limit:?}"),
            Self::Useless(reason) => write!(f, "of no use: {reason}"),
        }
    }
}

/// Awaits a conductor's answer: a panic is an error, and with a limit so is no answer.
pub(crate) async fn guard<T>(
    limit: impl Into<Option<Duration>>,
    request: impl Future<Output = T>,
) -> Result<T, Fault> {
    let caught = AssertUnwindSafe(request).catch_unwind();
    let answered = match limit.into() {
        Some(limit) => match timeout(limit, caught).await {
            Ok(answered) => answered,
            Err(_) => return Err(Fault::NoAnswer(limit)),
        },
        None => caught.await,
    };
    answered.map_err(|panic| Fault::Panicked(panic_message(&*panic).to_owned()))
}

/// Awaits a session's answer. Time in which the session is blocked does not count: it waits for its broker, and
/// nothing would come of letting go of it but that finished work runs again.
async fn answer<T>(session: &SharedSession, request: impl Future<Output = T>) -> Result<T, Fault> {
    let mut request = pin!(guard(None, request));
    let mut waited = Duration::ZERO;
    loop {
        if let Ok(answered) = timeout(LOOK_EVERY, &mut request).await {
            return answered;
        }
        let is_blocked = guard(None, async { session.is_blocked() }).await?;
        waited = if is_blocked { Duration::ZERO } else { waited + LOOK_EVERY };
        if waited >= ANSWER_TIMEOUT {
            return Err(Fault::NoAnswer(waited));
        }
    }
}

impl Link {
    /// `id` tells it from the node's other conductors, which may be of the same type and name.
    pub(crate) fn new(
        id: ConductorId,
        conductor: Arc<dyn Conductor>,
        give_up_after: Option<Duration>,
    ) -> Self {
        Self {
            metrics: OfLink::new(&id),
            id,
            conductor,
            session: watch::Sender::new(None),
            inbox: OnceLock::new(),
            handings: OnceLock::new(),
            telling: Telling::default(),
            give_up_after,
            faults: Faults::default(),
        }
    }

    pub(crate) fn event_log(&self) -> Option<Arc<dyn EventLog>> {
        self.conductor.event_log()
    }

    pub(crate) fn id(&self) -> &ConductorId {
        &self.id
    }

    pub(crate) fn sessions(&self) -> watch::Receiver<Option<SharedSession>> {
        self.session.subscribe()
    }

    /// Returns the session that is open now.
    pub(crate) fn session(&self) -> Option<SharedSession> {
        self.session.borrow().clone()
    }

    pub(crate) fn reply_to(&self) -> &ReplyTo {
        &self.inbox().0
    }

    pub(crate) fn limits(&self) -> Limits {
        self.inbox().1
    }

    /// Says where children are handed to, once the workers are there.
    pub(crate) fn set_handings(&self, handings: FxHashMap<AtomId, Handing>) {
        self.handings.get_or_init(|| handings);
    }

    pub(crate) fn handing(&self, atom: &AtomId) -> Option<&Handing> {
        self.handings.get()?.get(atom)
    }

    fn inbox(&self) -> &(ReplyTo, Limits) {
        self.inbox.get().expect("a node starts with a session of each conductor")
    }

    /// Opens the first session. Gives up when that is refused, or unreachable for `connect_timeout`.
    pub(crate) async fn open_first(
        &self,
        node: &Node,
        connect_timeout: Option<Duration>,
    ) -> Result<(), OpenError> {
        let deadline = connect_timeout.map(|timeout| Instant::now() + timeout);
        // What to say when the time is over in the middle of a try.
        let mut last = OpenError::Unreachable(format!("{:?} did not answer", self.conductor));
        for pause in backoff() {
            let open = self.open(node);
            let opened = match deadline {
                Some(deadline) => {
                    timeout_at(deadline, open).await.unwrap_or_else(|_| Err(last.clone()))
                }
                None => open.await,
            };
            last = match opened {
                Ok(()) => return Ok(()),
                Err(error @ OpenError::Unreachable(_)) if !self.is_gone() => error,
                Err(error) => return Err(error),
            };
            let left = deadline.map_or(Duration::MAX, |deadline| deadline - Instant::now());
            if left.is_zero() {
                return Err(last);
            }
            self.open_failed(node, &last, pause.min(left));
            sleep(pause.min(left)).await;
        }
        unreachable!("the backoff has no end")
    }

    /// Keeps a session open until the node closes, or the conductor is given up.
    pub(crate) async fn run(&self, node: &Node) -> Option<GaveUp> {
        let gave_up = tokio::select! {
            gave_up = self.reopen(node) => Some(gave_up),
            () = node.reached(Stage::Closing) => None,
        };
        let session = self.replace_session(None);
        if let Some(session) = session {
            drop(guard(ANSWER_TIMEOUT, session.close()).await);
        }
        if let Some(GaveUp { error, .. }) = &gave_up {
            self.faults.gone.send_replace(true);
            tracing::error!(conductor = %self.id(), %error, "conductor given up");
            node.events.emit(Some(self.id()), || EventKind::ConductorGone { error: error.clone() });
        }
        gave_up
    }

    async fn reopen(&self, node: &Node) -> GaveUp {
        let mut pauses = backoff();
        let mut down = Down::default();
        loop {
            let current = self.session.borrow().clone();
            if let Some(session) = current {
                let begun = Instant::now();
                let error = self.watch(&session).await;
                drop(self.replace_session(None));
                drop(session);
                self.metrics.lost.increment(1);
                tracing::warn!(conductor = %self.id(), %error, "session lost");
                node.events
                    .emit(Some(self.id()), || EventKind::SessionLost { error: error.clone() });
                down = Down::since_now(error);
                if self.is_gone() {
                    return down.gave_up(self.id());
                }
                if begun.elapsed() > STABLE_AFTER {
                    pauses = backoff();
                } else {
                    // Sessions that open and end at once must not become a hot loop.
                    sleep(next(&mut pauses)).await;
                }
            }
            while let Err(error) = self.open(node).await {
                down.failed(&error);
                if self.is_gone()
                    || self.give_up_after.is_some_and(|limit| down.for_longer_than(limit))
                {
                    return down.gave_up(self.id());
                }
                let pause = next(&mut pauses);
                self.open_failed(node, &error, pause);
                sleep(pause).await;
            }
            self.metrics.reopened.increment(1);
        }
    }

    /// Waits for the end of a session, and says why it ended.
    async fn watch(&self, session: &SharedSession) -> String {
        let ended = async {
            match guard(None, session.ended()).await {
                Ok(error) => error.to_string(),
                Err(fault) => self.caught(&fault),
            }
        };
        tokio::select! {
            error = ended => error,
            error = self.distrusted(session) => error,
        }
    }

    /// Waits until a session is not trusted any more, or the conductor is given up.
    async fn distrusted(&self, session: &SharedSession) -> String {
        loop {
            self.faults.caught.notified().await;
            let distrusted =
                self.faults.distrusted.lock().unwrap_or_else(PoisonError::into_inner).take();
            match distrusted {
                Some((which, why)) if which.ptr_eq(&Arc::downgrade(session)) => return why,
                _ if self.is_gone() => return "it panicked too often".to_owned(),
                // Of an earlier session, which is gone already.
                _ => {}
            }
        }
    }

    async fn open(&self, node: &Node) -> Result<(), OpenError> {
        let opening = async {
            let session = self.conductor.open(&node.id).await?;
            Ok((session.reply_to(), session.limits(), session))
        };
        let opened = guard(ANSWER_TIMEOUT, opening).await;
        let (reply_to, limits, session) =
            opened.unwrap_or_else(|fault| Err(OpenError::Unreachable(self.caught(&fault))))?;
        self.inbox.get_or_init(|| (reply_to, limits));
        tracing::info!(conductor = %self.id(), "session opened");
        node.events.emit(Some(self.id()), || EventKind::SessionOpened);
        drop(self.replace_session(Some(session)));
        Ok(())
    }

    /// The only place where the session changes, so that the count of those that are open is right.
    fn replace_session(&self, session: Option<SharedSession>) -> Option<SharedSession> {
        let opened = u8::from(session.is_some());
        let before = self.session.send_replace(session);
        self.metrics.sessions.increment(opened);
        self.metrics.sessions.decrement(u8::from(before.is_some()));
        before
    }

    fn open_failed(&self, node: &Node, error: &OpenError, retry_in: Duration) {
        self.metrics.open_failed.increment(1);
        tracing::warn!(conductor = %self.id(), %error, "failed to open a session; next try in {retry_in:.1?}");
        node.events
            .emit(Some(self.id()), || EventKind::OpenFailed { error: error.to_string(), retry_in });
    }

    /// Counts a panic, and returns what there is to say. Too many, and the conductor is given up.
    pub(crate) fn caught(&self, fault: &Fault) -> String {
        if let Fault::Panicked(_) = fault {
            let now = Instant::now();
            let mut panics = self.faults.panics.lock().unwrap_or_else(PoisonError::into_inner);
            panics.retain(|then| now.saturating_duration_since(*then) < PANICS_WITHIN);
            panics.push(now);
            if panics.len() >= PANICS_MAX {
                self.faults.gone.send_replace(true);
                self.faults.caught.notify_one();
            }
        }
        fault.to_string()
    }

    fn is_gone(&self) -> bool {
        *self.faults.gone.borrow()
    }

    /// Lets go of a session that cannot be relied on, if it is still the one that is open: what it holds is
    /// delivered again.
    pub(crate) fn distrust(&self, session: &SharedSession, fault: &Fault) -> String {
        let reason = self.caught(fault);
        if self.session.borrow().as_ref().is_some_and(|open| Arc::ptr_eq(open, session)) {
            let mut distrusted =
                self.faults.distrusted.lock().unwrap_or_else(PoisonError::into_inner);
            *distrusted = Some((Arc::downgrade(session), reason.clone()));
            drop(distrusted);
            self.faults.caught.notify_one();
        }
        reason
    }

    /// Asks something of a session. One that panics or does not answer is let go of.
    pub(crate) async fn ask<T>(
        &self,
        session: &SharedSession,
        request: impl Future<Output = T>,
    ) -> Result<T, SessionError> {
        let answered = answer(session, request).await;
        answered.map_err(|fault| SessionError::lost(self.distrust(session, &fault)))
    }

    /// Makes a result address, through as many sessions as that takes. The caller bounds the time.
    pub(crate) async fn make_results(&self, id: &ResultsId) -> Result<ReplyTo, SendError> {
        let mut pauses = backoff();
        loop {
            let Some(session) = self.opened_session().await else {
                return Err(SendError::Refused(format!("{} is given up", self.id())));
            };
            let made = self.ask(&session, session.make_results(id)).await;
            match made.unwrap_or_else(|error| Err(SendError::Unknown(error.to_string()))) {
                Err(SendError::Unknown(_) | SendError::NotTaken(_)) => {}
                made => return made,
            }
            sleep(next(&mut pauses)).await;
        }
    }

    /// Settles through a session. The results stand in the order of the batch; what a session does not say is
    /// not known.
    pub(crate) async fn settle(
        &self,
        session: &SharedSession,
        batch: Vec<(Ticket, Outcome)>,
    ) -> Vec<Result<(), SettleError>> {
        let count = batch.len();
        let _unconfirmed = self.unconfirmed(batch.iter().map(|(_, outcome)| emits(outcome)).sum());
        let unknown = |error: &SessionError| Err(SettleError::Unknown(error.clone()));
        match self.ask(session, session.settle(batch)).await {
            Ok(mut results) => {
                results.resize_with(count, || unknown(&SessionError::lost("no result")));
                results
            }
            Err(error) => std::iter::repeat_with(|| unknown(&error)).take(count).collect(),
        }
    }

    /// Makes envelopes safe, through as many sessions as that takes. The results stand in their order.
    ///
    /// What the session could not say, because it ended meanwhile, is sent again through the next one, under
    /// the same ids; so is what was not taken for now. The caller bounds the time.
    pub(crate) async fn send(&self, envelopes: &[Envelope]) -> Vec<Result<(), SendError>> {
        self.send_wanted(envelopes, |_| true).await
    }

    /// As [`send`](Self::send), but an envelope is not sent again when that is not wanted any more, by its place.
    pub(crate) async fn send_wanted(
        &self,
        envelopes: &[Envelope],
        wanted: impl Fn(usize) -> bool,
    ) -> Vec<Result<(), SendError>> {
        let mut unconfirmed = self.unconfirmed(envelopes.len());
        let open_now = self.session.borrow().clone();
        let results = match open_now {
            Some(session) => self.send_through(&session, envelopes).await,
            None => vec![Err(SendError::Unknown(String::new())); envelopes.len()],
        };
        if !results.iter().any(is_open) {
            return results;
        }
        // Boxed: it is seldom needed, and every send would have to have room for it.
        Box::pin(self.send_again(envelopes, results, wanted, &mut unconfirmed)).await
    }

    /// Sends again what is open, until nothing is, or what is left is not wanted any more.
    async fn send_again(
        &self,
        envelopes: &[Envelope],
        mut results: Vec<Result<(), SendError>>,
        wanted: impl Fn(usize) -> bool,
        unconfirmed: &mut Level,
    ) -> Vec<Result<(), SendError>> {
        let mut pauses = backoff();
        loop {
            let is_open = |&at: &usize| is_open(&results[at]) && wanted(at);
            let open: Vec<usize> = (0..results.len()).filter(is_open).collect();
            if open.is_empty() {
                return results;
            }
            unconfirmed.set(open.len());
            // A session that leaves something unknown is about to end; one that declines may want a rest.
            sleep(next(&mut pauses)).await;
            let Some(session) = self.opened_session().await else {
                for at in open {
                    results[at] = Err(SendError::Refused(format!("{} is given up", self.id())));
                }
                return results;
            };
            let batch: Vec<_> = open.iter().map(|&at| envelopes[at].clone()).collect();
            for (at, result) in open.into_iter().zip(self.send_through(&session, &batch).await) {
                results[at] = result;
            }
        }
    }

    /// Counts messages as not known to be safe, until it is dropped.
    fn unconfirmed(&self, messages: usize) -> Level {
        self.metrics.unconfirmed(messages)
    }

    /// Sends once. Waiting for room is right, however long it takes: the limit is the caller's.
    async fn send_through(
        &self,
        session: &SharedSession,
        envelopes: &[Envelope],
    ) -> Vec<Result<(), SendError>> {
        let unknown = |reason: &str| Err(SendError::Unknown(reason.to_owned()));
        match guard(None, session.send(envelopes)).await {
            Ok(mut results) => {
                results.resize_with(envelopes.len(), || unknown("no result"));
                results
            }
            Err(fault) => vec![unknown(&self.distrust(session, &fault)); envelopes.len()],
        }
    }

    /// Waits for a session; none when the conductor is given up.
    async fn opened_session(&self) -> Option<SharedSession> {
        let mut sessions = self.session.subscribe();
        let mut gone = self.faults.gone.subscribe();
        tokio::select! {
            biased;
            session = sessions.wait_for(Option::is_some) => {
                session.expect("its sender is in self").clone()
            }
            _ = gone.wait_for(|gone| *gone) => None,
        }
    }
}

/// How long there has been no session, and why.
struct Down {
    since: SystemTime,
    began: Instant,
    failures: u32,
    error: String,
}

impl Default for Down {
    fn default() -> Self {
        Self::since_now(String::new())
    }
}

impl Down {
    fn since_now(error: String) -> Self {
        Self { since: clock::now(), began: Instant::now(), failures: 0, error }
    }

    fn failed(&mut self, error: &OpenError) {
        self.failures = self.failures.saturating_add(1);
        self.error = error.to_string();
    }

    fn for_longer_than(&self, limit: Duration) -> bool {
        self.began.elapsed() >= limit
    }

    fn gave_up(self, conductor: &ConductorId) -> GaveUp {
        let Self { since, failures, error, .. } = self;
        GaveUp { conductor: conductor.clone(), error, failures, since }
    }
}

/// True when the same is to be sent again.
fn is_open(result: &Result<(), SendError>) -> bool {
    matches!(result, Err(SendError::Unknown(_) | SendError::NotTaken(_)))
}

/// How many messages an outcome emits.
fn emits(outcome: &Outcome) -> usize {
    match outcome {
        Outcome::Done { emit } => emit.len(),
        Outcome::Take {} | Outcome::Release {} => 0,
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Of a start that was given up, or whose supervisor failed.
        drop(self.replace_session(None));
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({:?})", self.conductor)
    }
}

/// How long a session must have lived for the next to be opened without a pause.
const STABLE_AFTER: Duration = Duration::from_secs(10);

pub(crate) fn next(pauses: &mut impl Iterator<Item = Duration>) -> Duration {
    pauses.next().expect("the backoff has no end")
}

/// The pauses between tries: from 50 ms doubling, with jitter that adds up to as much again, never more than
/// 1 s, without end.
pub(crate) fn backoff() -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_millis(500))
        .with_jitter()
        .without_max_times()
        .build()
}
