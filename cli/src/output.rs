//! Bytes and times, as they are printed.

use std::time::SystemTime;

use atomizer::{ContentType, Payload};
use serde_json::{Map, Value};

/// Writes bytes in base 64 (RFC 4648, with padding).
pub(crate) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0, |bits, byte| bits << 8 | u32::from(*byte));
        let bits = bits << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// Adds a payload to an object: as `name` where it is JSON, else as `name_text` or `name_base64`, with its type.
pub(crate) fn add_payload(object: &mut Map<String, Value>, name: &str, payload: &Payload) {
    object.insert("content_type".to_owned(), payload.content_type.as_str().into());
    if let Some(value) = json(payload) {
        object.insert(name.to_owned(), value);
    } else if let Ok(text) = str::from_utf8(&payload.body) {
        object.insert(format!("{name}_text"), text.into());
    } else {
        object.insert(format!("{name}_base64"), base64(&payload.body).into());
    }
}

/// Returns a payload for people to read: indented JSON, a text, or how many bytes there are.
pub(crate) fn pretty(payload: &Payload) -> String {
    if let Some(Ok(text)) = json(payload).map(|value| serde_json::to_string_pretty(&value)) {
        return text;
    }
    match str::from_utf8(&payload.body) {
        Ok(text) if !text.chars().any(|char| char.is_control() && !char.is_whitespace()) => {
            text.to_owned()
        }
        _ => format!("({} bytes of {})", payload.body.len(), payload.content_type.as_str()),
    }
}

/// Returns when something was, in UTC and whole seconds; a dash where nobody knows.
pub(crate) fn time(at: Option<SystemTime>) -> String {
    at.map_or_else(|| "-".to_owned(), |at| humantime::format_rfc3339_seconds(at).to_string())
}

/// Returns when something was, as JSON.
pub(crate) fn json_time(at: Option<SystemTime>) -> Value {
    at.map_or(Value::Null, |at| humantime::format_rfc3339_millis(at).to_string().into())
}

/// Makes a line of a text that others wrote: what would move the cursor, or begin another line, is escaped.
pub(crate) fn one_line(text: &str) -> String {
    text.chars()
        .flat_map(|char| if char.is_control() { escaped(char) } else { vec![char] })
        .collect()
}

fn escaped(char: char) -> Vec<char> {
    char.escape_default().collect()
}

/// Reads a payload that says that it is JSON.
fn json(payload: &Payload) -> Option<Value> {
    let says_so = payload.content_type == ContentType::Json;
    says_so.then(|| serde_json::from_slice(&payload.body).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_in_base_64() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff]), "+/8=");
    }

    #[test]
    fn what_others_wrote_stays_on_its_line() {
        assert_eq!(one_line("two\nlines \u{1b}[31mred ü"), "two\\nlines \\u{1b}[31mred ü");
    }
}
