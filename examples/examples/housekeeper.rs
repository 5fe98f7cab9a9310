//! Keeps a folder clean: a resident that spawns work on a schedule, and starts again when it fails.

use std::{
    env,
    fs::{self, DirEntry},
    io,
    path::{Path, PathBuf},
    process::{self, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use atomizer::{Atom, AtomError, Atomizer, Context, Kind, Options, Resident, Result};
use atomizer_examples::{Exit, broker, cli};
use atomizer_rabbitmq::RabbitMq;
use clap::Parser;
use tokio::{
    sync::{Notify, watch},
    task::spawn_blocking,
    time::{MissedTickBehavior, interval, timeout},
};

/// Removes old temporary files from a folder, round after round, until SIGTERM or ctrl-c.
///
/// Only files directly in the folder go whose name ends in .tmp and that were not changed for a while. Without
/// a folder it makes one, drops files into it to have something to do, and removes it at the end.
///
/// Behind a broker, housekeepers share their rounds: each round is an electron that any of them may take, and
/// who takes it sweeps its own folder. So give them the same one.
///
/// What happens is on stderr; RUST_LOG changes how much of it.
#[derive(Parser)]
#[command(
    name = "housekeeper",
    version,
    after_help = "Exit codes: 0 stopped in order, 1 failed, 2 wrongly typed."
)]
struct Arguments {
    /// The folder to keep clean [default: a new one].
    #[arg(long, value_name = "PATH", value_parser = folder)]
    folder: Option<PathBuf>,
    /// How old a file must be to go, as in 30s or 5m [default: 1h; in a new folder: 0s].
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    older_than: Option<Duration>,
    /// How far apart the rounds are.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = period)]
    every: Duration,
    /// Stop after so many rounds [default: never].
    #[arg(long, value_name = "N", value_parser = cli::count, allow_hyphen_values = true)]
    rounds: Option<u64>,
    /// Fail on purpose after every so many rounds [default: never].
    #[arg(long, value_name = "N", value_parser = cli::count, allow_hyphen_values = true)]
    fail_every: Option<u64>,
    /// Share the rounds over this broker: amqp://user:password@host:port/vhost.
    #[arg(long, value_name = "URL", value_parser = cli::Url)]
    amqp: Option<RabbitMq>,
}

fn folder(text: &str) -> Result<PathBuf, &'static str> {
    Some(PathBuf::from(text)).filter(|path| path.is_dir()).ok_or("there is no such folder")
}

fn period(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(period) if period.is_zero() => Err("it must be longer than nothing".to_owned()),
        period => period.map_err(|error| error.to_string()),
    }
}

/// The work: one sweep. A singleton, so that two rounds that come late do not race for the same files.
///
/// Its input is empty on purpose: whoever can write to the queue can ask for a sweep, and cannot choose what is
/// removed.
struct Sweep {
    folder: PathBuf,
    older_than: Duration,
    /// How many files went so far. Each sweep is a change, also one that finds nothing.
    swept: watch::Sender<u64>,
}

impl Atom for Sweep {
    const ID: &'static str = "housekeeper.sweep";
    const KIND: Kind = Kind::Singleton;
    type Input = ();
    type Output = ();

    fn options(&self) -> Options {
        // Folders are read by system calls that block.
        Options::default().blocking()
    }

    async fn process(&self, _cx: &Context, (): ()) -> Result<()> {
        let files = sweep(&self.folder, self.older_than)?;
        self.swept.send_modify(|swept| *swept += files);
        Ok(())
    }
}

/// Removes what is old, and returns how many files that were. It does no harm when it runs twice.
fn sweep(folder: &Path, older_than: Duration) -> io::Result<u64> {
    let mut removed = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match remove_if_old(&entry, older_than) {
            Ok(is_removed) => removed += u64::from(is_removed),
            // Somebody else was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // One file that stays must not keep the others.
            Err(error) => tracing::warn!("{} stays: {error}", entry.path().display()),
        }
    }
    Ok(removed)
}

fn remove_if_old(entry: &DirEntry, older_than: Duration) -> io::Result<bool> {
    // Of the entry itself: what a link points to is none of our business.
    let metadata = entry.metadata()?;
    let is_temporary = entry.path().extension().is_some_and(|extension| extension == "tmp");
    // A time in the future has no age.
    let is_old = metadata.modified()?.elapsed().is_ok_and(|age| age >= older_than);
    let remove = metadata.is_file() && is_temporary && is_old;
    if remove {
        fs::remove_file(entry.path())?;
    }
    Ok(remove)
}

/// The schedule. It lives as long as the node does, and is made anew when it fails.
#[derive(Clone)]
struct Housekeeper {
    every: Duration,
    rounds_max: Option<u64>,
    fail_every: Option<u64>,
    litter: Option<PathBuf>,
    swept: watch::Receiver<u64>,
    /// Rounds of all lives. What is to outlive a failure is kept outside.
    rounds: Arc<AtomicU64>,
    done: Arc<Notify>,
}

impl Resident for Housekeeper {
    const ID: &'static str = "housekeeper";

    async fn run(&self, cx: &Context) -> Result<()> {
        // The state of this life: it ends with a failure, and the next life has its own.
        let mut life = Life { rounds: 0, swept: self.swept.clone(), before: *self.swept.borrow() };
        tracing::info!("life {} begins", cx.attempt());
        let mut ticks = interval(self.every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let work = async {
            loop {
                ticks.tick().await;
                self.round(cx, &mut life).await?;
                let rounds = self.rounds.load(Ordering::Relaxed);
                if self.rounds_max.is_some_and(|rounds_max| rounds >= rounds_max) {
                    self.done.notify_one();
                    return Ok(());
                }
                if self.fail_every.is_some_and(|fail_every| life.rounds >= fail_every) {
                    return Err(AtomError::msg("failed on purpose"));
                }
            }
        };
        let ended = tokio::select! {
            // The node drains. Who does not end by himself is aborted at the end of the drain time-out.
            () = cx.cancelled() => Ok(()),
            ended = work => ended,
        };
        let (files, rounds) = (life.files(), life.rounds);
        tracing::info!("life {} ends: {files} files in {rounds} rounds", cx.attempt());
        ended
    }
}

/// What one life of the housekeeper knows.
struct Life {
    rounds: u64,
    swept: watch::Receiver<u64>,
    before: u64,
}

impl Life {
    fn files(&self) -> u64 {
        *self.swept.borrow() - self.before
    }
}

impl Housekeeper {
    async fn round(&self, cx: &Context, life: &mut Life) -> Result<()> {
        let round = self.rounds.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(folder) = self.litter.clone() {
            spawn_blocking(move || litter(&folder, round)).await??;
        }
        let before = *life.swept.borrow_and_update();
        // Safe when this returns, and nobody waits for its answer: the sweep is done even if this life ends.
        cx.spawn_now::<Sweep>(()).await?;
        life.rounds += 1;
        // Done here it shows before the next round is due. Behind a broker another may have taken it.
        match timeout(self.every, life.swept.changed()).await {
            Ok(_) => {
                let (files, in_all) = (*life.swept.borrow() - before, life.files());
                tracing::info!("round {round}: {files} files swept, {in_all} in this life");
            }
            Err(_) => tracing::info!("round {round}: swept elsewhere, or still to come"),
        }
        Ok(())
    }
}

/// Drops files of which two are to go and one is to stay.
fn litter(folder: &Path, round: u64) -> io::Result<()> {
    let names = [format!("{round}-a.tmp"), format!("{round}-b.tmp"), "keep.txt".to_owned()];
    names.iter().try_for_each(|name| fs::write(folder.join(name), "left behind"))
}

/// A folder of its own, which is gone when this value is.
struct OwnFolder(PathBuf);

impl OwnFolder {
    fn make() -> anyhow::Result<Self> {
        let path = env::temp_dir().join(format!("housekeeper-{}", process::id()));
        // Fails where there is one already: it may be somebody else's.
        fs::create_dir(&path).with_context(|| format!("failed to make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for OwnFolder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!("{} stays: {error}", self.0.display());
        }
    }
}

fn main() -> ExitCode {
    atomizer_examples::run("info,lapin=off", housekeeper)
}

async fn housekeeper(arguments: Arguments) -> anyhow::Result<Exit> {
    let own = if arguments.folder.is_none() { Some(OwnFolder::make()?) } else { None };
    let litter = own.as_ref().map(|own| own.0.clone());
    // Files of others are given an hour, unless told otherwise.
    let older_than = if own.is_some() { Duration::ZERO } else { Duration::from_secs(60 * 60) };
    let older_than = arguments.older_than.unwrap_or(older_than);
    let folder = arguments.folder.or_else(|| litter.clone()).context("no folder")?;
    tracing::info!("sweeps {} every {:?}", folder.display(), arguments.every);
    let (swept_tx, swept) = watch::channel(0);
    let done = Arc::new(Notify::new());
    let housekeeper = Housekeeper {
        every: arguments.every,
        rounds_max: arguments.rounds,
        fail_every: arguments.fail_every,
        litter,
        swept,
        rounds: Arc::default(),
        done: Arc::clone(&done),
    };
    let builder = Atomizer::builder()
        .name("housekeeper")
        .atom(Sweep { folder, older_than, swept: swept_tx })
        .resident(move || housekeeper.clone())
        .drain_timeout(Duration::from_secs(5));
    let node = broker::start_or_in_memory(builder, arguments.amqp).await?;
    tokio::select! {
        ended = node.run() => ended?,
        () = done.notified() => node.drain().await?,
    }
    tracing::info!("ended in order");
    Ok(Exit::Done)
}
