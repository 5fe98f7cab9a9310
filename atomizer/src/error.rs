//! What an atom fails with.

use std::{error::Error, fmt};

use crate::{Failure, FailureKind};

/// The result of an atom's work.
pub type Result<T, E = AtomError> = std::result::Result<T, E>;

/// Why an atom failed. Any error converts into it, so `?` works on everything.
///
/// Like any type that every error converts into, it is no [`Error`] itself.
pub struct AtomError {
    kind: FailureKind,
    source: Box<dyn Error + Send + Sync>,
}

impl AtomError {
    /// Makes one from a message.
    #[must_use]
    pub fn msg(message: impl fmt::Display) -> Self {
        Self { kind: FailureKind::Error, source: message.to_string().into() }
    }

    /// Makes one that says the payload is not what the atom takes; for [`RawAtom`](crate::RawAtom).
    #[must_use]
    pub fn undecodable(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { kind: FailureKind::Undecodable, source: source.into() }
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for AtomError {
    fn from(source: E) -> Self {
        Self { kind: FailureKind::Error, source: Box::new(source) }
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

impl From<AtomError> for Failure {
    fn from(error: AtomError) -> Self {
        Self::new(error.kind, error.to_string())
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
        assert_eq!(Failure::from(error).kind, FailureKind::Error);
    }
}
