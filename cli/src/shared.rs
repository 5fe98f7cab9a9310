//! What all verbs share: where the broker is, and how to print.

use std::time::Duration;

use anyhow::Context as _;
use atomizer::{AtomId, Atomizer, Monitor};
use atomizer_programs::{
    broker::{self, PATIENCE},
    cli,
};
use atomizer_rabbitmq::{Counted, DeadLetters, RabbitMq, TopologyMode};
use clap::Args;

/// What all verbs share.
#[derive(Args, Debug)]
#[command(next_help_heading = "Options of all verbs")]
pub(crate) struct Shared {
    /// The broker: amqp://user:password@host:port/vhost.
    ///
    /// What is left out is guest, guest, 5672 and the virtual host "/". The nodes of a cluster stand side by side:
    /// amqp://user:password@a,b,c/vhost. Put it into the environment to keep a password out of the list of processes.
    #[arg(
        long,
        global = true,
        value_name = "URL",
        default_value = "amqp://localhost",
        env = "ATOMIZER_URL",
        hide_env_values = true,
        value_parser = cli::Url
    )]
    url: RabbitMq,
    /// What the names of exchanges and queues begin with.
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        default_value = "atomizer",
        value_parser = namespace
    )]
    namespace: String,
    /// Print JSON, one object a line, and nothing else on stdout.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

fn namespace(text: &str) -> Result<String, String> {
    let any = RabbitMq::from_url("amqp://localhost").map_err(|error| error.to_string())?;
    any.namespace(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

impl Shared {
    /// Returns the broker, on which nothing is made unless it is said otherwise.
    pub(crate) fn rabbit(&self) -> anyhow::Result<RabbitMq> {
        Ok(self.url.clone().namespace(&self.namespace)?.topology(TopologyMode::Passive))
    }

    pub(crate) fn dead_letters(&self) -> anyhow::Result<DeadLetters> {
        // The queue of an atom that is gone meanwhile is made again for what goes back to it.
        Ok(self.rabbit()?.topology(TopologyMode::Declare).dead_letters())
    }

    /// Watches over the nodes of the namespace. The stream is made when no node has been here yet: to watch before they come
    /// is as good.
    pub(crate) fn monitor(&self) -> anyhow::Result<Monitor> {
        Ok(Monitor::new(&self.rabbit()?.topology(TopologyMode::Declare))?)
    }

    /// Returns the virtual host.
    pub(crate) fn vhost(&self) -> String {
        let url = self.url.to_string();
        let rest = url.split_once("://").map_or("", |(_, rest)| rest);
        let vhost = rest.split_once('/').map_or("", |(_, vhost)| vhost);
        if vhost.is_empty() { "/" } else { vhost }.to_owned()
    }

    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Returns the queue of an atom.
    pub(crate) fn queue_of(&self, atom: &AtomId) -> String {
        format!("{}.atom.{atom}", self.namespace)
    }

    /// Counts what waits for an atom, and who serves it.
    pub(crate) async fn census(&self, atom: &AtomId) -> anyhow::Result<Counted> {
        let counted = self.rabbit()?.operator().census(std::slice::from_ref(atom)).await;
        let counted = counted.with_context(|| format!("failed to ask {}", self.url))?;
        Ok(counted.first().copied().unwrap_or(Counted::NoQueue))
    }

    /// Starts a node that has no atoms, to send and call from.
    pub(crate) async fn node(&self, declare: bool) -> anyhow::Result<Atomizer> {
        let mode = if declare { TopologyMode::Declare } else { TopologyMode::Passive };
        let builder = Atomizer::builder().name("atomizer").drain_timeout(Duration::ZERO);
        broker::start(builder, self.rabbit()?.topology(mode), PATIENCE).await
    }
}
