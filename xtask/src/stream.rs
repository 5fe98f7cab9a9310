//! A child process whose output is shown as it comes, and read besides.

use std::io::{BufRead as _, BufReader, IsTerminal as _, Read, Write, stderr, stdout};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;

use anyhow::{Context as _, Result};

/// How a process ended, and what `read` made of each of its two outputs.
#[derive(Debug)]
pub(crate) struct Ended<T> {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: T,
    pub(crate) stderr: T,
}

/// Runs the command, shows what it writes, and gives each line to `read` too.
///
/// The child stays in our process group: an interrupt from the terminal reaches it as well. What
/// `watch` makes of its pid is kept until it has ended.
pub(crate) fn run<T: Default + Send, W>(
    command: &mut Command,
    watch: impl FnOnce(u32) -> W,
    read: impl Fn(&mut T, &str) + Sync,
) -> Result<Ended<T>> {
    if stdout().is_terminal() {
        // It would do without, for it writes to us and not to the terminal.
        command.env("CARGO_TERM_COLOR", "always");
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("failed to run {command:?}"))?;
    let watched = watch(child.id());
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let read = &read;
    let (stdout, stderr) = thread::scope(|scope| {
        let stderr = scope.spawn(move || pass_on(err, stderr(), read));
        let stdout = pass_on(out, stdout(), read);
        (stdout, stderr.join().unwrap_or_default())
    });
    let status = child.wait().context("failed to wait for cargo")?;
    drop(watched);
    Ok(Ended { status, stdout, stderr })
}

fn pass_on<T: Default>(
    from: Option<impl Read>,
    mut to: impl Write,
    read: impl Fn(&mut T, &str),
) -> T {
    let mut value = T::default();
    let Some(from) = from else { return value };
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        // Nobody may be listening any more; the run is counted all the same.
        drop(to.write_all(&line).and_then(|()| to.flush()));
        read(&mut value, &String::from_utf8_lossy(&line));
        line.clear();
    }
    value
}
