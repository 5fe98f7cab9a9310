//! Between Atomizer's wire form and AMQP properties and headers.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use atomizer::{
    AtomId, ContentType, Extra, NodeId, SendError,
    wire::{self, ELECTRON, Parts, Property, Writer, header},
};
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, ShortString},
};
use serde_json::{Number, Value};

/// `delivery_mode` of messages that the broker writes to disk (AMQP 0-9-1, basic class).
pub(crate) const PERSISTENT: u8 = 2;

/// Headers that belong to the broker, and beginnings of such (those with a `-` at the end). They are never published
/// again: a copied `x-death` can make the broker drop a message as a cycle, and `CC` and `BCC` (sender-selected
/// distribution) would have it lead each copy to other queues once more.
const BROKER_HEADERS: [&str; 9] = [
    "CC",
    "BCC",
    "x-death",
    "x-first-death-",
    "x-last-death-",
    "x-delivery-count",
    "x-acquired-count",
    "x-opt-",
    "x-delivery-time",
];

/// How often a quorum queue delivered a message before.
const DELIVERY_COUNT: &str = "x-delivery-count";

/// What the application id of a message begins with that was parked: no node has such an id. It is no part of the wire
/// form, so it goes when the message is read: in the queue of an atom it says that the electron was delivered before.
pub(crate) const PARKED: &str = "atomizer/parked";

/// Properties of AMQP that a message is written to.
#[derive(Default)]
pub(crate) struct Writing<'a> {
    properties: BasicProperties,
    /// Which header travels as the application id.
    node: Option<&'static str>,
    headers: BTreeMap<ShortString, AMQPValue>,
    /// What takes the place of the application id.
    mark: Option<ShortString>,
    /// The atom in whose queue the message is to be. Of an electron there it goes without saying what it is, which atom
    /// it is for, and that it is JSON. Whatever is said costs the broker.
    queue: Option<&'a AtomId>,
    metadata_bytes: usize,
    error: Option<SendError>,
}

impl<'a> Writing<'a> {
    pub(crate) fn marked(mark: ShortString) -> Self {
        Self { mark: Some(mark), ..Self::default() }
    }

    pub(crate) fn for_queue_of(atom: &'a AtomId) -> Self {
        Self { queue: Some(atom), ..Self::default() }
    }

    /// Returns what was written.
    ///
    /// # Errors
    /// [`SendError::TooLarge`] when something is longer than AMQP can say, or all of it than `bytes_max`.
    pub(crate) fn finish(self, bytes_max: usize) -> Result<BasicProperties, SendError> {
        let Self { properties, headers, mark, metadata_bytes: bytes, error, .. } = self;
        if bytes > bytes_max {
            return Err(SendError::TooLarge { bytes, bytes_max });
        }
        if let Some(error) = error {
            return Err(error);
        }
        let properties = match mark {
            Some(mark) => properties.with_app_id(mark),
            None => properties,
        };
        let properties = properties.with_delivery_mode(PERSISTENT);
        if headers.is_empty() {
            Ok(properties)
        } else {
            Ok(properties.with_headers(FieldTable::from(headers)))
        }
    }

    /// Takes what was made of a part, unless that failed.
    fn take<T>(&mut self, made: Result<T, SendError>) -> Option<T> {
        match made {
            Ok(made) => Some(made),
            Err(error) => {
                self.error.get_or_insert(error);
                None
            }
        }
    }

    fn set(&mut self, change: impl FnOnce(BasicProperties) -> BasicProperties) {
        self.properties = change(std::mem::take(&mut self.properties));
    }

    /// Has a header travel as the application id, and returns true, if it is the one, and can be read again.
    fn take_node(&mut self, name: &str, value: &str) -> bool {
        let node = self.node.unwrap_or(header::SENDER);
        let is_node = name == node && self.mark.is_none() && NodeId::try_new(value).is_ok();
        if is_node {
            self.headers.remove(name);
            let id = value.into();
            self.set(|properties| properties.with_app_id(id));
        }
        is_node
    }

    fn insert(&mut self, name: &str, value: Result<AMQPValue, SendError>) {
        let (name, value) = (self.take(short(name)), self.take(value));
        if let Some((name, value)) = name.zip(value) {
            self.headers.insert(name, value);
        }
    }
}

impl Writer for Writing<'_> {
    fn put_property(&mut self, property: Property, value: Cow<'_, str>) {
        self.metadata_bytes += value.len();
        let goes_without_saying = match property {
            Property::Kind => value == ELECTRON,
            Property::ContentType => value == ContentType::Json.as_str(),
            _ => false,
        };
        if property == Property::Kind {
            self.node = Some(node_of(Some(&value)));
        }
        if goes_without_saying && self.queue.is_some() {
            return;
        }
        let Some(value) = self.take(short(value)) else { return };
        self.set(|properties| match property {
            Property::Kind => properties.with_type(value),
            Property::Id => properties.with_message_id(value),
            Property::CorrelationId => properties.with_correlation_id(value),
            Property::ReplyTo => properties.with_reply_to(value),
            Property::ContentType => properties.with_content_type(value),
        });
    }

    fn put_header(&mut self, name: &'static str, value: Cow<'_, str>) {
        self.metadata_bytes += name.len() + value.len();
        if name == header::ATOM && self.queue.is_some_and(|atom| atom.as_str() == value) {
            self.headers.remove(name);
        } else if !self.take_node(name, &value) {
            self.insert(name, Ok(AMQPValue::LongString(value.into_owned().into())));
        }
    }

    fn put_extra(&mut self, name: &str, value: &Value) {
        self.metadata_bytes += name.len();
        self.metadata_bytes += value.as_str().map_or_else(|| value.to_string().len(), str::len);
        if !value.as_str().is_some_and(|value| self.take_node(name, value)) {
            self.insert(name, to_amqp(value));
        }
    }
}

/// Which header travels as the application id: which node a message is from. Brokers read the table of headers of each
/// message, and what is in it costs several times what a property does.
fn node_of(kind: Option<&str>) -> &'static str {
    if kind == Some(wire::ANSWER) { header::NODE } else { header::SENDER }
}

/// Short strings have a length of one byte (AMQP 0-9-1, 4.2.5.3).
fn short<'a>(text: impl Into<Cow<'a, str>>) -> Result<ShortString, SendError> {
    let text = text.into();
    let bytes = text.len();
    ShortString::try_new(text.into_owned())
        .map_err(|_| SendError::TooLarge { bytes, bytes_max: usize::from(u8::MAX) })
}

/// The properties and headers of a message that arrived.
pub(crate) struct Arrived<'a>(pub(crate) &'a BasicProperties);

impl Arrived<'_> {
    /// When it was sent (AMQP 0-9-1, basic class: POSIX time, to the second).
    pub(crate) fn sent_at(&self) -> Option<SystemTime> {
        let seconds = self.0.timestamp().as_ref()?;
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(*seconds))
    }

    fn table(&self, name: &str) -> Option<&AMQPValue> {
        self.0.headers().as_ref()?.inner().get(name)
    }

    /// The header that travels as the application id. Other programs have ids of other kinds.
    fn node(&self) -> Option<(&'static str, &str)> {
        let (name, app_id) = (node_of(self.kind()), self.0.app_id().as_ref()?.as_str());
        let is_node = !app_id.starts_with(PARKED) && NodeId::try_new(app_id).is_ok();
        (is_node && self.table(name).is_none()).then_some((name, app_id))
    }
}

impl Parts for Arrived<'_> {
    fn kind(&self) -> Option<&str> {
        self.0.kind().as_ref().map(ShortString::as_str)
    }

    fn id(&self) -> Option<&str> {
        self.0.message_id().as_ref().map(ShortString::as_str)
    }

    fn correlation_id(&self) -> Option<&str> {
        self.0.correlation_id().as_ref().map(ShortString::as_str)
    }

    fn reply_to(&self) -> Option<&str> {
        self.0.reply_to().as_ref().map(ShortString::as_str)
    }

    fn content_type(&self) -> Option<&str> {
        self.0.content_type().as_ref().map(ShortString::as_str)
    }

    fn header(&self, name: &str) -> Option<Result<Cow<'_, str>, String>> {
        let Some(value) = self.table(name) else {
            let is_it = name == node_of(self.kind());
            return is_it.then(|| self.node()).flatten().map(|(_, node)| Ok(node.into()));
        };
        Some(match value {
            AMQPValue::LongString(text) => Ok(String::from_utf8_lossy(text.as_bytes())),
            other => wire::text(&to_json(other)).map(|text| text.into_owned().into()),
        })
    }

    fn headers_but(&self, names: &[&str]) -> Extra {
        let all = self.0.headers().iter().flatten().map(|(name, value)| (name.as_str(), value));
        all.filter(|(name, _)| !names.contains(name) && !is_the_brokers(name))
            .map(|(name, value)| (name.to_owned(), to_json(value)))
            .chain(
                self.node()
                    .filter(|(name, _)| !names.contains(name))
                    .map(|(name, node)| (name.to_owned(), Value::from(node))),
            )
            .collect()
    }
}

/// Returns how often a message was delivered before.
pub(crate) fn redeliveries(properties: &BasicProperties, redelivered: bool) -> u32 {
    let headers = properties.headers().as_ref();
    let counted = headers.and_then(|headers| headers.inner().get(DELIVERY_COUNT));
    let counted = counted.and_then(|count| u32::try_from(to_json(count).as_u64()?).ok());
    let redeliveries = counted.unwrap_or_default().max(redelivered.into());
    let mark = properties.app_id().as_ref();
    let was_parked = mark.is_some_and(|mark| mark.as_str().starts_with(PARKED));
    redeliveries.saturating_add(was_parked.into())
}

pub(crate) fn is_the_brokers(name: &str) -> bool {
    BROKER_HEADERS
        .iter()
        .any(|owned| if owned.ends_with('-') { name.starts_with(owned) } else { name == *owned })
}

fn to_amqp(value: &Value) -> Result<AMQPValue, SendError> {
    Ok(match value {
        Value::Null => AMQPValue::Void,
        Value::Bool(bool) => AMQPValue::Boolean(*bool),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => AMQPValue::LongLongInt(integer),
            (None, Some(float)) => AMQPValue::Double(float),
            (None, None) => AMQPValue::LongString(number.to_string().into()),
        },
        Value::String(text) => AMQPValue::LongString(text.as_str().into()),
        Value::Array(values) => {
            let values: Result<Vec<_>, _> = values.iter().map(to_amqp).collect();
            AMQPValue::FieldArray(values?.into())
        }
        Value::Object(fields) => {
            let fields: Result<BTreeMap<_, _>, SendError> =
                (fields.iter()).map(|(name, value)| Ok((short(name)?, to_amqp(value)?))).collect();
            AMQPValue::FieldTable(fields?.into())
        }
    })
}

/// Integers keep their value but not their width, and bytes that are no text become text.
fn to_json(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::Boolean(bool) => Value::Bool(*bool),
        AMQPValue::ShortShortInt(number) => Value::from(*number),
        AMQPValue::ShortShortUInt(number) => Value::from(*number),
        AMQPValue::ShortInt(number) => Value::from(*number),
        AMQPValue::ShortUInt(number) => Value::from(*number),
        AMQPValue::LongInt(number) => Value::from(*number),
        AMQPValue::LongUInt(number) => Value::from(*number),
        AMQPValue::LongLongInt(number) => Value::from(*number),
        AMQPValue::Timestamp(seconds) => Value::from(*seconds),
        AMQPValue::Float(number) => float(f64::from(*number)),
        AMQPValue::Double(number) => float(*number),
        AMQPValue::DecimalValue(decimal) => {
            float(f64::from(decimal.value) / 10_f64.powi(i32::from(decimal.scale)))
        }
        AMQPValue::ShortString(text) => Value::from(text.as_str()),
        AMQPValue::LongString(text) => lossy(text.as_bytes()),
        AMQPValue::ByteArray(bytes) => lossy(bytes.as_slice()),
        AMQPValue::FieldArray(values) => values.as_slice().iter().map(to_json).collect(),
        AMQPValue::FieldTable(fields) => {
            let fields = fields.into_iter().map(|(name, value)| (name.to_string(), to_json(value)));
            Value::Object(fields.collect())
        }
        AMQPValue::Void => Value::Null,
    }
}

fn float(number: f64) -> Value {
    Number::from_f64(number).map_or(Value::Null, Value::Number)
}

fn lossy(bytes: &[u8]) -> Value {
    Value::from(String::from_utf8_lossy(bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use atomizer::{Electron, Message, Payload, Properties, wire::Wire};
    use bytes::Bytes;
    use serde_json::json;

    use super::*;

    fn properties(wire: &Wire) -> Result<BasicProperties, SendError> {
        let mut writing = Writing::default();
        wire.write(&mut writing);
        writing.finish(usize::MAX)
    }

    #[test]
    fn headers_of_others_survive_a_round_trip() {
        let headers = json!({
            "text": "ü", "number": -7, "float": 1.5, "flag": true, "nothing": null,
            "list": [1, "two"], "table": { "deep": { "er": 1 } },
        });
        let headers: BTreeMap<_, _> = headers.as_object().unwrap().clone().into_iter().collect();
        let mut before = Wire::default();
        before.headers.clone_from(&headers);
        let after = properties(&before).unwrap();
        assert_eq!(Arrived(&after).headers_but(&[]), headers);
        assert_eq!(redeliveries(&after, false), 0);
    }

    #[test]
    fn what_amqp_cannot_say_is_an_error() {
        let mut wire = Wire::default();
        wire.correlation_id = Some("x".repeat(256));
        let error = properties(&wire).unwrap_err();
        assert_eq!(error, SendError::TooLarge { bytes: 256, bytes_max: 255 });
    }

    #[test]
    fn a_message_says_the_same_in_place_as_taken_apart() {
        let mut electron = Electron::new(AtomId::from_static("double"), Payload::json("21"));
        electron.sender = Some(NodeId::from_static("agent-0badcafe"));
        electron.attempts = 2;
        let node = NodeId::from_static("agent-1badcafe");
        let answer = Properties::new(&electron, node, Ok(Payload::json("42")));
        let mut of_others = electron.clone();
        // Where somebody uses our names, our word counts.
        for (name, value) in [("traceparent", "00"), (header::ATOM, "x"), (header::SENDER, "y")] {
            of_others.extra.insert(name.to_owned(), value.into());
        }
        for message in [electron.into(), Message::from(answer), of_others.into()] {
            let mut writing = Writing::default();
            message.write(&mut writing);
            let wire = Wire::from(&message);
            assert_eq!(writing.finish(usize::MAX).unwrap(), properties(&wire).unwrap());
        }
    }

    #[test]
    fn in_the_queue_of_its_atom_an_electron_says_little() {
        let (atom, other) = (AtomId::from_static("double"), AtomId::from_static("half"));
        let mut electron = Electron::new(atom.clone(), Payload::json("21"));
        electron.extra.insert(header::ATOM.to_owned(), "x".into());
        let message = Message::from(electron);
        let written = |queue| {
            let mut writing = Writing::for_queue_of(queue);
            message.write(&mut writing);
            writing.finish(usize::MAX).unwrap()
        };
        let said = written(&atom);
        assert_eq!((said.kind(), said.content_type(), said.headers()), (&None, &None, &None));
        let Message::Electron(read) = Message::read(&Arrived(&said), "21".into(), Some(&atom))
        else {
            panic!("it can be read")
        };
        assert_eq!(read.atom, atom);
        let said = written(&other);
        assert_eq!(Arrived(&said).header(header::ATOM).unwrap().unwrap(), "double");
    }

    #[test]
    fn what_was_parked_was_delivered_before() {
        let parked = BasicProperties::default().with_app_id("atomizer/parked.7".into());
        assert_eq!(redeliveries(&parked, false), 1);
        let read = Arrived(&parked).to_wire(Bytes::new());
        assert_eq!(*properties(&read).unwrap().app_id(), None, "the mark is not kept");
        let other = BasicProperties::default().with_app_id("billing".into());
        assert_eq!(redeliveries(&other, false), 0);
    }

    #[test]
    fn the_node_that_a_message_is_from_is_its_application_id() {
        for (kind, name) in [(None, header::SENDER), (Some(wire::ANSWER), header::NODE)] {
            let mut wire = Wire::default();
            wire.kind = kind.map(ToOwned::to_owned);
            wire.headers.insert(name.to_owned(), "agent-0badcafe".into());
            let sent = properties(&wire).unwrap();
            assert_eq!(sent.app_id().as_ref().map(ShortString::as_str), Some("agent-0badcafe"));
            assert_eq!(*sent.headers(), None, "that is all");
            let arrived = Arrived(&sent);
            assert_eq!(arrived.header(name).unwrap().unwrap(), "agent-0badcafe");
            assert_eq!(arrived.headers_but(&[]), wire.headers);
            assert_eq!(arrived.headers_but(&[name]), Extra::new());
            let mut marked = Writing::marked(PARKED.into());
            wire.write(&mut marked);
            let marked = marked.finish(usize::MAX).unwrap();
            assert_eq!(Arrived(&marked).headers_but(&[]), wire.headers, "beside a mark");
        }
        let other = BasicProperties::default().with_app_id("no node".into());
        assert_eq!(Arrived(&other).header(header::SENDER), None);
    }

    #[test]
    fn what_is_no_node_stays_in_its_header() {
        for sender in [json!("x".repeat(300)), json!("a b"), json!(["a"])] {
            let mut wire = Wire::default();
            wire.headers.insert(header::SENDER.to_owned(), sender);
            let sent = properties(&wire).unwrap();
            assert_eq!(*sent.app_id(), None);
            assert_eq!(
                Arrived(&sent).headers_but(&[]),
                wire.headers,
                "it can be buried as it came"
            );
        }
    }

    #[test]
    fn headers_of_the_broker_are_read_and_not_kept() {
        let headers = BTreeMap::from([
            (ShortString::from("x-delivery-count"), AMQPValue::LongInt(3)),
            (ShortString::from("x-death"), AMQPValue::FieldArray(Vec::new().into())),
            (ShortString::from("x-first-death-queue"), AMQPValue::LongString("q".into())),
            (ShortString::from("CC"), AMQPValue::FieldArray(Vec::new().into())),
            (ShortString::from("x-death-row"), AMQPValue::LongString("kept".into())),
        ]);
        let properties = BasicProperties::default().with_headers(headers.into());
        assert_eq!(redeliveries(&properties, true), 3);
        assert_eq!(
            Arrived(&properties).headers_but(&[]).keys().collect::<Vec<_>>(),
            ["x-death-row"]
        );
    }
}
