//! Begins to consume a queue, which may be silent or down.

use std::time::Duration;

use atomizer::SessionError;
use lapin::{
    Channel, Connection, Consumer,
    options::{BasicConsumeOptions, BasicQosOptions},
    types::FieldTable,
};
use tokio::{runtime::Handle, time::timeout};

use super::RabbitSession;
use crate::{
    life::{Life, REPLY_SUCCESS, REQUEST_TIMEOUT},
    opened::Opened,
    quarantine,
};

impl RabbitSession {
    /// Begins to consume, though not before that is known to be safe where it has cost a session.
    pub(super) async fn consume_safely(
        &self,
        queue: &str,
        prefetch: u16,
    ) -> Result<(Channel, Consumer), NotConsumed> {
        let quarantine = &self.options.quarantine;
        if quarantine.holds(queue)
            && let Err(failed) = self.probe(queue).await
        {
            // What says nothing of the queue must not keep it here.
            if failed.is_of_queue() {
                quarantine.add(queue);
            }
            return Err(failed);
        }
        let consumed = self.consume(queue, prefetch).await;
        if let Err(NotConsumed::Down(_)) = &consumed {
            quarantine.add(queue);
        }
        consumed
    }

    /// Finds out over a connection of its own whether a queue can be consumed. It may be brought one delivery, which goes
    /// back.
    async fn probe(&self, queue: &str) -> Result<(), NotConsumed> {
        let probing = async {
            let connecting = Opened::connect(&self.address, &self.node, "probes", REQUEST_TIMEOUT);
            let probe = connecting.await.map_err(SessionError::lost)?;
            drop(self.consume_over(&probe.connection, &probe.life, queue, 1).await?);
            probe.close().await;
            Ok(())
        };
        tokio::select! {
            probed = probing => probed,
            error = self.life.ended() => Err(error.into()),
        }
    }

    pub(super) async fn consume(
        &self,
        queue: &str,
        prefetch: u16,
    ) -> Result<(Channel, Consumer), NotConsumed> {
        self.consume_over(&self.consuming, &self.life, queue, prefetch).await
    }

    async fn consume_over(
        &self,
        connection: &Connection,
        life: &Life,
        queue: &str,
        prefetch: u16,
    ) -> Result<(Channel, Consumer), NotConsumed> {
        let channel = life.bound(REQUEST_TIMEOUT, connection.create_channel()).await?;
        let runtime = Handle::current();
        let mut unused = Unused { session: self, channel: Some(channel.clone()), runtime };
        let consuming = async {
            channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            let tag = self.node.as_str().into();
            channel.basic_consume(queue.into(), tag, options, FieldTable::default()).await
        };
        let answered = async { timeout(REQUEST_TIMEOUT, consuming).await.ok().transpose() };
        match life.bound(Duration::MAX, answered).await {
            Ok(Some(consumer)) => {
                unused.channel = None;
                Ok((channel, consumer))
            }
            Ok(None) => Err(NotConsumed::Silent(silent(queue))),
            Err(error) if quarantine::is_internal(&error) => {
                Err(NotConsumed::Down(down(queue, &error)))
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Why a queue is not consumed.
pub(super) enum NotConsumed {
    /// There was no answer, as with a queue without a leader.
    Silent(SessionError),
    /// That cost the connection: its process may be down.
    Down(SessionError),
    /// It is not known to be the queue's fault.
    Other(SessionError),
}

impl NotConsumed {
    /// Whether another queue may be well.
    pub(super) fn is_of_queue(&self) -> bool {
        matches!(self, Self::Silent(_) | Self::Down(_))
    }
}

impl From<SessionError> for NotConsumed {
    fn from(error: SessionError) -> Self {
        Self::Other(error)
    }
}

impl From<NotConsumed> for SessionError {
    fn from(failed: NotConsumed) -> Self {
        match failed {
            NotConsumed::Silent(error) | NotConsumed::Down(error) | NotConsumed::Other(error) => {
                error
            }
        }
    }
}

/// A channel that is closed unless it comes to be used. A consumer that comes into being when nobody waits for it
/// any more would hold for ever what nobody takes from it: the client keeps it, and with it the channel.
struct Unused<'session> {
    session: &'session RabbitSession,
    channel: Option<Channel>,
    runtime: Handle,
}

impl Drop for Unused<'_> {
    fn drop(&mut self) {
        let Some(channel) = self.channel.take() else { return };
        self.session.spawn_on(&self.runtime, async move {
            let closing = channel.close(REPLY_SUCCESS, "too late".into());
            drop(timeout(REQUEST_TIMEOUT, closing).await);
        });
    }
}

/// Says what it may mean that a queue cannot be consumed.
fn silent(queue: &str) -> SessionError {
    SessionError::lost(format!(
        "{queue} did not answer within {REQUEST_TIMEOUT:?}; if that goes on it is without a leader, and docs/failures.md \
         says what to do"
    ))
}

/// Says what it may mean that consuming a queue cost the connection.
fn down(queue: &str, error: &SessionError) -> SessionError {
    SessionError::lost(format!(
        "{error}: {queue} cannot be consumed; its process may be down, and docs/failures.md says what to do"
    ))
}
