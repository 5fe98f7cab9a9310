//! One run of an atom, apart from everything else: whatever it does, one result comes of it.

use std::{any::Any, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
    task::{self, AbortHandle},
    time::timeout,
};

use crate::{Context, ElectronId, Failure, FailureKind, Options, Payload, RawAtom};

/// What a run comes to.
pub(crate) type RunResult = Result<Payload, Failure>;

/// A run under way. Dropping it aborts the run at its next `await`.
#[derive(Debug)]
pub(crate) enum Run {
    Async(AbortHandle),
    /// A task on a thread of its own cannot be aborted from outside: it watches for the other end.
    Blocking {
        _alive: oneshot::Sender<()>,
    },
}

impl Drop for Run {
    fn drop(&mut self) {
        if let Self::Async(task) = self {
            task.abort();
        }
    }
}

/// Starts runs of one atom. Generics stop here: behind it is any [`RawAtom`].
pub(crate) trait Start: Send + Sync {
    /// Starts a run, which reports its result unless it is aborted.
    fn start(self: Arc<Self>, context: Context, options: &Options, report: Report) -> Run;
}

/// Where the result of one run goes.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) electron: ElectronId,
    pub(crate) to: mpsc::UnboundedSender<(ElectronId, RunResult)>,
}

impl<A: RawAtom> Start for A {
    #[expect(
        clippy::disallowed_methods,
        reason = "owned by the `Run`, which aborts it when dropped"
    )]
    fn start(self: Arc<Self>, context: Context, options: &Options, report: Report) -> Run {
        let limit = context.electron().time_limit.or(options.run_time_limit());
        let running = async move {
            let result = AssertUnwindSafe(run(&*self, context, limit)).catch_unwind().await;
            let result = result.unwrap_or_else(|panic| Err(panicked(&*panic)));
            // An error says that the worker is gone, and with it the ticket.
            drop(report.to.send((report.electron, result)));
        };
        if options.is_blocking() {
            let runtime = Handle::current();
            let (alive, dropped) = oneshot::channel();
            task::spawn_blocking(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = running => {}
                        _ = dropped => {}
                    }
                });
            });
            Run::Blocking { _alive: alive }
        } else {
            Run::Async(task::spawn(running).abort_handle())
        }
    }
}

/// The context is dropped at the end, and with it the permit: before the result is reported.
async fn run(atom: &impl RawAtom, context: Context, limit: Option<Duration>) -> RunResult {
    let running = atom.run(&context, &context.electron().payload);
    let Some(limit) = limit else {
        return running.await.map_err(Failure::from);
    };
    let result = timeout(limit, running).await.map_err(|_| {
        let limit = humantime::format_duration(limit);
        Failure::new(FailureKind::TimedOut, format!("did not finish within {limit}"))
    })?;
    result.map_err(Failure::from)
}

fn panicked(panic: &(dyn Any + Send)) -> Failure {
    let literal = panic.downcast_ref::<&'static str>().copied();
    let message = literal.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    Failure::new(FailureKind::Panic, message.unwrap_or("a panic without a message"))
}
