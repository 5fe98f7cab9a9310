//! `atomizer dead requeue`.

use std::{cell::Cell, num::NonZeroUsize, pin::pin, time::Duration};

use anyhow::{Context as _, bail};
use atomizer::Payload;
use atomizer_programs::{
    Exit, Mistyped,
    progress::{self, Scaled, Shown, per_second, time_left},
    say, signals,
};
use atomizer_rabbitmq::{Clearing, Progress, Requeue};
use serde_json::json;

use super::{Chosen, edit, rate::Rate, show};
use crate::{input, shared::Shared};

/// Sends dead letters back to their atoms, each exactly once.
///
/// What is sent back keeps its id, payload and policy, and has all its attempts before it. What cannot be sent back stays.
/// Interrupted, it finishes the window that is under way: what was sent back is gone from the dead letters, and the same
/// command goes on with the rest.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  atomizer dead requeue --cause 1f2e3d4c5b6a --rate 100/s
  atomizer dead requeue 01932c07-e8f1-7a3b-9c4d-5e6f70819203 --payload '{\"to\": \"ann@example.org\"}'
  atomizer dead requeue 01932c07-e8f1-7a3b-9c4d-5e6f70819203 --edit

With --json: {\"done\", \"refused\", \"kept\", \"interrupted\"}. Exit code 1 when something could not be sent back, 130 when it was
interrupted.")]
pub(super) struct Arguments {
    #[command(flatten)]
    chosen: Chosen,
    /// How fast, as in 100/s or 30/min [default: as fast as the broker takes them].
    #[arg(long)]
    rate: Option<Rate>,
    /// How many are on their way at a time: the most that are sent twice when this process is killed.
    #[arg(long, value_name = "N", default_value_t = Requeue::WINDOW)]
    window: NonZeroUsize,
    /// With an ID: send it back with this payload: JSON, - for stdin, or @FILE.
    #[arg(long, value_name = "JSON", requires = "id", allow_negative_numbers = true)]
    payload: Option<String>,
    /// With --payload: what it is, when it is no JSON, as in text/plain.
    #[arg(long, value_name = "TYPE", requires = "payload")]
    content_type: Option<String>,
    /// With an ID: edit its payload first.
    #[arg(long, requires = "id", conflicts_with = "payload")]
    edit: bool,
    /// What to edit with, a command.
    #[arg(
        long,
        env = "EDITOR",
        hide_env_values = true,
        value_name = "COMMAND",
        default_value = "vi"
    )]
    editor: String,
}

pub(super) async fn run(shared: &Shared, arguments: Arguments) -> anyhow::Result<Exit> {
    let selection = arguments.chosen.selection()?;
    // Where --all is said as well, clap does not ask for it.
    if arguments.chosen.id.is_none() && (arguments.edit || arguments.payload.is_some()) {
        return Err(Mistyped("say which letter to change: <ID>".to_owned()).into());
    }
    let dead = shared.dead_letters()?;
    let clearing = match (arguments.chosen.id, edited(shared, &arguments).await?) {
        (Some(id), Edited::To(payload)) => dead.requeue_edited(id, payload),
        (_, Edited::Unchanged) => {
            eprintln!("nothing was changed, and nothing sent back");
            return Ok(Exit::Done);
        }
        _ => {
            let mut options = Requeue::default().window(arguments.window);
            if let Some(Rate { electrons, per }) = arguments.rate {
                options = options.rate(electrons, per);
            }
            dead.requeue(selection, options)
        }
    };
    let (progress, exit) = follow(clearing, "sent back").await?;
    report(shared, "sent back", progress, exit)?;
    if arguments.chosen.id.is_some() && progress.done + progress.refused == 0 {
        bail!("there is no such dead letter, or somebody else is at work on it just now");
    }
    if progress.refused > 0 {
        bail!("{} could not be sent back, and stay: the log says why", progress.refused);
    }
    Ok(exit)
}

/// What becomes of the payload.
enum Edited {
    No,
    To(Payload),
    Unchanged,
}

async fn edited(shared: &Shared, arguments: &Arguments) -> anyhow::Result<Edited> {
    if let Some(typed) = &arguments.payload {
        return input::read(typed, arguments.content_type.as_deref()).map(Edited::To);
    }
    let Some(id) = arguments.chosen.id.filter(|_| arguments.edit) else { return Ok(Edited::No) };
    let letter = show::find(shared, id).await?;
    if letter.revive().is_none() {
        bail!("{id} is no electron, and cannot be sent back");
    }
    let before = show::payload(&letter).context("it has no payload")?;
    let after = edit::edit(&arguments.editor, &before)?;
    Ok(if after == before { Edited::Unchanged } else { Edited::To(after) })
}

/// Shows how far it has come until it ends; told to stop, it is brought to its end in order.
pub(super) async fn follow(
    clearing: Clearing,
    done: &'static str,
) -> anyhow::Result<(Progress, Exit)> {
    let seen = Cell::new(Progress::default());
    let mut clearing = clearing;
    let mut exit = Exit::Done;
    {
        let mut stop = Box::pin(signals::stop());
        let mut show = pin!(progress::show(|time| shown(seen.get(), done, time)));
        loop {
            tokio::select! {
                progress = clearing.next() => match progress {
                    Some(progress) => seen.set(progress),
                    None => break,
                },
                stopped = &mut stop => {
                    stopped?;
                    if exit == Exit::Interrupted {
                        eprintln!("interrupted again: the window that was under way may come twice");
                        return Ok((seen.get(), exit));
                    }
                    exit = Exit::Interrupted;
                    clearing.stop();
                    stop = Box::pin(signals::stop());
                }
                never = &mut show => match never {},
            }
        }
    }
    Ok((clearing.finish().await?, exit))
}

fn shown(progress: Progress, what: &str, time: Duration) -> Shown {
    let Progress { total, done, kept, refused, .. } = progress;
    let rate = per_second(done, time);
    let mut text = format!("{done} {what}, {}/s", Scaled(rate));
    let looked_at = done + kept + refused;
    if total > 0 {
        text.push_str(&format!(", {looked_at} of {total} looked at"));
        if let Some(left) = time_left(looked_at, total, per_second(looked_at, time)) {
            text.push_str(&format!(", {} left", humantime::format_duration(left)));
        }
    }
    Shown { done: looked_at, all: total, text }
}

/// Says what was done.
pub(super) fn report(
    shared: &Shared,
    what: &str,
    progress: Progress,
    exit: Exit,
) -> anyhow::Result<()> {
    let Progress { done, kept, refused, .. } = progress;
    let interrupted = exit == Exit::Interrupted;
    if shared.json {
        say(json!({ "done": done, "refused": refused, "kept": kept, "interrupted": interrupted }))?;
    } else {
        say(format_args!("{done} {what}"))?;
    }
    if interrupted {
        eprintln!("interrupted: {done} were {what}; the same command goes on with the rest");
    }
    Ok(())
}
