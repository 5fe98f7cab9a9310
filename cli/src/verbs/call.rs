//! `atomizer call`.

use std::{convert::Infallible, future::pending, time::Duration};

use atomizer::{CallError, ContentType, Payload};
use atomizer_programs::{Exit, say, signals, write};
use serde_json::{Map, Value};
use tokio::time::sleep;

use super::send::{Description, explain};
use crate::{output::add_payload, shared::Shared};

/// Asks an atom, wherever it runs, and prints its output.
///
/// Who is no longer waited for is not begun, or stopped: --timeout travels with the electron. An interrupted call gives up
/// the answer, not the electron.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  atomizer call double 21
  atomizer call montecarlo '{\"tosses\": 1000000, \"batch\": 10000, \"seed\": 1}' --timeout 30s
  atomizer call report @request.json --json

Prints the output as it came, and a newline after JSON. A failure goes to stderr, and the exit code is 1.
With --json: {\"id\", \"atom\", \"content_type\", \"output\"} (\"output_text\" or \"output_base64\" for what is no JSON), or
{\"id\", \"atom\", \"failure\": {\"kind\", \"message\", \"node\", \"attempt\"}}.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    electron: Description,
    /// How long to wait for the answer, as in 30s or 5m.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

/// After how long somebody may wonder whether anything happens.
const STILL: Duration = Duration::from_secs(3);

pub(crate) async fn run(shared: &Shared, arguments: Arguments) -> anyhow::Result<Exit> {
    let Arguments { electron: described, timeout } = arguments;
    let electron = described.electron(None)?;
    described.check(shared).await?;
    let node = shared.node(described.declare).await?;
    let mut call = node.call_raw(electron.atom.clone(), electron.payload).deadline(timeout);
    if let Some(policy) = electron.policy {
        call = call.policy(policy);
    }
    if let Some(limit) = electron.time_limit {
        call = call.time_limit(limit);
    }
    let id = call.electron().map(|id| id.to_string()).unwrap_or_default();
    let answer = tokio::select! {
        answer = call.into_future() => answer,
        never = say_when_still(&id, timeout) => match never {},
        stopped = signals::stop() => {
            stopped?;
            eprintln!("interrupted: electron {id} goes its way, and its answer is dropped");
            node.drain().await?;
            return Ok(Exit::Interrupted);
        }
    };
    node.drain().await?;
    let mut object = Map::new();
    object.insert("id".to_owned(), id.as_str().into());
    object.insert("atom".to_owned(), described.atom.as_str().into());
    match answer {
        Ok(output) if shared.json => {
            add_payload(&mut object, "output", &output);
            say(Value::from(object))?;
        }
        Ok(output) => print(&output)?,
        Err(error) => {
            let CallError::Failed(failure) = error else { return Err(explain(error)) };
            if shared.json {
                object.insert("failure".to_owned(), serde_json::to_value(&failure)?);
                say(Value::from(object))?;
            }
            return Err(anyhow::Error::new(failure).context(format!("electron {id} failed")));
        }
    }
    Ok(Exit::Done)
}

/// Says that there is no answer yet, when it takes a while.
async fn say_when_still(id: &str, timeout: Duration) -> Infallible {
    sleep(STILL).await;
    let timeout = humantime::format_duration(timeout);
    eprintln!("no answer yet; electron {id} is waited for, up to {timeout}");
    pending().await
}

/// Prints bytes as they came; a document of JSON is a line.
fn print(output: &Payload) -> anyhow::Result<()> {
    let mut bytes = output.body.to_vec();
    if output.content_type == ContentType::Json {
        bytes.push(b'\n');
    }
    write(&bytes)
}
