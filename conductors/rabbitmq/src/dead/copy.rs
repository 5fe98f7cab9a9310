//! Reads letters from AMQP messages, and writes them anew.

use std::{collections::BTreeMap, time::SystemTime};

use atomizer::{
    AtomId, BrokerDeath, DeadLetter, Reason,
    wire::{Parts as _, Wire, header, timestamp},
};
use bytes::Bytes;
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, ShortString},
};

use crate::convert::{self, Arrived, redeliveries};

/// Reads a letter, and how often it was delivered before.
pub(super) fn read(
    properties: &BasicProperties,
    redelivered: bool,
    data: Vec<u8>,
    atom_of: impl Fn(&str) -> Option<AtomId>,
) -> (DeadLetter, u32) {
    let death = death(properties, atom_of);
    let wire = Arrived(properties).to_wire(data.into());
    (DeadLetter::from_wire(&wire, death), redeliveries(properties, redelivered))
}

/// What the broker says, if it was the one who moved the message here: the newest entry of `x-death`, and the atom by the
/// newest that is of an atom's queue.
fn death(
    properties: &BasicProperties,
    atom_of: impl Fn(&str) -> Option<AtomId>,
) -> Option<BrokerDeath> {
    let headers = properties.headers().as_ref()?.inner();
    let AMQPValue::FieldArray(deaths) = headers.get("x-death")? else { return None };
    let mut deaths = deaths.as_slice().iter().filter_map(|death| match death {
        AMQPValue::FieldTable(death) => Some(death.inner()),
        _ => None,
    });
    let newest = deaths.next()?;
    let said =
        |death: &BTreeMap<ShortString, AMQPValue>, name: &str| death.get(name).and_then(text);
    let at = match newest.get("time") {
        Some(AMQPValue::Timestamp(seconds)) => {
            SystemTime::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(*seconds))
        }
        _ => None,
    };
    let (word, queue) = (said(newest, "reason")?, said(newest, "queue").unwrap_or_default());
    let mut earlier = deaths.filter_map(|death| said(death, "queue"));
    let atom = atom_of(&queue).or_else(|| earlier.find_map(|queue| atom_of(&queue)));
    Some(BrokerDeath { word, queue, atom, at })
}

fn text(value: &AMQPValue) -> Option<String> {
    match value {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

/// Which walk wrote a letter anew.
pub(super) fn mark(properties: &BasicProperties) -> Option<String> {
    text(properties.headers().as_ref()?.inner().get(header::DEAD_WALK)?)
}

/// The payload of a letter.
pub(super) fn body(letter: &DeadLetter) -> Bytes {
    match &letter.message {
        Some(message) => Wire::from(message).body,
        None => Bytes::new(),
    }
}

/// The properties of a letter that is written anew: all that it had but what is the broker's, which is noted
/// in words of ours.
pub(super) fn anew(
    properties: &BasicProperties,
    letter: &DeadLetter,
    mark: &str,
) -> BasicProperties {
    let mut headers: BTreeMap<ShortString, AMQPValue> = BTreeMap::new();
    for (name, value) in properties.headers().iter().flatten() {
        if !convert::is_the_brokers(name.as_str()) {
            headers.insert(name.clone(), value.clone());
        }
    }
    let mut note = |name: &str, text: &str| {
        headers.insert(name.into(), AMQPValue::LongString(text.into()));
    };
    if let Reason::Broker { word, queue } = &letter.reason {
        note(header::DEAD_REASON, word);
        note(header::DEAD_QUEUE, queue);
    }
    if let Some(at) = letter.died_at {
        note(header::DEAD_AT, &timestamp(at));
    }
    if let Some(atom) = &letter.atom {
        note(header::DEAD_ATOM, atom.as_str());
    }
    note(header::DEAD_WALK, mark);
    let mut anew = BasicProperties::default()
        .with_delivery_mode(convert::PERSISTENT)
        .with_headers(FieldTable::from(headers));
    // Neither an expiration, by which it would vanish, nor a user, who would have to be this one.
    macro_rules! keep {
        ($($property:ident $with:ident),*) => {
            $(if let Some(value) = properties.$property() { anew = anew.$with(value.clone()); })*
        };
    }
    keep!(
        kind with_type, message_id with_message_id, correlation_id with_correlation_id,
        reply_to with_reply_to, content_type with_content_type, app_id with_app_id,
        content_encoding with_content_encoding, priority with_priority, timestamp with_timestamp
    );
    anew
}
