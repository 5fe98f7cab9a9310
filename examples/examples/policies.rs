//! Shows what becomes of an electron whose atom fails: tried again here, then elsewhere, then given up.

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use atomizer::{
    Atom, AtomError, Atomizer, Backoff, Call, CallError, Context, Electron, Event, EventKind,
    Failure, Memory, Message, Missed, Policy,
};
use atomizer_examples::{Exit, say, short};
use clap::Parser;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// Shows what becomes of electrons whose atom fails, as two nodes tell it: flaky and sound.
///
/// Both have the same atom. Its first attempt is always made on flaky; what follows is for the policy to say,
/// and for the error. Each line is one event: the end of the electron's id, the node, the attempt, and what
/// happened. The nodes also log their failures: RUST_LOG=warn shows that on stderr.
#[derive(Parser)]
#[command(
    name = "policies",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrongly typed."
)]
struct Options {}

/// What goes wrong with a delivery. It is the input of the atom, so it travels with the electron.
#[derive(Clone, Copy, Serialize, Deserialize)]
enum Trouble {
    Lasting,
    Passing,
    OfThisNode,
    WrongAddress,
    Busy,
    NoRoom,
}

struct Deliver {
    is_flaky: bool,
    /// Holds the first attempt until both nodes are there.
    both_there: Arc<Notify>,
}

impl Atom for Deliver {
    const ID: &'static str = "deliver";
    type Input = Trouble;
    type Output = String;

    async fn process(&self, cx: &Context, trouble: Trouble) -> atomizer::Result<String> {
        if cx.history().is_empty() {
            self.both_there.notified().await;
        }
        match trouble {
            Trouble::Lasting => Err(AtomError::msg("nobody is at home")),
            Trouble::Passing if cx.attempt() < 3 => Err(AtomError::msg("the line is dead")),
            Trouble::OfThisNode if self.is_flaky => Err(AtomError::msg("the van is broken")),
            // Three errors that say themselves what is to follow.
            Trouble::WrongAddress => Err(AtomError::msg("no such street").do_not_retry()),
            Trouble::Busy if cx.attempt() == 1 => {
                Err(AtomError::msg("the gate is shut").retry_after(Duration::from_millis(300)))
            }
            Trouble::NoRoom if self.is_flaky => Err(AtomError::msg("the van is full").give_back()),
            _ => Ok(delivered_after(cx.history())),
        }
    }
}

/// An atom sees how earlier attempts failed, wherever they were made, and may do better for it.
fn delivered_after(history: &[Failure]) -> String {
    let failures: Vec<_> = history.iter().map(|failure| failure.message.as_str()).collect();
    format!("delivered after [{}]", failures.join(", "))
}

const BOTH: Policy = Policy::retry(2).then_requeue(1);
const CASES: [(&str, Policy, &str, Trouble); 8] = [
    ("Fail at once", Policy::fail(), "fail()", Trouble::Lasting),
    ("Retry here", Policy::retry(2), "retry(2)", Trouble::Passing),
    ("Requeue elsewhere", Policy::requeue(1), "requeue(1)", Trouble::OfThisNode),
    ("Here, then elsewhere", BOTH, "retry(2).then_requeue(1)", Trouble::OfThisNode),
    ("Here, elsewhere, fail", BOTH, "retry(2).then_requeue(1)", Trouble::Lasting),
    ("Error: do not retry", BOTH, "retry(2).then_requeue(1)", Trouble::WrongAddress),
    ("Error: retry after", Policy::retry(1), "retry(1)", Trouble::Busy),
    ("Error: give back", Policy::fail(), "fail()", Trouble::NoRoom),
];
/// Pauses without chance in them, for the same lines each time. A program of yours leaves chance in: then what
/// failed together does not come again together.
const BACKOFF: Backoff = Backoff::exponential(Duration::from_millis(50)).jitter_percent(0);

fn main() -> ExitCode {
    atomizer_examples::run("error", policies)
}

async fn policies(_: Options) -> anyhow::Result<Exit> {
    let memory = Memory::new();
    let both_there = Arc::new(Notify::new());
    let flaky = start("flaky", &memory, &both_there).await?;
    let asker = Atomizer::builder().name("asker").conductor(memory.clone()).start().await?;
    let mut summary = Vec::new();
    for (title, policy, policy_text, trouble) in CASES {
        say(format_args!("{title} · Policy::{policy_text}"))?;
        // Subscribed before the electron is sent, so that nothing is missed.
        let mut on_flaky = flaky.events();
        let end = async {
            // Sound joins once flaky has the electron: as equals, either could take it first.
            while !matches!(tell(on_flaky.next().await)?.kind, EventKind::Started { .. }) {}
            let sound = start("sound", &memory, &both_there).await?;
            let mut on_sound = sound.events();
            both_there.notify_one();
            loop {
                let event = tokio::select! {
                    event = on_flaky.next() => tell(event)?,
                    event = on_sound.next() => tell(event)?,
                };
                if matches!(event.kind, EventKind::Completed { .. } | EventKind::Failed { .. }) {
                    sound.drain().await?;
                    return Ok(event);
                }
            }
        };
        // The policy could as well be the atom's, or the node's; what the electron says goes before both.
        let call = asker.call::<Deliver>(trouble).policy(policy.backoff(BACKOFF));
        let (answer, end) = tokio::try_join!(answered(call), end)?;
        say(format_args!("       asker  is answered: {answer}\n"))?;
        let (attempts, node) = (end.attempt().unwrap_or_default(), short::node(&end.node));
        summary.push(format!("  {title:<22} {attempts:>8} {node:<6} {answer}"));
    }
    say("Dead letters, with their histories")?;
    for dead in memory.take_dead_letters() {
        if let Message::Electron(dead) = dead {
            print_history(&dead)?;
        }
    }
    say("\nSummary                attempts on     answer")?;
    summary.iter().try_for_each(say)?;
    asker.drain().await?;
    flaky.drain().await?;
    Ok(Exit::Done)
}

async fn start(name: &str, memory: &Memory, both_there: &Arc<Notify>) -> anyhow::Result<Atomizer> {
    let atom = Deliver { is_flaky: name == "flaky", both_there: Arc::clone(both_there) };
    Ok(Atomizer::builder().name(name).conductor(memory.clone()).atom(atom).start().await?)
}

/// Waits for the answer as a text. A failure is an answer too; that there is none is an error.
async fn answered(call: Call<'_, String>) -> anyhow::Result<String> {
    match call.await {
        Err(CallError::Failed(failure)) => Ok(format!("{}: {}", failure.kind, failure.message)),
        answer => Ok(answer?),
    }
}

/// Prints what happens to an electron, as one narrow line.
fn tell(event: Option<Result<Event, Missed>>) -> anyhow::Result<Event> {
    let event = event.context("a node has stopped")??;
    let text = match &event.kind {
        EventKind::Started { .. } => "begins".to_owned(),
        EventKind::Retried { failure, wait, .. } => {
            format!("fails: {}; again here in {wait:?}", failure.message)
        }
        EventKind::Requeued { failure, wait, .. } => {
            format!("fails: {}; back in the queue for {wait:?}", failure.message)
        }
        // Given back by its atom; or put back by a node that failed it, and happened to get it again.
        EventKind::HandedOn { reason, .. } => format!("hands it on: {reason}"),
        EventKind::Completed { .. } => "succeeds".to_owned(),
        EventKind::Failed { failure, dead: false, .. } => format!("fails: {}", failure.message),
        EventKind::Failed { failure, .. } => format!("fails: {}, dead letter", failure.message),
        _ => return Ok(event),
    };
    if let (Some(id), Some(attempt)) = (event.electron(), event.attempt()) {
        let (id, node) = (short::electron(id), short::node(&event.node));
        say(format_args!("  {id} {node:<6} attempt {attempt} {text}"))?;
    }
    Ok(event)
}

fn print_history(dead: &Electron) -> anyhow::Result<()> {
    say(format_args!("  {} failed attempts: {}", short::electron(dead.id), dead.attempts))?;
    for Failure { attempt, node, message, .. } in &dead.history {
        let node = node.as_ref().map_or("?", short::node);
        say(format_args!("       {node:<6} attempt {attempt} {message}"))?;
    }
    Ok(())
}
