//! Where RabbitMQ is installed.

use std::fs;
use std::path::{Path, PathBuf};

use crate::env;

/// Names the `rabbitmq-server` script to use, before all other places.
pub const RABBITMQ_SERVER: &str = "ATOMIZER_RABBITMQ_SERVER";

/// The one command that installs RabbitMQ on Debian and Ubuntu.
pub const INSTALL_APT: &str = "sudo apt-get update && sudo apt-get install -y rabbitmq-server";

/// The one command that installs RabbitMQ with Homebrew.
pub const INSTALL_BREW: &str = "brew install rabbitmq";

/// The one command that runs the tests where Docker is all there is.
pub const RUN_IN_DOCKER: &str = "docker run --rm -v \"$PWD\":/src -w /src \
    -e CARGO_TARGET_DIR=/tmp/target rust:1.95 cargo xtask test --yes";

/// Where packages put the scripts; tried in this order, after [`RABBITMQ_SERVER`].
const PLACES: [&str; 4] = [
    "/usr/lib/rabbitmq/bin/rabbitmq-server",
    "/opt/homebrew/sbin/rabbitmq-server",
    "/usr/local/sbin/rabbitmq-server",
    "/home/linuxbrew/.linuxbrew/sbin/rabbitmq-server",
];

/// Where `epmd`, Erlang's port mapper, may be when it is not on the `PATH`.
const EPMD_FOLDERS: [&str; 5] = [
    "/usr/bin",
    "/usr/lib/erlang/bin",
    "/opt/homebrew/bin",
    "/usr/local/bin",
    "/home/linuxbrew/.linuxbrew/bin",
];

/// An installed RabbitMQ.
#[derive(Clone, Debug)]
pub struct Server {
    script: PathBuf,
    ctl: PathBuf,
    epmd: PathBuf,
}

impl Server {
    /// Returns the path of the script that starts a broker.
    #[must_use]
    pub fn script(&self) -> &Path {
        &self.script
    }

    /// Returns the path of `rabbitmqctl`.
    #[must_use]
    pub fn ctl(&self) -> &Path {
        &self.ctl
    }

    pub(crate) fn epmd(&self) -> &Path {
        &self.epmd
    }
}

/// The report that RabbitMQ is missing, with what to do about it.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "{what}; install RabbitMQ with one of
    Debian, Ubuntu:  {INSTALL_APT}
    Homebrew:        {INSTALL_BREW}
or, with nothing but Docker, run the tests with
    {RUN_IN_DOCKER}
or set {RABBITMQ_SERVER} to the path of a rabbitmq-server script"
)]
pub struct Missing {
    what: String,
    installable: bool,
}

impl Missing {
    fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), installable: true }
    }

    /// Returns what is missing, without the instructions.
    #[must_use]
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Returns whether installing RabbitMQ is what helps.
    ///
    /// Where [`RABBITMQ_SERVER`] names a script that is not there, it is not.
    #[must_use]
    pub fn is_installable(&self) -> bool {
        self.installable
    }
}

/// Finds the installed RabbitMQ.
///
/// Looks at [`RABBITMQ_SERVER`], the folder of the Debian and RPM packages, the `PATH` and the
/// folders of Homebrew.
///
/// # Errors
///
/// [`Missing`], whose text says how to install it.
pub fn find() -> Result<Server, Missing> {
    at(find_script()?)
}

/// Returns the RabbitMQ that a `rabbitmq-server` script belongs to.
///
/// `rabbitmqctl` has to be beside it. So may be an `epmd`, which is used rather than one of the
/// machine then.
///
/// # Errors
///
/// [`Missing`], when there is no `rabbitmqctl` beside it or no `epmd` anywhere.
pub fn at(script: PathBuf) -> Result<Server, Missing> {
    let ctl = script.with_file_name("rabbitmqctl");
    if !ctl.is_file() {
        let what = format!("there is no rabbitmqctl beside {}", script.display());
        return Err(Missing::new(what));
    }
    let epmd = find_epmd(&script).ok_or_else(|| Missing::new("Erlang's epmd was not found"))?;
    Ok(Server { script, ctl, epmd })
}

fn find_script() -> Result<PathBuf, Missing> {
    if let Some(named) = env::text(RABBITMQ_SERVER) {
        // Taken at its word: it may be somebody's own wrapper. Anything else than that would test
        // another RabbitMQ than the one asked for.
        let named = PathBuf::from(named);
        if named.is_file() {
            return Ok(real_script(&named).unwrap_or(named));
        }
        return Err(Missing {
            what: format!("{RABBITMQ_SERVER} names {}, which is no file", named.display()),
            installable: false,
        });
    }
    let [package, homebrew @ ..] = PLACES.map(PathBuf::from);
    let on_path = env::path_folders().into_iter().map(|folder| folder.join("rabbitmq-server"));
    std::iter::once(package)
        .chain(on_path)
        .chain(homebrew)
        .find_map(|candidate| real_script(&candidate))
        .ok_or_else(|| Missing::new("rabbitmq-server was not found"))
}

/// Returns the script behind `candidate` that starts a broker as the user who calls it.
///
/// What packages put into `/usr/sbin` is a wrapper that changes to the user `rabbitmq`. The real
/// script is told by `rabbitmq-env` beside it, which it reads.
fn real_script(candidate: &Path) -> Option<PathBuf> {
    let real = fs::canonicalize(candidate).ok()?;
    let folder = real.parent()?;
    let script = fs::canonicalize(folder.join("rabbitmq-server")).ok()?;
    script.with_file_name("rabbitmq-env").is_file().then_some(script)
}

fn find_epmd(script: &Path) -> Option<PathBuf> {
    let beside = script.parent().map(Path::to_owned);
    beside
        .into_iter()
        .chain(env::path_folders())
        .chain(EPMD_FOLDERS.map(PathBuf::from))
        .map(|folder| folder.join("epmd"))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::{INSTALL_APT, INSTALL_BREW, Missing};

    #[test]
    fn a_missing_server_is_reported_with_what_to_type() {
        let text = Missing::new("rabbitmq-server was not found").to_string();
        for part in ["was not found", INSTALL_APT, INSTALL_BREW, "docker run"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}
