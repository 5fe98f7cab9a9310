//! Brings the events of a node to where they are kept, and tells every few seconds that the node is there.
//!
//! What goes wrong here costs events, which are counted; never an electron, and no electron waits for it.

use std::{
    collections::VecDeque,
    process,
    sync::Arc,
    time::{Duration, Instant},
};

use uuid::Uuid;

use crate::{
    AtomId, ConductorId, EventKind, EventLog, OpenError, Pack, Presence, Serving, SessionError,
    admission::{Lane, Usage},
    event::Gather,
    link::guard,
    node::{Node, Stage},
};

/// How many packs may be on their way at once.
const UNSURE_MAX: usize = 16;
/// How long opening a log may take.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);
/// The pauses between tries: from 100 ms doubling. Whoever may not write, say, must not cost his broker more than now and
/// then a connection.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// While nothing is reached: a node must not seem to be gone for longer than its broker was.
const AWAY_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Where the events of a node are to be kept: one for each conductor that keeps them.
pub(crate) struct Keeping {
    pub(crate) log: Arc<dyn EventLog>,
    pub(crate) gather: Arc<Gather>,
    pub(crate) conductor: ConductorId,
}

/// Keeps the events of a node until no more come.
pub(crate) async fn run(node: Arc<Node>, keeping: Keeping) {
    let Keeping { log, gather, conductor } = keeping;
    let mut writing = Writing { gather: &gather, unsure: VecDeque::new(), works: None };
    let mut pause = PAUSE_MIN;
    loop {
        // Once the node has ended its last words are tried to be said once more.
        let is_last = gather.is_closed();
        let Err(Failed { reason, is_away }) = writing.write(&node, &*log).await else { return };
        match writing.works.replace(false) {
            Some(false) => tracing::debug!(%conductor, reason, "events are not kept for now"),
            worked => {
                let reason = reason.as_str();
                tracing::warn!(%conductor, reason, "events are not kept for now; that costs no electron");
                if worked == Some(true) {
                    pause = PAUSE_MIN;
                }
            }
        }
        if is_last {
            return;
        }
        let pause_max = if is_away { AWAY_PAUSE_MAX } else { PAUSE_MAX };
        pause = pause.min(pause_max);
        gather.pause(with_jitter(pause)).await;
        pause = pause.saturating_mul(2);
    }
}

/// Why writing ended.
struct Failed {
    reason: String,
    /// The log was not reached: waiting may help.
    is_away: bool,
}

impl From<String> for Failed {
    fn from(reason: String) -> Self {
        Self { reason, is_away: false }
    }
}

impl From<OpenError> for Failed {
    fn from(error: OpenError) -> Self {
        Self { reason: error.to_string(), is_away: matches!(error, OpenError::Unreachable(_)) }
    }
}

/// Between half of a pause and all of it: the nodes that lost one broker do not all come back at once.
fn with_jitter(pause: Duration) -> Duration {
    let random = Uuid::new_v4().as_u64_pair().0 >> 32;
    pause / 2 + pause.mul_f64(random as f64 / f64::from(u32::MAX) / 2.0)
}

/// What goes on over all writers of a log.
struct Writing<'node> {
    gather: &'node Gather,
    /// What was handed over, and may have been kept or not.
    unsure: VecDeque<Pack>,
    /// Whether the last try kept something; none before the first.
    works: Option<bool>,
}

impl Writing<'_> {
    /// Writes until no more events come.
    ///
    /// What another writer left unknown is written once more: readers know events by their numbers. How long a step may
    /// take is for the log to say, which knows whether its broker takes nothing for now.
    async fn write(&mut self, node: &Node, log: &dyn EventLog) -> Result<(), Failed> {
        let opening = guard(OPEN_TIMEOUT, log.writer(&node.id)).await;
        let opened = opening.map_err(|fault| fault.to_string())?;
        let mut writer = opened?;
        for pack in &self.unsure {
            done(writer.append(pack.clone())).await?;
        }
        let mut over = false;
        while !(over && self.unsure.is_empty()) {
            tokio::select! {
                biased;
                kept = done(writer.kept()), if !self.unsure.is_empty() => {
                    let kept = kept?;
                    if let (Some(pack), false) = (self.unsure.pop_front(), kept) {
                        self.gather.declined(&pack);
                    }
                    if self.works.replace(true) == Some(false) {
                        tracing::info!("events are kept again");
                    }
                }
                pack = self.gather.next(), if !over && self.unsure.len() < UNSURE_MAX => match pack {
                    Some(pack) => {
                        self.unsure.push_back(pack.clone());
                        done(writer.append(pack)).await?;
                    }
                    // No more come; the last may be on their way.
                    None => over = true,
                },
            }
        }
        writer.close().await;
        Ok(())
    }
}

/// Awaits a step of a log. One that panics has failed.
async fn done<T>(step: impl Future<Output = Result<T, SessionError>>) -> Result<T, String> {
    let done = guard(None, step).await;
    done.map_err(|fault| fault.to_string())?.map_err(|error| error.to_string())
}

/// Tells at once, and every few seconds from then on, that the node is there, until it closes.
pub(crate) async fn announce(node: Arc<Node>, atoms: Vec<(AtomId, Lane)>) {
    let begun = Instant::now();
    let host = host();
    let mut ticks = tokio::time::interval(Presence::PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = node.reached(Stage::Closing) => return,
        }
        node.events
            .emit(None, || EventKind::Alive(Box::new(presence(&node, &atoms, &host, begun))));
    }
}

fn presence(node: &Node, atoms: &[(AtomId, Lane)], host: &str, begun: Instant) -> Presence {
    let Usage { running, limit: concurrency } = node.admission.usage();
    let serving = |(atom, lane): &(AtomId, Lane)| {
        let Usage { running, limit: concurrency } = node.admission.usage_of(*lane);
        Serving { atom: atom.clone(), running, concurrency }
    };
    Presence {
        host: host.to_owned(),
        process: process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime: begun.elapsed(),
        running,
        concurrency,
        waiting: node.admission.waiting(),
        atoms: atoms.iter().map(serving).collect(),
    }
}

/// Returns the name of this machine, as far as the system tells.
fn host() -> String {
    gethostname::gethostname().to_string_lossy().into_owned()
}
