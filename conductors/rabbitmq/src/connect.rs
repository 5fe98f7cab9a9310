//! Where the broker is, how it is reached, and what its refusals mean.

use std::{
    fmt,
    hash::{BuildHasher, Hasher, RandomState},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
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
};

/// In seconds; the broker gives up a silent client after twice this.
const HEARTBEAT_DEFAULT_S: u16 = 10;

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
        let all = parse(url).map_err(|reason| UrlError { url: redacted(url), reason })?;
        // So that a fleet that starts together spreads. Each `RandomState` has keys of its own.
        let first = RandomState::new().build_hasher().finish();
        let next = Arc::new(AtomicUsize::new(usize::try_from(first >> 33).unwrap_or(0)));
        Ok(Self { all: all.into(), next, slow: Arc::default() })
    }

    /// Runs through all addresses once, beginning after the one that was tried last.
    pub(crate) fn round(&self) -> impl Iterator<Item = &Address> {
        let first = self.next.load(Ordering::Relaxed);
        (first..first + self.all.len()).map(|index| {
            // Also who gives up half-way begins elsewhere the next time.
            self.next.store(index + 1, Ordering::Relaxed);
            &self.all[index % self.all.len()]
        })
    }

    /// How long to try each. When all were given too little, the next round is patient.
    pub(crate) fn patience(&self) -> Patience {
        if self.all.len() == 1 || self.slow.load(Ordering::Relaxed) {
            Patience::FULL
        } else {
            Patience::SHORT
        }
    }

    pub(crate) fn answered(&self) {
        self.slow.store(false, Ordering::Relaxed);
    }

    /// Says what it means that no address could be used, all tries together having taken so long. As long as
    /// waiting may help with one, it may help.
    pub(crate) fn none_answered(&self, errors: Vec<OpenError>, took: Duration) -> OpenError {
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
    uri: AMQPUri,
    tls: Option<Tls>,
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

const EXPECTED: &str = "expected amqp://user:password@host:port,host:port/vhost; in user and password write / # @ as \
    %2F %23 %40";

/// Reads a URL with any number of hosts into a URL for each. An error says why not, without quoting anything
/// of it.
fn parse(url: &str) -> Result<Vec<Address>, String> {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    // What looks like a virtual host may be half of a password.
    if tail.contains(['@', '#']) {
        return Err(EXPECTED.to_owned());
    }
    let parameters: Vec<_> =
        tail.split_once('?').map_or("", |(_, query)| query).split('&').collect();
    let parameters: Vec<_> = (parameters.iter())
        .filter_map(|parameter| parameter.split_once('='))
        .map(|(name, value)| (name.to_owned(), decoded(value)))
        .collect();
    let tls = match scheme {
        "amqp" => None,
        "amqps" => Some(Tls::from_query(&parameters)?),
        _ => return Err("it begins neither with amqp:// nor with amqps://".to_owned()),
    };
    let of_tls = |name: &str| ["cacertfile", "certfile", "keyfile", "verify"].contains(&name);
    if tls.is_none()
        && let Some((name, _)) = parameters.iter().find(|(name, _)| of_tls(name))
    {
        return Err(format!("{name} is of use with amqps:// only"));
    }
    let (user, hosts) = match authority.rsplit_once('@') {
        Some((user, hosts)) => (format!("{user}@"), hosts),
        None => (String::new(), authority),
    };
    let several = hosts.contains(',');
    hosts
        .split(',')
        .map(|host| {
            if several && host.is_empty() {
                return Err("there is an empty host among several".to_owned());
            }
            let uri = parse_one(&format!("{scheme}://{user}"), host, tail)?;
            Ok(Address { uri, tls: tls.clone() })
        })
        .collect()
}

fn parse_one(before: &str, host: &str, tail: &str) -> Result<AMQPUri, String> {
    // The URL parser knows addresses of version 6 by their brackets; lapin's takes them for no host at all.
    let literal = host.strip_prefix('[').and_then(|host| host.split_once(']'));
    let mut uri = AMQPUri::from_str(&format!("{before}{host}{tail}"))
        // The parser's message may quote what it was given, and with it the password.
        .map_err(|_| EXPECTED.to_owned())?;
    if let Some((literal, _)) = literal {
        literal.clone_into(&mut uri.authority.host);
    }
    uri.query.heartbeat.get_or_insert(HEARTBEAT_DEFAULT_S);
    // By the letter of the AMQP URI specification a slash at the end names the virtual host "", which
    // nobody has: it means the default one, as with most other clients.
    if uri.vhost.is_empty() {
        "/".clone_into(&mut uri.vhost);
    }
    Ok(uri)
}

/// Text from a URL, where bytes may be written as `%2F`.
fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|code| std::str::from_utf8(code).ok());
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
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Says what is wrong with a URL; user and password are left out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} is not a RabbitMQ URL: {reason}")]
pub struct UrlError {
    url: String,
    reason: String,
}

/// The URL with all that may be a secret replaced: what stands before the last `@`, everything when there is
/// none and it may have been forgotten, and the query.
fn redacted(url: &str) -> String {
    let (scheme, rest) = match url.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), url),
    };
    let (user, after) = match rest.rsplit_once('@') {
        Some((_, after)) => ("***@", after),
        None if rest.contains(':') => return format!("{scheme}***"),
        None => ("", rest),
    };
    match after.split_once('?') {
        Some((after, _)) => format!("{scheme}{user}{after}?***"),
        None => format!("{scheme}{user}{after}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(url: &str) -> AMQPUri {
        let addresses = Addresses::parse(url).unwrap();
        assert_eq!(addresses.all.len(), 1, "{url}");
        addresses.all[0].uri.clone()
    }

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
    fn a_slash_at_the_end_means_the_default_virtual_host() {
        for url in [
            "amqp://broker",
            "amqp://broker/",
            "amqp://guest:guest@broker:5672/",
            "amqp://broker/%2f",
        ] {
            assert_eq!(one(url).vhost, "/", "{url}");
        }
        assert_eq!(one("amqp://broker/jobs").vhost, "jobs");
    }

    #[test]
    fn several_hosts_have_one_user_virtual_host_and_query() {
        let url = "amqp://alice:a,b@one,two:5673,[::1],[fe80::2]:5674/jobs?heartbeat=3";
        let addresses = Addresses::parse(url).unwrap();
        assert_eq!(
            addresses.to_string(),
            "amqp://one:5672,two:5673,[::1]:5672,[fe80::2]:5674/jobs"
        );
        for Address { uri, .. } in &*addresses.all {
            assert_eq!(uri.authority.userinfo.password, "a,b");
            assert_eq!((uri.vhost.as_str(), uri.query.heartbeat), ("jobs", Some(3)));
        }
        assert_eq!(addresses.all[2].uri.authority.host, "::1");
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

    #[test]
    fn who_has_been_too_quick_for_all_is_patient_until_one_answers() {
        let addresses = Addresses::parse("amqp://a,b").unwrap();
        let unreachable = || vec![OpenError::Unreachable("silent".to_owned())];
        assert_eq!(addresses.patience(), Patience::SHORT);
        drop(addresses.none_answered(unreachable(), Duration::from_millis(1)));
        assert_eq!(addresses.patience(), Patience::SHORT);
        drop(addresses.none_answered(unreachable(), Duration::from_secs(2)));
        assert_eq!(addresses.patience(), Patience::FULL);
        addresses.answered();
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

    #[cfg(not(feature = "tls"))]
    #[test]
    fn without_tls_the_feature_is_named() {
        let error = Addresses::parse("amqps://alice:s3cret@broker").unwrap_err().to_string();
        assert!(error.contains("feature `tls`"), "{error}");
    }

    #[cfg(feature = "tls")]
    #[test]
    fn tls_has_its_port_and_its_parameters() {
        let url = "amqps://alice:s3cret@a,b:1/jobs?cacertfile=%2Fca.pem&certfile=/c&keyfile=/k";
        let addresses = Addresses::parse(url).unwrap();
        assert_eq!(addresses.to_string(), "amqps://a:5671,b:1/jobs");
        let Some(tls) = &addresses.all[1].tls else { panic!("it is encrypted") };
        let shown = format!("{tls:?}");
        assert!(["/ca.pem", "/c", "/k"].iter().all(|path| shown.contains(path)), "{shown}");
        for (query, reason) in [
            ("verify=verify_none", "always verified"),
            ("certfile=/c", "need each other"),
            ("keyfile=/k", "need each other"),
            ("password=s3cret", "password is not supported"),
        ] {
            let url = format!("amqps://alice:s3cret@broker?{query}");
            let error = Addresses::parse(&url).unwrap_err().to_string();
            assert!(error.contains(reason) && !error.contains("s3cret"), "{error}");
        }
        Addresses::parse("amqps://broker?verify=verify_peer").unwrap();
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
            "amqps://alice:s3cret@broker?verify=verify_none",
            "amqp://alice:s3cret@broker?cacertfile=/ca.pem",
            "amqp://alice:s3cret",
            "alice:s3cret",
            "amqp://alice:s3cret@a,,b",
            "amqp://alice:s3cret@a,b:port",
            "amqp://alice:s3cret@[::1",
            "amqp://alice:s3cret@::1",
            "amqp://alice:5/s3cret@broker",
            "amqp://alice:5#s3cret@broker",
        ] {
            let error = Addresses::parse(url).expect_err(url).to_string();
            assert!(!error.contains("s3cret"), "{error}");
            assert!(error.contains("is not a RabbitMQ URL"), "{error}");
        }
    }
}
