//! A private broker, from its start to its end.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::ops::Deref;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::ctl::Ctl;
use crate::error::BrokerError;
use crate::guard::{Guard, Guest};
use crate::http::Management;
use crate::node::Node;
use crate::process::{self, Signal};
use crate::server::{self, Server};
use crate::settings::{Places, Ports};

/// How long a start may take; 3 to 7 s on a quiet machine, 16 s on a busy one.
const START_MAX: Duration = Duration::from_secs(90);

/// How long an orderly stop may take; usually six seconds, most of them in the management plugin.
const STOP_MAX: Duration = Duration::from_secs(60);

/// How long one question whether the broker is ready may take.
const PROBE_MAX: Duration = Duration::from_secs(2);

/// How often it is asked.
const POLL: Duration = Duration::from_millis(50);

/// The header by which a client opens AMQP 0-9-1; the broker answers it with its first frame.
const AMQP_HEADER: &[u8; 8] = b"AMQP\0\0\x09\x01";

/// Names of the processes in the guard's folder.
const BROKER: &str = "broker";
const EPMD: &str = "epmd";

const LOG_LINES: usize = 40;

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
        let machinery = Machinery::new(server)?;
        machinery.launch()?;
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
        self.machinery.broker().as_ref().map(Child::id)
    }

    /// Has another process end (SIGTERM) with ours, should ours be killed, until the returned value
    /// is dropped.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn end_with_us(&self, pid: u32) -> Result<Guest, BrokerError> {
        let guest = self.machinery.guard.invite(pid);
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
        self.machinery.launch()?;
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

/// The processes of one broker and where they live.
#[derive(Debug)]
struct Machinery {
    server: Server,
    ctl: Ctl,
    ports: Ports,
    broker: Mutex<Option<Child>>,
    epmd: Child,
    /// Last, for it removes the folder when it is dropped.
    guard: Guard,
}

impl Machinery {
    fn new(server: &Server) -> Result<Self, BrokerError> {
        let ports = Ports::free().map_err(BrokerError::io("looking for free ports"))?;
        let guard = Guard::start()?;
        let places = Places::new(guard.folder());
        places.write(ports).map_err(BrokerError::io("writing the broker's configuration"))?;
        let epmd = start_epmd(server, &guard, ports.epmd)?;
        let ctl = Ctl {
            program: server.ctl().to_owned(),
            home: guard.folder().to_owned(),
            epmd_port: ports.epmd,
            node: format!("atomizer{}@localhost", ports.amqp),
        };
        let mut machinery =
            Self { server: server.clone(), ctl, ports, broker: Mutex::new(None), epmd, guard };
        machinery.wait_epmd()?;
        Ok(machinery)
    }

    /// The broker would start one by itself, but as a daemon that stays behind.
    fn wait_epmd(&mut self) -> Result<(), BrokerError> {
        let start = Instant::now();
        loop {
            if let Ok(Some(status)) = self.epmd.try_wait() {
                return Err(self.died("epmd", status));
            }
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.ports.epmd));
            if TcpStream::connect_timeout(&address, PROBE_MAX).is_ok() {
                return Ok(());
            }
            if start.elapsed() > START_MAX {
                return Err(self.not_ready("epmd"));
            }
            thread::sleep(POLL);
        }
    }

    fn launch(&self) -> Result<(), BrokerError> {
        let mut broker = self.broker();
        if broker.is_some() {
            return Ok(());
        }
        let places = Places::new(self.guard.folder());
        let mut command = self.guard.command(BROKER, self.server.script());
        places.set_broker(&mut command, self.ports, &self.ctl.node);
        write_to(&mut command, &places)
            .and_then(|command| command.spawn())
            .map(|child| *broker = Some(child))
            .map_err(BrokerError::io("starting rabbitmq-server"))
    }

    /// Waits until AMQP and the management interface answer; returns the broker's version.
    fn wait_ready(&self) -> Result<String, BrokerError> {
        let start = Instant::now();
        while start.elapsed() < START_MAX {
            if let Some(status) = self.ended() {
                return Err(self.died("the broker", status));
            }
            if amqp_answers(self.ports.amqp).is_ok()
                && let Some(version) = reported_version(self.ports.management)
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
        self.guard.forget(BROKER);
        Some(status)
    }

    fn signal(&self, signal: Signal) -> Result<(), BrokerError> {
        match self.broker().as_ref() {
            Some(child) => process::signal(child.id(), signal),
            None => Err(BrokerError::io("sending a signal to the broker")(
                io::ErrorKind::NotFound.into(),
            )),
        }
    }

    fn stop(&self) -> Result<(), BrokerError> {
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
        self.guard.forget(BROKER);
        Ok(())
    }

    fn kill(&self) -> Result<(), BrokerError> {
        let mut broker = self.broker();
        if let Some(child) = broker.as_mut() {
            kill_and_wait(child).map_err(BrokerError::io("killing the broker"))?;
            *broker = None;
            self.guard.forget(BROKER);
        }
        Ok(())
    }

    fn broker(&self) -> MutexGuard<'_, Option<Child>> {
        // A panic elsewhere is no reason to leave the broker running.
        self.broker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> String {
        let places = Places::new(self.guard.folder());
        process::tail(&[&places.console(), &places.log()], LOG_LINES)
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
        // What fails here is left to the guard, which is dropped next.
        drop(self.kill());
        if kill_and_wait(&mut self.epmd).is_ok() {
            self.guard.forget(EPMD);
        }
    }
}

fn start_epmd(server: &Server, guard: &Guard, port: u16) -> Result<Child, BrokerError> {
    let mut command = guard.command(EPMD, server.epmd());
    // In the foreground, so that its pid is the one we know.
    command.args(["-port", &port.to_string(), "-address", "127.0.0.1"]);
    write_to(&mut command, &Places::new(guard.folder()))
        .and_then(|command| command.spawn())
        .map_err(BrokerError::io("starting epmd"))
}

/// Leads what the command writes into a file: whoever reads our own output would otherwise wait
/// for the broker's end too.
fn write_to<'a>(command: &'a mut Command, places: &Places) -> io::Result<&'a mut Command> {
    let console = File::options().create(true).append(true).open(places.console())?;
    Ok(command.stdout(console.try_clone()?).stderr(console))
}

fn kill_and_wait(child: &mut Child) -> io::Result<()> {
    child.kill()?;
    child.wait().map(drop)
}

/// Returns without an error when AMQP is spoken on the port.
fn amqp_answers(port: u16) -> io::Result<()> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, PROBE_MAX)?;
    stream.set_read_timeout(Some(PROBE_MAX))?;
    stream.write_all(AMQP_HEADER)?;
    stream.read_exact(&mut [0])
}

fn reported_version(port: u16) -> Option<String> {
    let management = Management { port, answer_max: PROBE_MAX };
    let overview = management.get("/api/overview").ok()?;
    let version = overview.get("rabbitmq_version").and_then(Value::as_str)?;
    Some(version.to_owned())
}
