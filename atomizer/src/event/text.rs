//! Events as lines of text.

use std::fmt;

use super::{Event, EventKind};
use crate::AtomId;

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = format!("{} {}", humantime::format_rfc3339_millis(self.at), self.node);
        if let Some(conductor) = &self.conductor {
            line.push(' ');
            line.push_str(conductor.as_str());
        }
        // Texts of others may have more lines than one; an event has one.
        let kind = self.kind.to_string().replace(['\n', '\r'], " ");
        write!(f, "{line} {kind}")
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SessionOpened => f.write_str("session opened"),
            Self::OpenFailed { error, retry_in } => {
                write!(f, "failed to open a session: {error}; next try in {retry_in:.1?}")
            }
            Self::SessionLost { error } => write!(f, "session lost: {error}"),
            Self::ConductorGone { error } => write!(f, "conductor given up: {error}"),
            Self::Subscribed { atom: Some(atom) } => write!(f, "takes {atom}"),
            Self::Subscribed { atom: None } => f.write_str("takes answers"),
            Self::SubscriptionLost { atom, error } => {
                let source = atom.as_ref().map_or("the inbox", AtomId::as_str);
                write!(f, "subscription to {source} lost: {error}")
            }
            Self::AskedAgain { electrons } => {
                write!(f, "asks again for {electrons} answers that may be lost")
            }
            Self::AnswerDropped { electron } => {
                write!(f, "dropped an answer nobody waits for: {electron}")
            }
            Self::Unreadable { atom, reason } => {
                write!(f, "unreadable message for {atom}: {reason}")
            }
            Self::Renewed { atom } => write!(f, "made {atom} afresh"),
            Self::ResidentStarted { atom, attempt } => {
                write!(f, "resident {atom} began, start {attempt}")
            }
            Self::ResidentFailed { atom, failure, wait, .. } => {
                write!(f, "resident {atom} failed: {failure}; starts again in {wait:.1?}")
            }
            Self::ResidentEnded { atom, .. } => write!(f, "resident {atom} ended"),
            Self::Alive(presence) => presence.fmt(f),
            Self::EventsLost { events } => write!(f, "{events} events were not kept"),
            Self::Sent { electron, atom, parent: None } => write!(f, "sent {atom} {electron}"),
            Self::Sent { electron, atom, parent: Some(parent) } => {
                write!(f, "sent {atom} {electron}, child of {parent}")
            }
            Self::Critical { error } => write!(f, "critical: {error}"),
            Self::Draining => f.write_str("draining"),
            Self::Cancelling => f.write_str("cancelling"),
            Self::Aborting => f.write_str("aborting"),
            Self::Stopped => f.write_str("stopped"),
            Self::Other => f.write_str("something that a later version knows"),
            of_an_electron => of_an_electron.fmt_electron(f),
        }
    }
}

impl EventKind {
    fn fmt_electron(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(electron), Some(atom), Some(attempt)) = self.subject() else { return Ok(()) };
        let id = format_args!("{atom} {electron}");
        let nth = format_args!("attempt {attempt}");
        match self {
            Self::Received { redeliveries: 0, .. } => write!(f, "received {id}, {nth} is next"),
            Self::Received { redeliveries, .. } => {
                write!(f, "received {id} again, redelivery {redeliveries}, {nth} is next")
            }
            Self::Adopted { .. } => {
                write!(f, "received {id} again, which is here or has just ended, {nth}")
            }
            Self::Parked { .. } => write!(f, "parked {id}, {nth}"),
            Self::Suspected { lives, .. } => {
                write!(f, "suspects {id}, life {lives}, {nth} is next")
            }
            Self::Started { .. } => write!(f, "started {id}, {nth}"),
            Self::Progress { done, total: Some(total), .. } => {
                write!(f, "{id}, {nth}: {done} of {total} done")
            }
            Self::Progress { done, total: None, .. } => write!(f, "{id}, {nth}: {done} done"),
            Self::Blocking { .. } => write!(f, "{id}, {nth}, blocks its thread"),
            Self::Stuck { overdue, .. } => {
                write!(f, "{id}, {nth}, does not stop, {overdue:.1?} after its time limit")
            }
            Self::Retried { failure, wait, .. } => {
                write!(f, "retries {id} in {wait:.1?} after {failure}")
            }
            Self::Requeued { failure, wait, .. } => {
                write!(f, "requeued {id} for {wait:.1?} after {failure}")
            }
            Self::HandedOn { reason, .. } => write!(f, "handed on {id}: {reason}"),
            Self::Completed { took, unclaimed, .. } => {
                write!(f, "completed {id} in {took:.1?}, {nth}{}", claim(unclaimed.as_ref()))
            }
            Self::Failed { failure, dead, unclaimed, .. } => {
                let dead = if *dead { " (dead letter)" } else { "" };
                write!(f, "failed {id}: {failure}{dead}{}", claim(unclaimed.as_ref()))
            }
            Self::NotSettled { reason, .. } => write!(f, "not settled here: {id}: {reason}"),
            _ => Ok(()),
        }
    }
}

fn claim(unclaimed: Option<&String>) -> String {
    unclaimed.map(|reason| format!(" (unclaimed: {reason})")).unwrap_or_default()
}
