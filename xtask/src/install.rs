//! Installs what is missing where that takes one command and needs nobody's password.

use std::io::{IsTerminal as _, Write as _, stdin, stdout};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use atomizer_test_support::{Server, server};

/// Runs as root; `$1` is the package. That of RabbitMQ would start a broker that listens on all interfaces; Debian's way to
/// forbid that is a `policy-rc.d` that says no (101). One that exists is left alone.
const INSTALL: &str = r#"
set -eu
policy=/usr/sbin/policy-rc.d
made=no
if (set -C; printf '#!/bin/sh\nexit 101\n' >"$policy") 2>/dev/null; then
    made=yes
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    chmod 755 "$policy"
fi
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y "$1"
# Nor is it to start with the machine from now on.
if [ "$1" = rabbitmq-server ] && [ "$made" = yes ] && [ -d /run/systemd/system ]; then
    systemctl disable --quiet rabbitmq-server || true
fi
"#;

/// Returns the installed RabbitMQ; says what to type where it cannot be installed.
pub(crate) fn ensure_rabbitmq(yes: bool) -> Result<Server> {
    let missing = match server::find() {
        Ok(server) => return Ok(server),
        Err(missing) => missing,
    };
    if !missing.is_installable() {
        return Err(missing.into());
    }
    println!("{}.", missing.what());
    let about = "The service that comes with it is kept from starting: the tests start brokers of \
                 their own.";
    install("rabbitmq-server", about, yes).map_err(|error| error.context(missing))?;
    Ok(server::find()?)
}

/// Returns once `debootstrap` is installed; says why where it cannot be.
pub(crate) fn ensure_debootstrap(yes: bool) -> Result<()> {
    if succeeds("debootstrap", &["--version"]) {
        return Ok(());
    }
    println!("debootstrap, which fetches a Debian into a folder, is missing.");
    install("debootstrap", "It starts no service.", yes)
        .context("debootstrap is missing; install it with: sudo apt-get install debootstrap")
}

fn install(package: &str, about: &str, yes: bool) -> Result<()> {
    let mut command = installer(package).context("there is no right to install it")?;
    println!("It can be installed now with apt-get (update, then install {package}). {about}");
    if !yes && stdin().is_terminal() {
        ensure!(confirmed()?, "it was not to be installed");
    }
    let status = command.stdin(Stdio::null()).status().context("failed to run apt-get")?;
    ensure!(status.success(), "apt-get failed: {status}");
    Ok(())
}

/// Returns the command that installs a package, where there is apt-get and the right to use it.
fn installer(package: &str) -> Option<Command> {
    if !succeeds("apt-get", &["--version"]) {
        return None;
    }
    let mut command = if is_root() {
        Command::new("sh")
    } else if succeeds("sudo", &["-n", "true"]) {
        let mut command = Command::new("sudo");
        command.args(["-n", "sh"]);
        command
    } else {
        return None;
    };
    command.args(["-c", INSTALL, "sh", package]);
    Some(command)
}

pub(crate) fn is_root() -> bool {
    let id = Command::new("id").arg("-u").stderr(Stdio::null()).output();
    id.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn confirmed() -> Result<bool> {
    print!("Install it? [y/N] ");
    stdout().flush()?;
    let mut answer = String::new();
    stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
