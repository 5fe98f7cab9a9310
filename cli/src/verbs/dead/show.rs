//! `atomizer dead show`.

use atomizer::{DeadLetter, LetterId, Message, Payload};
use atomizer_programs::{Exit, say};
use serde_json::{Map, Value, json};

use crate::{
    output::{add_payload, json_time, one_line, pretty, time},
    shared::Shared,
};

/// Shows one dead letter with its payload and how each attempt failed; it stays where it is.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
With --json: {\"id\", \"cause\", \"atom\", \"reason\", \"detail\", \"died_at\", \"attempts\", \"history\", \"sender\", \"parent\",
\"content_type\", \"payload\" (or \"payload_text\", \"payload_base64\"), \"payload_bytes\"}.")]
pub(super) struct Arguments {
    /// Its id, as `dead list` has it.
    id: LetterId,
}

pub(super) async fn run(shared: &Shared, arguments: &Arguments) -> anyhow::Result<Exit> {
    let letter = find(shared, arguments.id).await?;
    if shared.json {
        say(json(&letter)?)?;
    } else {
        print(&letter)?;
    }
    Ok(Exit::Done)
}

/// Finds a letter.
pub(super) async fn find(shared: &Shared, id: LetterId) -> anyhow::Result<DeadLetter> {
    let letter = shared.dead_letters()?.show(id).await?;
    letter.ok_or_else(|| {
        anyhow::anyhow!("there is no dead letter {id}, or somebody else is at work on it just now")
    })
}

/// Returns what a letter carries.
pub(super) fn payload(letter: &DeadLetter) -> Option<Payload> {
    match letter.message.as_ref()? {
        Message::Electron(electron) => Some(electron.payload.clone()),
        Message::Unreadable(unreadable) => {
            let wire = &unreadable.wire;
            let content_type = wire.content_type.as_deref().unwrap_or("application/octet-stream");
            Some(Payload::new(content_type, wire.body.clone()))
        }
        _ => None,
    }
}

fn json(letter: &DeadLetter) -> anyhow::Result<Value> {
    let mut object = Map::new();
    let mut add = |name: &str, value: Value| object.insert(name.to_owned(), value);
    add("id", letter.id.to_string().into());
    add("cause", letter.cause().key().to_string().into());
    add("atom", json!(letter.atom.as_ref().map(|atom| atom.as_str())));
    add("reason", letter.reason.to_string().into());
    add("detail", letter.detail.as_str().into());
    add("died_at", json_time(letter.died_at));
    add("attempts", letter.attempts.into());
    add("history", serde_json::to_value(&letter.history)?);
    if let Some(Message::Electron(electron)) = &letter.message {
        add("sender", json!(electron.sender.as_ref().map(|sender| sender.as_str())));
        add("parent", json!(electron.parent.as_ref().map(|parent| parent.id.to_string())));
    }
    add("payload_bytes", letter.payload_bytes.into());
    if let Some(payload) = payload(letter) {
        add_payload(&mut object, "payload", &payload);
    }
    Ok(object.into())
}

fn print(letter: &DeadLetter) -> anyhow::Result<()> {
    say(format_args!("id        {}", letter.id))?;
    say(format_args!("atom      {}", letter.atom.as_ref().map_or("-", |atom| atom.as_str())))?;
    say(format_args!("cause     {}", letter.cause().key()))?;
    say(format_args!("reason    {}", one_line(&letter.reason.to_string())))?;
    if !letter.detail.is_empty() {
        say(format_args!("detail    {}", one_line(&letter.detail)))?;
    }
    say(format_args!("died at   {}", time(letter.died_at)))?;
    if let Some(Message::Electron(electron)) = &letter.message {
        if let Some(sender) = &electron.sender {
            say(format_args!("sent by   {sender}"))?;
        }
        if let Some(parent) = &electron.parent {
            say(format_args!("child of  {}", parent.id))?;
        }
    }
    say(format_args!("attempts  {}", letter.attempts))?;
    for failure in &letter.history {
        say(format_args!("          {}", one_line(&failure.to_string())))?;
    }
    if let Some(payload) = payload(letter) {
        say(format_args!("payload   {} bytes", letter.payload_bytes))?;
        say(pretty(&payload))?;
    }
    Ok(())
}
