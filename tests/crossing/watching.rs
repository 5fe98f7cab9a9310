//! Whoever watches a cluster sees what happened in it: each end of each electron, by id.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use atomizer::{AtomId, CallError, ElectronId, FailureKind, Payload, prelude::*};
use atomizer_rabbitmq::RabbitMq;
use atomizer_test_support::Cluster;
use serde_json::Value;
use tokio::task::{JoinSet, spawn_blocking};

const CALLS: u64 = 3_000;
const IN_FLIGHT: u64 = 32;
/// How many electrons a node may have ended that it had not told of: those of its last 100 ms, and of the moment in which
/// its packs are confirmed.
const UNTOLD_MAX: usize = 200;
const SOON: Duration = Duration::from_secs(120);

/// A program of this workspace, which the tests of all crates build: its `target` folder has them all.
fn program(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_BIN_EXE_watched")).parent().unwrap();
    let path = here.join(name);
    assert!(path.exists(), "{} is not there: `cargo build --workspace --examples`", path.display());
    path
}

fn start(command: &mut Command) -> Child {
    command.env_remove("ATOMIZER_URL").env_remove("RUST_LOG");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

fn signal(child: &Child, signal: &str) {
    let kill = ["-c", "kill -s \"$1\" \"$2\"", "sh", signal, &child.id().to_string()];
    assert!(Command::new("sh").args(kill).status().unwrap().success());
}

/// A node that serves, and tells where its metrics are.
struct Agent {
    child: Child,
    node: String,
    metrics: SocketAddr,
}

impl Agent {
    fn start(url: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_watched"));
        // Its panics are wanted, and would be all there is to read.
        let mut child = start(command.arg(url).stderr(Stdio::null()));
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let node = lines.next().unwrap().unwrap();
        let metrics = lines.next().unwrap().unwrap().parse().unwrap();
        Self { child, node, metrics }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// How many electrons it says that it has ended, by end.
    fn ends(&self) -> BTreeMap<String, u64> {
        let mut stream = TcpStream::connect(self.metrics).unwrap();
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let mut ends = BTreeMap::new();
        for line in text.lines().filter(|line| line.starts_with("atomizer_electrons_ended_total{"))
        {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let end = series.split_once("end=\"").unwrap().1.split_once('"').unwrap().0;
            *ends.entry(end.to_owned()).or_default() += value.parse::<u64>().unwrap();
        }
        ends
    }

    fn stop(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success(), "it stops in order");
    }
}

/// The example `monitor`.
struct Monitor {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Monitor {
    fn start(url: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(program("examples/monitor"));
        let mut child = start(command.args(["--amqp", url, "--json"]).args(arguments));
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The next line that it prints.
    fn sums(&mut self) -> Value {
        let mut line = String::new();
        assert_ne!(self.lines.read_line(&mut line).unwrap(), 0, "it has ended");
        serde_json::from_str(&line).unwrap()
    }

    /// What it has seen when that is so much of a kind.
    fn until(&mut self, kind: &str, count: u64) -> Value {
        let begun = Instant::now();
        loop {
            let mut line = self.sums();
            let sums = line["sums"].take();
            if sums["events"][kind].as_u64().is_some_and(|seen| seen >= count) {
                return sums;
            }
            assert!(begun.elapsed() < SOON, "{kind} {count}: {sums}");
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // An error says that it has ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// How each electron ended, as who asked was told.
type Ledger = BTreeMap<ElectronId, bool>;

async fn call_all(url: &str, kills: impl FnOnce() + Send + 'static) -> Ledger {
    let asker = Atomizer::builder().conductor(RabbitMq::from_url(url).unwrap()).start().await;
    let (asker, done) = (asker.unwrap(), Arc::new(AtomicU64::new(0)));
    let mut callers = JoinSet::new();
    for caller in 0..IN_FLIGHT {
        let (asker, done) = (asker.clone(), Arc::clone(&done));
        callers.spawn(async move {
            let mut ledger = Ledger::new();
            for number in (0..CALLS).filter(|number| number % IN_FLIGHT == caller) {
                let call =
                    asker.call_raw(AtomId::from_static("moody"), Payload::json(number.to_string()));
                let id = call.electron().unwrap();
                let wanted = match (number % 10, call.await) {
                    (3, Err(CallError::Failed(failure))) => failure.kind == FailureKind::Panic,
                    (7, Err(CallError::Failed(failure))) => failure.kind == FailureKind::Error,
                    (0 | 1 | 2 | 4 | 5 | 6 | 8 | 9, Ok(_)) => true,
                    (_, other) => panic!("{number}: {other:?}"),
                };
                assert!(wanted, "{number} ended otherwise");
                ledger.insert(id, !matches!(number % 10, 3 | 7));
                done.fetch_add(1, Ordering::SeqCst);
            }
            ledger
        });
    }
    let half_way = Arc::clone(&done);
    let killing = spawn_blocking(move || {
        while half_way.load(Ordering::SeqCst) < CALLS / 2 {
            std::thread::yield_now();
        }
        kills();
    });
    let mut ledger = Ledger::new();
    while let Some(part) = callers.join_next().await {
        ledger.append(&mut part.unwrap());
    }
    killing.await.unwrap();
    asker.drain().await.unwrap();
    ledger
}

/// One end of an electron.
#[derive(Debug)]
struct Told {
    electron: ElectronId,
    well: bool,
    node: String,
}

/// What `atomizer events` says of how electrons ended, and where.
fn told(url: &str) -> Vec<Told> {
    let mut command = Command::new(program("atomizer"));
    command.args(["--url", url, "events", "--from", "start", "--once", "--json"]);
    command.args(["--kind", "completed", "--kind", "failed"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let read = |line: &str| {
        let event: Value = serde_json::from_str(line).unwrap();
        let electron = event["electron"].as_str().unwrap().parse().unwrap();
        let node = event["node"].as_str().unwrap().to_owned();
        Told { electron, well: event["event"] == "completed", node }
    };
    String::from_utf8(output.stdout).unwrap().lines().map(read).collect()
}

/// Waits until an agent's metrics say of it what its events say.
fn agree(agent: &Agent, url: &str) {
    let begun = Instant::now();
    loop {
        let told = told(url);
        let told = |well: bool| {
            told.iter().filter(|told| told.well == well && told.node == agent.node).count() as u64
        };
        let ends = agent.ends();
        let of = |end: &str| ends.get(end).copied().unwrap_or_default();
        let (told, measured) =
            ((told(true), told(false)), (of("completed"), of("failed") + of("dead")));
        if told == measured {
            assert!(told.0 > 0 && told.1 > 0, "{ends:?}");
            return;
        }
        assert!(begun.elapsed() < SOON, "{}: {ends:?}, but {told:?} is told", agent.node);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_who_watch_a_cluster_agree_with_the_ledger_on_every_electron() {
    let cluster = spawn_blocking(|| Cluster::start().unwrap()).await.unwrap();
    let (cluster, vhost) = spawn_blocking(move || {
        let vhost = cluster.brokers()[0].vhost().unwrap();
        (cluster, vhost)
    })
    .await
    .unwrap();
    let url = cluster.url(vhost.name());
    let state = std::env::temp_dir().join(format!("atomizer-{}", ElectronId::new()));
    let started = spawn_blocking({
        let (url, state) = (url.clone(), state.display().to_string());
        move || {
            let steady = Monitor::start(&url, &["--from", "start"]);
            let restarted = Monitor::start(&url, &["--from", "start", "--state", &state]);
            (steady, restarted, [0, 1, 2].map(|_| Agent::start(&url)))
        }
    });
    let (mut steady, mut restarted, [mut victim, one, other]) = started.await.unwrap();
    let killed = victim.node.clone();
    // Half-way an agent dies, and one of the monitors in the middle of its work; it begins again where it was.
    let (again, kept) = (url.clone(), state.display().to_string());
    let (give, taken) = std::sync::mpsc::channel();
    let ledger = call_all(&url, move || {
        restarted.sums();
        restarted.sums();
        signal(&restarted.child, "KILL");
        victim.kill();
        drop(restarted);
        give.send(Monitor::start(&again, &["--from", "start", "--state", &kept])).unwrap();
    })
    .await;
    let mut restarted = taken.recv().unwrap();

    spawn_blocking(move || {
        agree(&one, &url);
        agree(&other, &url);
        one.stop();
        other.stop();
        // Two agents and who asked; the third agent has not said so.
        let (steady, restarted) = (steady.until("stopped", 3), restarted.until("stopped", 3));
        assert_eq!(steady, restarted, "who was killed has seen the same");
        assert_eq!(steady["missed"], 0);

        let told = told(&url);
        for Told { electron, well, node } in &told {
            assert_eq!(ledger.get(electron), Some(well), "{electron} on {node}");
        }
        let seen = |kind| steady["events"][kind].as_u64().unwrap();
        assert_eq!(seen("completed") + seen("failed"), told.len() as u64);
        let ids: BTreeSet<_> = told.iter().map(|told| told.electron).collect();
        let untold = ledger.len() - ids.len();
        println!("{} of {CALLS} ends were told of, {untold} were not: of {killed}", ids.len());
        assert!(untold <= UNTOLD_MAX, "{untold}");
        std::fs::remove_file(&state).unwrap();
        drop((vhost, cluster));
    })
    .await
    .unwrap();
}
