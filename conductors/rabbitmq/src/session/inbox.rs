//! Gets over an inbox that cannot be consumed.

use std::{sync::Arc, time::Duration};

use atomizer::SessionError;
use lapin::{Channel, options::QueueDeleteOptions};
use tokio::time::sleep;

use super::{RabbitSession, consume::NotConsumed};
use crate::{declare::on_own_channel, life::REQUEST_TIMEOUT};

/// How long it takes until an inbox that cost a connection is tried again.
const INBOX_PAUSE: Duration = Duration::from_secs(5);
/// How long deleting a queue without a leader may take: a broker asks each of its members first, for 5 s.
const LEADERLESS_DELETE_TIMEOUT: Duration = Duration::from_secs(30);

impl RabbitSession {
    /// Gets over an inbox that has no leader and gets none, or whose process is down. Once it has failed for a while, and
    /// another queue is consumed, it is deleted, and the session ends: the next one makes it anew, and what was asked is
    /// asked again.
    pub(super) async fn inbox_failed(&self, failed: NotConsumed) -> SessionError {
        let inbox = self.topology.inbox_queue(&self.node);
        if !self.options.inboxes.fails_for_long(&self.node) {
            if let NotConsumed::Down(_) = &failed {
                // A session that refuses the inbox again and again is let go of.
                tokio::select! {
                    () = sleep(INBOX_PAUSE) => {}
                    _ = self.life.ended() => {}
                }
            }
            return failed.into();
        }
        let error = SessionError::from(failed);
        // Where too few brokers are left for any queue, this one has a leader when they are back.
        if let Err(error) = self.try_another_inbox().await {
            return error;
        }
        tracing::warn!(inbox, %error, "an inbox that cannot be consumed is deleted, and made anew");
        let error = self.delete_leaderless(inbox.clone()).await.map_or_else(
            |error| error,
            |()| SessionError::lost(format!("{inbox} could not be consumed, and was deleted")),
        );
        self.life.end_with(error.clone());
        error
    }

    /// Makes a queue that is like the inbox and consumes it, and removes it again.
    async fn try_another_inbox(&self) -> Result<(), SessionError> {
        let name = self.topology.trial_queue(&self.node, self.epoch);
        self.options.inboxes.tries(&name);
        let declaring = self.topology.declare_inbox(&self.consuming, &name);
        self.life.bound(REQUEST_TIMEOUT, declaring).await?;
        let consumed = self.consume(&name, 1).await;
        self.delete_trial(name.clone()).await;
        Ok(consumed.map(drop)?)
    }

    /// Deletes a queue that was made only to try it, or leaves that to the next session: it may have no leader
    /// either, and would then be there for ever.
    pub(super) fn delete_trial(&self, name: String) -> impl Future<Output = ()> + Send + 'static {
        let (inboxes, deleting) =
            (self.options.inboxes.clone(), self.delete_leaderless(name.clone()));
        async move {
            if deleting.await.is_ok() {
                inboxes.tried(&name);
            }
        }
    }

    fn delete_leaderless(
        &self,
        queue: String,
    ) -> impl Future<Output = Result<(), SessionError>> + Send + 'static {
        let (life, publishing) = (self.life.clone(), Arc::clone(&self.publishing));
        async move {
            let delete = async |channel: &Channel| {
                channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await
            };
            let deleting = on_own_channel(&publishing, delete);
            life.bound(LEADERLESS_DELETE_TIMEOUT, deleting).await.map(drop)
        }
    }
}
