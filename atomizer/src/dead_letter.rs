//! What is known of a dead letter, the same over every conductor.

use std::{fmt, str::FromStr, time::SystemTime};

use serde_json::Value;
use uuid::Uuid;

use crate::{
    AtomId, Electron, ElectronId, Failure, FailureKind, InvalidId, Message,
    wire::{Wire, header},
};

/// One letter among the dead: what it was, why it is there, and since when.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeadLetter {
    /// Its name among the dead letters.
    pub id: LetterId,
    /// The atom that it is for, or in whose queue it was found; none when neither is known.
    pub atom: Option<AtomId>,
    /// What brought it here.
    pub reason: Reason,
    /// The reason in words: the last failure's message, or what could not be read.
    pub detail: String,
    /// When it came here, by the clock of who put it here; none when nobody wrote it down.
    pub died_at: Option<SystemTime>,
    /// Attempts that failed.
    pub attempts: u32,
    /// How they failed, oldest first: the first and the last [`Electron::HISTORY_HALF`].
    pub history: Vec<Failure>,
    /// How long its payload is, in bytes.
    pub payload_bytes: usize,
    /// All that there is of it, payload included; none in lists, which would not fit into memory otherwise.
    pub message: Option<Message>,
}

/// What brings a letter to the dead.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// It failed, the last time like this.
    Failed(FailureKind),
    /// It is no electron that a node could read.
    Unreadable,
    /// The broker moved it here by itself.
    Broker {
        /// The broker's word for it: `delivery_limit`, `expired`, `maxlen` or `rejected` with RabbitMQ.
        word: String,
        /// The queue it was moved from.
        queue: String,
    },
}

/// What a broker says of a message that it moved to the dead letters by itself.
#[derive(Clone, Debug)]
pub struct BrokerDeath {
    /// The broker's word for why.
    pub word: String,
    /// The queue it was moved from.
    pub queue: String,
    /// The atom whose queue that is.
    pub atom: Option<AtomId>,
    /// When, by the broker's clock.
    pub at: Option<SystemTime>,
}

impl DeadLetter {
    /// Reads a dead letter. A broker that moved it there by itself says so in its own way.
    #[must_use]
    pub fn from_wire(wire: &Wire, death: Option<BrokerDeath>) -> Self {
        let text = |name: &str| wire.headers.get(name).and_then(Value::as_str).map(str::to_owned);
        let atom = text(header::DEAD_ATOM).and_then(|atom| AtomId::try_new(atom).ok());
        let at = text(header::DEAD_AT).and_then(|at| humantime::parse_rfc3339(&at).ok());
        let unreadable = text(header::UNREADABLE);
        let death = death.or_else(|| {
            let (word, queue) = (text(header::DEAD_REASON)?, text(header::DEAD_QUEUE)?);
            Some(BrokerDeath { word, queue, atom: atom.clone(), at })
        });
        let id = LetterId::of(wire);
        let payload_bytes = wire.body.len();
        let atom = atom.or_else(|| death.as_ref().and_then(|death| death.atom.clone()));
        let message = Message::from_wire(wire, atom.as_ref());
        let (electron, unread) = match &message {
            Message::Electron(electron) => (Some(electron), None),
            Message::Unreadable(unreadable) => (None, Some(unreadable.reason.clone())),
            Message::Answer(_) | Message::Cancel(_) => {
                (None, Some("no electron in a queue of electrons".to_owned()))
            }
        };
        let history = electron.map(|electron| electron.history.clone()).unwrap_or_default();
        let died_at = death.as_ref().map_or(at, |death| death.at);
        let (reason, detail) = match (death, unreadable.or(unread), history.last()) {
            (Some(death), unreadable, _) => {
                let detail = unreadable.unwrap_or_default();
                (Reason::Broker { word: death.word, queue: death.queue }, detail)
            }
            (None, Some(unreadable), _) => (Reason::Unreadable, unreadable),
            (None, None, Some(last)) => (Reason::Failed(last.kind), last.message.clone()),
            // Its history did not fit, or it was put here by other means.
            (None, None, None) => (Reason::Failed(FailureKind::Other), String::new()),
        };
        Self {
            id,
            atom: electron.map(|electron| electron.atom.clone()).or(atom),
            reason,
            detail,
            died_at,
            attempts: electron.map_or(0, |electron| electron.attempts),
            history,
            payload_bytes,
            message: Some(message),
        }
    }

    /// Lets go of the message, and keeps what is known of it.
    #[must_use]
    pub fn without_message(mut self) -> Self {
        self.message = None;
        self
    }

    /// Returns what it has in common with others that died alike.
    #[must_use]
    pub fn cause(&self) -> Cause {
        Cause {
            atom: self.atom.clone(),
            reason: self.reason.clone(),
            detail: without_numbers(&self.detail),
        }
    }

    /// Returns the electron as it is sent back to its atom: the same id and payload, with all its attempts and
    /// lives before it. None for what is no electron, and without the [message](Self::message).
    ///
    /// Nobody is answered: who asked was told of the failure. But where the broker moved it here nobody was
    /// told, and who asked is still answered, within its deadline.
    #[must_use]
    pub fn revive(&self) -> Option<Electron> {
        let Some(Message::Electron(electron)) = &self.message else { return None };
        let mut electron = Electron::clone(electron);
        electron.attempts = 0;
        electron.lives = 0;
        electron.passes = 0;
        electron.history.clear();
        electron.extra.retain(|name, _| {
            !name.starts_with(header::DEAD_PREFIX) && name.as_str() != header::UNREADABLE
        });
        if !matches!(self.reason, Reason::Broker { .. }) {
            electron.reply_to = None;
            electron.correlation_id = None;
            electron.deadline = None;
        }
        Some(electron)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(kind) => kind.fmt(f),
            Self::Unreadable => f.write_str("unreadable"),
            Self::Broker { word, queue } => write!(f, "{word} in {queue}"),
        }
    }
}

/// Names a dead letter: the electron's id, or one that is derived from the message where that says none.
///
/// Two letters may have one name: an electron that failed in two places, or two messages that say no id and
/// are alike in all else.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LetterId(Uuid);

impl LetterId {
    fn of(wire: &Wire) -> Self {
        if let Some(Ok(id)) = wire.id.as_deref().map(Uuid::parse_str) {
            return Self(id);
        }
        let Wire { kind, id, correlation_id, reply_to, content_type, headers, body } = wire;
        // What is noted about a letter while it lies here does not change its name.
        let headers: Vec<_> =
            headers.iter().filter(|(name, _)| !name.starts_with(header::DEAD_PREFIX)).collect();
        let said = format!("{:?}", (kind, id, correlation_id, reply_to, content_type, headers));
        let mut bytes = said.into_bytes();
        bytes.extend_from_slice(body);
        // SHA-1 through UUID version 5: no secret is protected here.
        Self(Uuid::new_v5(&Uuid::nil(), &bytes))
    }
}

impl From<ElectronId> for LetterId {
    fn from(id: ElectronId) -> Self {
        Self(*id.as_uuid())
    }
}

impl FromStr for LetterId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        Uuid::parse_str(text).map(Self).map_err(|_| InvalidId::new("letter id", text, "a UUID"))
    }
}

impl fmt::Display for LetterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for LetterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What dead letters have in common that died alike: atom, reason, and words without their numbers.
///
/// A number is a word with a digit in it, so "account 7 is closed" and "account 12 is closed" are one cause,
/// and ids and addresses do not tell causes apart.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cause {
    /// The atom, where known.
    pub atom: Option<AtomId>,
    /// What brought them here.
    pub reason: Reason,
    /// The [detail](DeadLetter::detail), with `#` for each number.
    pub detail: String,
}

impl Cause {
    /// Returns a short name for it, the same in every process.
    #[must_use]
    pub fn key(&self) -> CauseKey {
        let hash = Uuid::new_v5(&Uuid::nil(), self.to_string().as_bytes());
        CauseKey(hash.as_u64_pair().0 >> (64 - CauseKey::BITS))
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.atom {
            Some(atom) => write!(f, "{atom}: {}", self.reason)?,
            None => self.reason.fmt(f)?,
        }
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

/// A short name for a [`Cause`]: 12 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CauseKey(u64);

impl CauseKey {
    const BITS: u32 = 48;
}

impl FromStr for CauseKey {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let hexadecimal = text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let key = u64::from_str_radix(text, 16).ok().filter(|_| hexadecimal);
        let refused = || InvalidId::new("cause", text, "12 hexadecimal digits");
        key.map(Self).ok_or_else(refused)
    }
}

impl fmt::Display for CauseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012x}", self.0)
    }
}

impl fmt::Debug for CauseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Writes `#` for each word with a digit in it. Words are made of letters, digits, `-` and `_`, and of `.`
/// between two of those.
fn without_numbers(text: &str) -> String {
    let is_word = |char: char| char.is_alphanumeric() || char == '-' || char == '_';
    let mut written = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let mut end = rest.find(|char| !is_word(char)).unwrap_or(rest.len());
        while rest[end..].starts_with('.') && rest[end + 1..].starts_with(is_word) && end > 0 {
            let after = &rest[end + 1..];
            end += 1 + after.find(|char| !is_word(char)).unwrap_or(after.len());
        }
        if end == 0 {
            written.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let (word, after) = rest.split_at(end);
        written.push_str(if word.contains(|char: char| char.is_ascii_digit()) {
            "#"
        } else {
            word
        });
        rest = after;
    }
    written
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::{Payload, ReplyTo};

    fn electron() -> Electron {
        let mut electron = Electron::new(AtomId::from_static("bill"), Payload::json("7"));
        electron.attempts = 3;
        electron.lives = 2;
        electron.passes = 1;
        electron.reply_to = Some(ReplyTo::new("inbox"));
        electron.deadline = Some(Duration::from_secs(1));
        electron.remember(Failure::new(FailureKind::Error, "account 7 is closed"));
        electron.extra.insert("traceparent".to_owned(), "00-1".into());
        electron.extra.insert(header::DEAD_AT.to_owned(), "2026-11-22T00:00:00Z".into());
        electron
    }

    fn read(electron: Electron) -> DeadLetter {
        DeadLetter::from_wire(&Wire::from(&Message::from(electron)), None)
    }

    #[test]
    fn causes_are_alike_whatever_the_numbers() {
        for (one, other) in [
            ("account 7 is closed", "account 12 is closed"),
            ("did not finish within 1s", "did not finish within 250ms"),
            ("127.0.0.1:5672: refused.", "10.0.0.12:80: refused."),
            ("no 01932c07-e8f1-7a3b-9c4d-5e6f70819203 (v1.5)", "no 7 (v2)"),
        ] {
            assert_eq!(without_numbers(one), without_numbers(other));
        }
        assert_eq!(without_numbers("127.0.0.1:5672: refused."), "#:#: refused.");
        assert_eq!(without_numbers("… ü. kein_Weg .7"), "… ü. kein_Weg .#");
        let letter = read(electron());
        assert_eq!(letter.cause().to_string(), "bill: error: account # is closed");
        let key = letter.cause().key();
        assert_eq!(key.to_string().parse::<CauseKey>().unwrap(), key);
        assert!("7".parse::<CauseKey>().is_err() && "+00000000000".parse::<CauseKey>().is_err());
    }

    #[test]
    fn what_is_sent_back_has_everything_before_it() {
        let before = electron();
        let letter = read(before.clone());
        assert_eq!((letter.attempts, letter.history.len(), letter.payload_bytes), (3, 1, 1));
        assert_eq!(letter.id, before.id.into());
        assert!(letter.died_at.is_some());
        let revived = letter.revive().unwrap();
        let mut expected = Electron::with_id(before.id, before.atom.clone(), before.payload);
        expected.extra.insert("traceparent".to_owned(), "00-1".into());
        assert_eq!(revived, expected);
        assert_eq!(letter.without_message().revive(), None);
    }

    #[test]
    fn who_was_never_answered_still_is() {
        let word = "delivery_limit".to_owned();
        let queue = "atomizer.atom.bill".to_owned();
        let death = BrokerDeath {
            word,
            queue,
            atom: None,
            at: UNIX_EPOCH.checked_add(Duration::from_secs(7)),
        };
        let wire = Wire::from(&Message::from(electron()));
        let letter = DeadLetter::from_wire(&wire, Some(death));
        assert_eq!(letter.reason.to_string(), "delivery_limit in atomizer.atom.bill");
        assert_eq!(letter.died_at, UNIX_EPOCH.checked_add(Duration::from_secs(7)));
        let revived = letter.revive().unwrap();
        assert_eq!(revived.reply_to, Some(ReplyTo::new("inbox")));
        assert_eq!((revived.attempts, revived.deadline), (0, Some(Duration::from_secs(1))));
    }

    #[test]
    fn what_says_no_id_is_named_after_what_it_is() {
        let kind = Some("positron".to_owned());
        let mut wire = Wire { kind, body: "whatever".into(), ..Wire::default() };
        let letter = DeadLetter::from_wire(&wire, None);
        assert_eq!(letter.reason, Reason::Unreadable);
        assert_eq!(letter.detail, "unknown type \"positron\"");
        assert!(letter.revive().is_none());
        wire.headers.insert(header::DEAD_ATOM.to_owned(), "bill".into());
        let later = DeadLetter::from_wire(&wire, None);
        assert_eq!((later.id, later.atom), (letter.id, Some(AtomId::from_static("bill"))));
        wire.body = "else".into();
        assert_ne!(DeadLetter::from_wire(&wire, None).id, letter.id);
        assert_eq!(letter.id.to_string().parse::<LetterId>().unwrap(), letter.id);
    }
}
