//! Connects to RabbitMQ, and says what was tried when that fails.

use std::time::Duration;

use atomizer::{Atomizer, Builder, OpenError, StartError};
use atomizer_rabbitmq::RabbitMq;

/// Starts a node behind a broker; `timeout` limits how long a broker that cannot be reached is tried.
///
/// # Errors
/// Says which broker was tried, for how long, and what came of it; never with a password.
pub async fn start(
    builder: Builder,
    broker: RabbitMq,
    timeout: impl Into<Option<Duration>>,
) -> anyhow::Result<Atomizer> {
    let timeout = timeout.into();
    let address = broker.to_string();
    let started = builder.conductor(broker).connect_timeout(timeout).start().await;
    started.map_err(|error| {
        let StartError::Open { source, .. } = error else {
            return anyhow::Error::new(error);
        };
        let tried = match (&source, timeout) {
            (OpenError::Unreachable(_), Some(timeout)) => {
                format!(" within {}", humantime::format_duration(timeout))
            }
            _ => String::new(),
        };
        anyhow::Error::new(source).context(format!("failed to connect to {address}{tried}"))
    })
}

/// Limits how long programs with somebody in front of them try to reach a broker: 5 s.
pub const PATIENCE: Duration = Duration::from_secs(5);
