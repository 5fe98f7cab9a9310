//! As much of an HTTP client as the management interface needs.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use crate::error::BrokerError;

/// `guest:guest` in base 64, RabbitMQ's default user.
const CREDENTIALS: &str = "Z3Vlc3Q6Z3Vlc3Q=";

const CONNECT_MAX: Duration = Duration::from_secs(5);

/// A caller of the management interface.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Management {
    pub(crate) address: SocketAddr,
    /// How long an answer may take.
    pub(crate) answer_max: Duration,
}

impl Management {
    pub(crate) fn get(self, path: &str) -> Result<Value, BrokerError> {
        self.call("GET", path, None)
    }

    pub(crate) fn put(self, path: &str, body: &Value) -> Result<(), BrokerError> {
        self.call("PUT", path, Some(body)).map(drop)
    }

    pub(crate) fn delete(self, path: &str) -> Result<(), BrokerError> {
        self.call("DELETE", path, None).map(drop)
    }

    /// Sends one request and returns the body of the answer, null where it is empty.
    pub(crate) fn call(
        self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, BrokerError> {
        let request = format!("{method} {path}");
        let answer = self.exchange(&request, body).map_err(BrokerError::io(request.clone()))?;
        let refused = |status, answer: &str| BrokerError::Management {
            request,
            status,
            answer: answer.to_owned(),
        };
        let Some((status, body)) = parse(&answer) else {
            return Err(refused(0, &answer));
        };
        if !(200..300).contains(&status) {
            return Err(refused(status, body));
        }
        if body.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(body).map_err(|_| refused(status, body))
    }

    fn exchange(self, request: &str, body: Option<&Value>) -> std::io::Result<String> {
        let address = self.address;
        let mut stream = TcpStream::connect_timeout(&address, CONNECT_MAX)?;
        stream.set_read_timeout(Some(self.answer_max))?;
        stream.set_write_timeout(Some(self.answer_max))?;
        let body = body.map_or_else(String::new, Value::to_string);
        // HTTP 1.0: the answer ends where the connection does, and comes unchunked.
        let message = format!(
            "{request} HTTP/1.0\r\nHost: {address}\r\nAuthorization: Basic {CREDENTIALS}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(message.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

/// Splits an answer into its status and its body.
fn parse(answer: &str) -> Option<(u16, &str)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?;
    Some((status.parse().ok()?, body))
}

/// Percent-encodes everything but the unreserved characters of RFC 3986.
pub(crate) fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            write!(encoded, "%{byte:02X}").expect("writing to a String does not fail");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::{encode, parse};

    #[test]
    fn everything_but_unreserved_characters_is_encoded() {
        assert_eq!(encode("/"), "%2F");
        assert_eq!(encode("a-b._~ é%"), "a-b._~%20%C3%A9%25");
    }

    #[test]
    fn an_answer_is_a_status_and_a_body() {
        let answer = "HTTP/1.1 404 Not Found\r\nserver: Cowboy\r\n\r\n{}";
        assert_eq!(parse(answer), Some((404, "{}")));
        assert_eq!(parse("AMQP"), None);
    }
}
