//! Keeps a resident running: from the start of the node to its drain, and again when it fails.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};
use futures::{FutureExt, future::BoxFuture};
use tokio::{
    sync::oneshot,
    task::AbortHandle,
    time::{Instant, sleep},
};

use crate::{
    AtomId, Context, Electron, EventKind, FailureKind, Payload, Resident, Result, ask::Asker,
    error::Failed, metrics, node::Stage, run::panic_message,
};

/// A resident as a node knows it. Generics stop here.
#[derive(Clone)]
pub(crate) struct Registered {
    pub(crate) id: AtomId,
    run: Arc<dyn Fn(Context) -> BoxFuture<'static, Result<()>> + Send + Sync>,
}

impl Registered {
    pub(crate) fn new<R: Resident>(make: impl Fn() -> R + Send + Sync + 'static) -> Self {
        let make = Arc::new(make);
        let run = move |cx: Context| {
            let make = Arc::clone(&make);
            // Made in here, where a panic is caught.
            async move { make().run(&cx).await }.boxed()
        };
        Self { id: const { AtomId::from_static(R::ID) }, run: Arc::new(run) }
    }
}

/// A resident that ran for so long starts again soon after a failure, however often it failed before.
const STABLE_AFTER: Duration = Duration::from_secs(60);

fn backoff() -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_secs(30))
        .without_max_times()
        .build()
}

/// Runs until the resident is done, or the node drains.
pub(crate) async fn run(asker: Asker, resident: Registered) {
    let failures = metrics::resident_failures(&resident.id);
    let mut pauses = backoff();
    for attempt in 1.. {
        let events = &asker.node.events;
        let atom = || resident.id.clone();
        events.emit(None, || EventKind::ResidentStarted { atom: atom(), attempt });
        let began = Instant::now();
        let Some(result) = run_once(&asker, &resident, attempt).await else { return };
        let draining = *asker.node.stage.borrow() >= Stage::Draining;
        let failure = match result {
            Err(Failed { failure, .. }) if !draining => failure,
            result => {
                if let Err(Failed { failure, .. }) = result {
                    tracing::warn!(resident = %resident.id, %failure, "failed while the node stops");
                }
                events.emit(None, || EventKind::ResidentEnded { atom: atom(), attempt });
                return;
            }
        };
        if began.elapsed() > STABLE_AFTER {
            pauses = backoff();
        }
        let wait = pauses.next().expect("the backoff has no end");
        tracing::warn!(resident = %resident.id, %failure, "failed; starts again in {wait:.1?}");
        failures.increment(1);
        events.emit(None, || EventKind::ResidentFailed { atom: atom(), attempt, failure, wait });
        tokio::select! {
            () = sleep(wait) => {}
            () = asker.node.reached(Stage::Draining) => return,
        }
    }
}

/// Runs it once, among the atoms. Returns when it has truly ended; none when it was dropped.
async fn run_once(
    asker: &Asker,
    resident: &Registered,
    attempt: u32,
) -> Option<Result<(), Failed>> {
    let mut electron = Electron::new(resident.id.clone(), Payload::bytes(Vec::new()));
    electron.attempts = attempt - 1;
    let context = Context::of_resident(asker.clone(), Arc::new(electron));
    let running = AssertUnwindSafe((resident.run)(context)).catch_unwind();
    let (tx, rx) = oneshot::channel();
    let task = asker.node.threads.spawn(async move {
        let result = match running.await {
            Ok(result) => result.map_err(Failed::from),
            Err(panic) => Err(Failed::new(FailureKind::Panic, panic_message(&*panic))),
        };
        // An error says that the node was dropped.
        drop(tx.send(result));
    });
    let _stop = AbortOnDrop(task);
    rx.await.ok()
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
