//! When a fan-out or a group is complete, and what is made of what came.

use std::{sync::Arc, time::Duration};

use futures::Stream;
use tokio::time::Instant;

use super::children::{Children, Question};
use crate::{CallError, Payload, Properties};

/// A fan-out or a group that is complete before all children have succeeded: made by
/// [`FanOut::tolerate`](crate::FanOut::tolerate), [`enough`](crate::FanOut::enough) and
/// [`within`](crate::FanOut::within), and the same of a [`Group`](crate::Group).
///
/// Any number of failures is tolerated unless told otherwise.
#[derive(Debug)]
#[must_use = "nothing is asked until its outputs are asked for"]
pub struct Lenient<F> {
    pub(crate) of: F,
    pub(crate) rules: Rules,
}

/// What makes it complete.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) tolerated: usize,
    pub(crate) wanted: Option<usize>,
    pub(crate) within: Option<Duration>,
}

impl Rules {
    /// All must succeed.
    pub(crate) const STRICT: Self = Self { tolerated: 0, wanted: None, within: None };

    pub(crate) fn until(&self) -> Option<Instant> {
        self.within.and_then(|within| Instant::now().checked_add(within))
    }
}

impl<F> Lenient<F> {
    pub(crate) fn new(of: F) -> Self {
        Self { of, rules: Rules { tolerated: usize::MAX, wanted: None, within: None } }
    }

    /// Sets how many children may fail. One more, and the rest is given up.
    pub fn tolerate(mut self, failures: usize) -> Self {
        self.rules.tolerated = failures;
        self
    }

    /// Sets how many outputs are enough. With the last of them the rest is given up.
    pub fn enough(mut self, outputs: usize) -> Self {
        self.rules.wanted = Some(outputs);
        self
    }

    /// Sets how long to wait in all, from when the outputs are asked for. The children are told: one that has not
    /// begun by then never does.
    pub fn within(mut self, time: Duration) -> Self {
        self.rules.within = Some(time);
        self
    }
}

/// What has come when a [lenient](Lenient) fan-out or group is complete.
#[derive(Debug)]
#[non_exhaustive]
pub struct Partial<T> {
    /// What was made of the outputs.
    pub value: T,
    /// The children that failed, in the order in which that was known.
    pub failures: Vec<ChildError>,
    /// How many children had been asked and had not answered.
    pub given_up: usize,
    /// What made it complete.
    pub end: End,
}

/// What made a [lenient](Lenient) fan-out or group complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum End {
    /// Every child was asked and has answered or failed.
    All,
    /// There were [enough](Lenient::enough) outputs.
    Enough,
    /// The [time](Lenient::within) was over.
    Late,
}

/// A child of a fan-out or a group failed.
#[derive(Debug, thiserror::Error)]
#[error("child {index} failed")]
#[non_exhaustive]
pub struct ChildError {
    /// Which input or member, counted from 0.
    pub index: usize,
    /// How.
    pub source: CallError,
}

/// Why a [lenient](Lenient) fan-out or group came to nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FanOutError {
    /// More children failed than are [tolerated](Lenient::tolerate).
    #[error("too many children failed: {}, where {tolerated} are tolerated{}", failures.len(), last(failures))]
    TooManyFailures {
        /// How many may fail.
        tolerated: usize,
        /// Those that did.
        failures: Vec<ChildError>,
    },
    /// All children have answered or failed, and there were not [enough](Lenient::enough) outputs.
    #[error("too few outputs: {outputs}, where {wanted} were wanted; failed: {}{}", failures.len(), last(failures))]
    TooFewOutputs {
        /// How many were wanted.
        wanted: usize,
        /// How many there were.
        outputs: usize,
        /// The children that failed.
        failures: Vec<ChildError>,
    },
}

fn last(failures: &[ChildError]) -> String {
    let last = failures.last();
    last.map_or_else(String::new, |ChildError { index, source }| {
        format!("; the last was child {index}: {source}")
    })
}

/// Folds what comes until the rules say that it is complete. What is not waited for any more is given up.
pub(crate) async fn gather<S, T, O>(
    mut children: Children<'_, S>,
    rules: Rules,
    initial: T,
    decode: impl Fn(usize, &Payload) -> Result<O, serde_json::Error> + Send,
    mut fold: impl FnMut(T, usize, O) -> T + Send,
) -> Result<Partial<T>, FanOutError>
where
    S: Stream<Item = Question> + Send,
{
    let (mut value, mut outputs, mut failures) = (initial, 0, Vec::new());
    let Rules { tolerated, wanted, .. } = rules;
    let end = loop {
        if wanted == Some(outputs) {
            break End::Enough;
        }
        let Some((index, came)) = children.next().await else {
            break if children.is_late() { End::Late } else { End::All };
        };
        match output(came, |payload| decode(index, payload)) {
            Ok(output) => {
                value = fold(value, index, output);
                outputs += 1;
            }
            Err(source) => {
                failures.push(ChildError { index, source });
                if failures.len() > tolerated {
                    return Err(FanOutError::TooManyFailures { tolerated, failures });
                }
            }
        }
    };
    match wanted {
        Some(wanted) if end == End::All => {
            Err(FanOutError::TooFewOutputs { wanted, outputs, failures })
        }
        _ => Ok(Partial { value, failures, given_up: children.unanswered(), end }),
    }
}

/// What a child that has answered put out.
pub(crate) fn output<O>(
    came: Result<Arc<Properties>, CallError>,
    decode: impl FnOnce(&Payload) -> Result<O, serde_json::Error>,
) -> Result<O, CallError> {
    match &came?.outcome {
        Ok(payload) => decode(payload).map_err(CallError::Decode),
        Err(failure) => Err(CallError::Failed(failure.clone())),
    }
}
