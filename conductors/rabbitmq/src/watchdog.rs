//! Notices a consumer that is brought nothing while its queue has something for it.
//!
//! Everything may look well then: the connection beats, the channel is open, the client believes in its consumer.
//! It is the broker that has forgotten it, or that cannot reach the queue's leader. Nobody else would ever say so,
//! and the worker would look alive and consume nothing.

use std::{sync::Arc, time::Duration};

use atomizer::SessionError;
use futures::future::BoxFuture;
use lapin::{Channel, Connection, Queue, options::QueueDeclareOptions, types::FieldTable};
use tokio::time::{Instant, sleep_until};

use crate::{
    declare::on_own_channel,
    life::{Life, REQUEST_TIMEOUT},
};

/// How long a consumer may be brought nothing before the broker is asked, unless told otherwise.
pub(crate) const PERIOD_DEFAULT: Duration = Duration::from_secs(10);

/// How often in a row the answer must speak against the consumer: what is ready at one moment may be on its way.
const SUSPICIONS_MAX: u32 = 2;

/// Watches one consumer.
pub(crate) struct Watchdog {
    queue: String,
    connection: Arc<Connection>,
    life: Life,
    period: Duration,
    look_at: Instant,
    /// What the broker has been asked and has not answered. It lives here, as [`bite`](Self::bite) is dropped and
    /// called again: on a busy worker it would never be answered there.
    looking: Option<BoxFuture<'static, Result<Option<String>, SessionError>>>,
    suspicions: u32,
}

impl Watchdog {
    pub(crate) fn new(
        queue: String,
        connection: Arc<Connection>,
        life: Life,
        period: Duration,
    ) -> Self {
        let look_at = Instant::now() + period;
        Self { queue, connection, life, period, look_at, looking: None, suspicions: 0 }
    }

    /// Notes that something was delivered.
    pub(crate) fn feed(&mut self) {
        self.suspicions = 0;
        self.looking = None;
        self.look_at = Instant::now() + self.period;
    }

    /// Waits until something is wrong, and says what. `may_expect` tells whether something would be delivered.
    ///
    /// Cancel safe.
    pub(crate) async fn bite(&mut self, may_expect: impl Fn() -> bool) -> SessionError {
        loop {
            let looked = match &mut self.looking {
                Some(looking) => looking.await,
                None => {
                    sleep_until(self.look_at).await;
                    if may_expect() {
                        self.looking = Some(self.look());
                        continue;
                    }
                    Ok(None)
                }
            };
            self.looking = None;
            self.look_at = Instant::now() + self.period;
            match looked {
                Ok(Some(wrong)) if self.suspicions + 1 >= SUSPICIONS_MAX => {
                    return SessionError::lost(wrong);
                }
                Ok(Some(wrong)) => {
                    tracing::debug!(queue = self.queue, wrong, "a consumer is brought nothing");
                    self.suspicions += 1;
                }
                Ok(None) => self.suspicions = 0,
                // A broker that is slow says nothing against the consumer.
                Err(error) => {
                    tracing::debug!(queue = self.queue, %error, "failed to look after a consumer");
                }
            }
        }
    }

    fn look(&self) -> BoxFuture<'static, Result<Option<String>, SessionError>> {
        let (queue, connection) = (self.queue.clone(), Arc::clone(&self.connection));
        let life = self.life.clone();
        Box::pin(async move {
            let look = async |channel: &Channel| {
                let options = QueueDeclareOptions { passive: true, ..Default::default() };
                channel.queue_declare(queue.as_str().into(), options, FieldTable::default()).await
            };
            let looking = on_own_channel(&connection, look);
            life.bound(REQUEST_TIMEOUT, looking).await.map(|queue| verdict(&queue))
        })
    }
}

fn verdict(queue: &Queue) -> Option<String> {
    match (queue.message_count(), queue.consumer_count()) {
        (_, 0) => Some("the broker has forgotten the consumer".to_owned()),
        (0, _) => None,
        (ready, _) => Some(format!("{ready} messages are ready and none is delivered")),
    }
}
