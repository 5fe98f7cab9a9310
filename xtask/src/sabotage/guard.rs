//! What makes sure that nothing is left behind, however we end.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// Runs beside us; `$1` is the folder. It reads which process group runs now, and an empty line when none
/// does. The end of the file is our end.
const WATCH: &str = r#"
group=
while read -r line; do group=$line; done
[ -n "$group" ] && kill -9 "-$group" 2>/dev/null
tries=0
while [ -e "$1" ] && [ "$tries" -lt 100 ]; do
    rm -rf "$1" 2>/dev/null
    tries=$((tries + 1))
    [ -e "$1" ] && sleep 0.1
done
"#;

/// Becomes the command once we say so: by then the guard knows of it.
const WAIT: &str = r#"read -r go || exit 1; exec "$@" </dev/null"#;

/// How often a process is asked whether it has ended.
const POLL: Duration = Duration::from_millis(20);

/// A folder that vanishes when we end, with the process that runs then.
#[derive(Debug)]
pub(crate) struct Guard {
    folder: PathBuf,
    watcher: Child,
}

/// How a process ended.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ended {
    Exited(ExitStatus),
    /// It took too long and was killed.
    TimedOut,
}

impl Guard {
    /// Makes the folder, which may be left from before, and puts a guard beside us. The guard shares the lock,
    /// so that it is free only when the folder is gone.
    pub(crate) fn start(folder: &Path, lock: &File) -> Result<Self> {
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error)
                    .with_context(|| format!("failed to remove {}", folder.display()));
            }
            _ => {}
        }
        let lock = lock.try_clone().context("failed to share the lock")?;
        let watcher = Command::new("sh")
            .args(["-c", WATCH, "sh"])
            .arg(folder)
            .current_dir("/")
            .stdin(Stdio::piped())
            // Nothing is written there.
            .stdout(Stdio::from(lock))
            .stderr(Stdio::null())
            // A group of its own, so that an interrupt from the terminal spares it.
            .process_group(0)
            .spawn()
            .context("failed to start the guard")?;
        let guard = Self { folder: folder.to_owned(), watcher };
        DirBuilder::new()
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("failed to make {}", folder.display()))?;
        Ok(guard)
    }

    /// Runs a command to its end, in a process group of its own; what is left of that then is killed.
    pub(crate) fn run(
        &self,
        command: &Command,
        stdout: Stdio,
        stderr: Stdio,
        limit: Option<Duration>,
    ) -> Result<Ended> {
        let failed = || format!("failed to run {command:?}");
        let mut waiting = Command::new("sh");
        waiting.args(["-c", WAIT, "sh"]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => waiting.env(name, value),
                None => waiting.env_remove(name),
            };
        }
        if let Some(folder) = command.get_current_dir() {
            waiting.current_dir(folder);
        }
        waiting.stdin(Stdio::piped()).stdout(stdout).stderr(stderr).process_group(0);
        let mut child = waiting.spawn().with_context(failed)?;
        let group = child.id();
        let begun = self.tell(&group.to_string()).and_then(|()| say(child.stdin.take(), "go"));
        let ended = begun.and_then(|()| wait(&mut child, limit));
        kill(group);
        if !matches!(ended, Ok(Some(_))) {
            child.wait().with_context(failed)?;
        }
        self.tell("").context("failed to tell the guard")?;
        Ok(ended.with_context(failed)?.map_or(Ended::TimedOut, Ended::Exited))
    }

    fn tell(&self, line: &str) -> io::Result<()> {
        say(self.watcher.stdin.as_ref(), line)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The shell does the work, so that there is one way for things to end. Closing the pipe is what
        // starts it.
        drop(self.watcher.stdin.take());
        let ended = self.watcher.wait();
        if !ended.is_ok_and(|status| status.success()) && self.folder.exists() {
            eprintln!("{} is left behind", self.folder.display());
        }
    }
}

fn say(to: Option<impl io::Write>, line: &str) -> io::Result<()> {
    let mut to = to.ok_or(io::ErrorKind::BrokenPipe)?;
    to.write_all(format!("{line}\n").as_bytes())
}

/// Waits until the process has ended; `None` where it has not within the limit.
fn wait(child: &mut Child, limit: Option<Duration>) -> io::Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if limit.is_some_and(|limit| start.elapsed() > limit) {
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

/// Kills a process group, if it is still there. By the shell's own `kill`: the standard library has none for
/// groups.
fn kill(group: u32) {
    let mut shell = Command::new("sh");
    shell.args(["-c", r#"kill -9 "-$1""#, "sh", &group.to_string()]);
    drop(shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status());
}
