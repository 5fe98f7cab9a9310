//! A private broker, from its start to its end.

use std::net::Ipv4Addr;
use std::ops::Deref;
use std::sync::Arc;

use crate::error::BrokerError;
use crate::guard::{Guard, Guest};
use crate::host::Host;
use crate::machinery::{Machinery, Member};
use crate::node::Node;
use crate::process::Signal;
use crate::server::{self, Server};
use crate::settings::{Ports, cookie};

/// A broker of one's own, dead and gone when this value is dropped or the process ends.
///
/// It offers what [`Node`] offers, and its life besides.
#[derive(Debug)]
pub struct Broker {
    node: Node,
    machinery: Machinery,
}

impl Broker {
    /// Starts a broker of the installed RabbitMQ and waits until it is ready.
    ///
    /// # Errors
    ///
    /// When RabbitMQ is missing, ends at once, or is not ready within 90 seconds.
    pub fn start() -> Result<Self, BrokerError> {
        Self::start_on(&server::find()?)
    }

    /// Starts a broker of this RabbitMQ and waits until it is ready.
    ///
    /// # Errors
    ///
    /// When it ends at once, or is not ready within 90 seconds.
    pub fn start_on(server: &Server) -> Result<Self, BrokerError> {
        match Self::start_once(server) {
            // Someone took one of the ports meanwhile; new ports, new luck.
            Err(BrokerError::Died { .. }) => Self::start_once(server),
            result => result,
        }
    }

    fn start_once(server: &Server) -> Result<Self, BrokerError> {
        let ports = Ports::free(1).map_err(BrokerError::io("looking for free ports"))?;
        let [ports] = ports[..] else { unreachable!("they were asked for") };
        let guard = Arc::new(Guard::start()?);
        let folder = guard.folder().to_owned();
        let host = Host::start(server, guard, Ipv4Addr::LOCALHOST, None, ports.epmd)?;
        let node = format!("atomizer{}@localhost", ports.amqp);
        let member = Member { name: "broker", folder, ports, node, cookie: &cookie(), more: "" };
        let machinery = Machinery::new(Arc::new(host), member)?;
        machinery.launch()?;
        Self::ready(machinery)
    }

    /// Waits until what was launched is ready.
    pub(crate) fn ready(machinery: Machinery) -> Result<Self, BrokerError> {
        let version = machinery.wait_ready()?;
        let Ports { amqp, management, .. } = machinery.ports;
        let node = Node::new(amqp, management, machinery.ctl.clone(), version);
        Ok(Self { node, machinery })
    }

    /// Returns the handle for those who use the broker and do not own it.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Returns the broker's process id; `None` while it does not run.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.machinery.pid()
    }

    /// Has another process end (SIGTERM) with ours, should ours be killed, until the returned value
    /// is dropped.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn end_with_us(&self, pid: u32) -> Result<Guest, BrokerError> {
        let guest = self.machinery.host.guard.invite(pid);
        guest.map_err(BrokerError::io("telling the guard of a process"))
    }

    /// Has the broker write to disk at once what it writes every few seconds otherwise.
    ///
    /// A quorum queue is lost with all its confirmed messages when the broker is killed within
    /// three seconds of the queue's declaration (seen with 3.10.8, on a single node): its name
    /// waits in a buffer for that long. A test of something else calls this before
    /// [`kill`](Self::kill).
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails.
    pub fn flush(&self) -> Result<(), BrokerError> {
        self.ctl(&["eval", "[ok = dets:sync(Table) || Table <- dets:all()]."]).map(drop)
    }

    /// Kills the broker as a crash would (SIGKILL), and waits until it is dead.
    ///
    /// What was declared just before may be lost: see [`flush`](Self::flush).
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn kill(&self) -> Result<(), BrokerError> {
        self.machinery.kill()
    }

    /// Stops the broker in order (SIGTERM), and waits until it has ended.
    ///
    /// # Errors
    ///
    /// When it has not ended within a minute; it is killed then.
    pub fn stop(&self) -> Result<(), BrokerError> {
        self.machinery.stop()
    }

    /// Starts the broker again, on the same data and ports, and waits until it is ready.
    ///
    /// Does nothing but wait where it runs.
    ///
    /// # Errors
    ///
    /// When it ends at once or is not ready within 90 seconds.
    pub fn start_again(&self) -> Result<(), BrokerError> {
        self.launch()?;
        self.wait_ready()
    }

    pub(crate) fn launch(&self) -> Result<(), BrokerError> {
        self.machinery.launch()
    }

    pub(crate) fn wait_ready(&self) -> Result<(), BrokerError> {
        self.machinery.wait_ready().map(drop)
    }

    /// Stops the broker in order and starts it again.
    ///
    /// # Errors
    ///
    /// As [`stop`](Self::stop) and [`start_again`](Self::start_again).
    pub fn restart(&self) -> Result<(), BrokerError> {
        self.stop()?;
        self.start_again()
    }

    /// Freezes the broker (SIGSTOP): its sockets stay open and nobody answers.
    ///
    /// # Errors
    ///
    /// When the broker does not run.
    pub fn pause(&self) -> Result<(), BrokerError> {
        self.machinery.signal(Signal::Stop)
    }

    /// Lets a paused broker go on (SIGCONT).
    ///
    /// # Errors
    ///
    /// When the broker does not run.
    pub fn resume(&self) -> Result<(), BrokerError> {
        self.machinery.signal(Signal::Continue)
    }
}

impl Deref for Broker {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}
