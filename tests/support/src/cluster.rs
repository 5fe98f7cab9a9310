//! Three brokers that are one cluster.

use std::fs;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::broker::Broker;
use crate::error::BrokerError;
use crate::guard::Guard;
use crate::host::{Host, START_MAX};
use crate::http::encode;
use crate::machinery::{Machinery, Member};
use crate::network::Network;
use crate::server;
use crate::settings::{Ports, cookie};

/// How many brokers a cluster has: the fewest of which one may be lost.
const BROKERS: usize = 3;

/// How long it takes at the most until a broker knows that another is out of reach: three quarters of it to five
/// quarters.
const SILENCE_MAX: Duration = Duration::from_secs(8);

/// How long a broker that has paused itself is given to begin again by itself.
const BEGINS_AGAIN_WITHIN: Duration = Duration::from_secs(60);

/// Three brokers that are one cluster, dead and gone when this value is dropped or the process ends.
///
/// Quorum queues are on all three, and a broker that sees fewer than two pauses (`pause_minority`).
#[derive(Debug)]
pub struct Cluster {
    brokers: Vec<Broker>,
    /// After the brokers, which live in it.
    network: Option<Network>,
}

impl Cluster {
    /// Starts three brokers of the installed RabbitMQ on 127.0.0.1, and waits until they are one; some 25 s.
    ///
    /// # Errors
    ///
    /// When RabbitMQ is missing, or a broker ends at once or is not ready within 90 seconds.
    pub fn start() -> Result<Self, BrokerError> {
        let (server, guard) = (server::find()?, Arc::new(Guard::start()?));
        let ports = Ports::free(BROKERS).map_err(BrokerError::io("looking for free ports"))?;
        let address = Ipv4Addr::LOCALHOST;
        let host = Host::start(&server, guard, address, None, epmd_port(&ports))?;
        let host = Arc::new(host);
        let members = ports
            .into_iter()
            .map(|ports| (Arc::clone(&host), ports, format!("atomizer{}@localhost", ports.amqp)));
        Self::of(members.collect(), None)
    }

    /// Starts three brokers that are apart, each with a network and an address of its own, which can be
    /// [cut off](Self::cut_off).
    ///
    /// The addresses are of 198.18.0.0/15, which nobody routes (RFC 2544). They are on a bridge of this machine
    /// and reached from nowhere else; the brokers listen on nothing else. All of it is gone with the brokers.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start); and where the system permits no network namespaces, as to all but root.
    pub fn start_apart() -> Result<Self, BrokerError> {
        let (server, guard) = (server::find()?, Arc::new(Guard::start()?));
        let network = Network::make(&guard, BROKERS)?;
        let ports = Ports::free(BROKERS).map_err(BrokerError::io("looking for free ports"))?;
        let mut members = Vec::new();
        for (link, ports) in network.links().iter().zip(&ports) {
            let namespace = Some(link.namespace.clone());
            let guard = Arc::clone(&guard);
            let host = Host::start(&server, guard, link.address, namespace, ports.epmd)?;
            members.push((Arc::new(host), *ports, format!("atomizer@{}", link.address)));
        }
        Self::of(members, Some(network))
    }

    fn of(
        members: Vec<(Arc<Host>, Ports, String)>,
        network: Option<Network>,
    ) -> Result<Self, BrokerError> {
        let mut more = format!(
            "cluster_formation.peer_discovery_backend = classic_config\n\
             cluster_partition_handling = pause_minority\n\
             net_ticktime = {}\n\
             # Nobody but this machine gets here.\n\
             loopback_users = none\n",
            SILENCE_MAX.as_secs()
        );
        for (number, (_, _, node)) in members.iter().enumerate() {
            let number = number + 1;
            more.push_str(&format!("cluster_formation.classic_config.nodes.{number} = {node}\n"));
        }
        let cookie = cookie();
        let mut launched = Vec::new();
        for (number, (host, ports, node)) in members.into_iter().enumerate() {
            let name = format!("broker{}", number + 1);
            let folder = host.guard.folder().join(&name);
            fs::create_dir(&folder).map_err(BrokerError::io("making a folder"))?;
            let member = Member { name: &name, folder, ports, node, cookie: &cookie, more: &more };
            let machinery = Machinery::new(host, member)?;
            machinery.launch()?;
            launched.push(machinery);
        }
        let brokers: Result<Vec<_>, _> = launched.into_iter().map(Broker::ready).collect();
        let cluster = Self { brokers: brokers?, network };
        cluster.wait_whole()?;
        Ok(cluster)
    }

    /// Returns the brokers; each can be killed, stopped and started again by itself.
    #[must_use]
    pub fn brokers(&self) -> &[Broker] {
        &self.brokers
    }

    /// Returns the address of a virtual host on all of the brokers, for the user `guest`.
    #[must_use]
    pub fn url(&self, vhost: &str) -> String {
        let addresses: Vec<String> =
            self.brokers.iter().map(|broker| broker.address().to_string()).collect();
        format!("amqp://guest:guest@{}/{}", addresses.join(","), encode(vhost))
    }

    /// Starts all brokers that do not run, at once, for they wait for each other; returns when they are one.
    ///
    /// # Errors
    ///
    /// When one ends at once or is not ready in time.
    pub fn start_again(&self) -> Result<(), BrokerError> {
        self.brokers.iter().try_for_each(Broker::launch)?;
        self.brokers.iter().try_for_each(|broker| match broker.wait_ready() {
            // RabbitMQ 3.10 gives up where it meets another that has just begun to start. A service manager starts it
            // once more.
            Err(BrokerError::Died { log, .. }) if log.contains("incompatible_feature_flags") => {
                broker.launch()?;
                broker.wait_ready()
            }
            ready => ready,
        })?;
        self.wait_whole()
    }

    /// Has all brokers write to disk at once what they write every few seconds otherwise: see
    /// [`Broker::flush`].
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails.
    pub fn flush(&self) -> Result<(), BrokerError> {
        let mut running = self.brokers.iter().filter(|broker| broker.pid().is_some());
        running.try_for_each(Broker::flush)
    }

    /// Returns which broker leads a quorum queue, as the broker `asked` knows.
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails, as for a queue without a leader.
    pub fn leader(&self, asked: usize, vhost: &str, queue: &str) -> Result<usize, BrokerError> {
        let leader = self.brokers[asked].ctl_of().leader(vhost, queue)?;
        self.brokers
            .iter()
            .position(|broker| broker.ctl_of().identity.node == leader)
            .ok_or(BrokerError::Unexpected { what: "the leader of a queue", text: leader })
    }

    /// Has one of the brokers lead a quorum queue, and waits until it does.
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails.
    pub fn lead(&self, broker: usize, vhost: &str, queue: &str) -> Result<(), BrokerError> {
        let node = &self.brokers[broker].ctl_of().identity.node;
        while self.leader(broker, vhost, queue)? != broker {
            self.brokers[broker].ctl_of().lead(vhost, queue, node)?;
        }
        Ok(())
    }

    /// Returns what each broker that runs says of the queues of a virtual host, for who has to find out why a test
    /// fails.
    #[must_use]
    pub fn describe_queues(&self, vhost: &str) -> String {
        let columns = "name leader online messages_ready messages_unacknowledged consumers state";
        let arguments: Vec<_> =
            ["list_queues", "-p", vhost].into_iter().chain(columns.split(' ')).collect();
        let running = self.brokers.iter().filter(|broker| broker.pid().is_some());
        let said = running.map(|broker| {
            let said = broker.ctl(&arguments).unwrap_or_else(|error| error.to_string());
            format!("{}:\n{said}", broker.ctl_of().identity.node)
        });
        said.collect()
    }

    /// Returns which broker has the connection that its client gave a name with this in it.
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails, or there is no such connection.
    pub fn connected_to(&self, asked: usize, client: &str) -> Result<usize, BrokerError> {
        let connections = ["list_connections", "name", "client_properties"];
        let all = self.brokers[asked].ctl(&connections)?;
        let found = all.lines().filter(|line| line.contains(client)).find_map(|line| {
            // As in 127.0.0.1:43210 -> 127.0.0.1:5672.
            self.brokers
                .iter()
                .position(|broker| line.contains(&format!("-> {}", broker.address())))
        });
        found.ok_or(BrokerError::Unexpected { what: "the list of connections", text: all })
    }

    /// Takes a broker off the network: what is on the way to it and from it is lost, silently.
    ///
    /// # Errors
    ///
    /// When the cluster is not [apart](Self::start_apart), or the system refuses.
    pub fn cut_off(&self, broker: usize) -> Result<(), BrokerError> {
        self.set_link(broker, "down")
    }

    /// Brings a broker back to the network.
    ///
    /// # Errors
    ///
    /// As [`cut_off`](Self::cut_off).
    pub fn bring_back(&self, broker: usize) -> Result<(), BrokerError> {
        self.set_link(broker, "up")
    }

    fn set_link(&self, broker: usize, state: &str) -> Result<(), BrokerError> {
        match &self.network {
            Some(network) => network.set_link(broker, state),
            None => Err(BrokerError::Network { what: "the brokers share one network".to_owned() }),
        }
    }

    /// Waits until all brokers know each other.
    ///
    /// # Errors
    ///
    /// When they do not within the time that a broker may take to start.
    pub fn wait_whole(&self) -> Result<(), BrokerError> {
        let whole = ["await_online_nodes", &BROKERS.to_string()];
        self.brokers.iter().try_for_each(|broker| {
            // One that has paused itself begins again some time after it sees the others, and cannot be asked before.
            let begun = Instant::now();
            while broker.ctl(&["eval", "rabbit:is_running()."])?.trim() != "true"
                && begun.elapsed() < START_MAX
            {
                if begun.elapsed() > BEGINS_AGAIN_WITHIN {
                    // RabbitMQ 3.10 tries once, and stays down when that fails. An operator starts it then. An error says
                    // that it is not down.
                    drop(broker.ctl(&["start_app"]));
                }
            }
            broker.ctl(&whole).map(drop)
        })
    }
}

fn epmd_port(ports: &[Ports]) -> u16 {
    ports.first().map_or(0, |ports| ports.epmd)
}
