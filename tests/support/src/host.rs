//! What brokers on one address share: the guard, and `epmd`, Erlang's port mapper.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::BrokerError;
use crate::guard::Guard;
use crate::process;
use crate::server::Server;

/// How long a start may take; 3 to 7 s on a quiet machine, 16 s on a busy one.
pub(crate) const START_MAX: Duration = Duration::from_secs(240);

/// How long one question whether something is ready may take.
pub(crate) const PROBE_MAX: Duration = Duration::from_secs(2);

/// How often it is asked.
pub(crate) const POLL: Duration = Duration::from_millis(50);

/// The name of the process in the guard's folder; that of a network namespace is added.
const EPMD: &str = "epmd";

const LOG_LINES: usize = 40;

/// An address where brokers are, with its port mapper.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) server: Server,
    pub(crate) address: Ipv4Addr,
    /// The network namespace that has the address, where it is not our own.
    pub(crate) namespace: Option<String>,
    epmd: Child,
    /// Last, for it removes the folder when it is dropped.
    pub(crate) guard: Arc<Guard>,
}

impl Host {
    pub(crate) fn start(
        server: &Server,
        guard: Arc<Guard>,
        address: Ipv4Addr,
        namespace: Option<String>,
        epmd_port: u16,
    ) -> Result<Self, BrokerError> {
        let mut command =
            command(&guard, namespace.as_deref(), &epmd_name(namespace.as_deref()), server.epmd());
        // In the foreground, so that its pid is the one we know. A broker would start one by itself,
        // but as a daemon that stays behind.
        command.args(["-port", &epmd_port.to_string(), "-address", &address.to_string()]);
        let epmd = write_to(&mut command, &epmd_log(&guard))
            .and_then(|command| command.spawn())
            .map_err(BrokerError::io("starting epmd"))?;
        let mut host = Self { server: server.clone(), address, namespace, epmd, guard };
        host.wait_epmd(epmd_port)?;
        Ok(host)
    }

    fn wait_epmd(&mut self, port: u16) -> Result<(), BrokerError> {
        let start = Instant::now();
        let log = |guard: &Guard| process::tail(&[&epmd_log(guard)], LOG_LINES);
        loop {
            if let Ok(Some(status)) = self.epmd.try_wait() {
                return Err(BrokerError::Died { what: EPMD, status, log: log(&self.guard) });
            }
            let address = SocketAddr::from((self.address, port));
            if TcpStream::connect_timeout(&address, PROBE_MAX).is_ok() {
                return Ok(());
            }
            if start.elapsed() > START_MAX {
                let log = log(&self.guard);
                return Err(BrokerError::NotReady { what: EPMD, limit: START_MAX, log });
            }
            thread::sleep(POLL);
        }
    }

    /// Returns a command whose process runs here, and which the guard will kill.
    pub(crate) fn command(&self, name: &str, program: &Path) -> Command {
        command(&self.guard, self.namespace.as_deref(), name, program)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // What fails here is left to the guard.
        if kill_and_wait(&mut self.epmd).is_ok() {
            self.guard.forget(&epmd_name(self.namespace.as_deref()));
        }
    }
}

fn command(guard: &Guard, namespace: Option<&str>, name: &str, program: &Path) -> Command {
    match namespace {
        None => guard.command(name, program),
        Some(namespace) => {
            // It becomes the program.
            let mut command = guard.command(name, Path::new("ip"));
            command.args(["netns", "exec", namespace]).arg(program);
            command
        }
    }
}

fn epmd_name(namespace: Option<&str>) -> String {
    namespace.map_or_else(|| EPMD.to_owned(), |namespace| format!("{EPMD}-{namespace}"))
}

fn epmd_log(guard: &Guard) -> PathBuf {
    guard.folder().join("epmd.log")
}

/// Leads what the command writes into a file: whoever reads our own output would otherwise wait
/// for the broker's end too.
pub(crate) fn write_to<'a>(command: &'a mut Command, file: &Path) -> io::Result<&'a mut Command> {
    let console = File::options().create(true).append(true).open(file)?;
    Ok(command.stdout(console.try_clone()?).stderr(console))
}

pub(crate) fn kill_and_wait(child: &mut Child) -> io::Result<()> {
    child.kill()?;
    child.wait().map(drop)
}
