//! Publishes: pipelined, confirmed, bounded.

use std::time::Duration;

use atomizer::{
    Envelope, Limits, Message, SendError,
    wire::{METADATA_BYTES_MAX, Wire},
};
use bytes::Bytes;
use futures::{
    StreamExt,
    future::{BoxFuture, join_all},
    stream::FuturesUnordered,
};
use lapin::{BasicProperties, Channel, Confirmation, options::BasicPublishOptions};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    connect::plain,
    session::Life,
    topology::{Route, Topology},
};

/// From how many unconfirmed messages on no further batch is taken.
const UNCONFIRMED_MAX: usize = 1024;
/// How long a confirm may take before the session is given up.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);

type Results = Vec<Result<(), SendError>>;

/// A handle to the task that owns the publishing channel.
#[derive(Clone, Debug)]
pub(crate) struct Publisher {
    commands: mpsc::Sender<Command>,
    topology: Topology,
    limits: Limits,
}

struct Command {
    batch: Vec<Result<Publication, SendError>>,
    done: oneshot::Sender<Results>,
}

/// One `basic.publish`.
struct Publication {
    route: Route,
    to: String,
    properties: BasicProperties,
    body: Bytes,
}

impl Publisher {
    /// Returns the handle, and the task, which ends with the last handle.
    pub(crate) fn new(
        channel: Channel,
        topology: Topology,
        limits: Limits,
        life: Life,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (commands, wanted) = mpsc::channel(UNCONFIRMED_MAX);
        (Self { commands, topology, limits }, publish_all(channel, wanted, life))
    }

    /// Publishes, and waits until each is confirmed or not.
    ///
    /// Once handed over, the batch is published even when this future is dropped.
    pub(crate) async fn publish(&self, envelopes: &[Envelope]) -> Results {
        let batch = envelopes.iter().map(|envelope| self.prepare(envelope)).collect();
        let (done, results) = oneshot::channel();
        let lost =
            || vec![Err(SendError::Unknown("the session ended".to_owned())); envelopes.len()];
        if self.commands.send(Command { batch, done }).await.is_err() {
            return lost();
        }
        results.await.unwrap_or_else(|_| lost())
    }

    fn prepare(&self, envelope: &Envelope) -> Result<Publication, SendError> {
        let route = self.topology.route(&envelope.to)?;
        let mut wire = Wire::from(Message::clone(&envelope.message));
        let body = std::mem::take(&mut wire.body);
        check(body.len(), self.limits.payload_bytes_max)?;
        check(wire.metadata_bytes(), METADATA_BYTES_MAX)?;
        let properties = crate::convert::properties(wire)?;
        Ok(Publication { route, to: envelope.to.to_string(), properties, body })
    }
}

fn check(bytes: usize, bytes_max: usize) -> Result<(), SendError> {
    if bytes > bytes_max { Err(SendError::TooLarge { bytes, bytes_max }) } else { Ok(()) }
}

/// Keeps as many publishes under way as there are: a client that awaits each in turn spends its time waiting.
async fn publish_all(channel: Channel, mut wanted: mpsc::Receiver<Command>, life: Life) {
    let mut under_way: FuturesUnordered<BoxFuture<'_, usize>> = FuturesUnordered::new();
    let mut unconfirmed = 0;
    loop {
        tokio::select! {
            command = wanted.recv(), if unconfirmed < UNCONFIRMED_MAX => match command {
                Some(Command { batch, done }) => {
                    let (channel, life, count) = (&channel, &life, batch.len());
                    unconfirmed += count;
                    under_way.push(Box::pin(async move {
                        let results = join_all(batch.into_iter().map(async |prepared| {
                            publish(channel, prepared?, life).await
                        }));
                        // An error says that nobody waits for the results any more.
                        drop(done.send(results.await));
                        count
                    }));
                }
                None => break,
            },
            Some(count) = under_way.next() => unconfirmed -= count,
            // What is under way may never be answered: dropping it says that it is unknown.
            _ = life.ended() => return,
        }
    }
    while under_way.next().await.is_some() {}
}

async fn publish(
    channel: &Channel,
    publication: Publication,
    life: &Life,
) -> Result<(), SendError> {
    let Publication { route: Route { exchange, key }, to, properties, body } = publication;
    // Without `mandatory`, what cannot be routed is confirmed and gone.
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let confirmed =
        async { channel.basic_publish(exchange, key, options, &body, properties).await?.await };
    match timeout(CONFIRM_TIMEOUT, confirmed).await {
        Ok(Ok(Confirmation::Ack(None))) => Ok(()),
        Ok(Ok(Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_)))) => {
            Err(SendError::Unroutable(to))
        }
        Ok(Ok(Confirmation::Nack(None))) => {
            Err(SendError::NotTaken("the broker declined".to_owned()))
        }
        Ok(Ok(Confirmation::NotRequested)) => {
            Err(SendError::Unknown("the channel does not confirm".to_owned()))
        }
        Ok(Err(error)) => {
            // Whatever went wrong, this channel is of no more use, and with it the session.
            life.end(format!("publishing failed: {}", plain(&error)));
            Err(SendError::Unknown(plain(&error)))
        }
        Err(_) => {
            let reason = format!("no confirm within {CONFIRM_TIMEOUT:?}");
            life.end(reason.clone());
            Err(SendError::Unknown(reason))
        }
    }
}
