//! Publishes a few messages, and waits until each is confirmed or not.

use std::{pin::pin, time::Duration};

use bytes::Bytes;
use futures::future::join_all;
use lapin::{
    BasicProperties, Channel, Confirmation, options::BasicPublishOptions, types::ShortString,
};
use tokio::time::timeout;

use crate::{connect::plain, life::Life};

/// How long the confirms may take, unless the broker says that it is blocked.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);

/// One message on its way out.
pub(super) struct Outgoing {
    pub(super) exchange: ShortString,
    pub(super) key: ShortString,
    pub(super) properties: BasicProperties,
    pub(super) body: Bytes,
}

/// Why a message is not known to be safe.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum NotSent {
    /// There is no queue for it.
    #[error("no queue takes it")]
    Unroutable,
    /// It cannot be sent as it is.
    #[error("{0}")]
    Never(String),
    /// The broker did not take it, or nobody knows; it may later.
    #[error("{0}")]
    NotNow(String),
}

/// Publishes all, and waits until the broker has answered each.
pub(super) async fn all(
    channel: &Channel,
    life: &Life,
    batch: Vec<Outgoing>,
) -> Vec<Result<(), NotSent>> {
    let keys: Vec<_> = batch
        .iter()
        .map(|outgoing| (outgoing.key.clone(), outgoing.properties.message_id().clone()))
        .collect();
    let publishing = join_all(batch.into_iter().map(async |outgoing| {
        let Outgoing { exchange, key, properties, body } = outgoing;
        // Without `mandatory`, what cannot be routed is confirmed and gone.
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        channel.basic_publish(exchange, key, options, &body, properties).await?.await
    }));
    let mut publishing = pin!(publishing);
    let answers = loop {
        tokio::select! {
            answers = timeout(CONFIRM_TIMEOUT, &mut publishing) => match answers {
                Ok(answers) => break answers,
                Err(_) if life.is_blocked() => {}
                Err(_) => return unknown(&keys, &format!("no confirm within {CONFIRM_TIMEOUT:?}")),
            },
            error = life.ended() => return unknown(&keys, &error.to_string()),
        }
    };
    // The client hands a returned message to whichever confirm comes next, so all are looked at first, and
    // then each is looked up by what it says.
    let returned: Vec<_> = (answers.iter())
        .filter_map(|answer| match answer {
            Ok(Confirmation::Ack(Some(message)) | Confirmation::Nack(Some(message))) => {
                Some((message.routing_key.clone(), message.properties.message_id().clone()))
            }
            _ => None,
        })
        .collect();
    (answers.into_iter().zip(&keys))
        .map(|(answer, key)| match answer {
            _ if returned.contains(key) => Err(NotSent::Unroutable),
            Ok(Confirmation::Ack(_)) => Ok(()),
            Ok(Confirmation::Nack(_)) => Err(NotSent::NotNow("the broker declined".to_owned())),
            Ok(Confirmation::NotRequested) => {
                Err(NotSent::NotNow("the channel does not confirm".to_owned()))
            }
            Err(error) => Err(NotSent::NotNow(plain(&error))),
        })
        .collect()
}

fn unknown<T>(all: &[T], reason: &str) -> Vec<Result<(), NotSent>> {
    all.iter().map(|_| Err(NotSent::NotNow(reason.to_owned()))).collect()
}
