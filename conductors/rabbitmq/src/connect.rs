//! Where the broker is, how it is reached, and what its refusals mean.

use std::{fmt, str::FromStr, time::Duration};

use atomizer::{NodeId, OpenError};
use futures::stream::{BoxStream, StreamExt};
use lapin::{
    Connection, ConnectionProperties, Error, ErrorKind, Event,
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
    uri::AMQPUri,
};
use tokio::time::timeout;

/// How long one connection may take to be made. DNS, TCP and the login are in it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// In seconds; the broker gives up a silent client after twice this.
const HEARTBEAT_DEFAULT_S: u16 = 10;

/// A connection, and what happens to it: events that nobody listens for are lost.
pub(crate) struct Connected {
    pub(crate) connection: Connection,
    pub(crate) events: BoxStream<'static, Event>,
}

/// A broker's URL, with its secrets out of sight.
#[derive(Clone)]
pub(crate) struct Address(AMQPUri);

impl Address {
    pub(crate) fn parse(url: &str) -> Result<Self, UrlError> {
        let refuse = |reason: String| UrlError { url: redacted(url), reason };
        let scheme = url.split_once("://").map(|(scheme, _)| scheme);
        match scheme {
            Some("amqp") => {}
            Some("amqps") => return Err(refuse("TLS is not supported yet".to_owned())),
            _ => return Err(refuse("it does not begin with amqp://".to_owned())),
        }
        // The parser's message may quote what it was given, and with it the password.
        let mut uri = AMQPUri::from_str(url)
            .map_err(|_| refuse(
                "expected amqp://user:password@host:port/vhost; in user and password write / # @ as \
                 %2F %23 %40"
                    .to_owned(),
            ))?;
        uri.query.heartbeat.get_or_insert(HEARTBEAT_DEFAULT_S);
        // By the letter of the AMQP URI specification a slash at the end names the virtual host "", which
        // nobody has: it means the default one, as with most other clients.
        if uri.vhost.is_empty() {
            "/".clone_into(&mut uri.vhost);
        }
        Ok(Self(uri))
    }

    /// Makes one connection.
    pub(crate) async fn connect(&self, node: &NodeId, role: &str) -> Result<Connected, OpenError> {
        let properties =
            ConnectionProperties::default().with_connection_name(format!("{node} {role}").into());
        let connecting = Connection::connect_uri(self.0.clone(), properties);
        match timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => {
                let events = connection.events_listener().boxed();
                Ok(Connected { connection, events })
            }
            Ok(Err(error)) => Err(self.classify(&error)),
            Err(_) => {
                Err(OpenError::Unreachable(format!("{self}: no answer within {CONNECT_TIMEOUT:?}")))
            }
        }
    }

    /// Says what an error while opening means for whoever waits.
    pub(crate) fn classify(&self, error: &Error) -> OpenError {
        let text = format!("{self}: {}", plain(error));
        match error.kind() {
            ErrorKind::ProtocolError(refusal) => match refusal.kind() {
                // A virtual host that is starting or has failed is "down", and may come up.
                _ if refusal.get_message().as_str().contains("is down") => {
                    OpenError::Unreachable(text)
                }
                AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)
                | AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => OpenError::Refused(text),
                AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => {
                    OpenError::Misconfigured(text)
                }
                AMQPErrorKind::Soft(_) | AMQPErrorKind::Hard(_) => OpenError::Unreachable(text),
            },
            ErrorKind::InvalidProtocolVersion(_) | ErrorKind::ParsingError(_) => {
                OpenError::Misconfigured(format!("{self}: not an AMQP 0-9-1 broker"))
            }
            _ => OpenError::Unreachable(text),
        }
    }
}

/// An error without the client's own wording around what the broker or the system said.
pub(crate) fn plain(error: &Error) -> String {
    match error.kind() {
        ErrorKind::IOError(error) => error.to_string(),
        ErrorKind::ProtocolError(error) => error.get_message().to_string(),
        _ => error.to_string(),
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AMQPUri { authority, vhost, .. } = &self.0;
        let vhost = if vhost == "/" { "" } else { vhost };
        write!(f, "amqp://{}:{}/{vhost}", authority.host, authority.port)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Says what is wrong with a URL; user and password are left out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} is not a RabbitMQ URL: {reason}")]
pub struct UrlError {
    url: String,
    reason: String,
}

/// The URL with all that may be a secret replaced: what stands before the last `@`, and everything when there
/// is none and it may have been forgotten.
fn redacted(url: &str) -> String {
    let (scheme, rest) = match url.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), url),
    };
    match rest.rsplit_once('@') {
        Some((_, after)) => format!("{scheme}***@{after}"),
        None if rest.contains(':') => format!("{scheme}***"),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_shows_neither_user_nor_password() {
        let address = Address::parse("amqp://alice:s3cret@broker:5673/jobs").unwrap();
        assert_eq!(
            format!("{address} {address:?}"),
            "amqp://broker:5673/jobs amqp://broker:5673/jobs"
        );
    }

    #[test]
    fn a_slash_at_the_end_means_the_default_virtual_host() {
        for url in [
            "amqp://broker",
            "amqp://broker/",
            "amqp://guest:guest@broker:5672/",
            "amqp://broker/%2f",
        ] {
            assert_eq!(Address::parse(url).unwrap().0.vhost, "/", "{url}");
        }
        assert_eq!(Address::parse("amqp://broker/jobs").unwrap().0.vhost, "jobs");
    }

    #[test]
    fn a_malformed_url_is_refused_without_its_password() {
        for url in [
            "",
            "localhost",
            "http://alice:s3cret@broker",
            "amqp:/alice:s3cret@broker",
            "alice:s3cret@broker",
            "amqp://alice:s3cret@broker:port",
            "amqp://alice:s3cret@broker/?heartbeat=soon",
            "amqps://alice:s3cret@broker",
            "amqp://alice:s3cret",
            "alice:s3cret",
        ] {
            let error = Address::parse(url).expect_err(url).to_string();
            assert!(!error.contains("s3cret"), "{error}");
            assert!(error.contains("is not a RabbitMQ URL"), "{error}");
        }
    }
}
