//! Ids and names: each a type of its own, so that none is taken for another.

use std::{
    borrow::Borrow,
    fmt,
    hash::{Hash, Hasher},
    ops::Deref,
    str::FromStr,
    sync::Arc,
    time::UNIX_EPOCH,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::clock;

/// Identifies one electron, wherever it goes and however often it is delivered.
///
/// A fresh id is a version 7 UUID (RFC 9562): its first 48 bits are the milliseconds since the Unix
/// epoch, so ids sort by time. A [child](Self::child) id is a version 8 UUID that keeps those 48 bits of
/// its root and fills the rest with a hash of its parent and index: the same parent makes the same
/// children again, and any id of a tree tells when the tree began.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ElectronId(Uuid);

impl ElectronId {
    /// Makes a fresh id from the clock and randomness.
    #[expect(
        clippy::new_without_default,
        reason = "a default that differs each time would surprise"
    )]
    #[must_use]
    pub fn new() -> Self {
        let millis = clock::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let time = u64::try_from(millis).unwrap_or(u64::MAX) << 16;
        Self::put_together(&time.to_be_bytes(), &Uuid::new_v4(), 7)
    }

    /// Takes the time bits from `time` and all others from `random`.
    ///
    /// Ids made within one millisecond are in no order: a counter would be one lock for all threads.
    fn put_together(time: &[u8], random: &Uuid, version: u8) -> Self {
        const TIME_BYTES: usize = 6;
        let mut bytes = *random.as_bytes();
        bytes[..TIME_BYTES].copy_from_slice(&time[..TIME_BYTES]);
        bytes[TIME_BYTES] = (bytes[TIME_BYTES] & 0x0f) | (version << 4);
        Self(Uuid::from_bytes(bytes))
    }

    /// Derives the id of this electron's child with that index: the same answer for ever.
    #[must_use]
    pub fn child(self, index: u64) -> Self {
        // SHA-1 through UUID version 5: no secret is protected here, 74 well-mixed bits are wanted.
        let hash = Uuid::new_v5(&self.0, &index.to_be_bytes());
        Self::put_together(self.0.as_bytes(), &hash, 8)
    }

    /// Returns when the root of this electron's tree was made, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn root_millis(self) -> u64 {
        let high = self.0.as_u64_pair().0;
        high >> 16
    }

    /// Returns the id as a UUID.
    #[must_use]
    pub fn as_uuid(&self) -> &Uuid {
        &self.0
    }
}

impl From<Uuid> for ElectronId {
    fn from(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl FromStr for ElectronId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        Uuid::parse_str(text).map(Self).map_err(|_| InvalidId::new("electron id", text, "a UUID"))
    }
}

impl fmt::Display for ElectronId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for ElectronId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Says which id or name was refused, and what it should have been.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a valid {what}: expected {rule}")]
pub struct InvalidId {
    what: &'static str,
    text: String,
    rule: &'static str,
}

impl InvalidId {
    pub(crate) fn new(what: &'static str, text: &str, rule: &'static str) -> Self {
        Self { what, text: text.chars().take(64).collect(), rule }
    }
}

/// Text that is either compiled in or shared: cloning never copies it.
#[derive(Clone)]
enum Text {
    Static(&'static str),
    Shared(Arc<str>),
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        match self {
            Self::Static(text) => text,
            Self::Shared(text) => text,
        }
    }
}

const NAME_BYTES_MAX: usize = 128;
const NAME_RULE: &str = "1 to 128 of the characters A-Z a-z 0-9 . _ : -";

/// True when `name` may be part of a queue name, a routing key, a URL path and a metric label.
const fn is_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() > NAME_BYTES_MAX {
        return false;
    }
    let mut at = 0;
    while at < bytes.len() {
        if !matches!(bytes[at], b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b':' | b'-')
        {
            return false;
        }
        at += 1;
    }
    true
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone)]
        pub struct $name(Text);

        impl $name {
            /// Makes one from text found at run time.
            ///
            /// # Errors
            /// [`InvalidId`] unless the text is 1 to 128 of the characters `A-Z a-z 0-9 . _ : -`.
            pub fn try_new(text: impl Into<Arc<str>>) -> Result<Self, InvalidId> {
                let text = text.into();
                if is_name(&text) {
                    Ok(Self(Text::Shared(text)))
                } else {
                    Err(InvalidId {
                        what: $what,
                        text: text.chars().take(NAME_BYTES_MAX).collect(),
                        rule: NAME_RULE,
                    })
                }
            }

            /// Makes one from text in the program; a wrong one does not compile in a `const`.
            ///
            /// # Panics
            /// Unless the text is 1 to 128 of the characters `A-Z a-z 0-9 . _ : -`.
            #[must_use]
            pub const fn from_static(text: &'static str) -> Self {
                assert!(is_name(text), "a name is 1 to 128 of the characters A-Z a-z 0-9 . _ : -");
                Self(Text::Static(text))
            }

            /// Returns the text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        text_traits!($name);

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Self::try_new(text).map_err(serde::de::Error::custom)
            }
        }
    };
}

macro_rules! text_traits {
    ($name:ident) => {
        impl PartialEq for $name {
            fn eq(&self, other: &Self) -> bool {
                self.0[..] == other.0[..]
            }
        }

        impl Eq for $name {}

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }

        impl Ord for $name {
            fn cmp(&self, other: &Self) -> std::cmp::Ordering {
                self.0[..].cmp(&other.0[..])
            }
        }

        impl Hash for $name {
            fn hash<H: Hasher>(&self, state: &mut H) {
                self.0[..].hash(state);
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
    };
}

name!(
    /// Names an atom: which code an electron is for, the same on every node.
    AtomId,
    "atom id"
);

name!(
    /// Names one running node; no two that run at once may share it.
    NodeId,
    "node id"
);

name!(
    /// Names a conductor within its node.
    ConductorId,
    "conductor id"
);

name!(
    /// Names a result address: outcomes that are sent there wait for whoever reads them.
    ResultsId,
    "results id"
);

impl AtomId {
    /// Returns the id of an atom type; an invalid [`Atom::ID`](crate::Atom::ID) does not compile.
    #[must_use]
    pub fn of<A: crate::Atom>() -> Self {
        const { Self::from_static(A::ID) }
    }
}

impl NodeId {
    /// Makes an id that no other node has: `name` and eight random hexadecimal digits.
    ///
    /// # Errors
    /// [`InvalidId`] when `name` is not 1 to 119 characters of a name.
    pub fn unique(name: &str) -> Result<Self, InvalidId> {
        let random = Uuid::new_v4().as_u64_pair().1 as u32;
        Self::try_new(format!("{name}-{random:08x}"))
    }
}

/// Says where an answer goes, in the words of the conductor that made it; opaque to all others.
///
/// Over RabbitMQ it is the name of the asker's queue.
#[derive(Clone)]
pub struct ReplyTo(Text);

impl ReplyTo {
    /// Makes one from a conductor's own address.
    #[must_use]
    pub fn new(address: impl Into<Arc<str>>) -> Self {
        Self(Text::Shared(address.into()))
    }

    /// Returns the address.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

text_traits!(ReplyTo);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_childs_id_is_the_same_for_ever() {
        // Golden vectors: changing one of these breaks fan-outs that are under way during an upgrade.
        let root: ElectronId = "01932c07-e8f1-7a3b-9c4d-5e6f70819203".parse().unwrap();
        assert_eq!(root.child(0).to_string(), "01932c07-e8f1-8856-ac0b-7357f37909cd");
        assert_eq!(root.child(1).to_string(), "01932c07-e8f1-8aad-8d57-089736e4e455");
    }

    #[test]
    fn a_grandchild_keeps_the_time_bits_of_its_root() {
        let root = ElectronId::new();
        let grandchild = root.child(7).child(9);
        assert_eq!(grandchild.root_millis(), root.root_millis());
        assert_eq!(grandchild.as_uuid().get_version_num(), 8);
        assert_eq!(grandchild.as_uuid().get_variant(), uuid::Variant::RFC4122);
    }

    #[test]
    fn siblings_differ() {
        let root = ElectronId::new();
        let ids: std::collections::HashSet<_> =
            (0..10_000).map(|index| root.child(index)).collect();
        assert_eq!(ids.len(), 10_000);
    }

    #[test]
    fn names_are_checked() {
        assert!(AtomId::try_new("montecarlo.toss").is_ok());
        for wrong in ["", "a b", "a/b", "ü", &"x".repeat(129)] {
            assert!(AtomId::try_new(wrong).is_err(), "{wrong:?}");
        }
        let error = NodeId::try_new("a b").unwrap_err().to_string();
        assert!(error.contains("\"a b\" is not a valid node id"), "{error}");
    }
}
