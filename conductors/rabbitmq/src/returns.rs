//! Tells which publish a returned message belongs to.
//!
//! The broker returns what it cannot route, and then confirms it like everything else. The client hands a returned
//! message to whichever confirm it completes next, which need not be that of the message. So each is looked up by
//! what it says.
//!
//! A confirm for many is completed in any order. So one of those may carry the message of another, and its own may
//! be carried by that other, a moment later: a confirm that carries what is not its own is not judged before
//! everything that was carried has found its own. The other is confirmed already, so that is soon.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use lapin::{BasicProperties, message::BasicReturnMessage};

/// What tells one publish from another in a message that the broker returns: exchange, routing key, message id and
/// correlation id. Their hash only (64 bits), for there is one for each message under way, and next to none is returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key(u64);

impl Key {
    pub(crate) fn new(exchange: &str, routing_key: &str, properties: &BasicProperties) -> Self {
        let mut hasher = DefaultHasher::new();
        (exchange, routing_key).hash(&mut hasher);
        properties.message_id().hash(&mut hasher);
        properties.correlation_id().hash(&mut hasher);
        Self(hasher.finish())
    }

    pub(crate) fn returned(message: &BasicReturnMessage) -> Self {
        Self::new(message.exchange.as_str(), message.routing_key.as_str(), &message.properties)
    }
}

/// One publish that the broker has answered.
#[derive(Debug)]
pub(crate) struct Answered<T> {
    pub(crate) key: Key,
    /// The returned message that came with the answer, whosesoever it is.
    pub(crate) carried: Option<Key>,
    pub(crate) what: T,
}

/// Returned messages and answers that have not found each other yet.
#[derive(Debug)]
pub(crate) struct Returns<T> {
    /// Messages that were carried, and whose own answer has not come.
    unclaimed: HashMap<Key, u32>,
    /// Answers that are not judged: those that are new, and those that carried the message of another.
    unjudged: Vec<Answered<T>>,
}

impl<T> Default for Returns<T> {
    fn default() -> Self {
        Self { unclaimed: HashMap::new(), unjudged: Vec::new() }
    }
}

impl<T> Returns<T> {
    /// Takes in an answer.
    pub(crate) fn add(&mut self, answered: Answered<T>) {
        if let Some(key) = answered.carried {
            *self.unclaimed.entry(key).or_default() += 1;
        }
        self.unjudged.push(answered);
    }

    /// Says of all that can be judged now whether their message was returned.
    pub(crate) fn judge(&mut self, mut judged: impl FnMut(T, bool)) {
        if !self.unclaimed.is_empty() {
            for answered in std::mem::take(&mut self.unjudged) {
                if self.claim(answered.key) {
                    judged(answered.what, true);
                } else if answered.carried.is_some() {
                    self.unjudged.push(answered);
                } else {
                    judged(answered.what, false);
                }
            }
        }
        if self.unclaimed.is_empty() {
            // Drained and not taken: there are up to a thousand each time, and their room is needed again.
            for answered in self.unjudged.drain(..) {
                judged(answered.what, false);
            }
        }
    }

    fn claim(&mut self, key: Key) -> bool {
        let Some(count) = self.unclaimed.get_mut(&key) else { return false };
        *count -= 1;
        if *count == 0 {
            self.unclaimed.remove(&key);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::new("", name, &BasicProperties::default())
    }

    fn answered(name: &'static str, carried: Option<&str>) -> Answered<&'static str> {
        Answered { key: key(name), carried: carried.map(key), what: name }
    }

    fn judge(
        returns: &mut Returns<&'static str>,
        answers: Vec<Answered<&'static str>>,
    ) -> Vec<(&'static str, bool)> {
        let mut judged = Vec::new();
        answers.into_iter().for_each(|answered| returns.add(answered));
        returns.judge(|what, returned| judged.push((what, returned)));
        judged.sort_unstable();
        judged
    }

    #[test]
    fn a_message_is_told_of_its_own_publish_whichever_answer_carried_it() {
        let mut returns = Returns::default();
        let answers = vec![answered("well", Some("gone")), answered("gone", None)];
        assert_eq!(judge(&mut returns, answers), [("gone", true), ("well", false)]);
        assert_eq!(judge(&mut returns, vec![answered("gone", None)]), [("gone", false)]);
    }

    #[test]
    fn an_answer_that_carried_anothers_message_waits_for_what_that_one_carried() {
        let mut returns = Returns::default();
        assert_eq!(judge(&mut returns, vec![answered("a", Some("b"))]), []);
        // What carries nothing was not returned: whatever was returned before it has been carried before.
        assert_eq!(judge(&mut returns, vec![answered("well", None)]), [("well", false)]);
        let judged = judge(&mut returns, vec![answered("b", Some("a"))]);
        assert_eq!(judged, [("a", true), ("b", true)]);
        assert!(returns.unclaimed.is_empty() && returns.unjudged.is_empty());
    }

    #[test]
    fn a_chain_of_carried_messages_is_followed_to_its_end() {
        let mut returns = Returns::default();
        assert_eq!(judge(&mut returns, vec![answered("a", Some("b"))]), []);
        assert_eq!(judge(&mut returns, vec![answered("b", Some("c"))]), [("b", true)]);
        assert_eq!(judge(&mut returns, vec![answered("c", None)]), [("a", false), ("c", true)]);
    }
}
