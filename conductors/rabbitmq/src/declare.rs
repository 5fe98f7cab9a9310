//! Makes sure that something is there, and says what a refusal means.

use std::{collections::BTreeMap, sync::Arc};

use atomizer::SendError;
use lapin::{
    Channel, Connection, ErrorKind,
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{AMQPValue, ShortString},
};

use crate::{
    connect::plain,
    life::{Life, REPLY_SUCCESS, REQUEST_TIMEOUT},
    topology::{self, TopologyMode},
};

/// What to do about something that is not there where nothing is made.
pub(crate) const NOT_MADE: &str =
    "TopologyMode::Passive makes nothing; docs/topology.md says what is to be there";

/// Declares on the consuming connection of a session: the other one may be blocked.
#[derive(Clone, Debug)]
pub(crate) struct Declarer {
    pub(crate) connection: Arc<Connection>,
    pub(crate) life: Life,
    pub(crate) mode: TopologyMode,
}

impl Declarer {
    /// Makes sure that something is there.
    pub(crate) async fn declare(
        &self,
        declare: impl AsyncFnOnce(&Channel) -> lapin::Result<()>,
    ) -> Result<(), SendError> {
        self.make(on_own_channel(&self.connection, declare)).await
    }

    /// Makes sure that something is there, and says what a refusal means.
    pub(crate) async fn make(
        &self,
        making: impl Future<Output = lapin::Result<()>>,
    ) -> Result<(), SendError> {
        let made = self.life.bound(REQUEST_TIMEOUT, async { Ok(making.await) }).await;
        let Err(error) = made.map_err(|error| SendError::Unknown(error.to_string()))? else {
            return Ok(());
        };
        let reason = plain(&error);
        match refusal(&error) {
            Some(AMQPSoftError::NOTFOUND) if self.mode == TopologyMode::Passive => {
                Err(SendError::Refused(format!("{reason}: {NOT_MADE}")))
            }
            Some(AMQPSoftError::ACCESSREFUSED | AMQPSoftError::PRECONDITIONFAILED) => {
                Err(SendError::Refused(reason))
            }
            _ => Err(SendError::Unknown(reason)),
        }
    }
}

/// Declares a queue. One that is there with other arguments is used as it is when that is safe, and reported.
///
/// A broker names one argument at a time, and what makes a queue unsafe comes late: so it is asked again, with
/// what it has named as it has it, until there is nothing left to name.
pub(crate) async fn declare_queue(
    connection: &Connection,
    name: &str,
    arguments: BTreeMap<ShortString, AMQPValue>,
) -> lapin::Result<()> {
    for reason in differences(connection, name, arguments).await? {
        tracing::warn!(name, reason, "a queue is used that is not as it should be");
    }
    Ok(())
}

/// Declares a queue, and returns how one that is there differs, as long as nothing is lost by it.
///
/// Each difference may be harmless by itself, and all of them together not: what is there is looked at once more when
/// all of it is known.
pub(crate) async fn differences(
    connection: &Connection,
    name: &str,
    mut arguments: BTreeMap<ShortString, AMQPValue>,
) -> lapin::Result<Vec<String>> {
    let mut differences = Vec::new();
    let mut harmful = Vec::new();
    for _ in 0..DRIFTS_MAX {
        let wanted = arguments.clone();
        let ask = async |channel: &Channel| topology::declare(channel, name, wanted).await;
        let Err(error) = on_own_channel(connection, ask).await else { break };
        let reason = plain(&error);
        let drift = match refusal(&error) {
            Some(AMQPSoftError::PRECONDITIONFAILED) => Drift::read(&reason),
            _ => None,
        };
        let Some(drift) = drift.filter(Drift::is_safe) else { return Err(error) };
        let argument = drift.argument.to_owned();
        let understood = match drift.current {
            Some(Current::None) => arguments.remove(drift.argument).is_some(),
            Some(Current::Value(value)) => {
                arguments.insert(drift.argument.into(), value);
                true
            }
            None => false,
        };
        differences.push(reason);
        harmful.push((argument, error));
        if !understood {
            break;
        }
    }
    harmful.retain(|(argument, _)| drops(argument, &arguments));
    harmful.pop().map_or(Ok(differences), |(_, error)| Err(error))
}

/// Whether a queue with these arguments drops for good what this one of them limits.
fn drops(argument: &str, arguments: &BTreeMap<ShortString, AMQPValue>) -> bool {
    let is = |name: &str, value: &str| matches!(arguments.get(name), Some(AMQPValue::LongString(text)) if text.as_bytes() == value.as_bytes());
    match argument {
        // What is in a stream is to go when it is too long.
        "x-max-length" | "x-max-length-bytes" => {
            !is("x-overflow", "reject-publish") && !is("x-queue-type", "stream")
        }
        "x-delivery-limit" => !arguments.contains_key("x-dead-letter-exchange"),
        _ => false,
    }
}

/// More than there are arguments.
const DRIFTS_MAX: usize = 32;

/// One argument that is not as it was asked for, in the broker's words.
#[derive(Debug, PartialEq)]
struct Drift<'a> {
    argument: &'a str,
    was_asked_for: bool,
    /// What it is; `None` when that is not understood.
    current: Option<Current>,
}

#[derive(Debug, PartialEq)]
enum Current {
    None,
    Value(AMQPValue),
}

impl<'a> Drift<'a> {
    fn read(reason: &'a str) -> Option<Self> {
        let (_, rest) = reason.split_once("inequivalent arg '")?;
        let (argument, rest) = rest.split_once('\'')?;
        let (rest, current) = rest.rsplit_once(" but current is ")?;
        let was_asked_for = !rest.ends_with("received none");
        Some(Self { argument, was_asked_for, current: Current::read(current) })
    }

    /// Whether nothing is lost by it alone: neither the queue nor what is in it goes away by itself or with a node.
    fn is_safe(&self) -> bool {
        match self.argument {
            // Those of an inbox may differ, but no other queue may expire.
            "x-expires" => self.was_asked_for,
            "durable" | "auto_delete" | "exclusive" | "x-queue-type" | "x-message-ttl" => false,
            _ => true,
        }
    }
}

impl Current {
    fn read(text: &str) -> Option<Self> {
        if text == "none" {
            return Some(Self::None);
        }
        let text = text.strip_suffix('\'')?;
        // The name of an exchange stands without its type.
        let (value, kind) = match text.strip_prefix("the value '") {
            Some(typed) => typed.split_once("' of type '")?,
            None => (text.strip_prefix('\'')?, "longstr"),
        };
        Some(Self::Value(match kind {
            "longstr" => AMQPValue::LongString(value.into()),
            "bool" => AMQPValue::Boolean(value == "true"),
            _ => AMQPValue::LongLongInt(value.parse().ok()?),
        }))
    }
}

/// Tells what is not there from what cannot be told.
pub(crate) fn found<T>(asked: lapin::Result<T>) -> lapin::Result<Option<T>> {
    match asked {
        Ok(there) => Ok(Some(there)),
        Err(error) if refusal(&error) == Some(AMQPSoftError::NOTFOUND) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The reply code, when a request was refused at the cost of its channel.
pub(crate) fn refusal(error: &lapin::Error) -> Option<AMQPSoftError> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(code) => Some(code.clone()),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

/// Runs a request on a channel of its own: one that is refused costs the channel (AMQP 0-9-1, 2.2.4).
pub(crate) async fn on_own_channel<T>(
    connection: &Connection,
    request: impl AsyncFnOnce(&Channel) -> lapin::Result<T>,
) -> lapin::Result<T> {
    let channel = connection.create_channel().await?;
    let result = request(&channel).await?;
    channel.close(REPLY_SUCCESS, "done".into()).await?;
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(argument: &str, received: &str, current: &str) -> (bool, Option<Current>) {
        let reason = format!(
            "PRECONDITION_FAILED - inequivalent arg '{argument}' for queue 'q' in vhost '/': received \
             {received} but current is {current}"
        );
        let drift = Drift::read(&reason).unwrap();
        assert_eq!(drift.argument, argument);
        (drift.is_safe(), drift.current)
    }

    #[test]
    fn what_a_broker_says_of_an_argument_is_understood() {
        let limit = Some(Current::Value(AMQPValue::LongLongInt(20)));
        assert_eq!(
            read(
                "x-delivery-limit",
                "the value '100000' of type 'long'",
                "the value '20' of type 'signedint'"
            ),
            (true, limit)
        );
        assert_eq!(
            read("x-dead-letter-exchange", "the value 'a' of type 'longstr'", "none"),
            (true, Some(Current::None))
        );
        let elsewhere = Some(Current::Value(AMQPValue::LongString("elsewhere".into())));
        assert_eq!(read("x-dead-letter-exchange", "'a'", "'elsewhere'"), (true, elsewhere));
        assert!(!read("durable", "'true'", "'false'").0);
        assert!(!read("x-expires", "none", "the value '1000' of type 'long'").0);
        assert!(read("x-expires", "the value '1' of type 'long'", "none").0);
        assert!(!read("x-queue-type", "the value 'quorum' of type 'longstr'", "none").0);
        assert_eq!(Drift::read("PRECONDITION_FAILED - something else"), None);
    }

    #[test]
    fn a_limit_is_harmless_where_what_exceeds_it_is_declined_or_a_dead_letter() {
        let with = |arguments: &[(&str, &str)]| {
            let all = arguments.iter();
            all.map(|&(name, value)| (name.into(), AMQPValue::LongString(value.into()))).collect()
        };
        let plain = with(&[("x-queue-type", "quorum")]);
        let kept =
            with(&[("x-overflow", "reject-publish"), ("x-dead-letter-exchange", "elsewhere")]);
        let oldest = with(&[("x-overflow", "drop-head"), ("x-dead-letter-exchange", "elsewhere")]);
        for argument in ["x-max-length", "x-max-length-bytes"] {
            assert!(drops(argument, &plain) && drops(argument, &oldest) && !drops(argument, &kept));
            assert!(!drops(argument, &with(&[("x-queue-type", "stream")])));
        }
        let argument = "x-delivery-limit";
        assert!(drops(argument, &plain) && !drops(argument, &kept) && !drops(argument, &oldest));
        assert!(!drops("x-overflow", &plain), "there is no limit");
    }
}
