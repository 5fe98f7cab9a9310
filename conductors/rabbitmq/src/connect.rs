//! Where the broker is, how it is reached, and what its refusals mean.

use std::{
    fmt,
    hash::{BuildHasher, Hasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use atomizer::{NodeId, OpenError};
use futures::stream::{BoxStream, StreamExt};
use lapin::{
    Connection, ConnectionProperties, Error, ErrorKind, Event,
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
    uri::{AMQPAuthority, AMQPUri},
};
use tokio::time::timeout;

use crate::{
    life::REQUEST_TIMEOUT,
    server::Server,
    socket::{self, ConnectError},
    tls::{self, Tls},
    url::{self, UrlError},
};

/// A connection, and what happens to it: events that nobody listens for are lost.
pub(crate) struct Connected {
    pub(crate) connection: Connection,
    pub(crate) events: BoxStream<'static, Event>,
    pub(crate) server: Server,
}

/// How long opening may take at one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Patience {
    /// For connecting: DNS, TCP and the login are in it.
    pub(crate) connect: Duration,
    /// For making what is needed there.
    pub(crate) set_up: Duration,
}

impl Patience {
    const FULL: Self = Self { connect: Duration::from_secs(5), set_up: REQUEST_TIMEOUT };
    /// While there are others to try: one that is silent must not cost a caller's whole time.
    const SHORT: Self = Self { connect: Duration::from_secs(2), set_up: Duration::from_secs(5) };
}

/// All addresses of a broker. Clones share which one is next.
#[derive(Clone)]
pub(crate) struct Addresses {
    all: Arc<[Address]>,
    next: Arc<AtomicUsize>,
    /// Nobody answered the last time, and one at least was silent.
    slow: Arc<AtomicBool>,
}

impl Addresses {
    pub(crate) fn parse(url: &str) -> Result<Self, UrlError> {
        let all = url::parse(url)?;
        // So that a fleet that starts together spreads. Each `RandomState` has keys of its own.
        let first = RandomState::new().build_hasher().finish();
        let next = Arc::new(AtomicUsize::new(usize::try_from(first >> 33).unwrap_or(0)));
        Ok(Self { all: all.into(), next, slow: Arc::default() })
    }

    /// The same addresses, for connections that are to have no say in where others begin.
    pub(crate) fn apart(&self) -> Self {
        let next = Arc::new(AtomicUsize::new(self.next.load(Ordering::Relaxed)));
        Self { all: Arc::clone(&self.all), next, slow: Arc::default() }
    }

    /// Tries each address once, beginning after the one that was tried last, until one is of use.
    pub(crate) async fn try_each<T, F: Future<Output = Result<T, OpenError>>>(
        &self,
        attempt: impl Fn(Address, Patience) -> F,
    ) -> Result<T, OpenError> {
        let (patience, begun) = (self.patience(), Instant::now());
        let mut errors = Vec::new();
        for address in self.round() {
            match attempt(address.clone(), patience).await {
                Ok(used) => {
                    self.slow.store(false, Ordering::Relaxed);
                    return Ok(used);
                }
                Err(error) => {
                    tracing::debug!(%error, "an address was of no use");
                    errors.push(error);
                }
            }
        }
        Err(self.none_answered(errors, begun.elapsed()))
    }

    pub(crate) fn all(&self) -> &[Address] {
        &self.all
    }

    fn round(&self) -> impl Iterator<Item = &Address> {
        let first = self.next.load(Ordering::Relaxed);
        (first..first + self.all.len()).map(|index| {
            // Also who gives up half-way begins elsewhere the next time.
            self.next.store(index + 1, Ordering::Relaxed);
            &self.all[index % self.all.len()]
        })
    }

    /// How long to try each. When all were given too little, the next round is patient.
    fn patience(&self) -> Patience {
        if self.all.len() == 1 || self.slow.load(Ordering::Relaxed) {
            Patience::FULL
        } else {
            Patience::SHORT
        }
    }

    /// Says what it means that no address could be used, all tries together having taken so long. As long as
    /// waiting may help with one, it may help.
    fn none_answered(&self, errors: Vec<OpenError>, took: Duration) -> OpenError {
        self.slow.store(took >= Patience::SHORT.connect, Ordering::Relaxed);
        let mut outcome: Option<OpenError> = None;
        for error in errors {
            outcome = Some(match outcome {
                Some(earlier) => both(earlier, error),
                None => error,
            });
        }
        outcome.unwrap_or_else(|| OpenError::Unreachable("there is no address".to_owned()))
    }
}

/// Makes one error of two.
fn both(one: OpenError, other: OpenError) -> OpenError {
    use OpenError::{Misconfigured, Refused, Unreachable};
    match (one, other) {
        (Unreachable(one), Unreachable(other) | Refused(other) | Misconfigured(other))
        | (Refused(one) | Misconfigured(one), Unreachable(other)) => {
            Unreachable(one + "; " + &other)
        }
        (Refused(one), Refused(other) | Misconfigured(other))
        | (Misconfigured(one), Refused(other)) => Refused(one + "; " + &other),
        (Misconfigured(one), Misconfigured(other)) => Misconfigured(one + "; " + &other),
        (_, other) => other,
    }
}

/// One address of a broker, with its secrets out of sight.
#[derive(Clone)]
pub(crate) struct Address {
    pub(crate) uri: AMQPUri,
    pub(crate) tls: Option<Tls>,
}

impl Address {
    /// Makes one connection.
    pub(crate) async fn connect(
        &self,
        node: &NodeId,
        role: &str,
        limit: Duration,
    ) -> Result<Connected, OpenError> {
        let properties =
            ConnectionProperties::default().with_connection_name(format!("{node} {role}").into());
        let Self { uri, tls } = self.clone();
        match timeout(limit, socket::connect(uri, tls, properties, limit)).await {
            Ok(Ok((connection, server))) => {
                let events = connection.events_listener().boxed();
                Ok(Connected { connection, events, server })
            }
            Ok(Err(ConnectError::Client(error))) => Err(self.classify(&error)),
            Ok(Err(ConnectError::Server(reason))) => {
                Err(OpenError::Misconfigured(format!("{self}: {reason}")))
            }
            Err(_) => Err(self.silent(limit)),
        }
    }

    /// Says that there was no answer in time.
    pub(crate) fn silent(&self, limit: Duration) -> OpenError {
        OpenError::Unreachable(format!("{self}: no answer within {limit:?}"))
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
            ErrorKind::IOError(error) => match tls::means(error) {
                Some(means) => means(text),
                None => OpenError::Unreachable(text),
            },
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

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(Address { uri, .. }) = self.all.first() else { return Ok(()) };
        write!(f, "{}://", uri.scheme)?;
        for (index, address) in self.all.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}", Host(&address.uri))?;
        }
        write!(f, "/{}", shown(&uri.vhost))
    }
}

impl fmt::Debug for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { uri, .. } = self;
        write!(f, "{}://{}/{}", uri.scheme, Host(uri), shown(&uri.vhost))
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Host and port, as in a URL.
struct Host<'a>(&'a AMQPUri);

impl fmt::Display for Host<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AMQPAuthority { host, port, .. } = &self.0.authority;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

fn shown(vhost: &str) -> &str {
    if vhost == "/" { "" } else { vhost }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(addresses: &Addresses) -> Vec<String> {
        addresses.round().map(ToString::to_string).collect()
    }

    #[test]
    fn a_url_shows_neither_user_nor_password() {
        let addresses = Addresses::parse("amqp://alice:s3cret@broker:5673/jobs").unwrap();
        assert_eq!(
            format!("{addresses} {addresses:?} {:?}", addresses.all),
            "amqp://broker:5673/jobs amqp://broker:5673/jobs [amqp://broker:5673/jobs]"
        );
    }

    #[test]
    fn each_round_begins_after_the_address_that_was_tried_last() {
        let addresses = Addresses::parse("amqp://a,b,c").unwrap();
        let all = round(&addresses);
        let mut sorted = all.clone();
        sorted.sort();
        assert_eq!(sorted, ["amqp://a:5672/", "amqp://b:5672/", "amqp://c:5672/"]);
        let used = addresses.round().next().unwrap().to_string();
        assert_eq!(used, all[0]);
        // Clones go on together.
        assert_eq!(round(&addresses.clone()), [&*all[1], &all[2], &all[0]]);
    }

    #[test]
    fn fleets_spread_over_the_addresses() {
        let first = |_| round(&Addresses::parse("amqp://a,b,c").unwrap())[0].clone();
        let firsts: std::collections::HashSet<_> = (0..100).map(first).collect();
        assert_eq!(firsts.len(), 3, "{firsts:?}");
    }

    #[tokio::test]
    async fn who_has_been_too_quick_for_all_is_patient_until_one_answers() {
        let addresses = Addresses::parse("amqp://a,b").unwrap();
        let unreachable = || vec![OpenError::Unreachable("silent".to_owned())];
        assert_eq!(addresses.patience(), Patience::SHORT);
        drop(addresses.none_answered(unreachable(), Duration::from_millis(1)));
        assert_eq!(addresses.patience(), Patience::SHORT);
        drop(addresses.none_answered(unreachable(), Duration::from_secs(2)));
        assert_eq!(addresses.patience(), Patience::FULL);
        addresses.try_each(async |_, _| Ok(())).await.unwrap();
        assert_eq!(addresses.patience(), Patience::SHORT);
        assert_eq!(Addresses::parse("amqp://a").unwrap().patience(), Patience::FULL);
    }

    #[test]
    fn what_may_pass_at_one_address_may_pass() {
        use OpenError::{Misconfigured, Refused, Unreachable};
        let all = |errors: &[fn(String) -> OpenError]| {
            let errors = errors.iter().zip(["x", "y", "z"]);
            let errors = errors.map(|(error, reason)| error(reason.to_owned())).collect();
            let addresses = Addresses::parse("amqp://a").unwrap();
            addresses.none_answered(errors, Duration::ZERO).to_string()
        };
        assert_eq!(all(&[Refused, Unreachable, Misconfigured]), "unreachable: x; y; z");
        assert_eq!(all(&[Misconfigured, Refused]), "refused: x; y");
        assert_eq!(all(&[Misconfigured, Misconfigured]), "misconfigured: x; y");
        assert_eq!(all(&[Unreachable]), "unreachable: x");
    }
}
