//! Reads the stream, from anywhere in it, and knows when it has come to where its end was.

use std::time::{Duration, UNIX_EPOCH};

use async_trait::async_trait;
use atomizer::{EventReader, NodeId, OpenError, Pack, Position, Read, SessionError};
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt};
use lapin::{
    Channel, Confirmation, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions,
    },
    protocol::AMQPSoftError,
    types::{AMQPValue, FieldTable},
};
use tokio::time::{Instant, timeout_at};

use super::{RabbitLog, unreachable, writer::properties};
use crate::{
    connect::plain,
    declare::{found, refusal},
    life::REQUEST_TIMEOUT,
    opened::Opened,
};

/// How many packs may be on their way: some 16 MiB at the most.
const PREFETCH: u16 = 256;
/// How often what was read is acknowledged, which lets more come, while there is more.
const ACK_EVERY: u16 = PREFETCH / 8;
/// How long nothing must come until all is taken to have come, where no mark may be written.
const QUIET: Duration = Duration::from_millis(500);
/// How long nothing may come though there is a mark to read, until another is written.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// After so many silences at an offset it is taken to be of a stream that is no more.
const SILENCES_MAX: u32 = 3;

pub(super) struct Reader {
    log: RabbitLog,
    monitor: NodeId,
    opened: Opened,
    channel: Channel,
    consumer: Consumer,
    end: End,
    /// The offset that was asked for, while nothing has come.
    untried: Option<u64>,
    /// The offset that comes next, as far as is known.
    next: Option<u64>,
    unacknowledged: u16,
    /// What is to be returned.
    ready: Option<Read>,
}

/// How the end of what was there when the reading began is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By a mark that was written then: when one comes, all that was before it has come. Another is written after silence: the
    /// first may have been written before the broker had begun.
    Mark { silences: u32, silent_at: Instant },
    /// By silence: no mark may be written.
    Silence { at: Instant },
    /// It has been reached.
    Reached,
}

impl Reader {
    pub(super) async fn open(
        opened: Opened,
        log: RabbitLog,
        monitor: NodeId,
        from: Position,
    ) -> Result<Self, OpenError> {
        let queue = log.topology.events();
        let (channel, consumer) = match consume(&opened, &queue, offset(from)).await? {
            Some(consuming) => consuming,
            // To watch before any node comes is as good.
            None => {
                log.make(&opened).await?;
                let consuming = consume(&opened, &queue, offset(from)).await?;
                consuming.ok_or_else(|| unreachable("the stream is gone again"))?
            }
        };
        let untried = match from {
            Position::Offset(offset) => Some(offset),
            _ => None,
        };
        let end = mark(&log, &monitor).await;
        Ok(Self {
            log,
            monitor,
            opened,
            channel,
            consumer,
            end,
            untried,
            next: untried,
            unacknowledged: 0,
            ready: None,
        })
    }

    /// Waits for the next delivery; none when none comes for a while that decides something.
    async fn delivery(&mut self) -> Result<Option<Delivery>, SessionError> {
        let next = async {
            tokio::select! {
                biased;
                delivery = self.consumer.next() => match delivery {
                    Some(delivery) => delivery.map_err(|error| SessionError::lost(plain(&error))),
                    None => Err(SessionError::lost("the stream was deleted, or its broker is gone")),
                },
                error = self.opened.life.ended() => Err(error),
            }
        };
        match self.end {
            End::Mark { silent_at: at, .. } | End::Silence { at } => {
                timeout_at(at, next).await.ok().transpose()
            }
            End::Reached => next.await.map(Some),
        }
    }

    /// Takes note of a delivery. What is to be returned for it is [ready](Self::ready) then.
    fn take(&mut self, delivery: &Delivery) {
        self.untried = None;
        self.unacknowledged += 1;
        self.end = match self.end {
            End::Mark { .. } => marked(),
            End::Silence { .. } => End::Silence { at: Instant::now() + QUIET },
            End::Reached => End::Reached,
        };
        let properties = &delivery.properties;
        let offset = match properties.headers().as_ref().and_then(|all| all.inner().get(OFFSET)) {
            Some(AMQPValue::LongLongInt(offset)) => u64::try_from(*offset).ok(),
            _ => self.next,
        };
        let offset = offset.unwrap_or_default();
        self.next = Some(offset + 1);
        // Only marks have an id.
        let mark = properties.message_id().as_ref().map(lapin::types::ShortString::as_str);
        self.ready = match mark {
            None => Some(Read::Pack { offset, bytes: Bytes::copy_from_slice(&delivery.data) }),
            Some(mark) if mark == self.monitor.as_str() && self.end != End::Reached => {
                self.end = End::Reached;
                Some(Read::CaughtUp { next: self.next })
            }
            // Of another reader, or one more of this.
            Some(_) => None,
        };
    }

    async fn acknowledge(&mut self, tag: u64) -> Result<(), SessionError> {
        // A broker loses its patience with what is never acknowledged.
        if self.unacknowledged >= ACK_EVERY || self.end == End::Reached {
            let options = BasicAckOptions { multiple: true };
            let acknowledging = self.channel.basic_ack(tag, options);
            self.opened.life.bound(REQUEST_TIMEOUT, acknowledging).await?;
            self.unacknowledged = 0;
        }
        Ok(())
    }

    /// Nothing has come for a while, though there is a mark to read.
    async fn silent(&mut self, silences: u32) -> Result<(), SessionError> {
        if let Some(offset) = self.untried.filter(|_| silences >= SILENCES_MAX) {
            tracing::warn!(
                offset,
                "no event has this offset, or they were made anew; reading from their start"
            );
            let queue = self.log.topology.events();
            let again = consume(&self.opened, &queue, offset_first()).await;
            let again = again.map_err(|error| SessionError::lost(error.to_string()))?;
            let (channel, consumer) =
                again.ok_or_else(|| SessionError::lost("the stream was deleted"))?;
            (self.channel, self.consumer, self.unacknowledged) = (channel, consumer, 0);
            (self.untried, self.next) = (None, None);
        }
        let end = mark(&self.log, &self.monitor).await;
        self.end = match end {
            End::Mark { silent_at, .. } => End::Mark { silences, silent_at },
            // It was permitted before.
            _ => End::Mark { silences, silent_at: Instant::now() + SILENCE_MAX },
        };
        Ok(())
    }
}

#[async_trait]
impl EventReader for Reader {
    async fn next(&mut self) -> Result<Read, SessionError> {
        loop {
            if let Some(read) = self.ready.take() {
                return Ok(read);
            }
            match (self.delivery().await?, self.end) {
                (Some(delivery), _) => {
                    self.take(&delivery);
                    // What is ready stays so when this is dropped.
                    self.acknowledge(delivery.delivery_tag).await?;
                }
                (None, End::Mark { silences, .. }) => self.silent(silences + 1).await?,
                (None, End::Silence { .. } | End::Reached) => {
                    self.end = End::Reached;
                    return Ok(Read::CaughtUp { next: self.next });
                }
            }
        }
    }
}

/// The header in which a broker says where in its stream a message is.
const OFFSET: &str = "x-stream-offset";

/// Begins to consume; none when there is no stream.
async fn consume(
    opened: &Opened,
    queue: &str,
    offset: AMQPValue,
) -> Result<Option<(Channel, Consumer)>, OpenError> {
    let channel = opened.channel().await.map_err(unreachable)?;
    let consuming = async {
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let mut arguments = FieldTable::default();
        arguments.insert(OFFSET.into(), offset);
        let options = BasicConsumeOptions::default();
        Ok(channel.basic_consume(queue.into(), "events".into(), options, arguments).await)
    };
    let consumed = opened.life.bound(REQUEST_TIMEOUT, consuming).await.map_err(unreachable)?;
    match found(consumed) {
        Ok(consumer) => Ok(consumer.map(|consumer| (channel, consumer))),
        Err(error) if refusal(&error) == Some(AMQPSoftError::ACCESSREFUSED) => {
            Err(OpenError::Refused(plain(&error)))
        }
        // A replica that is not there yet, say.
        Err(error) => Err(unreachable(plain(&error))),
    }
}

/// Writes a mark into the stream, over a connection of its own: one that publishes is not read from when its broker is short of
/// memory.
async fn mark(log: &RabbitLog, monitor: &NodeId) -> End {
    let marking = |opened| write_mark(opened, log.topology.events(), monitor.clone()).boxed();
    match log.open(monitor, "marks events", marking).await {
        Ok(Confirmation::Ack(_)) => marked(),
        not => {
            tracing::debug!(?not, "no mark was written; the end is told from silence");
            End::Silence { at: Instant::now() + QUIET }
        }
    }
}

async fn write_mark(
    opened: Opened,
    events: String,
    monitor: NodeId,
) -> Result<Confirmation, OpenError> {
    let publishing = async {
        let channel = opened.connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let properties = properties()
            .with_app_id(monitor.as_str().into())
            .with_message_id(monitor.as_str().into());
        let body = Pack::mark(&monitor).into_bytes();
        let options = BasicPublishOptions::default();
        let (exchange, key) = (events.as_str().into(), format!("debug.{monitor}").into());
        channel.basic_publish(exchange, key, options, &body, properties).await?.await
    };
    let published = opened.life.bound(REQUEST_TIMEOUT, publishing).await.map_err(unreachable);
    opened.close().await;
    published
}

fn marked() -> End {
    End::Mark { silences: 0, silent_at: Instant::now() + SILENCE_MAX }
}

fn offset_first() -> AMQPValue {
    AMQPValue::LongString("first".into())
}

fn offset(from: Position) -> AMQPValue {
    match from {
        Position::Start => offset_first(),
        Position::Offset(offset) => {
            AMQPValue::LongLongInt(i64::try_from(offset).unwrap_or(i64::MAX))
        }
        Position::Time(time) => {
            AMQPValue::Timestamp(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
        }
        // `Now`, and what a later version knows.
        _ => AMQPValue::LongString("next".into()),
    }
}
