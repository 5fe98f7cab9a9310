//! The queues of one world, shared by all sessions in it.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use rustc_hash::FxHashMap;
use tokio::sync::Notify;

use super::session::MemorySession;
use crate::{Address, AtomId, Envelope, Limits, Message, ReplyTo, SendError};

/// All queues. One lock is enough: it is held for a few moves at a time, and never over an `await`.
///
/// Locks are taken in this order: the list of lanes, the queues, one lane. Nothing that holds one of them
/// drops a ticket.
#[derive(Default)]
pub(super) struct Broker {
    state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) queues: FxHashMap<QueueName, Queue>,
    pub(super) sessions: Vec<Weak<MemorySession>>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) enum QueueName {
    Atom(AtomId),
    Inbox(ReplyTo),
    Dead,
}

#[derive(Default)]
pub(super) struct Queue {
    pub(super) ready: VecDeque<Stored>,
    /// One bell for each subscription; each is rung for whatever arrives.
    pub(super) subscribers: Vec<Arc<Notify>>,
    /// Whether it was said that nobody takes from here.
    pub(super) warned: bool,
    /// Rung when there may be room again.
    pub(super) room: Arc<Notify>,
}

pub(super) struct Stored {
    pub(super) message: Message,
    pub(super) redeliveries: u32,
}

impl Queue {
    pub(super) fn ring(&self) {
        for bell in &self.subscribers {
            bell.notify_one();
        }
    }
}

impl Broker {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // No change spans more than one push or pop: a panic cannot leave one half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Returns the queue an envelope goes to; an inbox that is gone has none.
    pub(super) fn queue(&mut self, to: &Address) -> Option<&mut Queue> {
        match to {
            Address::Atom(atom) => {
                Some(self.queues.entry(QueueName::Atom(atom.clone())).or_default())
            }
            Address::Reply(reply_to) => self.queues.get_mut(&QueueName::Inbox(reply_to.clone())),
            Address::DeadLetter(_) => Some(self.queues.entry(QueueName::Dead).or_default()),
        }
    }

    pub(super) fn put(
        &mut self,
        envelope: Envelope,
        limits: Limits,
    ) -> Result<(), (Envelope, SendError)> {
        // What is here already can be set aside, however large it is.
        if !matches!(envelope.to, Address::DeadLetter(_))
            && let Err(error) = check_size(&envelope.message, limits)
        {
            return Err((envelope, error));
        }
        let Some(queue) = self.queue(&envelope.to) else {
            let error = SendError::Unroutable(envelope.to.to_string());
            return Err((envelope, error));
        };
        if let Address::Atom(atom) = &envelope.to
            && queue.subscribers.is_empty()
            && !std::mem::replace(&mut queue.warned, true)
        {
            tracing::warn!(%atom, "nobody takes these electrons yet; is `.atom(..)` missing?");
        }
        queue.ready.push_back(Stored { message: envelope.message, redeliveries: 0 });
        queue.ring();
        Ok(())
    }
}

fn check_size(message: &Message, limits: Limits) -> Result<(), SendError> {
    let bytes = match message {
        Message::Electron(electron) => electron.payload.body.len(),
        Message::Answer(answer) => answer.outcome.as_ref().map_or(0, |payload| payload.body.len()),
        Message::Unreadable(unreadable) => unreadable.wire.body.len(),
    };
    let bytes_max = limits.payload_bytes_max;
    if bytes > bytes_max {
        return Err(SendError::TooLarge { bytes, bytes_max });
    }
    Ok(())
}
