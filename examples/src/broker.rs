//! Where the broker of a program is, if it has one.

use atomizer::{Atomizer, Builder, Memory};
pub use atomizer_programs::broker::{PATIENCE, start};
use atomizer_programs::cli;
use atomizer_rabbitmq::RabbitMq;
use clap::Args;

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
