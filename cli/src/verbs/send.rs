//! `atomizer send`.

use std::time::Duration;

use atomizer::{AtomId, CallError, Census, Electron, ElectronId, Policy};
use atomizer_programs::{Exit, say};
use atomizer_rabbitmq::Counted;
use serde_json::json;

use crate::{input, shared::Shared};

/// Leaves an electron for whoever serves its atom, and prints its id.
///
/// When the id is printed, the electron is safe: a majority of the brokers has it on disk. Nobody waits for an answer; one
/// that fails for good becomes a dead letter.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  atomizer send double 21
  atomizer send mail '{\"to\": \"ann@example.org\"}' --after 10m --retry 3
  atomizer send thumbnail @request.json
  curl -s https://example.org/order.json | atomizer send order -

Prints the electron's id; with --json: {\"id\", \"atom\"}.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    electron: Description,
    /// Have it begun when so long a time is over and not before, as in 90s or 2h; at most 30days.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    after: Option<Duration>,
    /// Send it under this id: again, where it is not known whether it was sent [default: a new one].
    #[arg(long, value_name = "UUID")]
    id: Option<ElectronId>,
}

/// An electron, as it is typed.
#[derive(Debug, clap::Args)]
pub(crate) struct Description {
    /// The atom to run, as in montecarlo.toss.
    #[arg(value_name = "ATOM", value_parser = |text: &str| AtomId::try_new(text))]
    pub(crate) atom: AtomId,
    /// Its input: JSON, - for stdin, or @FILE.
    #[arg(value_name = "JSON", default_value = "null", allow_negative_numbers = true)]
    input: String,
    /// What the input is, when it is no JSON, as in text/plain.
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,
    /// After a failure try again on the same node, so many times [default: what the atom says].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    retry: Option<u32>,
    /// Then try on other nodes, so many times [default: what the atom says].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    requeue: Option<u32>,
    /// How long one attempt may take, as in 30s [default: what the atom says].
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    time_limit: Option<Duration>,
    /// Make what is missing on the broker: the queue of an atom that no node has served yet, and what delays need.
    #[arg(long)]
    pub(crate) declare: bool,
}

impl Description {
    /// Reads the input, and makes the electron.
    pub(crate) fn electron(&self, id: Option<ElectronId>) -> anyhow::Result<Electron> {
        let payload = input::read(&self.input, self.content_type.as_deref())?;
        let id = id.unwrap_or_else(ElectronId::new);
        let mut electron = Electron::with_id(id, self.atom.clone(), payload);
        electron.policy = self.policy();
        electron.time_limit = self.time_limit;
        Ok(electron)
    }

    /// What follows a failure, if that is said.
    pub(crate) fn policy(&self) -> Option<Policy> {
        let said = self.retry.is_some() || self.requeue.is_some();
        let (retry, requeue) = (self.retry.unwrap_or_default(), self.requeue.unwrap_or_default());
        said.then(|| Policy::retry(retry).then_requeue(requeue))
    }

    /// Looks whether anybody will take it, before anything is sent: an atom that is misspelt has no queue, and would
    /// get one for ever.
    pub(crate) async fn check(&self, shared: &Shared) -> anyhow::Result<()> {
        let (atom, queue) = (&self.atom, shared.queue_of(&self.atom));
        match shared.census(atom).await? {
            Counted::NoQueue if self.declare => {
                eprintln!(
                    "warning: no node has served {atom} so far: it gets a queue, {queue}, and waits there"
                );
            }
            Counted::NoQueue => anyhow::bail!(
                "there is no queue {queue}: no node has served {atom} so far. Is it spelt right, and is a node running? \
                 Nothing was sent; --declare makes the queue, and what is sent waits there"
            ),
            Counted::Queue(Census { subscribers: 0, ready, .. }) => {
                eprintln!(
                    "warning: nobody serves {atom} at the moment: it waits in {queue}, where {ready} wait already"
                );
            }
            // Whoever may not look may send all the same.
            _ => {}
        }
        Ok(())
    }
}

pub(crate) async fn run(shared: &Shared, arguments: Arguments) -> anyhow::Result<Exit> {
    let electron = arguments.electron.electron(arguments.id)?;
    arguments.electron.check(shared).await?;
    let node = shared.node(arguments.electron.declare).await?;
    let after = arguments.after.unwrap_or_default();
    let sent = node.send_electron_after(after, electron).await;
    node.drain().await?;
    let id = sent.map_err(explain)?;
    if shared.json {
        say(json!({ "id": id.to_string(), "atom": arguments.electron.atom.as_str() }))?;
    } else {
        say(id)?;
    }
    Ok(Exit::Done)
}

/// Says what can be done about an electron that was not sent.
pub(crate) fn explain(error: CallError) -> anyhow::Error {
    let advice = match &error {
        CallError::NotSent { id, source } => match source {
            atomizer::SendError::Unknown(_) => {
                Some(format!("it may have been sent; send it again with --id {id}"))
            }
            atomizer::SendError::Refused(reason) if reason.contains("NOT_FOUND") => {
                Some("--declare makes what is missing".to_owned())
            }
            _ => None,
        },
        _ => None,
    };
    let error = anyhow::Error::new(error);
    match advice {
        Some(advice) => anyhow::anyhow!("{error:#}; {advice}"),
        None => error,
    }
}
