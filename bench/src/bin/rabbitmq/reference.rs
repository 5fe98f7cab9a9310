//! What it is measured against: as fast as a program on lapin can be that loses nothing.
//!
//! Confirms are awaited in a sliding window, and deliveries are acknowledged in groups. It decodes nothing.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use atomizer_bench::now;
use futures::{FutureExt, StreamExt, stream::FuturesOrdered};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
};
use tokio::{sync::oneshot, task::JoinSet};

use crate::{QUEUE, emptied::Emptied, ours::Job};

/// What a node has made for the atom.
const EXCHANGE: &str = "atomizer";
const KEY: &str = "atom.noop";
const INBOX: &str = "inbox";
const ID: &str = "01932c07-e8f1-7a3b-9c4d-5e6f70819203";

/// How many publishes are unconfirmed at the most.
const UNCONFIRMED_MAX: usize = 1024;
/// How many deliveries are acknowledged together.
const GROUP: usize = 64;

fn payload() -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(&Job::new(1_000_000))?)
}

/// What a message carries beside its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Headers {
    /// What the program needs.
    None,
    /// What an electron has, or an answer; the values are of the same lengths.
    AnElectrons,
}

impl Headers {
    fn persistent(self, kind: &str) -> BasicProperties {
        let properties = BasicProperties::default().with_delivery_mode(2);
        if self == Self::None {
            return properties;
        }
        let mut headers = FieldTable::default();
        let mut set = |name: &str, value: &str| {
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
        };
        if kind == "answer" {
            set("atomizer-atom", "noop");
            set("atomizer-started-at", "2026-11-21T12:00:00.000000Z");
            set("atomizer-duration-us", "250");
        }
        let properties = properties.with_app_id("node-0badcafe".into());
        if kind == "answer" {
            let properties = properties.with_type(kind.into()).with_headers(headers);
            properties.with_content_type("application/json".into())
        } else {
            properties.with_message_id(ID.into()).with_timestamp(1_795_000_000)
        }
    }
}

async fn connect(url: &str) -> Result<Connection> {
    Ok(Connection::connect(url, ConnectionProperties::default()).await?)
}

async fn confirming(connection: &Connection) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(channel)
}

async fn consume(connection: &Connection, queue: &str) -> Result<(Channel, Consumer)> {
    let channel = connection.create_channel().await?;
    channel.basic_qos(crate::PREFETCH, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let consumer =
        channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await?;
    Ok((channel, consumer))
}

async fn close(connection: &Connection) -> Result<()> {
    Ok(connection.close(200, "done".into()).await?)
}

/// Publishes one message and waits until it is safe.
async fn publish_one(
    channel: &Channel,
    exchange: &'static str,
    key: ShortString,
    properties: BasicProperties,
    body: &[u8],
) -> Result<()> {
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    match channel.basic_publish(exchange.into(), key, options, body, properties).await?.await? {
        Confirmation::Ack(None) => Ok(()),
        other => bail!("not confirmed: {other:?}"),
    }
}

pub(crate) async fn publish(url: &str, headers: Headers, messages: u64) -> Result<Duration> {
    let connection = connect(url).await?;
    let channel = confirming(&connection).await?;
    let body = payload()?;
    let begun = Instant::now();
    let mut unconfirmed = FuturesOrdered::new();
    for _ in 0..messages {
        if unconfirmed.len() == UNCONFIRMED_MAX {
            unconfirmed.next().await.transpose()?;
        }
        unconfirmed.push_back(publish_one(
            &channel,
            EXCHANGE,
            KEY.into(),
            headers.persistent("electron"),
            &body,
        ));
    }
    while let Some(confirmed) = unconfirmed.next().await {
        confirmed?;
    }
    let took = begun.elapsed();
    close(&connection).await?;
    Ok(took)
}

/// Works off what is there; returns when the first delivery came.
pub(crate) async fn drain(url: &str, messages: u64, emptied: &Emptied<'_>) -> Result<SystemTime> {
    let connection = connect(url).await?;
    let (channel, mut consumer) = consume(&connection, QUEUE).await?;
    let mut first = None;
    let mut taken = 0;
    while taken < messages {
        let group = next_group(&mut consumer).await?;
        first.get_or_insert_with(now);
        taken += group.len() as u64;
        acknowledge(&channel, group.last()).await?;
    }
    emptied.wait()?;
    close(&connection).await?;
    first.context("nothing came")
}

/// Waits for a delivery, and takes what is there beside it.
async fn next_group(consumer: &mut Consumer) -> Result<Vec<Delivery>> {
    let first = consumer.next().await.context("the consumer ended")??;
    let mut group = vec![first];
    while group.len() < GROUP {
        match consumer.next().now_or_never() {
            Some(delivery) => group.push(delivery.context("the consumer ended")??),
            None => break,
        }
    }
    Ok(group)
}

/// Acknowledges everything up to this one.
async fn acknowledge(channel: &Channel, last: Option<&Delivery>) -> Result<()> {
    let last = last.context("a group has a last")?.delivery_tag;
    Ok(channel.basic_ack(last, BasicAckOptions { multiple: true }).await?)
}

/// Answers each request, and acknowledges it when its answer is safe.
async fn serve(
    headers: Headers,
    publishing: Channel,
    consuming: Channel,
    mut requests: Consumer,
) -> Result<()> {
    let mut answering = FuturesOrdered::new();
    loop {
        tokio::select! {
            request = requests.next() => {
                let Some(request) = request.transpose()? else { return Ok(()) };
                answering.push_back(answer(headers, &publishing, request));
            }
            Some(answered) = answering.next() => {
                let mut last: Delivery = answered?;
                while let Some(Some(answered)) = answering.next().now_or_never() {
                    last = answered?;
                }
                acknowledge(&consuming, Some(&last)).await?;
            }
        }
    }
}

async fn answer(headers: Headers, channel: &Channel, request: Delivery) -> Result<Delivery> {
    let reply_to = request.properties.reply_to().clone().context("a request has an asker")?;
    let id = request.properties.correlation_id().clone().context("a request has an id")?;
    let properties = headers.persistent("answer").with_correlation_id(id);
    publish_one(channel, "", reply_to, properties, &request.data).await?;
    Ok(request)
}

type Waiting = Mutex<HashMap<String, oneshot::Sender<Vec<u8>>>>;

/// Hands answers to those who wait.
async fn hand_out(channel: Channel, mut answers: Consumer, waiting: Arc<Waiting>) -> Result<()> {
    loop {
        let mut group = next_group(&mut answers).await?;
        for answer in &mut group {
            let id = answer.properties.correlation_id().clone().context("an answer has an id")?;
            let waiter = lock(&waiting).remove(id.as_str()).context("somebody waits")?;
            drop(waiter.send(std::mem::take(&mut answer.data)));
        }
        acknowledge(&channel, group.last()).await?;
    }
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, HashMap<String, oneshot::Sender<Vec<u8>>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn ask(
    headers: Headers,
    channel: &Channel,
    waiting: &Waiting,
    number: u64,
    body: &[u8],
) -> Result<()> {
    let id = number.to_string();
    let (tx, rx) = oneshot::channel();
    lock(waiting).insert(id.clone(), tx);
    let properties = headers.persistent("electron").with_reply_to(INBOX.into());
    let properties = properties.with_correlation_id(id.as_str().into());
    publish_one(channel, EXCHANGE, KEY.into(), properties, body).await?;
    ensure!(rx.await? == body, "the answer is another's");
    Ok(())
}

/// Declares an inbox as a node does.
async fn declare_inbox(channel: &Channel) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(100_000));
    arguments.insert("x-expires".into(), AMQPValue::LongLongInt(30 * 60 * 1000));
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(INBOX.into(), options, arguments).await?;
    Ok(())
}

pub(crate) async fn call(
    url: &str,
    headers: Headers,
    calls: u64,
    in_flight: u64,
) -> Result<Duration> {
    crate::ours::make_queues(url).await?;
    let (server, client) = (connect(url).await?, connect(url).await?);
    let mut background = JoinSet::new();
    let (consuming, requests) = consume(&server, QUEUE).await?;
    background.spawn(serve(headers, confirming(&server).await?, consuming, requests));
    let channel = confirming(&client).await?;
    declare_inbox(&channel).await?;
    let (consuming, answers) = consume(&client, INBOX).await?;
    let waiting = Arc::new(Waiting::default());
    background.spawn(hand_out(consuming, answers, Arc::clone(&waiting)));
    let body: Arc<[u8]> = payload()?.into();
    let begun = Instant::now();
    let made = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..in_flight {
        let (channel, waiting, made) = (channel.clone(), Arc::clone(&waiting), Arc::clone(&made));
        let body = Arc::clone(&body);
        clients.spawn(async move {
            loop {
                let number = made.fetch_add(1, Ordering::Relaxed);
                if number >= calls {
                    return anyhow::Ok(());
                }
                ask(headers, &channel, &waiting, number, &body).await?;
            }
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended??;
    }
    let took = begun.elapsed();
    close(&client).await?;
    close(&server).await?;
    background.shutdown().await;
    Ok(took)
}
