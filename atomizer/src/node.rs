//! What all parts of one node share.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{Semaphore, watch};

use crate::{
    EventKind, NodeError, NodeId, Policy, Properties, admission::Admission, ask::Pending,
    cancel::Cancelled, event::Events, home::Threads, link::Link,
};

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) events: Events,
    pub(crate) admission: Arc<Admission>,
    pub(crate) pending: Pending,
    pub(crate) stage: watch::Receiver<Stage>,
    pub(crate) threads: Threads,
    pub(crate) rules: Rules,
    /// Suspects run one at a time.
    pub(crate) suspects: Arc<Semaphore>,
    pub(crate) critical: Critical,
    /// Children that nobody wants.
    pub(crate) cancelled: Cancelled,
    /// For those that are parked because what they emit is not taken: a few, or memory would be their only bound.
    pub(crate) held_up: Arc<Semaphore>,
    /// Runs that do not stop.
    stuck: AtomicUsize,
}

/// How many electrons may be parked on their way out.
const HELD_UP_MAX: usize = 1024;

/// What a node is told once, for all atoms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// What follows a failure, where neither the electron nor its atom says.
    pub(crate) policy: Policy,
    /// How many starts under suspicion an electron has.
    pub(crate) lives_max: u32,
    /// How many runs that do not stop make the node give up.
    pub(crate) stuck_max: usize,
    /// How many parents may wait before children run inline.
    pub(crate) waiting_max: usize,
}

impl Node {
    pub(crate) fn new(
        id: NodeId,
        admission: Arc<Admission>,
        events: Events,
        stage: watch::Receiver<Stage>,
        threads: Threads,
        rules: Rules,
    ) -> Self {
        Self {
            id,
            events,
            admission,
            pending: Pending::default(),
            stage,
            threads,
            rules,
            suspects: Arc::new(Semaphore::new(1)),
            critical: Critical::default(),
            cancelled: Cancelled::default(),
            held_up: Arc::new(Semaphore::new(HELD_UP_MAX)),
            stuck: AtomicUsize::new(0),
        }
    }

    /// Hands an answer to who waits for it.
    pub(crate) fn answer(&self, link: &Link, answer: Arc<Properties>) {
        let electron = answer.electron;
        if !self.pending.resolve(answer) {
            link.metrics.answers_dropped.increment(1);
            self.events.emit(Some(link.id()), || EventKind::AnswerDropped { electron });
        }
    }

    /// Waits until the node is at `stage` or past it.
    pub(crate) async fn reached(&self, stage: Stage) {
        // An error says that the supervisor is gone, which is past every stage.
        drop(self.stage.clone().wait_for(|now| *now >= stage).await);
    }

    /// Counts a run that does not stop. One too many and the node gives up: it may hold every thread.
    pub(crate) fn count_stuck(&self, last: &str) {
        let stuck = self.stuck.fetch_add(1, Ordering::Relaxed) + 1;
        if stuck >= self.rules.stuck_max {
            let stuck_max = self.rules.stuck_max;
            self.critical.raise(NodeError::Stuck { stuck, stuck_max, last: last.into() });
        }
    }

    /// A run that was counted as stuck has ended after all.
    pub(crate) fn uncount_stuck(&self) {
        self.stuck.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where the report of a critical failure goes. The first one counts.
#[derive(Debug, Default)]
pub(crate) struct Critical {
    report: Mutex<Option<NodeError>>,
    raised: tokio::sync::Notify,
}

impl Critical {
    pub(crate) fn raise(&self, report: NodeError) {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(report);
        self.raised.notify_one();
    }

    /// Waits for the first report.
    pub(crate) async fn raised(&self) -> NodeError {
        loop {
            let report = self.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(report) = report {
                return report;
            }
            self.raised.notified().await;
        }
    }
}

/// A node's way to its end. It only ever moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Running,
    /// Take no more, finish what runs.
    Draining,
    /// Tell what runs to stop.
    Cancelling,
    /// Stop it; electrons go back.
    Aborting,
    /// Nothing runs: close the sessions.
    Closing,
}
