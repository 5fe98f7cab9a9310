//! Runs a program, reads what it writes, and ends it with the test.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Read, Write as _},
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread,
    time::{Duration, Instant},
};

/// How long anything may take that should happen; far more than it does on a busy machine.
const SOON: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Stdout,
    Stderr,
}

/// A program that runs; it is killed when this value is dropped.
pub(crate) struct Program {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<(From, String)>,
    seen: Vec<(From, String)>,
}

/// What a program left behind.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Program {
    pub(crate) fn start(name: &str, arguments: &[&str]) -> Self {
        Self::start_with(name, arguments, &[])
    }

    pub(crate) fn start_with(name: &str, arguments: &[&str], env: &[(&str, &str)]) -> Self {
        let mut child = Command::new(path(name))
            .args(arguments)
            .env_remove("ATOMIZER_URL")
            .env_remove("RUST_LOG")
            .envs(env.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{} does not start: {error}", path(name).display()));
        let (tx, lines) = channel();
        read(child.stdout.take().expect("it is piped"), From::Stdout, tx.clone());
        read(child.stderr.take().expect("it is piped"), From::Stderr, tx);
        let stdin = child.stdin.take();
        Self { name: name.to_owned(), child, stdin, lines, seen: Vec::new() }
    }

    pub(crate) fn type_line(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("the input has not ended");
        writeln!(stdin, "{line}").expect("the program reads");
    }

    pub(crate) fn end_input(&mut self) {
        self.stdin = None;
    }

    pub(crate) fn pid(&self) -> String {
        self.child.id().to_string()
    }

    pub(crate) fn signal(&self, signal: &str) {
        let status = Command::new("sh")
            .args(["-c", r#"kill -s "$1" "$2""#, "sh", signal, &self.pid()])
            .status()
            .expect("there is a shell");
        assert!(status.success(), "{signal} to {}", self.name);
    }

    /// Waits for a line that contains `part`, and returns it.
    pub(crate) fn wait_for(&mut self, from: From, part: &str) -> String {
        let start = Instant::now();
        loop {
            let left = SOON.saturating_sub(start.elapsed());
            match self.lines.recv_timeout(left) {
                Ok((stream, line)) => {
                    self.seen.push((stream, line.clone()));
                    if stream == from && line.contains(part) {
                        return line;
                    }
                }
                Err(_) => {
                    panic!("{} never wrote {part:?} to {from:?}: {:#?}", self.name, self.seen)
                }
            }
        }
    }

    /// True when it has written a line to stdout by now.
    pub(crate) fn has_answered(&mut self) -> bool {
        self.seen.extend(self.lines.try_iter());
        self.seen.iter().any(|(from, _)| *from == From::Stdout)
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> Ended {
        self.end_input();
        let start = Instant::now();
        loop {
            match self.lines.recv_timeout(SOON.saturating_sub(start.elapsed())) {
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("{} does not end: {:#?}", self.name, self.seen)
                }
            }
        }
        let code = self.child.wait().expect("it is our child").code();
        let text = |wanted| {
            let lines = self.seen.iter().filter(|(from, _)| *from == wanted);
            lines.map(|(_, line)| format!("{line}\n")).collect()
        };
        Ended { code, stdout: text(From::Stdout), stderr: text(From::Stderr) }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // An error says that it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Runs a program that needs no input to its end.
pub(crate) fn run(name: &str, arguments: &[&str]) -> Ended {
    Program::start(name, arguments).end()
}

impl Ended {
    /// Checks the exit code and that no password was written, and returns what went to stderr.
    pub(crate) fn failed_with(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert!(!format!("{self:?}").contains(PASSWORD), "{self:#?}");
        assert!(
            self.stderr.starts_with("error: ") || self.stderr.contains("\nerror: "),
            "{self:#?}"
        );
        &self.stderr
    }

    pub(crate) fn report(&self) -> Report {
        assert_eq!(self.code, Some(0), "{self:#?}");
        Report::parse(self.stdout.lines().last().unwrap_or_default())
    }
}

/// Never to be seen in what a program writes.
pub(crate) const PASSWORD: &str = "s3cret";

/// The line for machines.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Report {
    /// As written: up to 4 · 10⁸ tosses, 8 decimals tell any two counts of points apart.
    pub(crate) pi: String,
    pub(crate) tosses: u64,
    pub(crate) electrons: u64,
}

impl Report {
    pub(crate) fn parse(line: &str) -> Self {
        let fields: HashMap<_, _> =
            line.split(' ').filter_map(|field| field.split_once('=')).collect();
        let number = |name: &str| -> f64 {
            let field = fields.get(name).unwrap_or_else(|| panic!("no {name} in {line:?}"));
            field.parse().unwrap_or_else(|_| panic!("{name} in {line:?}"))
        };
        let (pi, tosses) = (number("pi"), number("tosses"));
        let error = pi - std::f64::consts::PI;
        assert!((error - number("error")).abs() < 1e-7, "{line:?}");
        assert!(error.abs() < 5.0 * 1.65 / tosses.sqrt(), "{line:?}");
        assert!(number("seconds") >= 0.0 && number("tosses_per_s") > 0.0, "{line:?}");
        Self {
            pi: fields["pi"].to_owned(),
            tosses: tosses as u64,
            electrons: number("electrons") as u64,
        }
    }
}

/// Returns a port that nobody listens on.
pub(crate) fn unused_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("it is bound").port()
}

fn read(from: impl Read + Send + 'static, name: From, lines: Sender<(From, String)>) {
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if lines.send((name, line)).is_err() {
                return;
            }
        }
    });
}

/// Cargo puts examples beside the folder of the tests, and builds them with the tests.
fn path(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test is a file");
    let profile = test.ancestors().nth(2).expect("it is two folders deep");
    profile.join("examples").join(name)
}
