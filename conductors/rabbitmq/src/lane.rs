//! One consumer on a channel of its own, and the task that settles what it delivered.

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use async_trait::async_trait;
use atomizer::{
    AtomId, Delivery, Envelope, Epoch, Message, Release, SessionError, SettleError, Subscription,
    Ticket,
};
use futures::{
    FutureExt, StreamExt, future::BoxFuture, future::join_all, stream::FuturesUnordered,
};
use lapin::{
    Channel, Consumer,
    options::{BasicAckOptions, BasicCancelOptions, BasicNackOptions},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    acks::Acks,
    connect::plain,
    convert,
    publisher::Publisher,
    session::{Lanes, Life},
};

/// How long cancelling a consumer may take.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an acknowledgement may take to be written.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How many commands are carried out before acknowledgements are sent.
const COMMANDS_MAX: usize = 256;

pub(crate) enum Command {
    Settle { tag: u64, emit: Vec<Envelope>, done: Done },
    Release { tag: u64 },
}

/// Where the result of one settlement goes.
type Done = oneshot::Sender<Result<(), SettleError>>;

/// Where the commands of one lane go. There are never more than deliveries out, so the window bounds them.
pub(crate) type Commands = mpsc::UnboundedSender<Command>;

/// Which lane, in which session: what a ticket says.
#[derive(Clone)]
pub(crate) struct LaneId {
    pub(crate) epoch: Epoch,
    pub(crate) number: u32,
    pub(crate) lanes: Arc<Lanes>,
}

impl LaneId {
    fn ticket(&self, tag: u64) -> Ticket {
        let lanes: Arc<dyn Release> = Arc::clone(&self.lanes) as _;
        Ticket::new(self.epoch, self.number, tag, lanes)
    }
}

/// Settles what one channel delivered. Ends with the channel or the session.
pub(crate) struct Settler {
    pub(crate) id: LaneId,
    pub(crate) channel: Channel,
    pub(crate) publisher: Publisher,
    pub(crate) life: Life,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
}

type Published = (u64, Vec<(Envelope, atomizer::SendError)>, Done);

impl Settler {
    pub(crate) async fn run(mut self) {
        let mut acks = Acks::default();
        let mut publishing: FuturesUnordered<BoxFuture<'static, Published>> =
            FuturesUnordered::new();
        let mut commands = Vec::new();
        let mut settled = Vec::new();
        loop {
            tokio::select! {
                count = self.commands.recv_many(&mut commands, COMMANDS_MAX) => {
                    if count == 0 {
                        return;
                    }
                }
                Some(published) = publishing.next() => self.published(published, &mut acks, &mut settled),
            }
            while let Some(Some(published)) = publishing.next().now_or_never() {
                self.published(published, &mut acks, &mut settled);
            }
            for command in commands.drain(..) {
                match command {
                    Command::Settle { tag, emit, done } if emit.is_empty() => {
                        acks.acknowledge(tag);
                        settled.push(done);
                    }
                    Command::Settle { tag, emit, done } => {
                        publishing.push(Box::pin(publish(self.publisher.clone(), tag, emit, done)));
                    }
                    Command::Release { tag } => {
                        acks.returned(tag);
                        if let Err(error) = self.release(tag).await {
                            return Self::lost(&error, settled);
                        }
                    }
                }
            }
            if let Err(error) = self.acknowledge(&mut acks).await {
                return Self::lost(&error, settled);
            }
            for done in settled.drain(..) {
                // An error says that nobody waits for the result any more.
                drop(done.send(Ok(())));
            }
        }
    }

    fn published(&self, (tag, failed, done): Published, acks: &mut Acks, settled: &mut Vec<Done>) {
        if failed.is_empty() {
            acks.acknowledge(tag);
            settled.push(done);
        } else {
            let not_safe = SettleError::NotSafe { ticket: self.id.ticket(tag), failed };
            // When nobody waits for it, the ticket in it is dropped, and so releases the delivery.
            drop(done.send(Err(not_safe)));
        }
    }

    async fn release(&self, tag: u64) -> Result<(), SessionError> {
        let options = BasicNackOptions { requeue: true, ..Default::default() };
        self.life.bound(WRITE_TIMEOUT, self.channel.basic_nack(tag, options)).await
    }

    async fn acknowledge(&self, acks: &mut Acks) -> Result<(), SessionError> {
        let sent = acks.take().into_iter().map(|ack| {
            let options = BasicAckOptions { multiple: ack.multiple };
            self.channel.basic_ack(ack.tag, options)
        });
        let sent = async { join_all(sent).await.into_iter().collect() };
        self.life.bound(WRITE_TIMEOUT, sent).await
    }

    /// The channel is gone: what it had delivered comes again.
    fn lost(error: &SessionError, settled: Vec<Done>) {
        tracing::debug!(%error, "a channel was lost while acknowledging");
        for done in settled {
            drop(done.send(Err(SettleError::Unknown(error.clone()))));
        }
    }
}

async fn publish(publisher: Publisher, tag: u64, emit: Vec<Envelope>, done: Done) -> Published {
    let results = publisher.publish(&emit).await;
    let failed = emit.into_iter().zip(results);
    let failed =
        failed.filter_map(|(envelope, result)| result.err().map(|error| (envelope, error)));
    (tag, failed.collect(), done)
}

pub(crate) struct LaneSubscription {
    pub(crate) id: LaneId,
    pub(crate) channel: Channel,
    pub(crate) consumer: Consumer,
    /// Whose queue it is; none for the inbox.
    pub(crate) atom: Option<AtomId>,
    pub(crate) life: Life,
}

impl LaneSubscription {
    fn delivery(&self, delivery: lapin::message::Delivery) -> Delivery {
        let ticket = self.id.ticket(delivery.delivery_tag);
        let (wire, redeliveries) =
            convert::wire(&delivery.properties, delivery.redelivered, delivery.data);
        Delivery::new(Message::from_wire(wire, self.atom.as_ref()), redeliveries, ticket)
    }
}

#[async_trait]
impl Subscription for LaneSubscription {
    async fn next(&mut self, max: NonZeroUsize) -> Result<Vec<Delivery>, SessionError> {
        // One of the two connections may be well when the session has ended.
        let first = tokio::select! {
            first = self.consumer.next() => match first {
                Some(Ok(delivery)) => Ok(self.delivery(delivery)),
                Some(Err(error)) => Err(SessionError::lost(plain(&error))),
                None => Err(SessionError::lost("the broker ended the subscription")),
            },
            error = self.life.ended() => Err(error),
        };
        let first = first.inspect_err(|_| self.id.lanes.remove(self.id.number))?;
        let mut deliveries = vec![first];
        while deliveries.len() < max.get() {
            // An error here is met again by the next call.
            let Some(Some(Ok(delivery))) = self.consumer.next().now_or_never() else { break };
            let delivery = self.delivery(delivery);
            deliveries.push(delivery);
        }
        Ok(deliveries)
    }

    async fn stop(&mut self) {
        let tag = self.consumer.tag();
        let cancelled = self.channel.basic_cancel(tag, BasicCancelOptions::default());
        if !matches!(timeout(CANCEL_TIMEOUT, cancelled).await, Ok(Ok(()))) {
            // The channel is of no more use; the broker takes back what it delivered.
            return;
        }
        while let Some(Some(Ok(delivery))) = self.consumer.next().now_or_never() {
            drop(self.id.ticket(delivery.delivery_tag));
        }
    }
}
