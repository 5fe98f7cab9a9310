//! The process of one broker, and where it lives.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::ctl::Ctl;
use crate::error::BrokerError;
use crate::host::{Host, POLL, PROBE_MAX, START_MAX, kill_and_wait, write_to};
use crate::http::Management;
use crate::process::{self, Signal};
use crate::settings::{Identity, Places, Ports};

/// How long an orderly stop may take; usually six seconds, most of them in the management plugin.
const STOP_MAX: Duration = Duration::from_secs(60);

/// The header by which a client opens AMQP 0-9-1; the broker answers it with its first frame.
const AMQP_HEADER: &[u8; 8] = b"AMQP\0\0\x09\x01";

const LOG_LINES: usize = 40;

/// What one broker on a host is called, and how it is set up.
#[derive(Debug)]
pub(crate) struct Member<'a> {
    /// The name of its process in the guard's folder.
    pub(crate) name: &'a str,
    /// What it writes is in here.
    pub(crate) folder: PathBuf,
    pub(crate) ports: Ports,
    pub(crate) node: String,
    pub(crate) cookie: &'a str,
    /// More lines of its configuration.
    pub(crate) more: &'a str,
}

/// The process of one broker, and where it lives.
#[derive(Debug)]
pub(crate) struct Machinery {
    pub(crate) ctl: Ctl,
    pub(crate) ports: Ports,
    name: String,
    places: Places,
    broker: Mutex<Option<Child>>,
    /// Last, for the folder is removed with it.
    pub(crate) host: Arc<Host>,
}

impl Machinery {
    pub(crate) fn new(host: Arc<Host>, member: Member<'_>) -> Result<Self, BrokerError> {
        let Member { name, folder, ports, node, cookie, more } = member;
        let places = Places::new(&folder);
        places
            .write(ports, host.address, cookie, more)
            .map_err(BrokerError::io("writing the broker's configuration"))?;
        let ctl = Ctl {
            program: host.server.ctl().to_owned(),
            home: folder,
            epmd_port: ports.epmd,
            identity: Identity { node, address: host.address },
            namespace: host.namespace.clone(),
        };
        Ok(Self { ctl, ports, name: name.to_owned(), places, broker: Mutex::new(None), host })
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.broker().as_ref().map(Child::id)
    }

    pub(crate) fn launch(&self) -> Result<(), BrokerError> {
        let mut broker = self.broker();
        if broker.is_some() {
            return Ok(());
        }
        let mut command = self.host.command(&self.name, self.host.server.script());
        self.places.set_broker(&mut command, self.ports, &self.ctl.identity);
        write_to(&mut command, &self.places.console())
            .and_then(|command| command.spawn())
            .map(|child| *broker = Some(child))
            .map_err(BrokerError::io("starting rabbitmq-server"))
    }

    /// Waits until AMQP and the management interface answer; returns the broker's version.
    pub(crate) fn wait_ready(&self) -> Result<String, BrokerError> {
        let start = Instant::now();
        while start.elapsed() < START_MAX {
            if let Some(status) = self.ended() {
                return Err(self.died("the broker", status));
            }
            let at = |port| SocketAddr::from((self.host.address, port));
            if amqp_answers(at(self.ports.amqp)).is_ok()
                && let Some(version) = reported_version(at(self.ports.management))
            {
                return Ok(version);
            }
            thread::sleep(POLL);
        }
        Err(self.not_ready("the broker"))
    }

    /// Returns how the broker ended, if it has ended by itself.
    fn ended(&self) -> Option<ExitStatus> {
        let mut broker = self.broker();
        let status = broker.as_mut()?.try_wait().ok()??;
        *broker = None;
        self.host.guard.forget(&self.name);
        Some(status)
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<(), BrokerError> {
        match self.broker().as_ref() {
            Some(child) => process::signal(child.id(), signal),
            None => Err(BrokerError::io("sending a signal to the broker")(
                io::ErrorKind::NotFound.into(),
            )),
        }
    }

    pub(crate) fn stop(&self) -> Result<(), BrokerError> {
        let mut broker = self.broker();
        let Some(child) = broker.as_mut() else {
            return Ok(());
        };
        process::signal(child.id(), Signal::Terminate)?;
        // A paused process does not see the other signal before this one.
        process::signal(child.id(), Signal::Continue)?;
        let ended = process::wait(child, STOP_MAX)
            .map_err(BrokerError::io("waiting for the end of the broker"))?;
        if ended.is_none() {
            drop(broker);
            self.kill()?;
            return Err(BrokerError::TimedOut {
                what: "stopping the broker".to_owned(),
                limit: STOP_MAX,
            });
        }
        *broker = None;
        self.host.guard.forget(&self.name);
        Ok(())
    }

    pub(crate) fn kill(&self) -> Result<(), BrokerError> {
        let mut broker = self.broker();
        if let Some(child) = broker.as_mut() {
            kill_and_wait(child).map_err(BrokerError::io("killing the broker"))?;
            *broker = None;
            self.host.guard.forget(&self.name);
        }
        Ok(())
    }

    fn broker(&self) -> MutexGuard<'_, Option<Child>> {
        // A panic elsewhere is no reason to leave the broker running.
        self.broker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> String {
        process::tail(&[&self.places.console(), &self.places.log()], LOG_LINES)
    }

    fn died(&self, what: &'static str, status: ExitStatus) -> BrokerError {
        let log = self.log();
        BrokerError::Died { what, status, log }
    }

    fn not_ready(&self, what: &'static str) -> BrokerError {
        BrokerError::NotReady { what, limit: START_MAX, log: self.log() }
    }
}

impl Drop for Machinery {
    fn drop(&mut self) {
        // What fails here is left to the guard.
        drop(self.kill());
    }
}

/// Returns without an error when AMQP is spoken there.
fn amqp_answers(address: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, PROBE_MAX)?;
    stream.set_read_timeout(Some(PROBE_MAX))?;
    stream.write_all(AMQP_HEADER)?;
    stream.read_exact(&mut [0])
}

fn reported_version(address: SocketAddr) -> Option<String> {
    let management = Management { address, answer_max: PROBE_MAX };
    let overview = management.get("/api/overview").ok()?;
    let version = overview.get("rabbitmq_version").and_then(Value::as_str)?;
    Some(version.to_owned())
}
