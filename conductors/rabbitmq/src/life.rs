//! Whether a session lives, and what ends it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use atomizer::SessionError;
use futures::{StreamExt, stream::BoxStream};
use lapin::{Connection, Event};
use tokio::{runtime::Handle, sync::watch, time::timeout};

use crate::connect::plain;

/// How long the broker may take over one request that is no publish.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long closing may take, each step.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// AMQP's reply code for "all is well".
pub(crate) const REPLY_SUCCESS: u16 = 200;

/// Whether a session has ended, and why. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Life(Arc<LifeState>);

#[derive(Debug)]
struct LifeState {
    ended: watch::Sender<Option<SessionError>>,
    /// The broker is short of memory or disk, and reads nothing from who publishes.
    blocked: AtomicBool,
}

impl Life {
    pub(crate) fn new() -> Self {
        Self(Arc::new(LifeState {
            ended: watch::Sender::new(None),
            blocked: AtomicBool::new(false),
        }))
    }

    pub(crate) fn is_blocked(&self) -> bool {
        self.0.blocked.load(Ordering::Relaxed)
    }

    /// Ends the session by a fault. The first reason stands.
    pub(crate) fn end(&self, reason: String) {
        self.end_with(SessionError::lost(reason));
    }

    pub(crate) fn end_with(&self, error: SessionError) {
        self.0.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(error);
            first
        });
    }

    /// Awaits something of the broker, but neither longer than `limit` nor than the session lives: requests
    /// that are under way when a connection breaks may never be answered, not even with an error.
    pub(crate) async fn bound<T>(
        &self,
        limit: Duration,
        request: impl Future<Output = lapin::Result<T>>,
    ) -> Result<T, SessionError> {
        tokio::select! {
            biased;
            answer = timeout(limit, request) => match answer {
                Ok(answer) => answer.map_err(|error| SessionError::lost(plain(&error))),
                Err(_) => Err(SessionError::lost(format!("no answer within {limit:?}"))),
            },
            error = self.ended() => Err(error),
        }
    }

    pub(crate) async fn ended(&self) -> SessionError {
        let mut ended = self.0.ended.subscribe();
        let error = ended.wait_for(Option::is_some).await.ok().and_then(|error| error.clone());
        error.unwrap_or(SessionError::Closed)
    }
}

/// Ends the session with the connection, and the connection with a session that a fault has ended, so that
/// the broker takes back at once what it delivered.
pub(crate) async fn watch_over(
    connection: Arc<Connection>,
    mut events: BoxStream<'static, Event>,
    life: Life,
) {
    let failed = async {
        // It may have ended before anyone listened.
        while connection.status().connected() {
            match events.next().await {
                Some(Event::ConnectionBlocked(reason)) => {
                    tracing::warn!(%reason, "the broker takes nothing for now");
                    life.0.blocked.store(true, Ordering::Relaxed);
                }
                Some(Event::ConnectionUnblocked) => {
                    tracing::info!("the broker takes messages again");
                    life.0.blocked.store(false, Ordering::Relaxed);
                }
                // Errors of single channels are told here too; those end their subscription only.
                Some(Event::Error(error)) if !connection.status().connected() => {
                    return plain(&error);
                }
                Some(_) => {}
                None => break,
            }
        }
        "the connection ended".to_owned()
    };
    tokio::select! {
        reason = failed => life.end(reason),
        error = life.ended() => {
            if !matches!(error, SessionError::Closed) {
                close(&connection).await;
            }
        }
    }
}

/// Closes a connection when it is dropped.
///
/// The client closes one that nobody holds any more; but a consumer that it is about to make holds it. Such a consumer
/// would be brought messages for ever that nobody takes.
pub(crate) struct CloseWhenDropped {
    connection: Arc<Connection>,
    runtime: Handle,
}

impl CloseWhenDropped {
    pub(crate) fn new(connection: &Arc<Connection>) -> Self {
        Self { connection: Arc::clone(connection), runtime: Handle::current() }
    }
}

impl Drop for CloseWhenDropped {
    fn drop(&mut self) {
        if self.connection.status().connected() {
            let connection = Arc::clone(&self.connection);
            // Not among the tasks of who held it: those end with it.
            self.runtime.spawn(async move { close(&connection).await });
        }
    }
}

pub(crate) async fn close(connection: &Connection) {
    let closing = connection.close(REPLY_SUCCESS, "the session has ended".into());
    // An error says that it is closed already.
    drop(timeout(CLOSE_TIMEOUT, closing).await);
}
