//! What makes sure that nothing outlives the process that started it.
//!
//! A [`Guard`] is a folder and a small `sh` process beside us. The shell reads from a pipe that
//! only we hold. When we end, in whatever way, it reads the end of file, kills every process
//! whose pid lies in the folder, and removes the folder.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::error::BrokerError;
use crate::{ports, process};

/// Names the file in the folder that says how to undo what was made outside of it, as a shell does.
pub(crate) const UNDO: &str = "undo";

/// Runs in the guard; `$1` is the folder.
///
/// It marks the folder before it looks for pids, and [`RECORD`] looks for the mark after it has
/// written a pid: at least one of the two sees the other, so no process slips through.
const WATCH: &str = r#"
while read -r _; do :; done
[ -d "$1" ] || exit 0
mkdir "$1/closing" 2>/dev/null
for file in "$1"/*.guest; do
    if [ -s "$file" ] && read -r pid <"$file"; then
        kill -TERM "$pid" 2>/dev/null
    fi
done
for file in "$1"/*.pid; do
    if [ -s "$file" ] && read -r pid <"$file"; then
        kill -9 "-$pid" 2>/dev/null || kill -9 "$pid" 2>/dev/null
    fi
done
[ -f "$1/undo" ] && sh "$1/undo" 2>/dev/null
tries=0
while [ -e "$1" ] && [ "$tries" -lt 100 ]; do
    rm -rf "$1" 2>/dev/null
    tries=$((tries + 1))
    [ -e "$1" ] && sleep 0.1
done
"#;

/// Writes its own pid to `$1`, then becomes the command; `$2` is the folder.
const RECORD: &str = r#"
echo "$$" >"$1" || exit 1
[ -e "$2/closing" ] && exit 1
shift 2
exec "$@"
"#;

/// How long the shell may take to end once its pipe is closed.
const CLOSE_MAX: Duration = Duration::from_secs(15);

/// A folder that vanishes, with the processes started in it, when this process ends.
#[derive(Debug)]
pub(crate) struct Guard {
    folder: PathBuf,
    watcher: Child,
}

impl Guard {
    /// Makes a folder among the system's temporary ones and puts a guard beside it.
    pub(crate) fn start() -> Result<Self, BrokerError> {
        let name =
            format!("atomizer-broker-{}-{:08x}", std::process::id(), ports::random() & 0xffff_ffff);
        let folder = std::env::temp_dir().join(name);
        DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(BrokerError::io(format!("making {}", folder.display())))?;
        let watcher = Command::new("sh")
            .args(["-c", WATCH, "sh"])
            .arg(&folder)
            .current_dir("/")
            .stdin(Stdio::piped())
            // Not ours: whoever reads our output would wait for the guard too.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A group of its own, so that an interrupt from the terminal spares it.
            .process_group(0)
            .spawn();
        match watcher {
            Ok(watcher) => Ok(Self { folder, watcher }),
            Err(source) => {
                drop(fs::remove_dir_all(&folder));
                Err(BrokerError::io("starting the guard")(source))
            }
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns a command whose process the guard will kill; `name` is its entry in the folder.
    ///
    /// The process runs in a group of its own. After its end the caller has to [`forget`] it.
    ///
    /// [`forget`]: Self::forget
    pub(crate) fn command(&self, name: &str, program: &Path) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", RECORD, "sh"])
            .arg(self.pid_file(name))
            .arg(&self.folder)
            .arg(program)
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .process_group(0);
        command
    }

    /// Undoes now what the file [`UNDO`] tells to undo at the end.
    pub(crate) fn undo(&self) {
        let file = self.folder.join(UNDO);
        let mut command = Command::new("sh");
        command.arg(&file);
        // What is left is left to the guard.
        if process::output(&mut command, "undo", CLOSE_MAX).is_ok_and(|it| it.status.success()) {
            drop(fs::remove_file(file));
        }
    }

    /// Tells the guard that the process has ended, for its pid may soon be another's.
    pub(crate) fn forget(&self, name: &str) {
        drop(fs::remove_file(self.pid_file(name)));
    }

    /// Has the guard end (SIGTERM) a process that was not started by it.
    pub(crate) fn invite(&self, pid: u32) -> io::Result<Guest> {
        let file = self.folder.join(format!("{pid}.guest"));
        fs::write(&file, format!("{pid}\n"))?;
        Ok(Guest { file })
    }

    fn pid_file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.pid"))
    }
}

/// A process that is ended (SIGTERM) when ours ends while this value exists.
#[derive(Debug)]
pub struct Guest {
    file: PathBuf,
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.file));
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The shell does the work, so that there is one way for things to end. Closing the pipe
        // is what starts it.
        drop(self.watcher.stdin.take());
        if !matches!(process::wait(&mut self.watcher, CLOSE_MAX), Ok(Some(_))) {
            drop(self.watcher.kill());
            drop(self.watcher.wait());
        }
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                eprintln!("{} is left behind: {error}", self.folder.display());
            }
            _ => {}
        }
    }
}
