//! What an atom fails with.

use std::{error::Error, fmt, time::Duration};

use crate::{Failure, FailureKind};

/// The result of an atom's work.
pub type Result<T, E = AtomError> = std::result::Result<T, E>;

/// Why an atom failed. Any [`Error`] converts into it, so `?` works on nearly everything; what is no `Error`
/// itself, such as `anyhow::Error`, is [wrapped](AtomError::wrap).
///
/// What follows is for the electron's [`Policy`](crate::Policy) to say, unless the error says it itself:
///
/// ```
/// use std::time::Duration;
/// use atomizer::AtomError;
///
/// // Trying again would not help.
/// let wrong = AtomError::msg("account 7 is closed").do_not_retry();
/// // The other side says when.
/// let busy = AtomError::msg("429 Too Many Requests").retry_after(Duration::from_secs(30));
/// // Nothing is wrong with the electron: let another node have it.
/// let full = AtomError::msg("the disk of this machine is full").give_back();
/// # drop((wrong, busy, full));
/// ```
///
/// Like any type that every error converts into, it is no [`Error`] itself.
pub struct AtomError {
    kind: FailureKind,
    then: Directive,
    source: Box<dyn Error + Send + Sync>,
}

/// What an error says is to follow it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Directive {
    /// What the policy says.
    #[default]
    Policy,
    /// Nothing: it is the end.
    Final,
    /// What the policy says, after so long.
    RetryAfter(Duration),
    /// Another node's attempt, and this one is not counted.
    GiveBack,
}

impl AtomError {
    /// Makes one from a message.
    #[must_use]
    pub fn msg(message: impl fmt::Display) -> Self {
        Self::new(FailureKind::Error, message.to_string().into())
    }

    /// Makes one of whatever becomes a boxed error: `read().map_err(AtomError::wrap)?`.
    #[must_use]
    pub fn wrap(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(FailureKind::Error, source.into())
    }

    fn new(kind: FailureKind, source: Box<dyn Error + Send + Sync>) -> Self {
        Self { kind, then: Directive::Policy, source }
    }

    /// Says that no attempt is to follow, whatever the policy allows: it would fail alike.
    #[must_use]
    pub fn do_not_retry(mut self) -> Self {
        self.then = Directive::Final;
        self
    }

    /// Says how long to wait before the next attempt, if the policy allows one.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.then = Directive::RetryAfter(wait);
        self
    }

    /// Says that the electron is to go to another node, and that this was no attempt.
    ///
    /// It comes back here when no other serves the atom. It is handed on after 100 ms, and later each time, up
    /// to 1 s; an electron that was handed on 1000 times ends in failure.
    #[must_use]
    pub fn give_back(mut self) -> Self {
        self.kind = FailureKind::GivenBack;
        self.then = Directive::GiveBack;
        self
    }

    /// Makes one that says the payload is not what the atom takes; for [`RawAtom`](crate::RawAtom).
    #[must_use]
    pub fn undecodable(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { then: Directive::Final, ..Self::new(FailureKind::Undecodable, source.into()) }
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for AtomError {
    fn from(source: E) -> Self {
        Self::new(FailureKind::Error, Box::new(source))
    }
}

impl fmt::Display for AtomError {
    /// Writes the error and its causes in one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)?;
        let mut cause = self.source.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl fmt::Debug for AtomError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A failed attempt, and what the atom said is to follow.
#[derive(Clone, Debug)]
pub(crate) struct Failed {
    pub(crate) failure: Failure,
    pub(crate) then: Directive,
}

impl Failed {
    /// A failure that the policy decides on.
    pub(crate) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { failure: Failure::new(kind, message), then: Directive::Policy }
    }
}

impl From<AtomError> for Failed {
    fn from(error: AtomError) -> Self {
        Self { failure: Failure::new(error.kind, error.to_string()), then: error.then }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_causes_are_kept() {
        let parse = "x".parse::<u8>().unwrap_err();
        let error: AtomError = std::io::Error::other(parse).into();
        assert_eq!(error.to_string(), "invalid digit found in string");
        assert_eq!(Failed::from(error).failure.kind, FailureKind::Error);
    }
}
