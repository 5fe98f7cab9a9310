//! Hands packs to the exchange, and waits for the stream to confirm them.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::{Pin, pin},
    time::Duration,
};

use async_trait::async_trait;
use atomizer::{EventWriter, OpenError, Pack, SessionError};
use lapin::{
    BasicProperties, Channel, Confirmation, PublisherConfirm,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};

use tokio::time::timeout;

use super::unreachable;
use crate::{
    connect::plain,
    life::{Life, REQUEST_TIMEOUT},
    opened::Opened,
};

/// How long the stream may take to confirm a pack.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) struct Writer {
    opened: Opened,
    channel: Channel,
    exchange: String,
    /// In the order of what was handed over.
    confirms: VecDeque<PublisherConfirm>,
}

impl Writer {
    pub(super) async fn open(opened: Opened, exchange: String) -> Result<Self, OpenError> {
        let channel = opened.channel().await.map_err(unreachable)?;
        let confirming = channel.confirm_select(ConfirmSelectOptions::default());
        opened.life.bound(REQUEST_TIMEOUT, confirming).await.map_err(unreachable)?;
        Ok(Self { opened, channel, exchange, confirms: VecDeque::new() })
    }
}

#[async_trait]
impl EventWriter for Writer {
    async fn append(&mut self, pack: Pack) -> Result<(), SessionError> {
        let key = format!("{}.{}", pack.severity().as_str(), pack.node());
        let properties = properties().with_app_id(pack.node().as_str().into());
        // Without `mandatory`, what no stream takes is confirmed and gone.
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let (exchange, body) = (self.exchange.as_str().into(), pack.into_bytes());
        let publishing =
            self.channel.basic_publish(exchange, key.into(), options, &body, properties);
        let confirm = patient(&self.opened.life, REQUEST_TIMEOUT, publishing).await?;
        self.confirms.push_back(confirm);
        Ok(())
    }

    async fn kept(&mut self) -> Result<bool, SessionError> {
        let Some(first) = self.confirms.front_mut() else {
            return std::future::pending().await;
        };
        let confirmed = poll_fn(|cx| Pin::new(&mut *first).poll(cx));
        let confirmed = patient(&self.opened.life, CONFIRM_TIMEOUT, confirmed).await?;
        self.confirms.pop_front();
        match confirmed {
            Confirmation::Ack(None) => Ok(true),
            Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_)) => {
                Err(SessionError::lost("there is no stream for events"))
            }
            // The stream never does that: a queue that somebody has bound beside it is full.
            Confirmation::Nack(None) => Ok(false),
            Confirmation::NotRequested => Err(SessionError::lost("the channel does not confirm")),
        }
    }

    async fn close(self: Box<Self>) {
        self.opened.close().await;
    }
}

/// Waits for the broker, but not for ever, unless it says that it takes nothing for now: another connection would wait as
/// well, and this one could not be closed.
async fn patient<T>(
    life: &Life,
    limit: Duration,
    request: impl Future<Output = lapin::Result<T>>,
) -> Result<T, SessionError> {
    let mut request = pin!(request);
    loop {
        tokio::select! {
            biased;
            answer = timeout(limit, &mut request) => match answer {
                Ok(answer) => return answer.map_err(|error| SessionError::lost(plain(&error))),
                Err(_) if life.is_blocked() => {}
                Err(_) => return Err(SessionError::lost(format!("no answer within {limit:?}"))),
            },
            error = life.ended() => return Err(error),
        }
    }
}

/// What every pack says of itself.
pub(super) fn properties() -> BasicProperties {
    /// As AMQP has it: persistent.
    const PERSISTENT: u8 = 2;
    BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type("application/x-ndjson".into())
        .with_type("events".into())
}
