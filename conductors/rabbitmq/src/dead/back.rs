//! The way from the dead letters back to the queues of atoms.

use std::{collections::HashSet, time::Duration};

use atomizer::{
    Address as To, AtomId, Electron, Message, Payload, SendError, SessionError,
    wire::METADATA_BYTES_MAX,
};
use lapin::{Channel, options::ConfirmSelectOptions};
use tokio::time::{Instant, sleep_until};

use super::{
    DeadLetters, DeadLettersError, Progress, Requeue,
    publish::{self, NotSent, Outgoing},
    walk::Held,
};
use crate::{
    connect::plain,
    convert::Writing,
    declare::refusal,
    life::{REQUEST_TIMEOUT, close},
    opened::Opened,
};

/// The way back to the queues of atoms.
pub(super) struct Back {
    opened: Opened,
    channel: Channel,
    dead: DeadLetters,
    pub(super) window: usize,
    pub(super) pace: Pace,
    edited: Option<Payload>,
    /// Atoms whose queue is there.
    declared: HashSet<AtomId>,
}

impl Back {
    pub(super) async fn open(
        dead: &DeadLetters,
        options: Requeue,
        edited: Option<Payload>,
    ) -> Result<Self, DeadLettersError> {
        // A connection of its own: one that publishes may be blocked, and what is removed must get through.
        let opened = dead.open("sends dead letters back").await?;
        let selecting = async {
            let channel = opened.connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok(channel)
        };
        let channel = opened.life.bound(REQUEST_TIMEOUT, selecting).await;
        let lost = |error| DeadLettersError::interrupted(Progress::default(), error);
        Ok(Self {
            channel: channel.map_err(lost)?,
            opened,
            dead: dead.clone(),
            window: options.window.get(),
            pace: Pace { interval: options.interval, due: Instant::now() },
            edited,
            declared: HashSet::new(),
        })
    }

    /// Publishes a window to the queues of its atoms, and waits for the confirms.
    pub(super) async fn send(
        &mut self,
        window: &[Held],
    ) -> Result<Vec<Result<(), NotSent>>, SessionError> {
        let mut results = Vec::with_capacity(window.len());
        let mut batch = Vec::new();
        for held in window {
            let outgoing = match held.letter.revive() {
                Some(electron) => self.outgoing(electron),
                None => Err(NotSent::Never("it is no electron".to_owned())),
            };
            if outgoing.is_ok()
                && let Some(atom) = &held.letter.atom
            {
                self.declare(atom).await?;
            }
            results.push(outgoing.map(|outgoing| batch.push(outgoing)));
        }
        let mut sent = publish::all(&self.channel, &self.opened.life, batch).await.into_iter();
        let unknown = || Err(NotSent::NotNow("it was not answered".to_owned()));
        for result in results.iter_mut().filter(|result| result.is_ok()) {
            *result = sent.next().unwrap_or_else(unknown);
        }
        Ok(results)
    }

    fn outgoing(&self, mut electron: Electron) -> Result<Outgoing, NotSent> {
        let never = |error: &dyn std::error::Error| NotSent::Never(error.to_string());
        let route = self.dead.topology.route(&To::Atom(electron.atom.clone()));
        let route = route.map_err(|error| never(&error))?;
        if let Some(payload) = &self.edited {
            let (bytes, bytes_max) = (payload.body.len(), self.dead.limits.payload_bytes_max);
            if bytes > bytes_max {
                return Err(never(&SendError::TooLarge { bytes, bytes_max }));
            }
            electron.payload = payload.clone();
        }
        let mut writing = Writing::default();
        let body = Message::from(electron).write(&mut writing);
        let properties = writing.finish(METADATA_BYTES_MAX).map_err(|error| never(&error))?;
        Ok(Outgoing { exchange: route.exchange, key: route.key, properties, body })
    }

    /// Makes sure that the queue of an atom is there, as far as this user may: whether it takes what is sent
    /// is seen then.
    async fn declare(&mut self, atom: &AtomId) -> Result<(), SessionError> {
        if self.declared.contains(atom) {
            return Ok(());
        }
        let topology = &self.dead.topology;
        let declaring = async { Ok(topology.declare_atom(&self.opened.connection, atom).await) };
        match self.opened.life.bound(REQUEST_TIMEOUT, declaring).await? {
            Ok(()) => {}
            Err(error) if refusal(&error).is_some() => {
                tracing::debug!(%atom, reason = plain(&error), "a queue is used as it is");
            }
            Err(error) => return Err(SessionError::lost(plain(&error))),
        }
        self.declared.insert(atom.clone());
        Ok(())
    }

    pub(super) async fn close(&self) {
        self.opened.life.end_with(SessionError::Closed);
        close(&self.opened.connection).await;
    }
}

/// How fast electrons are sent back.
pub(super) struct Pace {
    interval: Option<Duration>,
    /// When the next may go.
    due: Instant,
}

impl Pace {
    /// Waits until at least one may go, and returns how many may, at most `most`.
    ///
    /// What a slow broker held up is made up for by one window at the most.
    pub(super) async fn take(&mut self, most: usize) -> usize {
        let Some(interval) = self.interval.filter(|interval| !interval.is_zero()) else {
            return most;
        };
        sleep_until(self.due).await;
        let late = self.due.elapsed().as_nanos() / interval.as_nanos();
        let taken = most.min(usize::try_from(late).unwrap_or(most).saturating_add(1));
        self.due += interval * u32::try_from(taken).unwrap_or(u32::MAX);
        if taken == most {
            self.due = self.due.max(Instant::now());
        }
        taken
    }
}
