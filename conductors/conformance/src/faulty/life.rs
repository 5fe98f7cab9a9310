//! One life of a session, and what it has handed out.
//!
//! It hands out tickets of its own and keeps those of the session beneath: so it can end by itself, whoever
//! still has a ticket.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use atomizer::{Epoch, Release, Session, SessionError, SettleError, Ticket};
use tokio::sync::watch;

/// What of a session its subscriptions and its faults share.
pub(super) struct Life {
    /// Gone when this life was ended by a fault.
    inner: Mutex<Option<Arc<dyn Session>>>,
    ended: watch::Sender<Option<SessionError>>,
    epoch: Epoch,
    held: Arc<Held>,
}

/// The tickets of the session beneath. Its own allocation, for ours must not keep the session alive.
#[derive(Default)]
struct Held {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    ended: bool,
    channels: u32,
    channels_ended: BTreeSet<u32>,
    keys: u64,
    tickets: BTreeMap<(u32, u64), Ticket>,
}

/// The channel of what is parked: it outlives its subscription.
pub(super) const PARKED: u32 = 0;

impl Held {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn channel(&self) -> u32 {
        let mut table = self.lock();
        table.channels += 1;
        table.channels
    }

    fn take(&self, channel: u32, key: u64) -> Option<Ticket> {
        self.lock().tickets.remove(&(channel, key))
    }

    /// Gives back what came through a channel, the newest first: so it comes again in its old order.
    fn end_channel(&self, channel: u32) {
        let mut table = self.lock();
        table.channels_ended.insert(channel);
        let mut tickets = table.tickets.split_off(&(channel, 0));
        let mut others = tickets.split_off(&(channel + 1, 0));
        table.tickets.append(&mut others);
        drop(table);
        tickets.into_values().rev().for_each(drop);
    }

    /// Gives everything back.
    fn end(&self) {
        let mut table = self.lock();
        table.ended = true;
        let tickets = std::mem::take(&mut table.tickets);
        drop(table);
        tickets.into_values().rev().for_each(drop);
    }
}

impl Release for Held {
    fn release(&self, channel: u32, key: u64) {
        // Not under the lock, for it may do anything.
        drop(self.take(channel, key));
    }
}

impl Life {
    pub(super) fn new(inner: Arc<dyn Session>) -> Self {
        Self {
            inner: Mutex::new(Some(inner)),
            ended: watch::Sender::new(None),
            epoch: Epoch::unique(),
            held: Arc::default(),
        }
    }

    /// Ends it by a fault, unless it was before.
    pub(super) fn end(&self, error: &SessionError) -> bool {
        // First this: whoever finds a ticket stale finds the reason too.
        let first = self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert_with(|| error.clone());
            first
        });
        self.held.end();
        let inner = self.lock().take();
        drop(inner);
        first
    }

    pub(super) async fn ended(&self) -> SessionError {
        let mut ended = self.ended.subscribe();
        let error = ended.wait_for(Option::is_some).await.ok().and_then(|error| error.clone());
        error.unwrap_or(SessionError::Closed)
    }

    /// Returns why it was ended, if it was.
    pub(super) fn reason(&self) -> Option<SessionError> {
        self.ended.borrow().clone()
    }

    pub(super) fn error(&self) -> SessionError {
        self.reason().unwrap_or(SessionError::Closed)
    }

    /// Begins a channel: what one subscription delivers.
    pub(super) fn channel(&self) -> u32 {
        self.held.channel()
    }

    /// Gives back what came through a channel, and whatever else may come through it.
    pub(super) fn end_channel(&self, channel: u32) {
        self.held.end_channel(channel);
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.lock().as_ref().is_some_and(|inner| inner.is_blocked())
    }

    /// Calls the session beneath, for as long as this one lives.
    pub(super) async fn within<T, F>(
        &self,
        call: impl FnOnce(Arc<dyn Session>) -> F + Send,
    ) -> Result<T, SessionError>
    where
        F: Future<Output = T> + Send,
    {
        let inner = self.lock().clone().ok_or_else(|| self.error())?;
        tokio::select! {
            biased;
            error = self.ended() => Err(error),
            output = call(inner) => Ok(output),
        }
    }

    /// Puts one of our tickets in the place of one from beneath. There is none where the channel has ended.
    pub(super) fn wrap(&self, channel: u32, ticket: &mut Ticket) -> bool {
        let mut table = self.held.lock();
        if table.ended || table.channels_ended.contains(&channel) {
            return false;
        }
        let key = table.keys;
        table.keys += 1;
        let ours = Ticket::new(self.epoch, channel, key, Arc::clone(&self.held) as _);
        let theirs = std::mem::replace(ticket, ours);
        table.tickets.insert((channel, key), theirs);
        true
    }

    /// Returns the ticket from beneath for one of ours.
    pub(super) fn unwrap(&self, ticket: Ticket) -> Result<Ticket, SettleError> {
        if ticket.epoch() != self.epoch {
            return Err(SettleError::Stale);
        }
        let (channel, key) = ticket.take();
        self.held.take(channel, key).ok_or(SettleError::Stale)
    }

    /// Says why something was not settled. A ticket that comes back is wrapped.
    pub(super) fn unsettled(&self, channel: u32, error: SettleError) -> SettleError {
        match error {
            SettleError::NotSafe { mut ticket, failed } => match self.wrap(channel, &mut ticket) {
                true => SettleError::NotSafe { ticket, failed },
                false => SettleError::Stale,
            },
            error => error,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<dyn Session>>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.epoch.fmt(f)
    }
}
