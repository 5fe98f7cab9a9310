//! A virtual host of one's own on a broker, and what is in it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::error::BrokerError;
use crate::http::{Management, encode};
use crate::node::{Node, Permissions, format_url};
use crate::ports;

/// How long a test that is already over may wait for its virtual host to go.
const DELETE_MAX: Duration = Duration::from_secs(5);

static COUNT: AtomicU64 = AtomicU64::new(0);

/// A queue, as the broker has it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// `classic`, `quorum` or `stream`.
    pub kind: String,
    /// Whether it outlives a restart of the broker.
    pub durable: bool,
    /// Whether it goes with its last consumer.
    pub auto_delete: bool,
    /// Whether it belongs to one connection.
    pub exclusive: bool,
    /// What it was declared with.
    pub arguments: Map<String, Value>,
}

/// An exchange, as the broker has it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Exchange {
    /// Its name; empty for the default exchange.
    pub name: String,
    /// `direct`, `fanout`, `topic`, `headers` or a plugin's.
    pub kind: String,
    /// Whether it outlives a restart of the broker.
    pub durable: bool,
    /// Whether it goes with its last binding.
    pub auto_delete: bool,
    /// Whether clients may not publish to it.
    pub internal: bool,
    /// What it was declared with.
    pub arguments: Map<String, Value>,
}

/// A binding, as the broker has it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Binding {
    /// The exchange; empty for the default exchange, which is bound to every queue.
    pub source: String,
    /// The queue or exchange that gets the messages.
    pub destination: String,
    /// `queue` or `exchange`.
    pub destination_kind: String,
    /// Its routing key.
    pub routing_key: String,
    /// What it was declared with.
    pub arguments: Map<String, Value>,
}

/// How many messages a queue holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depth {
    /// Messages that wait for a consumer.
    pub ready: u64,
    /// Messages that a consumer has and has not answered for.
    pub unacknowledged: u64,
}

/// A virtual host that exists as long as this value.
#[derive(Debug)]
pub struct Vhost {
    node: Node,
    name: String,
}

impl Vhost {
    pub(crate) fn create(node: Node) -> Result<Self, BrokerError> {
        // Unique among all processes that share the broker.
        let name = format!(
            "test-{}-{}-{:08x}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed),
            ports::random() & 0xffff_ffff
        );
        let vhost = Self { node, name };
        let management = vhost.node.management();
        management.put(&format!("/api/vhosts/{}", vhost.name), &json!({}))?;
        vhost.node.permit("guest", &vhost.name, &Permissions::all())?;
        Ok(vhost)
    }

    /// Returns its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the broker that it is on.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Returns its address, for the user `guest`.
    #[must_use]
    pub fn url(&self) -> String {
        self.node.url(&self.name)
    }

    /// Returns its address, for any user.
    #[must_use]
    pub fn url_as(&self, user: &str, password: &str) -> String {
        self.node.url_as(user, password, &self.name)
    }

    /// Returns its address by way of another port, such as a [`Proxy`](crate::Proxy)'s.
    #[must_use]
    pub fn url_through(&self, address: SocketAddr) -> String {
        format_url(address, "guest", "guest", &self.name)
    }

    /// Returns its queues.
    ///
    /// # Errors
    ///
    /// When the management interface does not answer or refuses.
    pub fn queues(&self) -> Result<Vec<Queue>, BrokerError> {
        // Without statistics the answer is what the broker knows now.
        self.list("queues", "?disable_stats=true", |value| Queue {
            name: text(value, "name"),
            kind: queue_kind(value),
            durable: flag(value, "durable"),
            auto_delete: flag(value, "auto_delete"),
            exclusive: flag(value, "exclusive"),
            arguments: arguments(value),
        })
    }

    /// Returns its exchanges, the ones that every virtual host has among them.
    ///
    /// # Errors
    ///
    /// When the management interface does not answer or refuses.
    pub fn exchanges(&self) -> Result<Vec<Exchange>, BrokerError> {
        self.list("exchanges", "", |value| Exchange {
            name: text(value, "name"),
            kind: text(value, "type"),
            durable: flag(value, "durable"),
            auto_delete: flag(value, "auto_delete"),
            internal: flag(value, "internal"),
            arguments: arguments(value),
        })
    }

    /// Returns its bindings, those to the default exchange among them.
    ///
    /// # Errors
    ///
    /// When the management interface does not answer or refuses.
    pub fn bindings(&self) -> Result<Vec<Binding>, BrokerError> {
        self.list("bindings", "", |value| Binding {
            source: text(value, "source"),
            destination: text(value, "destination"),
            destination_kind: text(value, "destination_type"),
            routing_key: text(value, "routing_key"),
            arguments: arguments(value),
        })
    }

    /// Returns how much a queue holds at this moment; `None` where there is no such queue.
    ///
    /// Exact, for the queue itself is asked; a call takes half a second or more.
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails, as for a quorum queue without a leader.
    pub fn queue_depth(&self, queue: &str) -> Result<Option<Depth>, BrokerError> {
        self.node.ctl_of().depth(&self.name, queue)
    }

    /// Returns how much each of its queues holds at this moment, as
    /// [`queue_depth`](Self::queue_depth) does for one, in one call; `None` for a quorum queue without a leader.
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails.
    pub fn depths(&self) -> Result<Vec<(String, Option<Depth>)>, BrokerError> {
        self.node.ctl_of().depths(&self.name)
    }

    /// Returns the names of the connections that are open at this moment.
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails.
    pub fn connections(&self) -> Result<Vec<String>, BrokerError> {
        self.names("list_connections", "the list of connections")
    }

    /// Returns the names of the channels that are open at this moment.
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails.
    pub fn channels(&self) -> Result<Vec<String>, BrokerError> {
        self.names("list_channels", "the list of channels")
    }

    fn names(&self, list: &str, what: &'static str) -> Result<Vec<String>, BrokerError> {
        let answer = self.node.ctl(&[list, "name", "vhost", "--formatter", "json"])?;
        let all: Value = serde_json::from_str(&answer)
            .map_err(|_| BrokerError::Unexpected { what, text: answer })?;
        Ok(all
            .as_array()
            .into_iter()
            .flatten()
            .filter(|listed| text(listed, "vhost") == self.name)
            .map(|listed| text(listed, "name"))
            .collect())
    }

    /// Has the broker close all its connections, as an operator would.
    ///
    /// Clients get `connection.close` with the code 320 (CONNECTION_FORCED).
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails.
    pub fn close_connections(&self, reason: &str) -> Result<(), BrokerError> {
        self.node.ctl(&["close_all_connections", "--vhost", &self.name, reason]).map(drop)
    }

    fn list<T>(
        &self,
        what: &str,
        query: &str,
        parse: impl Fn(&Value) -> T,
    ) -> Result<Vec<T>, BrokerError> {
        let path = format!("/api/{what}/{}{query}", encode(&self.name));
        let answer = self.node.management().get(&path)?;
        Ok(answer.as_array().into_iter().flatten().map(parse).collect())
    }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        // The broker may be gone by now, on purpose; then so is the virtual host.
        let management = Management { answer_max: DELETE_MAX, ..self.node.management() };
        drop(management.delete(&format!("/api/vhosts/{}", encode(&self.name))));
    }
}

fn text(value: &Value, name: &str) -> String {
    let text = value.get(name).and_then(Value::as_str);
    text.unwrap_or_default().to_owned()
}

fn flag(value: &Value, name: &str) -> bool {
    value.get(name).and_then(Value::as_bool).unwrap_or_default()
}

fn arguments(value: &Value) -> Map<String, Value> {
    let arguments = value.get("arguments").and_then(Value::as_object);
    arguments.cloned().unwrap_or_default()
}

fn queue_kind(value: &Value) -> String {
    let declared = value.pointer("/arguments/x-queue-type");
    let kind = value.get("type").or(declared).and_then(Value::as_str);
    let kind = kind.unwrap_or("classic");
    // Some versions give the name of the module behind it.
    kind.trim_start_matches("rabbit_").trim_end_matches("_queue").to_owned()
}
