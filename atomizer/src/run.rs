//! One run of an atom, apart from everything else: whatever it does, one result comes of it.

use std::{any::Any, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt;
use tokio::{
    runtime::Handle,
    task::{self, AbortHandle},
    time::timeout,
};

use crate::{Context, Failure, FailureKind, Options, Payload, RawAtom};

/// What a run comes to.
pub(crate) type RunResult = Result<Payload, Failure>;

/// A run under way. Dropping it aborts the run at its next `await`.
#[derive(Debug)]
pub(crate) struct Run(AbortHandle);

impl Drop for Run {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Starts a run, which reports its result unless it is aborted.
#[expect(clippy::disallowed_methods, reason = "owned by the `Run`, which aborts it when dropped")]
pub(crate) fn spawn(
    atom: Arc<dyn RawAtom>,
    context: Context,
    options: &Options,
    report: impl FnOnce(RunResult) + Send + 'static,
) -> Run {
    let limit = context.electron().time_limit.or(options.run_time_limit());
    let running = async move {
        let result = AssertUnwindSafe(run(&*atom, context, limit)).catch_unwind().await;
        report(result.unwrap_or_else(|panic| Err(panicked(&*panic))));
    };
    let task = if options.is_blocking() {
        let runtime = Handle::current();
        task::spawn_blocking(move || runtime.block_on(running))
    } else {
        task::spawn(running)
    };
    Run(task.abort_handle())
}

/// The context is dropped at the end, and with it the permit: before the result is reported.
async fn run(atom: &dyn RawAtom, context: Context, limit: Option<Duration>) -> RunResult {
    let running = atom.run(&context, context.electron().payload.clone());
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
