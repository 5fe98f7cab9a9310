//! Everything at once, for a while, and then the books are balanced: every electron ended once, every call
//! resolved once, nothing is left over.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use atomizer::{
    AtomId, CallError, Conductor, ElectronId, EventKind, EventStream, Message, NodeId, Resident,
    prelude::*,
};
use atomizer_conformance::{Fault, Faulty, Op};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

/// What an electron does, drawn by lot when it is asked for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Lot(u64);

impl Lot {
    /// The next of a sequence that a seed begins (SplitMix64: Steele, Lea, Flood, 2014).
    fn next(&mut self) -> Self {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self(bits ^ (bits >> 31))
    }

    fn of(self, many: u64) -> u64 {
        self.0 % many
    }
}

/// How many runs there are, however they come to their end.
#[derive(Clone, Default)]
struct Runs(Arc<AtomicI64>);

struct RunUnderWay(Runs);

impl Runs {
    fn enter(&self) -> RunUnderWay {
        self.0.fetch_add(1, Ordering::SeqCst);
        RunUnderWay(self.clone())
    }
}

impl Drop for RunUnderWay {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn misbehave(cx: &Context, lot: Lot) -> Result<u64> {
    // Another lot for each run.
    let runs_before = cx.electron().attempts + 100 * cx.electron().passes;
    let lot = Lot(lot.0 ^ u64::from(runs_before)).next();
    match lot.of(20) {
        0 => Err(AtomError::msg("an error")),
        1 => panic!("a panic"),
        2 => {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            Ok(0)
        }
        3 => Err(AtomError::msg("not here").give_back()),
        4 => Err(AtomError::msg("never").do_not_retry()),
        5 => Err(AtomError::msg("soon").retry_after(Duration::from_millis(20))),
        6 => {
            tokio::time::sleep(Duration::from_millis(lot.of(50))).await;
            Ok(lot.0)
        }
        _ => Ok(lot.0),
    }
}

fn options() -> Options {
    let backoff = Backoff::exponential(Duration::from_millis(5)).max(Duration::from_millis(50));
    let policy = Policy::retry(2).then_requeue(2).backoff(backoff);
    Options::default().time_limit(Duration::from_millis(100)).policy(policy).concurrency(16)
}

macro_rules! atoms {
    ($($name:ident $id:literal $kind:ident $options:expr;)*) => {$(
        #[derive(Clone)]
        struct $name(Runs);

        impl Atom for $name {
            const ID: &'static str = $id;
            const KIND: Kind = Kind::$kind;
            type Input = Lot;
            type Output = u64;

            fn options(&self) -> Options {
                $options
            }

            async fn process(&self, cx: &Context, lot: Lot) -> Result<u64> {
                let _running = self.0.enter();
                misbehave(cx, lot).await
            }
        }
    )*};
}

atoms! {
    Leaf "soak.leaf" Atomic options();
    Single "soak.single" Singleton options();
    Blocking "soak.blocking" Atomic options().blocking();
    Once "soak.once" Atomic options().at_most_once();
}

/// Asks a few leaves, and takes what comes.
#[derive(Clone)]
struct Parent(Runs);

impl Atom for Parent {
    const ID: &'static str = "soak.parent";
    const KIND: Kind = Kind::Spawner;
    type Input = Lot;
    type Output = u64;

    fn options(&self) -> Options {
        options().time_limit(Duration::from_secs(5))
    }

    async fn process(&self, cx: &Context, lot: Lot) -> Result<u64> {
        let _running = self.0.enter();
        let mut lot = lot;
        let inputs: Vec<_> = (0..5)
            .map(|_| {
                lot = lot.next();
                lot
            })
            .collect();
        let mut failed = 0;
        for input in inputs {
            failed += u64::from(cx.call::<Leaf>(input).await.is_err());
        }
        Ok(failed)
    }
}

/// Sends what nobody waits for.
struct Sender {
    sent: Arc<AtomicU64>,
    enough: Arc<AtomicBool>,
}

impl Resident for Sender {
    const ID: &'static str = "soak.sender";

    async fn run(&self, cx: &Context) -> Result<()> {
        let mut lot = Lot(u64::from(cx.attempt()));
        loop {
            tokio::select! {
                () = cx.cancelled() => return Ok(()),
                () = tokio::time::sleep(Duration::from_millis(2)) => {}
            }
            lot = lot.next();
            cx.spawn_now::<Leaf>(lot).await?;
            self.sent.fetch_add(1, Ordering::SeqCst);
            if self.enough.load(Ordering::SeqCst) {
                return Ok(());
            }
            if lot.of(500) == 0 {
                panic!("a panic");
            }
        }
    }
}

/// What became of the electrons, as the events tell it.
#[derive(Default)]
struct Ledger {
    received: HashSet<ElectronId>,
    ends: HashMap<ElectronId, u32>,
    /// Of these a conductor said that it did not know.
    unknown: HashSet<ElectronId>,
    missed: u64,
}

impl Ledger {
    /// Whether all that came has ended, or may have: a conductor would not say.
    fn is_closed(&self) -> bool {
        let closed = |id| self.ends.contains_key(id) || self.unknown.contains(id);
        self.received.iter().all(closed)
    }
}

async fn follow(mut events: EventStream, ledger: Arc<Mutex<Ledger>>) {
    while let Some(event) = events.next().await {
        let mut ledger = ledger.lock().unwrap();
        match event.map(|event| event.kind) {
            Ok(EventKind::Received { electron, .. }) => {
                ledger.received.insert(electron);
            }
            Ok(EventKind::Completed { electron, .. } | EventKind::Failed { electron, .. }) => {
                *ledger.ends.entry(electron).or_default() += 1;
            }
            Ok(EventKind::NotSettled { electron, .. }) => {
                ledger.unknown.insert(electron);
            }
            Ok(EventKind::Stopped) => return,
            Ok(_) => {}
            Err(missed) => ledger.missed += missed.events,
        }
    }
}

/// What the process takes, in MiB; 0 where that cannot be told.
fn memory_mib() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096 / (1024 * 1024)
}

/// Panics on purpose are not worth a line each.
fn hush() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if panic.payload_as_str() != Some("a panic") {
            tell(panic);
        }
    }));
}

async fn soak(length: Duration, seed: u64) {
    println!("seed {seed}");
    hush();
    let sound = Memory::new();
    let faulty = Faulty::new(sound.clone());
    let faults = faulty.faults();
    let (runs, sent) = (Runs::default(), Arc::new(AtomicU64::new(0)));
    let enough = Arc::new(AtomicBool::new(false));
    let tasks_before = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let mut followers = JoinSet::new();
    let mut nodes = Vec::new();
    for number in 0..2 {
        let builder = Atomizer::builder().conductor(faulty.clone()).conductor(sound.clone());
        let builder = builder
            .atom(Leaf(runs.clone()))
            .atom(Single(runs.clone()))
            .atom_copied(Blocking(runs.clone()))
            .atom_from({
                let runs = runs.clone();
                move || Once(runs.clone())
            })
            .atom(Parent(runs.clone()))
            .lives_max(1000)
            .stuck_max(1000)
            .drain_timeout(Duration::from_secs(60));
        let (sent, enough) = (Arc::clone(&sent), Arc::clone(&enough));
        let builder = match number {
            0 => builder
                .resident(move || Sender { sent: Arc::clone(&sent), enough: Arc::clone(&enough) }),
            _ => builder,
        };
        let node = builder.start().await.unwrap();
        followers.spawn(follow(node.events(), Arc::clone(&ledger)));
        nodes.push(node);
    }
    let asker = Atomizer::builder().conductor(sound.clone()).start().await.unwrap();
    // One of the two conductors keeps failing.
    let all = [
        Fault::ErrorAfter,
        Fault::Drop,
        Fault::Stale,
        Fault::Delay(Duration::from_millis(20)),
        Fault::EndSubscription,
        Fault::EndSession,
        Fault::Fewer,
    ];
    // Not sending: what is sent twice ends twice, and rightly so.
    let ops = [Op::Next, Op::Subscribe, Op::Open, Op::Park, Op::Settle];
    faults.random(seed, 2, ops, all);
    let began = Instant::now();
    let (mut asked, mut failed, mut lost) = (0_u64, 0_u64, 0_u64);
    let mut calls: JoinSet<Result<u64, CallError>> = JoinSet::new();
    let mut lot = Lot(seed);
    let mut memory_before = 0;
    while began.elapsed() < length || !calls.is_empty() {
        while calls.len() < 128 && began.elapsed() < length {
            lot = lot.next();
            let asker = asker.clone();
            asked += 1;
            calls.spawn(async move {
                match lot.next().of(10) {
                    0 => asker.call::<Single>(lot).await,
                    1 => asker.call::<Blocking>(lot).await,
                    // Where it is not known whether one was taken for good, it is run by nobody.
                    2 => asker.call::<Once>(lot).deadline(Duration::from_secs(20)).await,
                    3 => asker.call::<Parent>(lot).await,
                    _ => asker.call::<Leaf>(lot).await,
                }
            });
        }
        if memory_before == 0 && began.elapsed() > length / 3 {
            memory_before = memory_mib();
        }
        let answered = tokio::time::timeout(Duration::from_secs(300), calls.join_next()).await;
        match answered.expect("every call resolves") {
            Some(Ok(Err(CallError::Failed(_)))) => failed += 1,
            Some(Ok(Err(CallError::Deadline { .. }))) => lost += 1,
            Some(Ok(Ok(_))) | None => {}
            Some(other) => panic!("{other:?}"),
        }
    }
    let memory_after = memory_mib();
    let bites: u64 = ops.iter().map(|op| faults.count(*op)).sum();
    faults.clear();
    enough.store(true, Ordering::SeqCst);
    tokio::time::timeout(Duration::from_secs(120), async {
        // What is unknown may be on its way for one more attempt, which is 50 ms at the most.
        let mut quiet = 0;
        while quiet < 50 {
            let over = waiting(&sound).await == 0 && ledger.lock().unwrap().is_closed();
            quiet = if over && runs.0.load(Ordering::SeqCst) == 0 { quiet + 1 } else { 0 };
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("everything comes to its end");
    for node in nodes.into_iter().chain([asker]) {
        node.drain().await.unwrap();
    }
    while let Some(followed) = followers.join_next().await {
        followed.unwrap();
    }
    let sent = sent.load(Ordering::SeqCst);
    println!(
        "{asked} asked, {failed} of them failed, {lost} at most once were lost; {sent} sent; {bites} faults; \
         {memory_before} MiB after a third, {memory_after} MiB at the end"
    );
    balance(&sound, &ledger, &runs, asked + sent).await;
    assert!(memory_after < 2 * memory_before + 50, "{memory_before} MiB became {memory_after}");
    assert!(asked > 100 && failed > 0 && bites > 0);
    tokio::time::timeout(Duration::from_secs(60), async {
        // Runs that were aborted end when their runtime comes to them.
        while tokio::runtime::Handle::current().metrics().num_alive_tasks() > tasks_before {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("no task is left over");
}

/// How many electrons wait, in all queues.
async fn waiting(memory: &Memory) -> u64 {
    let session = memory.open(&NodeId::unique("auditor").unwrap()).await.unwrap();
    let mut waiting = 0;
    for atom in [Leaf::ID, Single::ID, Blocking::ID, Once::ID, Parent::ID] {
        waiting += session.census(&AtomId::try_new(atom).unwrap()).await.unwrap().ready;
    }
    session.close().await;
    waiting
}

async fn balance(memory: &Memory, ledger: &Mutex<Ledger>, runs: &Runs, electrons: u64) {
    assert_eq!(waiting(memory).await, 0, "nothing is left in a queue");
    let ledger = ledger.lock().unwrap();
    assert_eq!(runs.0.load(Ordering::SeqCst), 0, "no run is left over");
    let dead = memory.take_dead_letters();
    for letter in &dead {
        let Message::Electron(dead) = letter else { panic!("electrons were sent: {letter:?}") };
        assert!(!dead.history.is_empty());
    }
    println!("{} dead letters, {} electrons in all", dead.len(), ledger.received.len());
    assert_eq!(ledger.missed, 0, "whoever follows the events keeps up");
    assert!(ledger.received.len() as u64 >= electrons, "{} of {electrons}", ledger.received.len());
    assert!(ledger.is_closed(), "every electron has ended");
    // A parent that is tried again asks the same children again. All others end once.
    let is_child = |electron: &ElectronId| electron.as_uuid().get_version_num() == 8;
    let twice = |(id, ends): &(&ElectronId, &u32)| **ends > 1 && !is_child(id);
    let twice: Vec<_> = ledger.ends.iter().filter(twice).collect();
    assert!(twice.is_empty(), "none ended twice: {twice:?}");
}

/// One minute of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn after_a_minute_of_everything_the_books_balance() {
    soak(Duration::from_secs(60), 7).await;
}

/// Ten minutes of it: `cargo test --release -p atomizer --test it -- --ignored --nocapture ten_minutes`.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "it takes ten minutes"]
async fn after_ten_minutes_of_everything_the_books_balance() {
    soak(Duration::from_secs(600), 8).await;
}
