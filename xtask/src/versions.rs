//! Which RabbitMQ to test on: the installed one, or a newer one from a Debian in a folder.

use std::fmt;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};
use atomizer_test_support::{Server, server};

use crate::cargo::target;
use crate::install;

/// The releases of Debian that have a newer RabbitMQ, oldest first, and what series that is.
///
/// The series of the last is only what it was when this was written: it moves.
const RELEASES: [(&str, [u32; 2]); 2] = [("trixie", [4, 0]), ("sid", [4, 3])];

/// What stands for a program that is in a Debian.
///
/// The mounts are in a namespace of the process, so they vanish with it, however it ends. Each
/// `exec` keeps the pid, which is the broker's own in the end.
const WRAPPER: &str = r#"#!/bin/sh
# Becomes the program of this name in the Debian beside this folder, in which the temporary files of
# this machine have the same names.
set -eu
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
here=$(dirname "$(readlink -f "$0")")
exec unshare --mount sh -c '
set -eu
root=$1
temporary=${TMPDIR:-/tmp}
shift
mkdir -p "$root$temporary"
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --bind "$temporary" "$root$temporary"
exec chroot "$root" PROGRAM "$@"
' sh "$here/../root" "$@"
"#;

/// The programs of RabbitMQ that tests need, and the folders that Debian has them in.
const PROGRAMS: [(&str, &str); 3] = [
    ("rabbitmq-server", "/usr/lib/rabbitmq/bin"),
    ("rabbitmqctl", "/usr/lib/rabbitmq/bin"),
    ("epmd", "/usr/bin"),
];

/// A version of RabbitMQ, as far as it is given: 4.0 comes before 4.0.5.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(Vec<u32>);

impl FromStr for Version {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        // What Debian adds is no part of it, as in 3.10.8-1.1+deb12u1.
        let number = text.split(['-', '+', '~']).next().unwrap_or_default();
        let parts: Result<Vec<u32>, _> = number.split('.').map(str::parse).collect();
        parts.map(Self).with_context(|| format!("{text:?} is no version, such as 4.0"))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(u32::to_string).collect();
        f.write_str(&parts.join("."))
    }
}

/// Returns a RabbitMQ of at least this version: the installed one where that suffices, else one
/// that is fetched. Without a version it is the installed one.
pub(crate) fn ensure(version: Option<&Version>, yes: bool) -> Result<Server> {
    let installed = install::ensure_rabbitmq(yes)?;
    match version {
        Some(version) if installed_version(&installed)? < *version => ensure_fetched(version, yes),
        _ => Ok(installed),
    }
}

/// Fails when a broker is older than what was asked for.
pub(crate) fn check(reported: &str, asked: &Version) -> Result<()> {
    let reported: Version = reported.parse()?;
    ensure!(
        reported >= *asked,
        "the broker is RabbitMQ {reported}, and at least {asked} was asked for; what was fetched \
         once is in {}, and fetched again where it is not",
        cache()?.display()
    );
    Ok(())
}

fn installed_version(server: &Server) -> Result<Version> {
    // It wants a home for the cookie that it does not use.
    let home = cache()?;
    fs::create_dir_all(&home).context("failed to make a folder")?;
    let output = Command::new(server.ctl())
        .arg("version")
        .env("HOME", home)
        .stdin(Stdio::null())
        .output()
        .context("failed to run rabbitmqctl")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().last().unwrap_or_default().trim().parse().context("`rabbitmqctl version` failed")
}

fn cache() -> Result<PathBuf> {
    Ok(target()?.join("rabbitmq"))
}

/// Returns the RabbitMQ of the first release of Debian that should have this version.
fn ensure_fetched(version: &Version, yes: bool) -> Result<Server> {
    let [.., last] = RELEASES;
    let suits = |(_, series): &&(&str, [u32; 2])| version.0.iter().take(2).le(series);
    let (release, _) = RELEASES.iter().find(suits).unwrap_or(&last);
    let cache = cache()?;
    let folder = cache.join(release);
    if !folder.is_dir() {
        let lock = File::create(cache.join("lock")).context("failed to make a lock")?;
        lock.lock().context("failed to lock")?;
        // Another may have been quicker.
        if !folder.is_dir() {
            fetch(release, &folder, yes).with_context(|| {
                format!("failed to fetch RabbitMQ {version} from Debian {release}")
            })?;
        }
    }
    Ok(server::at(folder.join("bin/rabbitmq-server"))?)
}

/// Puts a Debian with RabbitMQ into a folder, which is there when it is complete.
fn fetch(release: &str, folder: &Path, yes: bool) -> Result<()> {
    // For debootstrap, and for the namespaces that a broker from it runs in.
    ensure!(install::is_root(), "only root may do that");
    install::ensure_debootstrap(yes)?;
    let mirror = mirror()?;
    let part = folder.with_extension("part");
    if part.exists() {
        fs::remove_dir_all(&part).context("failed to remove what an earlier try has left")?;
    }
    let (root, bin) = (part.join("root"), part.join("bin"));
    fs::create_dir_all(&bin).context("failed to make a folder")?;
    println!("fetching RabbitMQ from Debian {release}, about 400 MB; this takes a minute or two");
    let log = part.join("debootstrap.log");
    let file = File::create(&log).context("failed to make a log")?;
    let fetched = Command::new("unshare")
        // What it mounts, and what packages start, vanishes with it.
        .args(["--mount", "--pid", "--fork", "--kill-child", "debootstrap", "--variant=minbase"])
        .args(["--include=rabbitmq-server", release])
        .arg(&root)
        .arg(mirror)
        .stdin(Stdio::null())
        .stdout(file.try_clone().context("failed to make a log")?)
        .stderr(file)
        .status()
        .context("failed to run unshare")?;
    ensure!(fetched.success(), "debootstrap failed ({fetched}):\n{}", last_lines(&log));
    // Without it the broker does not find its own machine.
    fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n")
        .context("failed to name localhost")?;
    for (name, place) in PROGRAMS {
        let mut options = File::options();
        let mut script = options
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(bin.join(name))
            .context("failed to make a script")?;
        let text = WRAPPER.replace("PROGRAM", &format!("{place}/{name}"));
        script.write_all(text.as_bytes()).context("failed to write a script")?;
    }
    fs::rename(&part, folder).context("failed to rename a folder")
}

fn last_lines(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

/// Returns where this machine gets Debian from.
fn mirror() -> Result<String> {
    let format = "$(LABEL) $(REPO_URI)";
    let known = || -> Result<Option<String>> {
        let output = Command::new("apt-get")
            .args(["indextargets", "--format", format, "Created-By: Packages"])
            .stdin(Stdio::null())
            .output()
            .context("failed to run apt-get")?;
        let targets = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(targets.lines().find_map(|line| line.strip_prefix("Debian ")).map(str::to_owned))
    };
    if let Some(mirror) = known()? {
        return Ok(mirror);
    }
    // Labels are in the lists, which images for containers come without.
    Command::new("apt-get")
        .args(["-q", "update"])
        .stdin(Stdio::null())
        .status()
        .context("failed to run apt-get")?;
    match known()? {
        Some(mirror) => Ok(mirror),
        None => bail!("no source of this machine's apt is a Debian"),
    }
}

#[cfg(test)]
mod tests {
    use super::Version;

    fn version(text: &str) -> Version {
        text.parse().unwrap()
    }

    #[test]
    fn versions_are_compared_by_number_as_far_as_they_are_given() {
        assert!(version("3.10") > version("3.9.1"));
        assert!(version("3.10.8") >= version("3.10"));
        assert!(version("4.0") > version("3.10.8"));
        assert_eq!(version("4.0.5-1+deb13u1"), version("4.0.5"));
        assert!("four".parse::<Version>().is_err());
        assert!("".parse::<Version>().is_err());
    }
}
