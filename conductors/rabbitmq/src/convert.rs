//! Between Atomizer's wire form and AMQP properties and headers.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use atomizer::{
    Extra, NodeId, SendError,
    wire::{self, Parts, Wire, header},
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

/// Turns all but the body into properties. A mark takes the place of the application id.
///
/// # Errors
/// [`SendError::TooLarge`] when something is longer than AMQP can say.
pub(crate) fn properties(
    mut wire: Wire,
    mark: Option<ShortString>,
) -> Result<BasicProperties, SendError> {
    let app_id = match mark {
        None => node(&mut wire).map(short).transpose()?,
        mark => mark,
    };
    let headers: Result<BTreeMap<ShortString, AMQPValue>, SendError> =
        wire.headers.into_iter().map(|(name, value)| Ok((short(name)?, to_amqp(value)?))).collect();
    let mut properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
    let headers = headers?;
    if !headers.is_empty() {
        properties = properties.with_headers(FieldTable::from(headers));
    }
    if let Some(app_id) = app_id {
        properties = properties.with_app_id(app_id);
    }
    if let Some(kind) = wire.kind {
        properties = properties.with_type(short(kind)?);
    }
    if let Some(id) = wire.id {
        properties = properties.with_message_id(short(id)?);
    }
    if let Some(id) = wire.correlation_id {
        properties = properties.with_correlation_id(short(id)?);
    }
    if let Some(reply_to) = wire.reply_to {
        properties = properties.with_reply_to(short(reply_to)?);
    }
    if let Some(content_type) = wire.content_type {
        properties = properties.with_content_type(short(content_type)?);
    }
    Ok(properties)
}

/// Which header travels as the application id: which node a message is from. Brokers read the table of headers of each
/// message, and what is in it costs several times what a property does.
fn node_of(kind: Option<&str>) -> &'static str {
    if kind == Some(wire::ANSWER) { header::NODE } else { header::SENDER }
}

/// Takes out the header that travels as the application id, if that can be read again.
fn node(wire: &mut Wire) -> Option<String> {
    let name = node_of(wire.kind.as_deref());
    let node =
        wire.headers.get(name)?.as_str().filter(|node| NodeId::try_new(*node).is_ok())?.to_owned();
    wire.headers.remove(name);
    Some(node)
}

/// Short strings have a length of one byte (AMQP 0-9-1, 4.2.5.3).
fn short(text: String) -> Result<ShortString, SendError> {
    let bytes = text.len();
    ShortString::try_new(text)
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

fn to_amqp(value: Value) -> Result<AMQPValue, SendError> {
    Ok(match value {
        Value::Null => AMQPValue::Void,
        Value::Bool(bool) => AMQPValue::Boolean(bool),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => AMQPValue::LongLongInt(integer),
            (None, Some(float)) => AMQPValue::Double(float),
            (None, None) => AMQPValue::LongString(number.to_string().into()),
        },
        Value::String(text) => AMQPValue::LongString(text.into()),
        Value::Array(values) => {
            let values: Result<Vec<_>, _> = values.into_iter().map(to_amqp).collect();
            AMQPValue::FieldArray(values?.into())
        }
        Value::Object(fields) => {
            let fields: Result<BTreeMap<_, _>, SendError> = fields
                .into_iter()
                .map(|(name, value)| Ok((short(name)?, to_amqp(value)?)))
                .collect();
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
    use bytes::Bytes;
    use serde_json::json;

    use super::*;

    #[test]
    fn headers_of_others_survive_a_round_trip() {
        let headers = json!({
            "text": "ü", "number": -7, "float": 1.5, "flag": true, "nothing": null,
            "list": [1, "two"], "table": { "deep": { "er": 1 } },
        });
        let headers: BTreeMap<_, _> = headers.as_object().unwrap().clone().into_iter().collect();
        let mut before = Wire::default();
        before.headers.clone_from(&headers);
        let after = properties(before, None).unwrap();
        assert_eq!(Arrived(&after).headers_but(&[]), headers);
        assert_eq!(redeliveries(&after, false), 0);
    }

    #[test]
    fn what_amqp_cannot_say_is_an_error() {
        let mut wire = Wire::default();
        wire.correlation_id = Some("x".repeat(256));
        let error = properties(wire, None).unwrap_err();
        assert_eq!(error, SendError::TooLarge { bytes: 256, bytes_max: 255 });
    }

    #[test]
    fn what_was_parked_was_delivered_before() {
        let parked = BasicProperties::default().with_app_id("atomizer/parked.7".into());
        assert_eq!(redeliveries(&parked, false), 1);
        let read = Arrived(&parked).to_wire(Bytes::new());
        assert_eq!(*properties(read, None).unwrap().app_id(), None, "the mark is not kept");
        let other = BasicProperties::default().with_app_id("billing".into());
        assert_eq!(redeliveries(&other, false), 0);
    }

    #[test]
    fn the_node_that_a_message_is_from_is_its_application_id() {
        for (kind, name) in [(None, header::SENDER), (Some(wire::ANSWER), header::NODE)] {
            let mut wire = Wire::default();
            wire.kind = kind.map(ToOwned::to_owned);
            wire.headers.insert(name.to_owned(), "agent-0badcafe".into());
            let sent = properties(wire.clone(), None).unwrap();
            assert_eq!(sent.app_id().as_ref().map(ShortString::as_str), Some("agent-0badcafe"));
            assert_eq!(*sent.headers(), None, "that is all");
            let arrived = Arrived(&sent);
            assert_eq!(arrived.header(name).unwrap().unwrap(), "agent-0badcafe");
            assert_eq!(arrived.headers_but(&[]), wire.headers);
            assert_eq!(arrived.headers_but(&[name]), Extra::new());
            let marked = properties(wire.clone(), Some(PARKED.into())).unwrap();
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
            let sent = properties(wire.clone(), None).unwrap();
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
