//! One run of an atom, apart from everything else: whatever it does, one report comes of it.

use std::{any::Any, future::poll_fn, panic::AssertUnwindSafe, pin::pin, sync::Arc};

use futures::FutureExt;
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
};

use crate::{
    Context, ElectronId, Envelope, EventKind, FailureKind, Payload, RawAtom,
    admission::Slot,
    error::{Directive, Failed},
    home::Threads,
    instance::Instances,
};

/// What a run comes to.
pub(crate) type RunResult = Result<Success, Failed>;

/// An output, and the children that are sent with it.
#[derive(Debug)]
pub(crate) struct Success {
    pub(crate) output: Payload,
    pub(crate) spawned: Vec<Envelope>,
}

/// Tells the runs of one worker apart: an electron may have several, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RunId(pub(crate) u64);

/// A run under way. Dropping it aborts the run at its next `await`.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) id: RunId,
    /// What the run and its worker share.
    pub(crate) slot: Arc<Slot>,
    /// Taken out when it is aborted.
    task: Option<Task>,
}

impl Run {
    /// Ends the run at its next `await`.
    pub(crate) fn abort(&mut self) {
        self.task = None;
    }
}

#[derive(Debug)]
enum Task {
    Async(AbortHandle),
    /// A run on a thread of its own cannot be aborted from outside: it watches for the other end.
    Blocking {
        _alive: oneshot::Sender<()>,
    },
}

impl Drop for Task {
    fn drop(&mut self) {
        if let Self::Async(task) = self {
            task.abort();
        }
    }
}

/// What a run tells of itself.
#[derive(Debug)]
pub(crate) struct Reported {
    pub(crate) electron: ElectronId,
    pub(crate) run: RunId,
    pub(crate) what: What,
}

#[derive(Debug)]
pub(crate) enum What {
    /// It waits, without a permit.
    Waits,
    /// It is over, and this came of it. Nothing at all comes of one that was aborted.
    Ended(Option<RunResult>),
}

/// Where it is told that one run waits.
#[derive(Debug)]
pub(crate) struct Waits {
    pub(crate) electron: ElectronId,
    pub(crate) run: RunId,
    pub(crate) to: mpsc::UnboundedSender<Reported>,
}

impl Waits {
    pub(crate) fn tell(&self) {
        let Self { electron, run, ref to } = *self;
        // An error says that the worker is gone.
        drop(to.send(Reported { electron, run, what: What::Waits }));
    }
}

/// Where the report of one run goes; it is made when the run is dropped, too.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) electron: ElectronId,
    pub(crate) run: RunId,
    pub(crate) to: mpsc::UnboundedSender<Reported>,
    pub(crate) result: Option<RunResult>,
}

impl Report {
    /// Takes the run to its end.
    fn end(mut self, result: RunResult) {
        self.result = Some(result);
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        let Self { electron, run, ref mut result, .. } = *self;
        if result.is_none() && std::thread::panicking() {
            *result = Some(Err(Failed::new(FailureKind::Panic, "a panic while it was dropped")));
        }
        // An error says that the worker is gone, and with it the ticket.
        drop(self.to.send(Reported { electron, run, what: What::Ended(result.take()) }));
    }
}

/// Starts runs of one atom. Generics stop here: behind it is any [`RawAtom`].
pub(crate) trait Start: Send + Sync {
    /// Starts a run, on a thread of its own if it is `blocking`.
    fn start(
        self: Arc<Self>,
        context: Context,
        blocking: bool,
        threads: &Threads,
        report: Report,
    ) -> Run;
}

impl<A: RawAtom> Start for Instances<A> {
    fn start(
        self: Arc<Self>,
        context: Context,
        blocking: bool,
        threads: &Threads,
        report: Report,
    ) -> Run {
        let id = report.run;
        let slot = Arc::clone(&context.slot);
        let watched = Arc::clone(&slot);
        let job = Job { context, report };
        let running = async move {
            // In here: making an instance is the user's code.
            let result = run(&self, &job.context, &watched).await;
            job.end(result);
        };
        let task = if blocking {
            let (alive, dropped) = oneshot::channel();
            threads.spawn_blocking(async move {
                // The end first: one that was given up while it waited for a thread is not begun.
                tokio::select! {
                    biased;
                    _ = dropped => {}
                    () = running => {}
                }
            });
            Task::Blocking { _alive: alive }
        } else {
            Task::Async(threads.spawn(running))
        };
        Run { id, slot, task: Some(task) }
    }
}

/// What is dropped at the end of a run, in this order: whoever hears of the result has the electron for itself.
struct Job {
    context: Context,
    report: Report,
}

impl Job {
    fn end(self, result: RunResult) {
        let Self { context, report } = self;
        drop(context);
        report.end(result);
    }
}

async fn run<A: RawAtom>(instances: &Instances<A>, context: &Context, slot: &Slot) -> RunResult {
    let atom = match std::panic::catch_unwind(AssertUnwindSafe(|| instances.get())) {
        Ok(atom) => atom,
        Err(panic) => return Err(panicked(&*panic)),
    };
    let running = AssertUnwindSafe(run_one(&*atom, context)).catch_unwind();
    let mut running = pin!(running);
    let result = poll_fn(|cx| {
        slot.polling();
        let polled = running.as_mut().poll(cx);
        slot.polled();
        polled
    });
    match result.await {
        Ok(result) => result,
        Err(panic) => {
            let (node, id) = (&context.asker.node, &context.electron().atom);
            node.cancelled.end_round(node.cancelled.round());
            let renewed = AssertUnwindSafe(|| instances.renew(&atom));
            match std::panic::catch_unwind(renewed) {
                Ok(true) => node.events.emit(None, || EventKind::Renewed { atom: id.clone() }),
                Ok(false) => {}
                Err(_) => tracing::error!(atom = %id, "panicked while it was made afresh"),
            }
            Err(panicked(&*panic))
        }
    }
}

async fn run_one(atom: &impl RawAtom, context: &Context) -> RunResult {
    let output = atom.run(context, &context.electron().payload).await.map_err(|error| {
        context.end_round();
        Failed::from(error)
    })?;
    let spawned = std::mem::take(&mut *context.spawned.lock());
    Ok(Success { output, spawned })
}

fn panicked(panic: &(dyn Any + Send)) -> Failed {
    Failed { then: Directive::Policy, ..Failed::new(FailureKind::Panic, panic_message(panic)) }
}

/// Returns what a panic says.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let literal = panic.downcast_ref::<&'static str>().copied();
    let message = literal.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    message.unwrap_or("a panic without a message")
}
