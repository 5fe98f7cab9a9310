//! Calls of `cargo`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

/// Returns a call of `cargo` in the root of the workspace.
pub(crate) fn cargo<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Command {
    cargo_in(root(), arguments)
}

/// Returns a call of `cargo` in a folder.
pub(crate) fn cargo_in<'a>(folder: &Path, arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.args(arguments).current_dir(folder);
    // Set by the `cargo run` that started us, and wrong for any other package.
    for name in ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PKG_NAME"] {
        command.env_remove(name);
    }
    command
}

/// Returns the root of the workspace.
pub(crate) fn root() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// Returns cargo's target folder, where things are kept that can be made again.
pub(crate) fn target() -> Result<PathBuf> {
    // We are TARGET/PROFILE/xtask.
    let own = std::env::current_exe().context("failed to find this program")?;
    let target = own.parent().and_then(Path::parent);
    let target = target.with_context(|| format!("{} is in no folder of cargo's", own.display()))?;
    Ok(target.to_owned())
}

/// Returns whether `cargo NAME` is installed.
pub(crate) fn has(name: &str) -> bool {
    cargo([name, "--version"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
