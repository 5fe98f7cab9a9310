//! Connects to RabbitMQ, and says what was tried when that fails.

use std::time::Duration;

use atomizer::{Atomizer, Builder, Memory, OpenError, StartError};
use atomizer_rabbitmq::RabbitMq;
use clap::Args;

use crate::cli;

/// Where the broker is, for programs that need one.
#[derive(Args, Clone, Debug)]
pub struct Broker {
    /// The broker: amqp://user:password@host:port/vhost.
    ///
    /// What is left out is guest, guest, 5672 and the virtual host "/". Put it into the environment to keep
    /// a password out of the list of processes.
    #[arg(
        long = "amqp",
        value_name = "URL",
        default_value = "amqp://localhost",
        env = "ATOMIZER_URL",
        hide_env_values = true,
        value_parser = cli::Url
    )]
    pub amqp: RabbitMq,
}

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

/// Starts a node behind a broker that is tried for [`PATIENCE`], or, without one, in memory.
///
/// # Errors
/// As [`start`].
pub async fn start_or_in_memory(
    builder: Builder,
    broker: Option<RabbitMq>,
) -> anyhow::Result<Atomizer> {
    match broker {
        Some(broker) => start(builder, broker, PATIENCE).await,
        None => Ok(builder.conductor(Memory::new()).start().await?),
    }
}

/// Limits how long programs with somebody in front of them try to reach a broker: 5 s.
pub const PATIENCE: Duration = Duration::from_secs(5);
