//! Asks an atom whose payload is protobuf: bytes on the wire as they are, read without a copy.

use std::process::ExitCode;

use anyhow::Context as _;
use atomizer::{
    AtomError, AtomId, Atomizer, CallError, ContentType, Context, Kind, Options, Payload, RawAtom,
    Result,
};
use atomizer_examples::{Exit, broker, cli, say};
use atomizer_rabbitmq::RabbitMq;
use bytes::Bytes;
use clap::Parser;
use prost::Message;

/// Sends a picture as protobuf to an atom that measures it, and prints what it answers.
///
/// Nothing is wrapped and nothing is base64: the body of the message is the protobuf, and its content type says
/// so. The atom reads the pixels where they lie in the payload. In memory that is where the sender put them.
///
/// Then asks the same with JSON, which is refused with an answer that says why.
#[derive(Parser)]
#[command(
    name = "protobuf",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrongly typed."
)]
struct Arguments {
    /// How many pixels the picture has, of one byte each, as in 5000000, 5_000_000 or 5e6.
    #[arg(long, value_name = "N", default_value = "1e6", value_parser = cli::count, allow_hyphen_values = true)]
    pixels: u64,
    /// Ask over this broker: amqp://user:password@host:port/vhost.
    #[arg(long, value_name = "URL", value_parser = cli::Url)]
    amqp: Option<RabbitMq>,
}

/// What is asked. The attributes are the schema, so there is no .proto file to compile; a program in another
/// language has one that says the same:
///
/// ```proto
/// message Picture { string name = 1; bytes pixels = 2; }
/// ```
#[derive(Clone, PartialEq, Message)]
struct Picture {
    #[prost(string, tag = "1")]
    name: String,
    // As `Bytes`, a field shares the payload it was read from. A `Vec<u8>` would be a copy.
    #[prost(bytes = "bytes", tag = "2")]
    pixels: Bytes,
}

/// What is answered.
#[derive(Clone, PartialEq, Message)]
struct Brightness {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint64, tag = "2")]
    pixels: u64,
    #[prost(double, tag = "3")]
    mean: f64,
    /// Whether the pixels were read where they lay.
    #[prost(bool, tag = "4")]
    in_place: bool,
}

const PROTOBUF: &str = "application/x-protobuf";

fn encode(message: &impl Message) -> Payload {
    let content_type = ContentType::Other(PROTOBUF.to_owned());
    Payload { content_type, body: message.encode_to_vec().into() }
}

/// Cloning `Bytes` counts one more owner: nothing is copied.
fn decode<M: Message + Default>(payload: &Payload) -> Result<M> {
    match payload.content_type.as_str() {
        PROTOBUF => M::decode(payload.body.clone()).map_err(AtomError::undecodable),
        other => Err(AtomError::undecodable(format!("it is {other}, not {PROTOBUF}"))),
    }
}

/// The atom. `Atom` takes and gives JSON; `RawAtom` is the same job over bytes.
struct Measure;

impl Measure {
    const ID: AtomId = AtomId::from_static("picture.measure");
}

impl RawAtom for Measure {
    fn id(&self) -> AtomId {
        Self::ID
    }

    fn kind(&self) -> Kind {
        Kind::Atomic
    }

    fn options(&self) -> Options {
        // It computes from the first byte to the last.
        Options::default().blocking()
    }

    async fn run(&self, _cx: &Context, payload: &Payload) -> Result<Payload> {
        let Picture { name, pixels } = decode(payload)?;
        let sum: u64 = pixels.iter().copied().map(u64::from).sum();
        let brightness = Brightness {
            name,
            pixels: pixels.len() as u64,
            mean: sum as f64 / pixels.len().max(1) as f64,
            in_place: payload.body.as_ptr_range().contains(&pixels.as_ptr()),
        };
        Ok(encode(&brightness))
    }
}

fn main() -> ExitCode {
    // What is refused below is told on stdout.
    atomizer_examples::run("error,lapin=off", protobuf)
}

async fn protobuf(arguments: Arguments) -> anyhow::Result<Exit> {
    let builder = Atomizer::builder().name("protobuf").atom(Measure);
    let node = broker::start_or_in_memory(builder, arguments.amqp).await?;
    let length = usize::try_from(arguments.pixels).context("too many pixels for this machine")?;
    let pixels: Bytes = (0..=u8::MAX).cycle().take(length).collect();
    let question = encode(&Picture { name: "a slope".to_owned(), pixels });
    say(format_args!("asked      {question:?}"))?;

    let answer = node.call_raw(Measure::ID, question).await?;
    say(format_args!("answered   {answer:?}"))?;
    let answer = Brightness::decode(answer.body).context("the answer is no brightness")?;
    say(format_args!("picture    {}", answer.name))?;
    say(format_args!("pixels     {}", answer.pixels))?;
    say(format_args!("brightness {:.3}", answer.mean))?;
    say(format_args!("copied     {}", if answer.in_place { "nothing" } else { "the pixels" }))?;

    let refused = node.call_raw(Measure::ID, Payload::json(r#"{"name":"a slope"}"#)).await;
    let Err(CallError::Failed(failure)) = refused else {
        anyhow::bail!("JSON was taken for protobuf");
    };
    say(format_args!("refused    {}: {}", failure.kind, failure.message))?;
    node.drain().await?;
    Ok(Exit::Done)
}
