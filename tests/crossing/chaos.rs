//! Agents and brokers that are killed at random, all the time: every call has its answer, and nothing is left.

use std::{
    hash::{BuildHasher as _, RandomState},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use atomizer::{AtomId, Payload, prelude::*};
use atomizer_rabbitmq::RabbitMq;
use atomizer_test_support::{BrokerError, Cluster, Depth, Vhost};
use tokio::task::{JoinSet, spawn_blocking};

const AGENTS: u64 = 3;
const IN_FLIGHT: usize = 64;
/// How long one call may take, whatever dies meanwhile.
const CALL_MAX: Duration = Duration::from_secs(120);
/// How long it may take until nothing is left when all is answered.
const END_MAX: Duration = Duration::from_secs(60);

/// SplitMix64: what is killed when follows from the seed alone.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    fn ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

/// The seed from the environment, or a new one.
fn seed() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "to see the same chaos again")]
    let given = std::env::var("ATOMIZER_CHAOS_SEED").ok();
    let seed = given.map_or_else(|| RandomState::new().hash_one(0), |given| given.parse().unwrap());
    println!("ATOMIZER_CHAOS_SEED={seed}");
    seed
}

/// A thread that kills something again and again, until it is told to stop.
struct Killer<T> {
    /// Dropped to stop it.
    stop: Option<mpsc::Sender<()>>,
    kills: Arc<AtomicU64>,
    thread: Option<JoinHandle<T>>,
}

/// What a killer knows of the world.
struct Orders {
    stop: mpsc::Receiver<()>,
    kills: Arc<AtomicU64>,
    random: Random,
}

impl Orders {
    /// Lets so much time pass; false when it is to stop.
    fn go_on_after(&mut self, from_ms: u64, to_ms: u64) -> bool {
        let pause = self.random.ms(from_ms, to_ms);
        self.stop.recv_timeout(pause) == Err(RecvTimeoutError::Timeout)
    }

    fn killed(&self) {
        self.kills.fetch_add(1, Ordering::SeqCst);
    }
}

impl<T: Send + 'static> Killer<T> {
    fn start(seed: u64, kill: impl FnOnce(Orders) -> T + Send + 'static) -> Self {
        let (stop, stopped) = mpsc::channel();
        let kills = Arc::default();
        let orders = Orders { stop: stopped, kills: Arc::clone(&kills), random: Random(seed) };
        Self { stop: Some(stop), kills, thread: Some(thread::spawn(move || kill(orders))) }
    }

    fn kills(&self) -> u64 {
        self.kills.load(Ordering::SeqCst)
    }

    fn has_failed(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }

    fn stop(&mut self) -> T {
        drop(self.stop.take());
        self.thread.take().expect("it is stopped once").join().unwrap()
    }
}

impl<T> Drop for Killer<T> {
    fn drop(&mut self) {
        drop(self.stop.take());
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// A process that serves. Ends when this is dropped, for its input does.
struct Agent(Child);

impl Agent {
    fn start(url: &str) -> Self {
        // What is asked takes all the time there is, and brokers would take minutes to start beside it. It becomes
        // the program that it starts, and is killed as such.
        let mut command = Command::new("nice");
        command
            .arg(env!("CARGO_BIN_EXE_adder"))
            .arg(url)
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    fn stop(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success(), "it stops in order");
    }
}

/// Kills an agent again and again, after so many milliseconds at the most. Returns the last, which is alive.
fn kill_agents(mut orders: Orders, url: &str, life_max_ms: u64) -> Agent {
    let mut agent = Agent::start(url);
    while orders.go_on_after(500, life_max_ms) {
        agent.kill();
        orders.killed();
        agent = Agent::start(url);
    }
    agent
}

/// Kills one broker at a time. All are there when it returns.
fn kill_brokers(mut orders: Orders, cluster: &Cluster) {
    let mut last = Instant::now();
    while orders.go_on_after(500, 2_500) {
        let at = usize::try_from(orders.random.below(3)).unwrap();
        let broker = &cluster.brokers()[at];
        // What a broker forgets that is killed within three seconds is its own affair: see there.
        broker.flush().unwrap();
        broker.kill().unwrap();
        orders.killed();
        println!("broker {at} killed {:?} after the last", last.elapsed());
        last = Instant::now();
        orders.go_on_after(0, 2_000);
        cluster.start_again().unwrap();
    }
}

/// The question of a number, and its answer.
fn question(number: u64) -> (AtomId, u64, u64) {
    if number.is_multiple_of(10) {
        let upto = number % 70 / 10;
        (AtomId::from_static("adder.sum"), upto, (1..=upto).map(|number| number.pow(2)).sum())
    } else {
        (AtomId::from_static("adder.square"), number, number.pow(2))
    }
}

/// Asks, one question after the other, until there is no need for more. Returns how long the slowest took.
async fn ask(asker: Atomizer, numbers: Arc<AtomicU64>, enough: impl Fn(u64) -> bool) -> Duration {
    let mut slowest = Duration::ZERO;
    loop {
        let number = numbers.fetch_add(1, Ordering::SeqCst);
        if enough(number) {
            return slowest;
        }
        let (atom, input, expected) = question(number);
        let begun = Instant::now();
        let call = asker.call_raw(atom, Payload::json(input.to_string())).deadline(CALL_MAX);
        let answer = call.await.unwrap_or_else(|error| panic!("{number}: {error}"));
        assert_eq!(answer.body, expected.to_string(), "{number}");
        slowest = slowest.max(begun.elapsed());
    }
}

fn is_inbox(queue: &str) -> bool {
    queue.starts_with("atomizer.inbox.")
}

/// Whether a queue is known to hold nothing, or was never whole: a queue that a broker is making when it is killed has
/// no leader, ever. Nothing is in it, and where it is of one process or session, nobody misses it.
fn is_empty(queue: &str, depth: Option<Depth>) -> bool {
    match depth {
        // Events are no work, and there to stay; not every broker tells how many there are.
        _ if queue == "atomizer.events" => true,
        Some(depth) => depth == Depth::default(),
        None => is_inbox(queue) || queue.starts_with("atomizer.lease."),
    }
}

/// The queues that hold something, but for inboxes.
fn held(vhost: &Vhost) -> Result<Vec<(String, Option<Depth>)>, BrokerError> {
    let mut depths = vhost.depths()?;
    depths.retain(|(name, depth)| !is_inbox(name) && !is_empty(name, *depth));
    Ok(depths)
}

/// Asks at least so many questions, while at least so many brokers are killed, and agents that live so long at the
/// most: each leaves queues behind for a while, which brokers that start have to look after.
async fn chaos(electrons: u64, broker_kills: u64, agent_life_max_ms: u64) {
    let (seed, began) = (seed(), Instant::now());
    let (cluster, vhost) = spawn_blocking(|| {
        let cluster = Cluster::start().unwrap();
        let vhost = cluster.brokers()[0].vhost().unwrap();
        (Arc::new(cluster), vhost)
    })
    .await
    .unwrap();
    println!("started after {:?}", began.elapsed());
    let url = format!("{}?heartbeat=2", cluster.url(vhost.name()));
    let start = |index| {
        let url = url.clone();
        Killer::start(seed ^ (index + 1), move |orders| {
            kill_agents(orders, &url, agent_life_max_ms)
        })
    };
    let mut agents: Vec<_> = (0..AGENTS).map(start).collect();
    let asker = Atomizer::builder().name("asker").conductor(RabbitMq::from_url(&url).unwrap());
    let asker = asker.start().await.unwrap();
    let brokers = Arc::clone(&cluster);
    let brokers = Killer::start(seed, move |orders| kill_brokers(orders, &brokers));
    let brokers = Arc::new(std::sync::Mutex::new(brokers));

    let (begun, numbers, mut asking) = (Instant::now(), Arc::default(), JoinSet::new());
    for _ in 0..IN_FLIGHT {
        let brokers = Arc::clone(&brokers);
        let enough = move |asked| {
            let brokers = brokers.lock().unwrap();
            assert!(!brokers.has_failed(), "brokers are killed and started");
            asked >= electrons && brokers.kills() >= broker_kills
        };
        asking.spawn(ask(asker.clone(), Arc::clone(&numbers), enough));
    }
    let mut slowest = Duration::ZERO;
    while let Some(asked) = asking.join_next().await {
        slowest = slowest.max(asked.unwrap());
    }
    let asked = numbers.load(Ordering::SeqCst) - IN_FLIGHT as u64;
    println!("{asked} answers within {:?}, the slowest in {slowest:?}", begun.elapsed());

    let ending = move || {
        let mut brokers = brokers.lock().unwrap();
        brokers.stop();
        let alive: Vec<_> = agents.iter_mut().map(Killer::stop).collect();
        let kills: u64 = agents.iter().map(Killer::kills).sum();
        println!("{kills} agents and {} brokers were killed", brokers.kills());
        println!("all brokers are back after {:?}", began.elapsed());
        let deadline = Instant::now() + END_MAX;
        // What is parked comes back within seconds, and is worked at again.
        loop {
            let held = held(&vhost);
            if held.as_ref().is_ok_and(Vec::is_empty) {
                break;
            }
            assert!(Instant::now() < deadline, "there is something left: {held:?}");
        }
        alive.into_iter().for_each(Agent::stop);
        (vhost, cluster, kills)
    };
    let (vhost, cluster, kills) = spawn_blocking(ending).await.unwrap();
    asker.drain().await.unwrap();
    let checking = move || {
        let left = vhost.depths().unwrap();
        let (inboxes, others): (Vec<_>, Vec<_>) =
            left.into_iter().partition(|(name, _)| is_inbox(name));
        // They expire with what nobody reads any more.
        assert!(inboxes.len() as u64 <= kills, "of those that were killed: {inboxes:?}");
        assert!(others.iter().all(|(name, depth)| is_empty(name, *depth)), "{others:?}");
        drop((vhost, cluster));
    };
    spawn_blocking(checking).await.unwrap();
    println!("all in {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_is_answered_while_agents_and_brokers_are_killed() {
    chaos(2_000, 2, 8_000).await;
}

/// `cargo nextest run -p atomizer-tests --run-ignored only two_hundred_thousand`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a quarter of an hour"]
async fn two_hundred_thousand_calls_are_answered_while_agents_and_brokers_are_killed() {
    chaos(200_000, 10, 30_000).await;
}
