//! The queues of one world, shared by all sessions in it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use rustc_hash::FxHashMap;
use tokio::{sync::Notify, time::Instant};

use super::session::MemorySession;
use crate::{Address, AtomId, Envelope, Limits, Message, ReplyTo, ResultsId, SendError};

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
    /// Kept back until then; whoever takes from here looks for what is due.
    pub(super) delayed: BTreeMap<(Instant, u64), Stored>,
    delays: u64,
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
    /// Since when it has waited for its first delivery.
    pub(super) since: Instant,
}

impl Stored {
    fn new(message: Message) -> Self {
        Self { message, redeliveries: 0, since: Instant::now() }
    }
}

impl Queue {
    /// Rings for all, each time for another one first: who hears it first is served first.
    pub(super) fn ring(&mut self) {
        if self.subscribers.len() > 1 {
            self.subscribers.rotate_left(1);
        }
        for bell in &self.subscribers {
            bell.notify_one();
        }
    }

    pub(super) fn len(&self) -> usize {
        self.ready.len() + self.delayed.len()
    }

    fn put(&mut self, stored: Stored, delay: Duration) {
        // A delay beyond what the clock can tell never ends; there is none so long in practice.
        let due = (!delay.is_zero()).then(|| stored.since.checked_add(delay)).flatten();
        match due {
            Some(due) => {
                self.delays += 1;
                self.delayed.insert((due, self.delays), stored);
            }
            None => self.ready.push_back(stored),
        }
        self.ring();
    }

    /// Makes ready what is due, and returns when there will be more.
    pub(super) fn ripen(&mut self) -> Option<Instant> {
        loop {
            let entry = self.delayed.first_entry()?;
            let due = entry.key().0;
            if due > Instant::now() {
                return Some(due);
            }
            self.ready.push_back(entry.remove());
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
            Address::Nodes => None,
        }
    }

    /// Puts a message into the inbox of everyone who reads one.
    fn put_for_all(&mut self, message: &Message) {
        for (name, queue) in &mut self.queues {
            let is_a_nodes = matches!(name, QueueName::Inbox(inbox) if !is_results(inbox));
            if is_a_nodes && !queue.subscribers.is_empty() {
                queue.put(Stored::new(message.clone()), Duration::ZERO);
            }
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
        if envelope.to == Address::Nodes {
            self.put_for_all(&envelope.message);
            return Ok(());
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
        queue.put(Stored::new(envelope.message), envelope.delay);
        Ok(())
    }
}

/// The name of a result address. No node has a blank in its name.
pub(super) fn result_address(id: &ResultsId) -> ReplyTo {
    ReplyTo::new(format!("results {id}"))
}

fn is_results(address: &ReplyTo) -> bool {
    address.as_str().contains(' ')
}

pub(super) fn check_size(message: &Message, limits: Limits) -> Result<(), SendError> {
    let bytes = match message {
        Message::Electron(electron) => electron.payload.body.len(),
        Message::Answer(answer) => answer.outcome.as_ref().map_or(0, |payload| payload.body.len()),
        // It is short, and nobody relies on it.
        Message::Cancel(_) => 0,
        Message::Unreadable(unreadable) => unreadable.wire.body.len(),
    };
    let bytes_max = limits.payload_bytes_max;
    if bytes > bytes_max {
        return Err(SendError::TooLarge { bytes, bytes_max });
    }
    Ok(())
}
