//! How a private broker is set up.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::env;
use crate::ports;

/// Keeps Erlang's own links between nodes off all interfaces but that of the address.
pub(crate) fn only_on(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("-kernel inet_dist_use_interface {{{a},{b},{c},{d}}}")
}

/// Added to [`only_on`] for the broker: idle schedulers sleep instead of spinning, for the
/// tests need the processor too, and no `epmd` is started but ours.
const ERLANG: &str = "+sbwt none +sbwtdcpu none +sbwtdio none -start_epmd false";

/// The ports of one broker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    pub(crate) amqp: u16,
    pub(crate) management: u16,
    pub(crate) distribution: u16,
    pub(crate) epmd: u16,
}

impl Ports {
    /// Returns free ports for so many brokers that share their `epmd`.
    pub(crate) fn free(brokers: usize) -> io::Result<Vec<Self>> {
        let all = ports::free(1 + 3 * brokers)?;
        let (epmd, all) = all.split_first().expect("there is at least one");
        let of_one = |ports: &[u16]| {
            let [amqp, management, distribution] = *ports else { unreachable!("they are three") };
            Self { amqp, management, distribution, epmd: *epmd }
        };
        Ok(all.chunks_exact(3).map(of_one).collect())
    }
}

/// Where a broker keeps what, all in its one folder.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    folder: PathBuf,
}

/// The name of a node, and where it listens.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// As in `rabbit@localhost`.
    pub(crate) node: String,
    /// The one address that everything of it listens on.
    pub(crate) address: Ipv4Addr,
}

impl Places {
    pub(crate) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    fn config(&self) -> PathBuf {
        self.folder.join("rabbitmq.conf")
    }

    fn plugins(&self) -> PathBuf {
        self.folder.join("enabled_plugins")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.folder.join("broker.log")
    }

    /// What the broker writes before its log is open.
    pub(crate) fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    /// Writes the configuration, the list of plugins and the cookie; `more` is configuration too.
    pub(crate) fn write(
        &self,
        ports: Ports,
        address: Ipv4Addr,
        cookie: &str,
        more: &str,
    ) -> io::Result<()> {
        let Ports { amqp, management, .. } = ports;
        // The two limits are absolute, so that the broker neither fills a shared machine nor
        // blocks its publishers because the machine is small or its disk nearly full.
        let config = format!(
            "listeners.tcp.1 = {address}:{amqp}\n\
             management.tcp.ip = {address}\n\
             management.tcp.port = {management}\n\
             vm_memory_high_watermark.absolute = 1GiB\n\
             disk_free_limit.absolute = 50MB\n\
             log.console = false\n\
             log.file.level = info\n{more}"
        );
        fs::write(self.config(), config)?;
        fs::write(self.plugins(), "[rabbitmq_management].\n")?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            // Erlang refuses a cookie that others can read.
            .mode(0o400)
            .open(self.folder.join(".erlang.cookie"))?
            .write_all(cookie.as_bytes())
    }

    /// Sets what the broker reads from its environment, and nothing else.
    pub(crate) fn set_broker(&self, command: &mut Command, ports: Ports, identity: &Identity) {
        set_common(command, &self.folder, ports.epmd, identity);
        command
            .env("RABBITMQ_NODE_PORT", ports.amqp.to_string())
            .env("RABBITMQ_DIST_PORT", ports.distribution.to_string())
            .env("RABBITMQ_CONFIG_FILE", self.config())
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", self.folder.join("advanced.config"))
            .env("RABBITMQ_MNESIA_BASE", self.folder.join("data"))
            .env("RABBITMQ_LOG_BASE", &self.folder)
            .env("RABBITMQ_LOGS", self.log())
            .env("RABBITMQ_PID_FILE", self.folder.join("rabbitmq.own_pid"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", self.plugins())
            .env("RABBITMQ_GENERATED_CONFIG_DIR", self.folder.join("generated"))
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                format!("{} {ERLANG}", only_on(identity.address)),
            )
            // Makes the script become the broker, instead of waiting for it as its parent: the
            // pid that we know is then the broker's own.
            .env("RUNNING_UNDER_SYSTEMD", "true");
    }
}

/// Sets what the broker and `rabbitmqctl` have to agree on; the rest of our own environment, which
/// might point to another broker, is taken away.
pub(crate) fn set_common(command: &mut Command, home: &Path, epmd_port: u16, identity: &Identity) {
    command.env_clear();
    for name in ["PATH", "TMPDIR"] {
        if let Some(value) = env::text(name) {
            command.env(name, value);
        }
    }
    let Identity { node, address } = identity;
    // An address instead of a name has dots in it.
    let is_long = !node.ends_with("@localhost");
    command
        .env("LC_ALL", "C.UTF-8")
        .env("HOME", home)
        .env("ERL_EPMD_PORT", epmd_port.to_string())
        .env("ERL_EPMD_ADDRESS", address.to_string())
        .env("ERL_CRASH_DUMP_SECONDS", "0")
        .env("RABBITMQ_NODENAME", node)
        .env("RABBITMQ_USE_LONGNAME", is_long.to_string())
        .env("RABBITMQ_CONF_ENV_FILE", "/dev/null");
}

/// Returns a fresh secret that nodes and `rabbitmqctl` know each other by.
pub(crate) fn cookie() -> String {
    format!("{:016X}{:016X}", ports::random(), ports::random())
}
