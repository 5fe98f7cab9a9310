//! Payloads other than JSON travel as they are: protobuf and plain bytes, in memory and over RabbitMQ.

use std::{num::NonZeroUsize, time::Duration};

use atomizer::{
    AtomId, Conductor, ContentType, Electron, Kind, Message, NodeId, Outcome, Payload, RawAtom,
    Source, prelude::*,
};
use bytes::Bytes;
use prost::Message as _;
use tokio::{
    sync::mpsc::{Receiver, Sender, channel},
    task::spawn_blocking,
    time::timeout,
};

use crate::{rabbit, vhost};

const PROTOBUF: &str = "application/x-protobuf";
const SOON: Duration = Duration::from_secs(60);

#[derive(Clone, PartialEq, prost::Message)]
struct Sample {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "bytes", tag = "2")]
    data: Bytes,
    #[prost(sint64, tag = "3")]
    offset: i64,
}

/// With every byte there is, so that nothing on the way can take it for text.
fn sample() -> Sample {
    Sample { name: "every byte".into(), data: (0..=u8::MAX).collect(), offset: -1 }
}

fn protobuf(body: impl Into<Bytes>) -> Payload {
    Payload { content_type: ContentType::Other(PROTOBUF.into()), body: body.into() }
}

/// Hands each payload that it sees to the test, and answers with what `answer` makes of it.
struct Observed {
    id: AtomId,
    seen: Sender<Payload>,
    answer: fn(&Payload) -> Result<Payload>,
}

impl RawAtom for Observed {
    fn id(&self) -> AtomId {
        self.id.clone()
    }

    fn kind(&self) -> Kind {
        Kind::Atomic
    }

    fn options(&self) -> Options {
        Options::default()
    }

    async fn run(&self, cx: &Context, payload: &Payload) -> Result<Payload> {
        assert_eq!(&cx.electron().payload, payload, "they are the same");
        self.seen.send(payload.clone()).await?;
        (self.answer)(payload)
    }
}

const NEGATE: AtomId = AtomId::from_static("negate");
const ECHO: AtomId = AtomId::from_static("echo");

/// Answers protobuf with protobuf, and checks that reading it copied nothing.
fn negate(payload: &Payload) -> Result<Payload> {
    if payload.content_type.as_str() != PROTOBUF {
        return Err(AtomError::undecodable(payload.content_type.as_str()));
    }
    let mut sample = Sample::decode(payload.body.clone()).map_err(AtomError::undecodable)?;
    assert!(payload.body.as_ptr_range().contains(&sample.data.as_ptr()), "it shares the payload");
    sample.offset = -sample.offset;
    Ok(protobuf(sample.encode_to_vec()))
}

fn echo(payload: &Payload) -> Result<Payload> {
    Ok(payload.clone())
}

/// A node that has both atoms, one that asks, and what the atoms see.
async fn nodes(conductor: impl Conductor + Clone) -> (Atomizer, Atomizer, Receiver<Payload>) {
    let (seen_tx, seen) = channel(1);
    let atom = |id, answer| Observed { id, seen: seen_tx.clone(), answer };
    let builder = Atomizer::builder().conductor(conductor.clone());
    let serving = builder.atom(atom(NEGATE, negate)).atom(atom(ECHO, echo)).start().await.unwrap();
    let asker = Atomizer::builder().conductor(conductor).start().await.unwrap();
    (serving, asker, seen)
}

fn payloads() -> [Payload; 4] {
    let every_byte: Bytes = (0..=u8::MAX).collect();
    [
        Payload::bytes(every_byte.clone()),
        Payload::bytes(Bytes::new()),
        Payload::json(r#"{"not":"looked at"}"#),
        // No text in any encoding, and of a type that nobody knows.
        Payload { content_type: ContentType::Other("image/x-unknown".into()), body: every_byte },
    ]
}

async fn carries_all(conductor: impl Conductor + Clone) {
    let (serving, asker, mut seen) = nodes(conductor).await;
    let asked = protobuf(sample().encode_to_vec());
    let answer = asker.call_raw(NEGATE, asked.clone()).deadline(SOON).await.unwrap();
    assert_eq!(seen.recv().await.unwrap(), asked, "bytes and type are those that were sent");
    assert_eq!(answer.content_type, ContentType::Other(PROTOBUF.into()));
    assert_eq!(Sample::decode(answer.body).unwrap(), Sample { offset: 1, ..sample() });
    for payload in payloads() {
        let answer = asker.call_raw(ECHO, payload.clone()).deadline(SOON).await.unwrap();
        assert_eq!(seen.recv().await.unwrap(), payload);
        assert_eq!(answer, payload);
    }
    for node in [asker, serving] {
        node.drain().await.unwrap();
    }
}

/// What another program would find in the queue: sent by a node, received without one.
async fn lies_in_the_queue_as_it_is(conductor: impl Conductor + Clone) {
    let asker = Atomizer::builder().conductor(conductor.clone()).start().await.unwrap();
    let reader = conductor.open(&NodeId::unique("reader").unwrap()).await.unwrap();
    let one = NonZeroUsize::MIN;
    let mut queue = reader.subscribe(Source::Atom(NEGATE), one).await.unwrap();
    for payload in payloads().into_iter().chain([protobuf(sample().encode_to_vec())]) {
        asker.send_electron(Electron::new(NEGATE, payload.clone())).await.unwrap();
        let mut deliveries = timeout(SOON, queue.next(one)).await.unwrap().unwrap();
        let delivery = deliveries.pop().unwrap();
        let Message::Electron(electron) = delivery.message else { panic!("it is an electron") };
        assert_eq!(electron.payload, payload);
        reader.settle(vec![(delivery.ticket, Outcome::done(Vec::new()))]).await.remove(0).unwrap();
    }
    reader.close().await;
    asker.drain().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn payloads_other_than_json_travel_in_memory() {
    carries_all(Memory::new()).await;
    lies_in_the_queue_as_it_is(Memory::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn payloads_other_than_json_travel_over_rabbitmq() {
    let vhost = vhost().await;
    carries_all(rabbit(&vhost)).await;
    lies_in_the_queue_as_it_is(rabbit(&vhost)).await;
    spawn_blocking(move || drop(vhost)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn in_memory_no_payload_is_copied() {
    let (serving, asker, mut seen) = nodes(Memory::new()).await;
    let asked = protobuf(sample().encode_to_vec());
    let sent_from = asked.body.as_ptr();
    asker.call_raw(NEGATE, asked).await.unwrap();
    assert_eq!(seen.recv().await.unwrap().body.as_ptr(), sent_from, "the atom reads what was sent");
    let asked = Payload::bytes(vec![7; 1_000_000]);
    let sent_from = asked.body.as_ptr();
    let answer = asker.call_raw(ECHO, asked).await.unwrap();
    assert_eq!(seen.recv().await.unwrap().body.as_ptr(), sent_from);
    assert_eq!(answer.body.as_ptr(), sent_from, "and so does the asker, when it comes back");
    for node in [asker, serving] {
        node.drain().await.unwrap();
    }
}
