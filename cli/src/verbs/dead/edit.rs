//! A payload, edited by whoever is in front of the terminal.

use std::{
    env, fs, io,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail, ensure};
use atomizer::{ContentType, ElectronId, Payload};

use crate::{input, output::pretty};

/// Has a payload edited, JSON indented, and returns what became of it.
///
/// # Errors
/// When the editor fails. What is edited and no JSON is kept, in the file that the error names.
pub(super) fn edit(editor: &str, before: &Payload) -> anyhow::Result<Payload> {
    let is_json = before.content_type == ContentType::Json;
    if !is_json && str::from_utf8(&before.body).is_err() {
        bail!("its payload is no text: send another with --payload @FILE");
    }
    let shown = if is_json { pretty(before) + "\n" } else { text(before) };
    let mut file = Private::create(shown.as_bytes()).context("failed to make a file to edit")?;
    run(editor, &file.path)?;
    let after = fs::read(&file.path).context("failed to read what was edited")?;
    if after == shown.as_bytes() {
        return Ok(before.clone());
    }
    if !is_json {
        return Ok(Payload::new(before.content_type.clone(), after));
    }
    let name = file.path.display().to_string();
    let edited = input::json(&name, &after);
    file.keep = edited.is_err();
    edited
}

fn text(payload: &Payload) -> String {
    String::from_utf8_lossy(&payload.body).into_owned()
}

/// Runs an editor. It is a command with arguments, as in `code --wait`, so a shell takes it apart.
fn run(editor: &str, path: &Path) -> anyhow::Result<()> {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{editor} \"$1\"")).arg("sh").arg(path);
    let status = command.status().with_context(|| format!("failed to run {editor}"))?;
    ensure!(status.success(), "{editor} failed: {status}");
    Ok(())
}

/// A file that nobody else may read, which is gone when this value is, unless it is to be kept.
struct Private {
    path: PathBuf,
    keep: bool,
}

impl Private {
    fn create(content: &[u8]) -> io::Result<Self> {
        let path = env::temp_dir().join(format!("atomizer-{}.json", ElectronId::new()));
        let mut options = fs::OpenOptions::new();
        // Fails where there is one already: it may be somebody else's.
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&path)?;
        let made = Self { path, keep: false };
        file.write_all(content)?;
        Ok(made)
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            eprintln!("warning: {} stays: {error}", self.path.display());
        }
    }
}
