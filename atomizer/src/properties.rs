//! The outcome of an electron.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{Atom, AtomId, CallError, Electron, ElectronId, NodeId, Payload, clock, erased};

/// The outcome of one electron: what the asker is answered.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Properties {
    /// Whose outcome this is.
    pub electron: ElectronId,
    /// What the asker put into the electron to recognise the answer by, where that is not the id.
    pub correlation_id: Option<String>,
    /// The atom that ran, or should have run.
    pub atom: AtomId,
    /// The node that answers.
    pub node: NodeId,
    /// Which attempt this was, counted from 1.
    pub attempt: u32,
    /// When the attempt began, by the answering node's clock.
    pub started_at: SystemTime,
    /// How long the attempt took.
    pub duration: Duration,
    /// The output, or how it failed.
    pub outcome: Result<Payload, Failure>,
}

impl Properties {
    /// Returns what the atom put out.
    ///
    /// # Errors
    /// [`CallError::Failed`] when it failed, and [`CallError::Decode`] when this is no output of `A`.
    pub fn output<A: Atom>(&self) -> Result<A::Output, CallError> {
        match &self.outcome {
            Ok(payload) => erased::decode(payload).map_err(CallError::Decode),
            Err(failure) => Err(CallError::Failed(failure.clone())),
        }
    }

    /// Makes the outcome of an attempt that begins and ends now.
    #[must_use]
    pub fn new(electron: &Electron, node: NodeId, outcome: Result<Payload, Failure>) -> Self {
        Self {
            electron: electron.id,
            correlation_id: electron.correlation_id.clone(),
            atom: electron.atom.clone(),
            node,
            attempt: electron.attempts + 1,
            started_at: clock::now(),
            duration: Duration::ZERO,
            outcome,
        }
    }
}

/// How an attempt failed, in a form that travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Failure {
    /// What sort of failure.
    pub kind: FailureKind,
    /// The error with its causes, at most [`Failure::MESSAGE_BYTES_MAX`] bytes.
    pub message: String,
    /// Where it happened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Which attempt it was, counted from 1.
    #[serde(default)]
    pub attempt: u32,
}

impl Failure {
    /// The longest message kept; the rest is cut off and the cut marked with `…`.
    pub const MESSAGE_BYTES_MAX: usize = 1024;

    /// Makes a failure that says neither node nor attempt yet.
    #[must_use]
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        let mut failure = Self { kind, message: message.into(), node: None, attempt: 0 };
        failure.cut(Self::MESSAGE_BYTES_MAX);
        failure
    }

    pub(crate) fn cut(&mut self, message_bytes_max: usize) {
        if self.message.len() > message_bytes_max {
            let kept = message_bytes_max.saturating_sub('…'.len_utf8());
            self.message.truncate(self.message.floor_char_boundary(kept));
            self.message.push('…');
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.message)?;
        if let Some(node) = &self.node {
            write!(f, " (attempt {} on {node})", self.attempt)?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

/// The sorts of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureKind {
    /// The atom returned an error.
    Error,
    /// The atom panicked.
    Panic,
    /// The time limit ran out.
    TimedOut,
    /// The payload is not what the atom takes.
    Undecodable,
    /// The electron reached a node that does not have its atom.
    UnknownAtom,
    /// The answer is larger than the conductor carries.
    AnswerTooLarge,
    /// Nobody wants it any more: its deadline is over, or who asked gave it up.
    Expired,
    /// The atom gave it back, for another node to try.
    GivenBack,
    /// It was being worked on each time when its node was lost, too often to try again.
    Killer,
    /// A sort that a later version knows.
    #[serde(other)]
    Other,
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Panic => "panic",
            Self::TimedOut => "timed out",
            Self::Undecodable => "undecodable payload",
            Self::UnknownAtom => "unknown atom",
            Self::AnswerTooLarge => "answer too large",
            Self::Expired => "expired",
            Self::GivenBack => "given back",
            Self::Killer => "killer electron",
            Self::Other => "failure",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let failure = Failure::new(FailureKind::Error, "ü".repeat(5000));
        assert!(failure.message.len() <= Failure::MESSAGE_BYTES_MAX);
        assert!(failure.message.ends_with("ü…"));
    }

    #[test]
    fn a_kind_of_a_later_version_is_read() {
        let failure: Failure =
            serde_json::from_str(r#"{"kind":"eaten_by_a_bear","message":"sorry","new":1}"#)
                .unwrap();
        assert_eq!(failure.kind, FailureKind::Other);
    }
}
