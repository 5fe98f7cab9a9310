//! Goes through the dead letters once, and holds on to what it meets: what is held does not come again.
//!
//! **How letters are had.** Two ways were weighed and measured (`docs/dead-letters.md`): `basic.get` for each
//! letter is exact about the end, and a round trip through the broker's log for each. A consumer is many times
//! as fast, but never says that there is nothing more. So a walk begins with one `get`, which tells how many
//! more there are, takes these through consumers, and asks by another `get` when they do not come. A consumer
//! serves one window and is cancelled, for its window would be used up by what is held.

use std::{collections::BTreeMap, time::Duration};

use atomizer::{AtomId, DeadLetter, SessionError};
use futures::{StreamExt, future::try_join_all};
use lapin::{
    BasicProperties, Channel,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicGetOptions,
        BasicNackOptions, BasicQosOptions, ConfirmSelectOptions, QueueDeclareOptions,
    },
    protocol::AMQPSoftError,
    types::FieldTable,
};
use tokio::time::{Instant, sleep, timeout};

use super::{DeadLetters, DeadLettersError, copy, publish};
use crate::{
    acks::Acks, connect::plain, declare::refusal, life::REQUEST_TIMEOUT, opened::Opened,
    topology::Topology,
};

/// The most letters of one window, and how many bytes it is to have about: payloads may be large.
const WINDOW_MAX: u64 = 256;
const WINDOW_BYTES: u64 = 4 * 1024 * 1024;
/// The first window, when nothing is known of their sizes.
const WINDOW_FIRST: u64 = 16;
/// How long to wait for letters that should be there before asking whether they are: others may have them.
const QUIET: Duration = Duration::from_millis(300);
/// How long to wait until what was given back can be seen, and how often to look.
const GIVEN_BACK_WITHIN: Duration = Duration::from_secs(1);
const GIVEN_BACK_POLL: Duration = Duration::from_millis(5);
/// How many letters are given back in one go. RabbitMQ 3.10 puts those of one go into the order of an Erlang
/// map: the right one up to 32.
const GO_MAX: usize = 32;
/// From how many deliveries on a letter is written anew before it is given back. Up to RabbitMQ 4.2 each
/// delivery that is given back counts, and what exceeds the queue's delivery limit is dropped for good; 20 is
/// the default of version 4, for queues that are not ours, and policies may set it.
const WORN_AT: u32 = 8;

/// One letter that a walk holds.
pub(super) struct Held {
    pub(super) tag: u64,
    pub(super) letter: DeadLetter,
    /// How often it was delivered before.
    deliveries: u32,
    /// The message as it came, for writing it anew.
    properties: BasicProperties,
}

/// One way through the dead letters, on a channel that holds all it meets.
pub(super) struct Walk {
    opened: Opened,
    channel: Channel,
    topology: Topology,
    queue: String,
    /// What this walk writes anew, so that it does not meet it twice.
    mark: String,
    acks: Acks,
    /// What is held: which consumer it came through by its tag.
    held: BTreeMap<u64, u64>,
    window: u64,
    /// How many letters are still to come.
    remaining: Option<u64>,
    /// How many there were at the beginning.
    total: u64,
    /// Some did not come that should have.
    missing: bool,
    consumers: u64,
    confirms: bool,
    begun: Instant,
}

impl Walk {
    pub(super) async fn open(dead: &DeadLetters) -> Result<Self, DeadLettersError> {
        let opened = dead.open("reads dead letters").await?;
        let lost = |error| DeadLettersError::interrupted(super::Progress::default(), error);
        let channel = opened.channel().await.map_err(lost)?;
        Ok(Self {
            opened,
            channel,
            topology: dead.topology.clone(),
            queue: dead.topology.dead_queue(),
            mark: atomizer::ElectronId::new().to_string(),
            acks: Acks::default(),
            held: BTreeMap::new(),
            window: WINDOW_FIRST,
            remaining: None,
            total: 0,
            missing: false,
            consumers: 0,
            confirms: false,
            begun: Instant::now(),
        })
    }

    /// How many letters there were when it began.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// For how long the first letter is held by now.
    pub(super) fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Takes the next letters; none when all have been seen.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<Held>>, SessionError> {
        if self.remaining == Some(0) {
            return Ok(None);
        }
        let mut deliveries = Vec::new();
        if self.remaining.is_none() || self.missing {
            let Some((delivery, more)) = self.get().await? else {
                self.remaining = Some(0);
                return Ok(None);
            };
            self.consumers += 1;
            self.held.insert(delivery.delivery_tag, self.consumers);
            deliveries.push(delivery);
            if self.remaining.is_none() {
                self.total = more + 1;
                self.remaining = Some(self.total);
            }
        }
        let remaining = self.remaining.unwrap_or_default();
        let wanted = self.window.min(remaining);
        let had = deliveries.len() as u64;
        if wanted > had {
            self.consume(wanted - had, &mut deliveries).await?;
        }
        let came = deliveries.len() as u64;
        let consumed = deliveries.iter().skip(usize::from(had > 0));
        self.held.extend(consumed.map(|delivery| (delivery.delivery_tag, self.consumers)));
        self.missing = came < wanted;
        self.remaining = Some(remaining.saturating_sub(came));
        let bytes: u64 = deliveries.iter().map(|delivery| delivery.data.len() as u64).sum();
        self.window = (WINDOW_BYTES / (bytes / came.max(1) + 1)).clamp(1, WINDOW_MAX);
        let held = deliveries.into_iter().filter_map(|delivery| self.read(delivery));
        Ok(Some(held.collect()))
    }

    /// Gets one letter, and how many more are ready. This goes through the log of the queue, so it sees all
    /// that was given back before it.
    async fn get(&self) -> Result<Option<(Delivery, u64)>, SessionError> {
        let queue = self.queue.as_str().into();
        let getting = async { Ok(self.channel.basic_get(queue, BasicGetOptions::default()).await) };
        match self.opened.life.bound(REQUEST_TIMEOUT, getting).await? {
            Ok(got) => Ok(got.map(|got| (got.delivery, got.message_count.into()))),
            // No node was ever here.
            Err(error) if refusal(&error) == Some(AMQPSoftError::NOTFOUND) => Ok(None),
            Err(error) => Err(SessionError::lost(plain(&error))),
        }
    }

    /// Takes so many letters, or as many as come.
    async fn consume(
        &mut self,
        wanted: u64,
        deliveries: &mut Vec<Delivery>,
    ) -> Result<(), SessionError> {
        self.consumers += 1;
        let (channel, life) = (&self.channel, &self.opened.life);
        let tag = format!("walk.{}", self.consumers);
        let prefetch = u16::try_from(wanted).unwrap_or(u16::MAX);
        let consuming = async {
            channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            let queue = self.queue.as_str().into();
            channel.basic_consume(queue, tag.as_str().into(), options, FieldTable::default()).await
        };
        let mut consumer = life.bound(REQUEST_TIMEOUT, consuming).await?;
        let gone = || SessionError::lost("the broker ended the delivery of dead letters");
        for _ in 0..wanted {
            match timeout(QUIET, consumer.next()).await {
                Ok(Some(Ok(delivery))) => deliveries.push(delivery),
                Ok(Some(Err(error))) => return Err(SessionError::lost(plain(&error))),
                Ok(None) => return Err(gone()),
                Err(_) => break,
            }
        }
        let cancelling = async {
            channel.basic_cancel(tag.as_str().into(), BasicCancelOptions::default()).await?;
            // What came meanwhile is ours as well.
            while let Some(delivery) = consumer.next().await {
                deliveries.push(delivery?);
            }
            Ok(())
        };
        life.bound(REQUEST_TIMEOUT, cancelling).await
    }

    /// Reads a letter; none when this very walk wrote it.
    fn read(&self, delivery: Delivery) -> Option<Held> {
        let Delivery { delivery_tag: tag, properties, redelivered, data, .. } = delivery;
        if copy::mark(&properties).as_deref() == Some(self.mark.as_str()) {
            return None;
        }
        let atom_of = |queue: &str| -> Option<AtomId> { self.topology.atom_of(queue) };
        let (letter, deliveries) = copy::read(&properties, redelivered, data, atom_of);
        Some(Held { tag, letter, deliveries, properties })
    }

    /// Removes letters for good, and waits until the broker knows.
    pub(super) async fn remove(
        &mut self,
        tags: impl IntoIterator<Item = u64>,
    ) -> Result<(), SessionError> {
        for tag in tags {
            self.held.remove(&tag);
            self.acks.acknowledge(tag);
        }
        let acks = self.acks.take();
        let channel = &self.channel;
        let acknowledging =
            async {
                try_join_all(acks.into_iter().map(|ack| {
                    channel.basic_ack(ack.tag, BasicAckOptions { multiple: ack.multiple })
                }))
                .await?;
                Ok(())
            };
        self.opened.life.bound(REQUEST_TIMEOUT, acknowledging).await?;
        // The broker answers no acknowledgement, but these go through the log of the queue behind it; the second
        // is behind all, however many there were (`lane.rs` has the reasons).
        for _ in 0..2 {
            if let Some((letter, _)) = self.get().await? {
                let tag = letter.delivery_tag;
                self.acks.not_ours(tag);
                let options = BasicNackOptions { requeue: true, ..Default::default() };
                let back = self.channel.basic_nack(tag, options);
                self.opened.life.bound(REQUEST_TIMEOUT, back).await?;
            }
        }
        Ok(())
    }

    /// Writes those anew, at the end of the queue, that were delivered so often that the broker might drop
    /// them.
    pub(super) async fn refresh(&mut self, held: &[Held]) -> Result<(), SessionError> {
        let worn: Vec<_> = held.iter().filter(|held| held.deliveries >= WORN_AT).collect();
        if worn.is_empty() {
            return Ok(());
        }
        if !self.confirms {
            let selecting = self.channel.confirm_select(ConfirmSelectOptions::default());
            self.opened.life.bound(REQUEST_TIMEOUT, selecting).await?;
            self.confirms = true;
        }
        let copies = worn.iter().map(|held| publish::Outgoing {
            exchange: "".into(),
            key: self.queue.as_str().into(),
            properties: copy::anew(&held.properties, &held.letter, &self.mark),
            body: copy::body(&held.letter),
        });
        let sent = publish::all(&self.channel, &self.opened.life, copies.collect()).await;
        let safe = worn.iter().zip(&sent).filter(|(_, sent)| sent.is_ok());
        let safe: Vec<_> = safe.map(|(held, _)| held.tag).collect();
        self.remove(safe).await?;
        match sent.into_iter().find_map(Result::err) {
            None => Ok(()),
            Some(error) => Err(SessionError::lost(format!(
                "a letter that was read too often could not be written anew: {error}"
            ))),
        }
    }

    /// Gives back what was not removed, in its old order, and closes the connection.
    pub(super) async fn give_back(self) -> Result<(), SessionError> {
        // Nothing is held where the queue was not there, or when the channel is lost: it went back then.
        let given = match self.channel.status().connected() {
            true => self.opened.life.bound(REQUEST_TIMEOUT, self.give_back_all()).await,
            false => Ok(()),
        };
        self.opened.close().await;
        given
    }

    async fn give_back_all(&self) -> lapin::Result<()> {
        let options = BasicNackOptions { multiple: true, requeue: true };
        let goes = self.goes().into_iter();
        // From version 4.3 on this does not count as a delivery, but the loss of the connection does.
        try_join_all(goes.map(|tag| self.channel.basic_nack(tag, options))).await?;
        // The broker answers no nack, and keeps many of them to itself for a moment: whoever looks next would find
        // an empty queue.
        let arrived = async {
            while self.ready().await? < self.held.len() as u64 {
                sleep(GIVEN_BACK_POLL).await;
            }
            Ok(())
        };
        // Others may have taken them by then.
        timeout(GIVEN_BACK_WITHIN, arrived).await.unwrap_or(Ok(()))
    }

    /// Counts what is ready.
    async fn ready(&self) -> lapin::Result<u64> {
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = self.queue.as_str().into();
        let queue = self.channel.queue_declare(queue, options, FieldTable::default()).await?;
        Ok(queue.message_count().into())
    }

    /// The last tag of each go. What one consumer had goes by itself: the order between consumers is not kept
    /// within a go.
    fn goes(&self) -> Vec<u64> {
        let held: Vec<_> = self.held.iter().collect();
        let of_one = held.chunk_by(|(_, one), (_, other)| one == other);
        let goes = of_one.flat_map(|tags| tags.chunks(GO_MAX));
        goes.filter_map(|go| go.last().map(|(tag, _)| **tag)).collect()
    }
}
