//! A running broker, seen by those who use it and do not own it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::ctl::Ctl;
use crate::error::BrokerError;
use crate::http::{Management, encode};
use crate::process;
use crate::settings::{Identity, Places};
use crate::vhost::Vhost;

const MANAGEMENT_MAX: Duration = Duration::from_secs(30);

/// What a user may do in a virtual host, as the regular expressions of RabbitMQ.
#[derive(Clone, Debug)]
pub struct Permissions {
    /// Names of what the user may declare and delete.
    pub configure: String,
    /// Names of what the user may publish to and bind.
    pub write: String,
    /// Names of what the user may consume from and bind to.
    pub read: String,
}

impl Permissions {
    /// Allows everything.
    #[must_use]
    pub fn all() -> Self {
        Self::new(".*", ".*", ".*")
    }

    /// Allows nothing but to connect.
    #[must_use]
    pub fn none() -> Self {
        Self::new("^$", "^$", "^$")
    }

    /// Allows what the three regular expressions match.
    #[must_use]
    pub fn new(configure: &str, write: &str, read: &str) -> Self {
        Self { configure: configure.to_owned(), write: write.to_owned(), read: read.to_owned() }
    }
}

/// A handle on a running broker; cheap to clone, and it does not keep the broker running.
#[derive(Clone, Debug)]
pub struct Node {
    facts: Arc<Facts>,
}

#[derive(Debug)]
struct Facts {
    port: u16,
    management: Management,
    ctl: Ctl,
    version: String,
}

impl Node {
    pub(crate) fn new(port: u16, management_port: u16, ctl: Ctl, version: String) -> Self {
        let address = SocketAddr::from((ctl.identity.address, management_port));
        let management = Management { address, answer_max: MANAGEMENT_MAX };
        let facts = Arc::new(Facts { port, management, ctl, version });
        Self { facts }
    }

    /// Returns where the broker listens for AMQP.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((self.facts.ctl.identity.address, self.facts.port))
    }

    /// Returns where the broker's management interface listens.
    #[must_use]
    pub fn management_address(&self) -> SocketAddr {
        self.facts.management.address
    }

    /// Returns the version of RabbitMQ, as the broker reports it.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.facts.version
    }

    /// Returns the folder of the broker's data, cookie and logs.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.facts.ctl.home
    }

    /// Returns the last lines of the broker's log.
    #[must_use]
    pub fn log_tail(&self, lines_max: usize) -> String {
        process::tail(&[&Places::new(self.folder()).log()], lines_max)
    }

    /// Returns the address of a virtual host, for the user `guest`.
    #[must_use]
    pub fn url(&self, vhost: &str) -> String {
        self.url_as("guest", "guest", vhost)
    }

    /// Returns the address of a virtual host, for any user.
    #[must_use]
    pub fn url_as(&self, user: &str, password: &str, vhost: &str) -> String {
        format_url(self.address(), user, password, vhost)
    }

    /// Makes a fresh virtual host, which is deleted when the value is dropped.
    ///
    /// # Errors
    ///
    /// When the management interface does not answer or refuses.
    pub fn vhost(&self) -> Result<Vhost, BrokerError> {
        Vhost::create(self.clone())
    }

    /// Adds a user, or changes one, and gives it permissions in one virtual host.
    ///
    /// # Errors
    ///
    /// When the management interface does not answer or refuses.
    pub fn add_user(
        &self,
        name: &str,
        password: &str,
        vhost: &str,
        permissions: &Permissions,
    ) -> Result<(), BrokerError> {
        let user = json!({ "password": password, "tags": "" });
        self.management().put(&format!("/api/users/{}", encode(name)), &user)?;
        self.permit(name, vhost, permissions)
    }

    /// Deletes a user.
    ///
    /// # Errors
    ///
    /// When the management interface does not answer or refuses.
    pub fn delete_user(&self, name: &str) -> Result<(), BrokerError> {
        self.management().delete(&format!("/api/users/{}", encode(name)))
    }

    pub(crate) fn permit(
        &self,
        user: &str,
        vhost: &str,
        permissions: &Permissions,
    ) -> Result<(), BrokerError> {
        let Permissions { configure, write, read } = permissions;
        self.management().put(
            &format!("/api/permissions/{}/{}", encode(vhost), encode(user)),
            &json!({ "configure": configure, "write": write, "read": read }),
        )
    }

    /// Runs `rabbitmqctl` on this broker and returns what it wrote.
    ///
    /// # Errors
    ///
    /// When it cannot be run, fails, or takes longer than a minute.
    pub fn ctl(&self, arguments: &[&str]) -> Result<String, BrokerError> {
        self.facts.ctl.run(arguments)
    }

    /// Calls the management interface as `guest`; the answer is null where its body is empty.
    ///
    /// `path` begins with `/api/`, and its variable parts are percent-encoded.
    ///
    /// # Errors
    ///
    /// When the management interface does not answer or refuses.
    pub fn manage(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, BrokerError> {
        self.management().call(method, path, body)
    }

    pub(crate) fn management(&self) -> Management {
        self.facts.management
    }

    pub(crate) fn ctl_of(&self) -> &Ctl {
        &self.facts.ctl
    }

    /// Describes the broker in one line, for the environment variable [`SHARED_BROKER`].
    ///
    /// [`SHARED_BROKER`]: crate::SHARED_BROKER
    #[must_use]
    pub fn describe(&self) -> String {
        let Ctl { program, home, epmd_port, identity, namespace } = &self.facts.ctl;
        json!({
            "port": self.facts.port,
            "management_port": self.facts.management.address.port(),
            "version": self.facts.version,
            "ctl": program,
            "folder": home,
            "epmd_port": epmd_port,
            "node": identity.node,
            "address": identity.address,
            "namespace": namespace,
        })
        .to_string()
    }

    /// Returns the handle that [`describe`](Self::describe) has described.
    ///
    /// # Errors
    ///
    /// When the text is not such a description.
    pub fn from_description(text: &str) -> Result<Self, BrokerError> {
        parse_description(text).ok_or_else(|| BrokerError::Unexpected {
            what: "the description of a broker",
            text: text.to_owned(),
        })
    }
}

fn parse_description(text: &str) -> Option<Node> {
    let value: Value = serde_json::from_str(text).ok()?;
    let port = |name: &str| u16::try_from(value.get(name)?.as_u64()?).ok();
    let string = |name: &str| Some(value.get(name)?.as_str()?.to_owned());
    let ctl = Ctl {
        program: PathBuf::from(string("ctl")?),
        home: PathBuf::from(string("folder")?),
        epmd_port: port("epmd_port")?,
        identity: Identity { node: string("node")?, address: string("address")?.parse().ok()? },
        namespace: string("namespace"),
    };
    Some(Node::new(port("port")?, port("management_port")?, ctl, string("version")?))
}

/// Writes an AMQP address, also for one that is not the broker's own, as that of a proxy.
pub(crate) fn format_url(address: SocketAddr, user: &str, password: &str, vhost: &str) -> String {
    let [user, password, vhost] = [user, password, vhost].map(encode);
    format!("amqp://{user}:{password}@{address}/{vhost}")
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::{Ctl, Identity, Node};

    fn node() -> Node {
        let ctl = Ctl {
            program: "/ctl".into(),
            home: "/folder".into(),
            epmd_port: 3,
            identity: Identity { node: "n@localhost".to_owned(), address: Ipv4Addr::LOCALHOST },
            namespace: None,
        };
        Node::new(1, 2, ctl, "3.10.8".to_owned())
    }

    #[test]
    fn a_description_survives_the_environment() {
        let text = node().describe();
        let again = Node::from_description(&text).unwrap();
        assert_eq!(again.describe(), text);
        assert_eq!(again.version(), "3.10.8");
        assert!(Node::from_description("{}").is_err());
    }

    #[test]
    fn names_in_addresses_are_encoded() {
        assert_eq!(node().url("/"), "amqp://guest:guest@127.0.0.1:1/%2F");
    }
}
