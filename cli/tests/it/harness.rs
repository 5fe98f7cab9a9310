//! Runs the command, and buries letters for it.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStderr, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use atomizer::{
    Address, AtomId, Conductor, Electron, ElectronId, Envelope, Failure, FailureKind, NodeId,
    Payload, prelude::*,
};
use atomizer_rabbitmq::RabbitMq;
use atomizer_test_support::{Vhost, shared};
use serde_json::Value;
use tokio::task::spawn_blocking;

/// Never to be seen in what the command writes.
pub(crate) const PASSWORD: &str = "s3cret";

/// What the command left behind.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Checks that it did what was asked.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        self.ended_with(0)
    }

    #[track_caller]
    pub(crate) fn ended_with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert!(!format!("{self:?}").contains(PASSWORD), "{self:#?}");
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
        self
    }

    /// Checks that it failed, and for this reason.
    #[track_caller]
    pub(crate) fn failed_with(self, code: i32, reason: &str) -> Self {
        let ran = self.ended_with(code);
        assert!(ran.stderr.contains("error: ") && ran.stderr.contains(reason), "{ran:#?}");
        ran
    }

    /// Reads what it printed with `--json`.
    #[track_caller]
    pub(crate) fn json(&self) -> Vec<Value> {
        let read = |line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{self:#?}"));
        self.stdout.lines().map(read).collect()
    }
}

pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atomizer"));
    command.args(arguments).env_remove("RUST_LOG").env_remove("EDITOR");
    command.env_remove("ATOMIZER_URL").env_remove("ATOMIZER_MANAGEMENT_URL");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a command to its end.
pub(crate) fn run(mut command: Command, stdin: &str) -> Ran {
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    // An error says that it reads nothing.
    drop(input.write_all(stdin.as_bytes()));
    drop(input);
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A command that runs; it is killed when this value is dropped.
pub(crate) struct Running {
    child: Child,
    stderr: BufReader<ChildStderr>,
    said: String,
}

impl Running {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut child = command(arguments).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { child, stderr, said: String::new() }
    }

    /// Waits for a line on stderr that contains this.
    pub(crate) fn wait_for(&mut self, part: &str) {
        loop {
            let begin = self.said.len();
            let read = self.stderr.read_line(&mut self.said).unwrap();
            assert_ne!(read, 0, "it never said {part:?}: {}", self.said);
            if self.said[begin..].contains(part) {
                return;
            }
        }
    }

    /// Waits for a line on stdout.
    pub(crate) fn next_line(&mut self) -> String {
        let mut line = String::new();
        BufReader::with_capacity(1, self.child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        line
    }

    pub(crate) fn interrupt(&self) {
        let pid = self.child.id().to_string();
        let killed = Command::new("sh").args(["-c", "kill -s INT \"$1\"", "sh", &pid]).status();
        assert!(killed.unwrap().success());
    }

    pub(crate) fn end(mut self) -> Ran {
        while self.stderr.read_line(&mut self.said).unwrap() > 0 {}
        let mut stdout = String::new();
        let output = self.child.stdout.take().unwrap();
        std::io::Read::read_to_string(&mut BufReader::new(output), &mut stdout).unwrap();
        let code = self.child.wait().unwrap().code();
        Ran { code, stdout, stderr: std::mem::take(&mut self.said) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error says that it has ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A virtual host of one's own, and the command on it.
#[derive(Clone)]
pub(crate) struct Place {
    vhost: Arc<Vhost>,
}

impl Place {
    pub(crate) async fn new() -> Self {
        let vhost = blocking(|| shared().expect("a broker").vhost().unwrap()).await;
        Self { vhost: Arc::new(vhost) }
    }

    pub(crate) fn url(&self) -> String {
        self.vhost.url()
    }

    pub(crate) fn rabbit(&self) -> RabbitMq {
        RabbitMq::from_url(&self.url()).unwrap()
    }

    pub(crate) fn management(&self) -> String {
        format!("http://guest:guest@{}", self.vhost.node().management_address())
    }

    /// Runs the command.
    pub(crate) async fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, "", &[]).await
    }

    pub(crate) async fn run_with(
        &self,
        arguments: &[&str],
        stdin: &str,
        environment: &[(&str, &str)],
    ) -> Ran {
        let mut command = command(arguments);
        command.env("ATOMIZER_URL", self.url()).envs(environment.iter().copied());
        let stdin = stdin.to_owned();
        blocking(move || run(command, &stdin)).await
    }

    /// Does something with the virtual host that blocks.
    pub(crate) async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Vhost) -> T + Send + 'static,
    ) -> T {
        let vhost = Arc::clone(&self.vhost);
        blocking(move || work(&vhost)).await
    }

    /// Calls the management interface; `{}` in the path is the virtual host.
    pub(crate) async fn manage(&self, method: &'static str, path: &'static str, body: Value) {
        self.with(move |vhost| {
            let path = path.replace("{}", vhost.name());
            vhost.node().manage(method, &path, Some(&body)).unwrap();
        })
        .await;
    }

    /// Buries electrons that failed with these messages, and returns their ids.
    pub(crate) async fn bury(&self, messages: &[String]) -> Vec<ElectronId> {
        let session = self.rabbit().open(&NodeId::unique("undertaker").unwrap()).await.unwrap();
        let atom = AtomId::from_static(Double::ID);
        let letter = |(number, message): (usize, &String)| {
            let mut electron = Electron::new(atom.clone(), Payload::json(number.to_string()));
            electron.attempts = 1;
            electron.history.push(Failure::new(FailureKind::Error, message.as_str()));
            electron
        };
        let letters: Vec<_> = messages.iter().enumerate().map(letter).collect();
        let ids = letters.iter().map(|electron| electron.id).collect();
        let dead = Address::DeadLetter(atom.clone());
        let envelopes: Vec<_> = (letters.into_iter())
            .map(|electron| Envelope::new(dead.clone(), electron.into()))
            .collect();
        assert!(session.send(&envelopes).await.iter().all(Result::is_ok));
        session.close().await;
        ids
    }

    /// Starts a node that doubles, and waits until all that it makes is there.
    pub(crate) async fn serve(&self) -> Atomizer {
        let builder = Atomizer::builder().conductor(self.rabbit()).atom(Double);
        let node = builder.start().await.unwrap();
        // It makes what keeps its events beside all else.
        soon(async {
            let is_bound = |vhost: &Vhost| {
                let bindings = vhost.bindings().unwrap();
                bindings.iter().any(|binding| binding.source == "atomizer.events")
            };
            while !self.with(is_bound).await {}
        })
        .await;
        node
    }

    pub(crate) async fn leave(self) {
        blocking(move || drop(self)).await;
    }
}

/// Runs what blocks beside the runtime.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    spawn_blocking(work).await.unwrap()
}

pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(90), future).await.expect("it happens soon")
}

pub(crate) struct Double;

impl Atom for Double {
    const ID: &'static str = "double";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
        input.checked_mul(2).ok_or_else(|| AtomError::msg("too large to double"))
    }
}
