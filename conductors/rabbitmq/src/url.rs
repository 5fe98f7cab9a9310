//! Reads the URL of a broker, and shows it without its secrets.

use std::str::FromStr;

use lapin::uri::AMQPUri;

use crate::{connect::Address, tls::Tls};

/// In seconds; the broker gives up a silent client after twice this.
const HEARTBEAT_DEFAULT_S: u16 = 10;

const EXPECTED: &str = "expected amqp://user:password@host:port,host:port/vhost; in user and password write / # @ as \
    %2F %23 %40";

/// Reads a URL with any number of hosts into an address for each.
pub(crate) fn parse(url: &str) -> Result<Vec<Address>, UrlError> {
    read(url).map_err(|reason| UrlError { url: redacted(url), reason })
}

/// An error says why not, without quoting anything of it.
fn read(url: &str) -> Result<Vec<Address>, String> {
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
    use crate::connect::Addresses;

    fn one(url: &str) -> AMQPUri {
        let addresses = parse(url).unwrap();
        assert_eq!(addresses.len(), 1, "{url}");
        addresses[0].uri.clone()
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
        let all = parse(url).unwrap();
        for Address { uri, .. } in &all {
            assert_eq!(uri.authority.userinfo.password, "a,b");
            assert_eq!((uri.vhost.as_str(), uri.query.heartbeat), ("jobs", Some(3)));
        }
        assert_eq!(all[2].uri.authority.host, "::1");
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
        let Some(tls) = &parse(url).unwrap()[1].tls else { panic!("it is encrypted") };
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
