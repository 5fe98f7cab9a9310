//! What goes wrong with a broker.

use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use crate::server::Missing;

/// The reason why something with a broker failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// RabbitMQ is not installed.
    #[error(transparent)]
    Missing(#[from] Missing),

    /// The system refused something.
    #[error("{doing} failed")]
    Io {
        /// What was being done.
        doing: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },

    /// A process ended before it was of use.
    #[error("{what} ended at once ({status}); the end of its log:\n{log}")]
    Died {
        /// Which process.
        what: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The last lines that it wrote.
        log: String,
    },

    /// A process runs, yet was not ready in time.
    #[error("{what} was not ready within {limit:?}; the end of its log:\n{log}")]
    NotReady {
        /// Which process.
        what: &'static str,
        /// How long it was given.
        limit: Duration,
        /// The last lines that it wrote.
        log: String,
    },

    /// Something took longer than it may.
    #[error("{what} took longer than {limit:?}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long it was given.
        limit: Duration,
    },

    /// The broker's management interface said no.
    #[error("{request} was answered with status {status}: {answer}")]
    Management {
        /// Method and path.
        request: String,
        /// The status of HTTP, 0 where the answer was not HTTP.
        status: u16,
        /// The body of the answer.
        answer: String,
    },

    /// `rabbitmqctl` failed.
    #[error("rabbitmqctl {command} failed: {output}")]
    Ctl {
        /// Its arguments.
        command: String,
        /// What it wrote.
        output: String,
    },

    /// A network of one's own cannot be had: it takes root, and a system that permits namespaces.
    #[error("there is no network to cut: {what}")]
    Network {
        /// What was refused.
        what: String,
    },

    /// The broker answered something that this crate does not understand.
    #[error("{what} is not understood: {text}")]
    Unexpected {
        /// Where the text comes from.
        what: &'static str,
        /// The text.
        text: String,
    },
}

impl BrokerError {
    /// Returns a function that gives an input/output error its context.
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}
