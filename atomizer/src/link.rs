//! One conductor of a node: keeps a session open, and sends through whichever is open.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout_at},
};

use crate::{
    Conductor, ConductorId, Envelope, EventKind, Limits, OpenError, ReplyTo, SendError, Session,
    node::{Node, Stage},
};

pub(crate) type SharedSession = Arc<dyn Session>;

pub(crate) struct Link {
    id: ConductorId,
    conductor: Arc<dyn Conductor>,
    /// The session that is open now. `None` while there is none.
    session: watch::Sender<Option<SharedSession>>,
    /// Where this node is answered, and how much an answer may be: known with the first session.
    inbox: OnceLock<(ReplyTo, Limits)>,
}

impl Link {
    /// `id` tells it from the node's other conductors, which may be of the same type and name.
    pub(crate) fn new(id: ConductorId, conductor: Arc<dyn Conductor>) -> Self {
        Self { id, conductor, session: watch::Sender::new(None), inbox: OnceLock::new() }
    }

    pub(crate) fn id(&self) -> &ConductorId {
        &self.id
    }

    pub(crate) fn sessions(&self) -> watch::Receiver<Option<SharedSession>> {
        self.session.subscribe()
    }

    pub(crate) fn reply_to(&self) -> &ReplyTo {
        &self.inbox().0
    }

    pub(crate) fn limits(&self) -> Limits {
        self.inbox().1
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
            let open = self.conductor.open(&node.id);
            let opened = match deadline {
                Some(deadline) => {
                    timeout_at(deadline, open).await.unwrap_or_else(|_| Err(last.clone()))
                }
                None => open.await,
            };
            last = match opened {
                Ok(session) => {
                    self.inbox.get_or_init(|| (session.reply_to(), session.limits()));
                    self.opened(node, session);
                    return Ok(());
                }
                Err(error @ OpenError::Unreachable(_)) => error,
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

    /// Keeps a session open until the node closes.
    pub(crate) async fn run(&self, node: &Node) {
        tokio::select! {
            () = self.reopen_for_ever(node) => {}
            () = node.reached(Stage::Closing) => {}
        }
        let session = self.session.send_replace(None);
        if let Some(session) = session {
            session.close().await;
        }
    }

    async fn reopen_for_ever(&self, node: &Node) {
        let mut pauses = backoff();
        loop {
            let current = self.session.borrow().clone();
            if let Some(session) = current {
                let begun = Instant::now();
                let error = session.ended().await;
                self.session.send_replace(None);
                tracing::warn!(conductor = %self.id(), %error, "session lost");
                node.events
                    .emit(Some(self.id()), || EventKind::SessionLost { error: error.to_string() });
                if begun.elapsed() > STABLE_AFTER {
                    pauses = backoff();
                } else {
                    // Sessions that open and end at once must not become a hot loop.
                    sleep(next(&mut pauses)).await;
                }
            }
            while let Err(error) = self.reopen(node).await {
                let pause = next(&mut pauses);
                self.open_failed(node, &error, pause);
                sleep(pause).await;
            }
        }
    }

    async fn reopen(&self, node: &Node) -> Result<(), OpenError> {
        let session = self.conductor.open(&node.id).await?;
        self.opened(node, session);
        Ok(())
    }

    fn opened(&self, node: &Node, session: SharedSession) {
        tracing::info!(conductor = %self.id(), "session opened");
        node.events.emit(Some(self.id()), || EventKind::SessionOpened);
        self.session.send_replace(Some(session));
    }

    fn open_failed(&self, node: &Node, error: &OpenError, retry_in: Duration) {
        tracing::warn!(conductor = %self.id(), %error, "failed to open a session; next try in {retry_in:.1?}");
        node.events
            .emit(Some(self.id()), || EventKind::OpenFailed { error: error.to_string(), retry_in });
    }

    /// Makes envelopes safe, through as many sessions as that takes. The results stand in their order.
    ///
    /// What a lost session leaves unknown is sent again, under the same ids. No result is
    /// [`SendError::Unknown`] or [`SendError::NotTaken`]; the caller bounds the time.
    pub(crate) async fn send(&self, envelopes: &[Envelope]) -> Vec<Result<(), SendError>> {
        let open_now = self.session.borrow().clone();
        let mut results = match open_now {
            Some(session) => session.send(envelopes).await,
            None => vec![Err(SendError::Unknown(String::new())); envelopes.len()],
        };
        let mut pauses = backoff();
        loop {
            let open: Vec<usize> = (0..results.len()).filter(|&at| is_open(&results[at])).collect();
            if open.is_empty() {
                return results;
            }
            // A session that leaves something unknown is about to end; one that declines may want a rest.
            sleep(next(&mut pauses)).await;
            let session = self.opened_session().await;
            let batch: Vec<_> = open.iter().map(|&at| envelopes[at].clone()).collect();
            for (at, result) in open.into_iter().zip(session.send(&batch).await) {
                results[at] = result;
            }
        }
    }

    async fn opened_session(&self) -> SharedSession {
        let mut sessions = self.session.subscribe();
        let session = sessions.wait_for(Option::is_some).await.expect("its sender is in self");
        session.clone().expect("it was waited for")
    }
}

/// True when the same is to be sent again.
fn is_open(result: &Result<(), SendError>) -> bool {
    matches!(result, Err(SendError::Unknown(_) | SendError::NotTaken(_)))
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({:?})", self.conductor)
    }
}

/// How long a session must have lived for the next to be opened without a pause.
const STABLE_AFTER: Duration = Duration::from_secs(10);

fn next(pauses: &mut impl Iterator<Item = Duration>) -> Duration {
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
