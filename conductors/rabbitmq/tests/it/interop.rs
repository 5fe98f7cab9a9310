//! Other AMQP clients: they ask without knowing anything of Atomizer, and send what cannot be read.

use atomizer::EventKind;
use futures::StreamExt;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    options::{BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};

use crate::support::{blocking, serve, soon, until, vhost};

async fn channel(url: &str) -> (Connection, Channel) {
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

async fn publish(channel: &Channel, body: &str, properties: BasicProperties) {
    let options = BasicPublishOptions::default();
    let key = "atom.double".into();
    channel
        .basic_publish("atomizer".into(), key, options, body.as_bytes(), properties)
        .await
        .unwrap();
}

/// A queue as any client makes one for its answers.
async fn own_queue(channel: &Channel) -> (ShortString, Consumer) {
    let options = QueueDeclareOptions { exclusive: true, ..Default::default() };
    let queue = channel.queue_declare("".into(), options, FieldTable::default()).await.unwrap();
    let name = queue.name().clone();
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let consuming =
        channel.basic_consume(name.clone(), "me".into(), options, FieldTable::default());
    (name, consuming.await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_knows_nothing_of_atomizer_is_answered() {
    let vhost = vhost().await;
    let atomizer = serve(&vhost.url()).await;
    let (_connection, channel) = channel(&vhost.url()).await;
    let (mine, mut answers) = own_queue(&channel).await;
    let asked = BasicProperties::default().with_reply_to(mine).with_correlation_id("17".into());
    publish(&channel, "21", asked).await;
    let answer = soon(answers.next()).await.unwrap().unwrap();
    assert_eq!(answer.data, b"42");
    assert_eq!(answer.properties.correlation_id().as_ref().unwrap().as_str(), "17");
    assert_eq!(answer.properties.kind().as_ref().unwrap().as_str(), "answer");
    assert_eq!(answer.properties.content_type().as_ref().unwrap().as_str(), "application/json");
    atomizer.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_what_cannot_be_read_is_told() {
    let vhost = vhost().await;
    let atomizer = serve(&vhost.url()).await;
    let (_connection, channel) = channel(&vhost.url()).await;
    let (mine, mut answers) = own_queue(&channel).await;
    let asked = BasicProperties::default().with_reply_to(mine).with_message_id("my-id".into());
    publish(&channel, "21", asked).await;
    let answer = soon(answers.next()).await.unwrap().unwrap();
    assert_eq!(answer.properties.correlation_id().as_ref().unwrap().as_str(), "my-id");
    let failure = String::from_utf8(answer.data).unwrap();
    assert!(failure.contains("not a valid electron id"), "{failure}");
    atomizer.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_goes_to_the_dead_letters_whole() {
    let vhost = vhost().await;
    let atomizer = serve(&vhost.url()).await;
    let mut events = atomizer.events();
    let (_connection, channel) = channel(&vhost.url()).await;
    publish(&channel, "from the future", BasicProperties::default().with_type("positron".into()))
        .await;
    let unreadable = |kind: &EventKind| matches!(kind, EventKind::Unreadable { .. });
    let event = until(&mut events, unreadable).await;
    assert!(event.to_string().contains("unknown type \"positron\""), "{event}");
    let dead = channel.basic_get("atomizer.dead".into(), BasicGetOptions::default()).await.unwrap();
    let dead = dead.expect("a dead letter");
    assert_eq!(dead.data, b"from the future");
    assert_eq!(dead.properties.kind().as_ref().unwrap().as_str(), "positron");
    let headers = dead.properties.headers().as_ref().unwrap().inner();
    let Some(AMQPValue::LongString(reason)) = headers.get("atomizer-unreadable") else {
        panic!("it says why: {headers:?}")
    };
    assert!(reason.to_string().contains("unknown type"), "{reason}");
    atomizer.drain().await.unwrap();
    blocking(move || drop(vhost)).await;
}
