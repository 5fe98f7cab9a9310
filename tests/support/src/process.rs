//! Processes: signals, deadlines and the end of a log.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::BrokerError;

/// How often a process is asked whether it has ended.
const POLL: Duration = Duration::from_millis(10);

/// A signal that brokers get.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Signal {
    Terminate,
    Stop,
    Continue,
}

/// Sends `signal` to the process.
///
/// By the shell's own `kill`: the standard library sends no signal but SIGKILL.
pub(crate) fn signal(pid: u32, signal: Signal) -> Result<(), BrokerError> {
    let name = match signal {
        Signal::Terminate => "TERM",
        Signal::Stop => "STOP",
        Signal::Continue => "CONT",
    };
    let doing = || format!("sending SIG{name} to process {pid}");
    let status = Command::new("sh")
        .args(["-c", r#"kill -s "$1" "$2""#, "sh", name, &pid.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map_err(BrokerError::io(doing()))?;
    if status.success() {
        Ok(())
    } else {
        Err(BrokerError::io(doing())(io::ErrorKind::NotFound.into()))
    }
}

/// Waits until the process has ended; `None` where it has not within `limit`.
pub(crate) fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() > limit {
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

/// Runs the command to its end and returns what it wrote; kills it after `limit`.
pub(crate) fn output(
    command: &mut Command,
    what: &str,
    limit: Duration,
) -> Result<Output, BrokerError> {
    let failed = || BrokerError::io(format!("running {what}"));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed())?;
    // Read on threads, for a full pipe would keep the process from ever ending.
    let stdout = read_on_thread(child.stdout.take());
    let stderr = read_on_thread(child.stderr.take());
    let ended = wait(&mut child, limit).map_err(failed())?;
    let Some(status) = ended else {
        child.kill().map_err(failed())?;
        child.wait().map_err(failed())?;
        // The readers are left to themselves: a grandchild may hold the pipes open.
        return Err(BrokerError::TimedOut { what: what.to_owned(), limit });
    };
    Ok(Output {
        status,
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
    })
}

fn read_on_thread(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What came before an error is still worth having.
            drop(pipe.read_to_end(&mut bytes));
        }
        bytes
    })
}

/// Returns the last lines of each file, under its name.
pub(crate) fn tail(files: &[&Path], lines_max: usize) -> String {
    let mut text = String::new();
    for file in files {
        let Ok(bytes) = fs::read(file) else { continue };
        let content = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = content.lines().collect();
        text.push_str(&format!("--- {}\n", file.display()));
        for line in lines.iter().skip(lines.len().saturating_sub(lines_max)) {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}
