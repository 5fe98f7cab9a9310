//! As much of RabbitMQ's management API as is of use: lists, over HTTP.
//!
//! AMQP 0-9-1 has no question for what there is. Where the plugin is on, it answers that.

use std::{fmt, str::FromStr, time::Duration};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::output::base64;

/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an answer may be: some 100,000 queues.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Where the management API is, and who asks.
#[derive(Clone)]
pub(crate) struct Management {
    host: String,
    /// User and password, in base 64.
    credentials: String,
    /// What stands before `/api`.
    prefix: String,
}

impl FromStr for Management {
    type Err = String;

    /// An error quotes nothing of it: there may be a password in it.
    fn from_str(url: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected http://user:password@host:15672";
        let Some(rest) = url.strip_prefix("http://") else {
            return Err(format!("{EXPECTED}; only http:// is spoken"));
        };
        let (authority, prefix) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (user, host) = authority.rsplit_once('@').unwrap_or(("guest:guest", authority));
        let user = decoded(user);
        if host.is_empty() || !user.contains(&b':') || prefix.contains('@') {
            return Err(EXPECTED.to_owned());
        }
        let after_address = host.rsplit_once(']').map_or(host, |(_, after)| after);
        let host = match after_address.rsplit_once(':') {
            Some((_, port)) if port.parse::<u16>().is_ok() => host.to_owned(),
            Some(_) => return Err(EXPECTED.to_owned()),
            None => format!("{host}:15672"),
        };
        let prefix = prefix.trim_end_matches('/').to_owned();
        Ok(Self { host, credentials: base64(&user), prefix })
    }
}

impl fmt::Debug for Management {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Management {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.host, self.prefix)
    }
}

impl Management {
    /// Lists something of a virtual host, as in `queues` and `bindings`.
    pub(crate) async fn list(&self, what: &str, vhost: &str) -> anyhow::Result<Vec<Value>> {
        let path = format!("{}/api/{what}/{}", self.prefix, encoded(vhost));
        let asking = timeout(ANSWER_TIMEOUT, self.get(&path));
        let answer = asking.await.unwrap_or_else(|_| bail!("no answer within {ANSWER_TIMEOUT:?}"));
        let answer = answer.with_context(|| format!("failed to list {what} at {self}"))?;
        match serde_json::from_slice(&answer) {
            Ok(Value::Array(list)) => Ok(list),
            _ => bail!("{self} does not answer as a management API does"),
        }
    }

    async fn get(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        let Self { host, credentials, .. } = self;
        let mut stream = TcpStream::connect(host).await?;
        // HTTP 1.0: the answer ends where the connection does, and comes in one piece.
        let request = format!(
            "GET {path} HTTP/1.0\r\nHost: {host}\r\nAuthorization: Basic {credentials}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
        let end = end.context("it speaks no HTTP")?;
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        let status = head.split(' ').nth(1).unwrap_or_default();
        ensure!(status != "401", "it refuses this user, or the user has not the tag 'monitoring'");
        ensure!(status == "200", "it answers with status {status}");
        Ok(answer.split_off(end + 4))
    }
}

/// Text from a URL, where bytes may be written as `%2F`.
fn decoded(text: &str) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|code| str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

/// Percent-encodes everything but the unreserved characters of RFC 3986.
fn encoded(text: &str) -> String {
    let encode = |byte: u8| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            char::from(byte).to_string()
        } else {
            format!("%{byte:02X}")
        }
    };
    text.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_and_shown_without_its_password() {
        for (url, shown) in [
            ("http://localhost", "http://localhost:15672"),
            ("http://alice:s3cret@broker:1/", "http://broker:1"),
            ("http://alice:s%40@[::1]/rabbit/", "http://[::1]:15672/rabbit"),
        ] {
            let management: Management = url.parse().unwrap();
            assert_eq!(format!("{management} {management:?}"), format!("{shown} {shown}"));
        }
        let management: Management = "http://broker".parse().unwrap();
        assert_eq!(management.credentials, "Z3Vlc3Q6Z3Vlc3Q=");
        for url in ["https://alice:s3cret@broker", "http://", "http://alice:s3cret@broker:port", ""]
        {
            let error = url.parse::<Management>().unwrap_err();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
}
