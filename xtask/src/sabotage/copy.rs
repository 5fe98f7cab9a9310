//! The copy of the tree that is patched instead of the tree.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, FileTimes};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use super::patch::Patch;

/// A copy of what git knows or would come to know, as it is now.
pub(crate) struct Copy {
    folder: PathBuf,
    /// Lists all files that were ever patched. What was built of them last may have been built of a patched
    /// one, whatever the time of the file says.
    touched: PathBuf,
}

/// The files that a patch has changed, with what was in them; `None` where there was no file.
pub(crate) type Changed = Vec<(PathBuf, Option<Vec<u8>>)>;

/// Returns where the copy of a tree goes: always to the same place, for cargo builds everything anew in
/// another.
pub(crate) fn folder(tree: &Path) -> PathBuf {
    // FNV-1a: the standard library's hash may be another one tomorrow.
    let hash = tree.as_os_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let temporary = std::env::temp_dir();
    let temporary = temporary.canonicalize().unwrap_or(temporary);
    temporary.join(format!("atomizer-sabotage-{hash:016x}"))
}

impl Copy {
    /// Copies the tree into an empty folder. Times are kept, for they tell cargo what has changed.
    pub(crate) fn make(tree: &Path, folder: &Path, touched: PathBuf) -> Result<Self> {
        let start = Instant::now();
        let files = files(tree)?;
        for file in &files {
            let (from, to) = (tree.join(file), folder.join(file));
            copy(&from, &to).with_context(|| format!("failed to copy {}", from.display()))?;
        }
        let took = start.elapsed().as_secs_f64();
        println!("copied {} files to {} in {took:.1} s", files.len(), folder.display());
        Ok(Self { folder: folder.to_owned(), touched })
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Has cargo look again at all files that these patches change, or others have changed before.
    pub(crate) fn touch(&self, patches: &[Patch]) -> Result<()> {
        let before = fs::read_to_string(&self.touched).unwrap_or_default();
        let mut files: BTreeSet<&Path> = before.lines().map(Path::new).collect();
        files.extend(patches.iter().flat_map(|patch| &patch.files).map(PathBuf::as_path));
        let mut list = String::new();
        for file in files {
            list.push_str(&format!("{}\n", file.display()));
            // Written again as it is: the time of that is what counts.
            let file = self.folder.join(file);
            if let Some(bytes) = content(&file)? {
                write(&file, &bytes)?;
            }
        }
        fs::write(&self.touched, list).context("failed to note what was touched")
    }
    /// Applies a patch. Returns what it has changed, or why it does not apply.
    pub(crate) fn apply(&self, patch: &Patch) -> Result<Result<Changed, String>> {
        let mut before = Vec::new();
        for file in &patch.files {
            before.push((file.clone(), content(&self.folder.join(file))?));
        }
        let mut git = git(&self.folder);
        // It would look for a repository above, and take the paths as below that.
        git.env("GIT_CEILING_DIRECTORIES", self.folder.parent().unwrap_or(&self.folder));
        git.args(["apply", "--whitespace=nowarn", "-"]).stdin(Stdio::piped());
        let mut git = git.spawn().context("failed to run git")?;
        // An error here is told by git's own.
        drop(git.stdin.take().map(|mut stdin| stdin.write_all(patch.diff.as_bytes())));
        let output = git.wait_with_output().context("failed to wait for git")?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            return Ok(Err(error.trim().replace('\n', "; ")));
        }
        let mut is_changed = false;
        for (file, content_before) in &before {
            is_changed |= content(&self.folder.join(file))? != *content_before;
        }
        Ok(if is_changed { Ok(before) } else { Err("it changes nothing".to_owned()) })
    }

    /// Undoes what a patch has changed.
    pub(crate) fn revert(&self, changed: Changed) -> Result<()> {
        for (file, before) in changed {
            let file = self.folder.join(file);
            match before {
                Some(bytes) => write(&file, &bytes)?,
                None => fs::remove_file(&file)
                    .with_context(|| format!("failed to remove {}", file.display()))?,
            }
        }
        Ok(())
    }
}

/// Lists what git knows or would come to know, below the tree.
fn files(tree: &Path) -> Result<Vec<PathBuf>> {
    let arguments = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let output = git(tree).args(arguments).output().context("failed to run git")?;
    if !output.status.success() {
        bail!("failed to list files: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let names = output.stdout.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    // One that is in conflict is listed more than once.
    let names: BTreeSet<PathBuf> = names.map(|name| OsStr::from_bytes(name).into()).collect();
    Ok(names.into_iter().collect())
}

fn git(folder: &Path) -> Command {
    let mut command = Command::new("git");
    command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Set where a hook of git's started us.
    for name in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"] {
        command.env_remove(name);
    }
    command
}

/// Copies a file, or a link as a link, with its time. What is deleted and still known to git is left out.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(from) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata?,
    };
    // The folder of a submodule, or of another repository.
    if metadata.is_dir() {
        return Ok(());
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    if metadata.is_symlink() {
        return symlink(fs::read_link(from)?, to);
    }
    fs::copy(from, to)?;
    let times = FileTimes::new().set_modified(metadata.modified()?);
    File::open(to)?.set_times(times)
}

fn content(file: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(file) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("failed to read {}", file.display())),
    }
}

fn write(file: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(file, bytes).with_context(|| format!("failed to write {}", file.display()))
}
