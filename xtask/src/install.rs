//! Installs RabbitMQ where that takes one command and needs nobody's password.

use std::io::{IsTerminal as _, Write as _, stdin, stdout};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use atomizer_test_support::server;

/// Runs as root. The package would start a broker that listens on all interfaces; Debian's way to
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
DEBIAN_FRONTEND=noninteractive apt-get install -y rabbitmq-server
# Nor is it to start with the machine from now on.
if [ "$made" = yes ] && [ -d /run/systemd/system ]; then
    systemctl disable --quiet rabbitmq-server || true
fi
"#;

/// Returns once RabbitMQ is installed; says what to type where it cannot be installed.
pub(crate) fn ensure_rabbitmq(yes: bool) -> Result<()> {
    let Err(missing) = server::find() else {
        return Ok(());
    };
    if !missing.is_installable() {
        return Err(missing.into());
    }
    let Some(mut command) = installer() else {
        return Err(missing.into());
    };
    println!("{}.", missing.what());
    println!(
        "It can be installed now with apt-get (update, then install rabbitmq-server). The service \
         that comes with it is kept from starting: the tests start brokers of their own."
    );
    if !yes && stdin().is_terminal() && !confirmed()? {
        return Err(missing.into());
    }
    let status = command.stdin(Stdio::null()).status().context("failed to run apt-get")?;
    if !status.success() {
        bail!("apt-get failed ({status}); {missing}");
    }
    server::find().map(drop).map_err(Into::into)
}

/// Returns the command that installs RabbitMQ, where there is apt-get and the right to use it.
fn installer() -> Option<Command> {
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
    command.args(["-c", INSTALL]);
    Some(command)
}

fn is_root() -> bool {
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
