//! What a worker holds of one electron.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::Instant,
};

use crate::{
    Electron, ElectronId, Failure, FailureKind, Parent,
    cancel::Cancelled,
    claim::Claim,
    clock,
    life::{Fact, State},
    run::Run,
    settle::Spent,
};

/// An electron, with the right and the duty to settle it.
pub(super) struct Held {
    pub(super) electron: Arc<Electron>,
    pub(super) state: State,
    /// None once it was taken for good: at most once; and when it is inline.
    pub(super) ticket: Option<Claim>,
    /// Its parent handed it over: it was in no queue.
    pub(super) inline: bool,
    /// Deliveries of the same electron that came while it was here: after its session was lost, or because it
    /// was sent twice. One run answers for all, each as it asks.
    pub(super) adopted: Vec<(Arc<Electron>, Claim)>,
    /// When nobody wants it any more.
    pub(super) deadline: Option<Instant>,
    /// When it was sent, or received as far as is known here; none once it has begun.
    pub(super) sent: Option<Instant>,
    /// Its turn as a suspect.
    pub(super) alone: Option<OwnedSemaphorePermit>,
}

impl Held {
    /// Whether this copy asks the same. A later life of a parent asks its children under the same ids, but not in the
    /// same order if that comes from elsewhere, such as a directory.
    pub(super) fn is_asked_by(&self, copy: &Electron) -> bool {
        self.electron.payload == copy.payload
    }

    /// Notes that it is wanted until `deadline` by another, too: an earlier life of its parent may have had less time.
    pub(super) fn extend(&mut self, deadline: Option<Instant>) {
        self.deadline = later(self.deadline, deadline);
    }

    /// Takes in another delivery of the same.
    pub(super) fn adopt(&mut self, electron: Arc<Electron>, claim: Claim) {
        // What an earlier session delivered went back when it ended.
        let epoch = claim.epoch();
        let is_gone = |held: &Claim| held.epoch() != epoch || held.is_lost();
        self.adopted.retain(|(_, held)| !is_gone(held));
        match &mut self.ticket {
            Some(held) if is_gone(held) => {
                *held = claim;
                self.answer_to(&electron);
            }
            _ => self.adopted.push((electron, claim)),
        }
    }

    /// Has it answered to who asked for this copy of it: its parent may have begun anew on another node.
    pub(super) fn answer_to(&mut self, copy: &Electron) {
        let Electron { reply_to, correlation_id, sender, parent, .. } = copy;
        let held = &self.electron;
        let round = |parent: &Option<Parent>| parent.map_or(0, |parent| parent.round);
        if held.sender == *sender && round(parent) < round(&held.parent) {
            // It was asked before this one, and is not waited for any more.
            return;
        }
        let same = (&held.reply_to, &held.correlation_id, &held.sender, &held.parent)
            == (reply_to, correlation_id, sender, parent);
        if !same {
            let held = Arc::make_mut(&mut self.electron);
            held.reply_to.clone_from(reply_to);
            held.correlation_id.clone_from(correlation_id);
            held.sender.clone_from(sender);
            held.parent = *parent;
        }
    }

    pub(super) fn claims_mut(&mut self) -> impl Iterator<Item = &mut Claim> {
        self.ticket.iter_mut().chain(self.adopted.iter_mut().map(|(_, claim)| claim))
    }

    /// How many of its deliveries count against the window.
    pub(super) fn out(&self) -> usize {
        let adopted = self.adopted.iter().filter(|(_, claim)| claim.is_delivered()).count();
        adopted + usize::from(self.ticket.as_ref().is_some_and(Claim::is_delivered))
    }

    /// Whether nobody wants it any more, though its deadline is not over.
    pub(super) fn is_cancelled(&self, cancelled: &Cancelled) -> bool {
        let adopted = self.adopted.iter().map(|(electron, _)| electron);
        cancelled.contains(&self.electron) && { adopted }.all(|adopted| cancelled.contains(adopted))
    }

    /// Moves on in its life.
    pub(super) fn on(&mut self, fact: Fact) -> State {
        let next = self.state.next(fact);
        self.state = next.unwrap_or_else(|| unreachable!("{fact:?} in {:?}", self.state));
        self.state
    }

    pub(super) fn left(&self, now: Instant) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(now))
    }

    /// Each delivery, to be settled.
    pub(super) fn deliveries(self) -> impl Iterator<Item = (Arc<Electron>, Option<Claim>)> {
        let adopted = self.adopted.into_iter().map(|(electron, claim)| (electron, Some(claim)));
        adopted.chain([(self.electron, self.ticket)])
    }

    pub(super) fn is_expired(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }
}

/// The later of two deadlines; none is later than any.
pub(super) fn later(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    Some(one?.max(other?))
}

pub(super) enum Begun {
    Running(Running),
    Pausing { held: Held, failure: Failure, until: Instant },
}

impl Begun {
    pub(super) fn held(&self) -> &Held {
        let (Self::Running(Running { held, .. }) | Self::Pausing { held, .. }) = self;
        held
    }

    pub(super) fn held_mut(&mut self) -> &mut Held {
        let (Self::Running(Running { held, .. }) | Self::Pausing { held, .. }) = self;
        held
    }
}

pub(super) struct Running {
    pub(super) held: Held,
    pub(super) began: Began,
    /// When it is stopped, and what for.
    pub(super) limit: Option<(Instant, FailureKind)>,
    pub(super) run: Run,
    /// How often it had been polled at the last tick.
    pub(super) polls: u32,
    pub(super) told: bool,
    /// It is among the parents that may be parked.
    pub(super) listed: bool,
    /// Told when it is over, if its parent lent it its permit.
    pub(super) over: Option<oneshot::Sender<()>>,
}

impl Running {
    /// Tells the parent that its permit is free. What came of the run is on its way to it.
    pub(super) fn tell_over(over: Option<oneshot::Sender<()>>) {
        if let Some(over) = over {
            // An error says that the parent does not wait any more.
            over.send(()).ok();
        }
    }
}

pub(super) struct Overdue {
    pub(super) electron: ElectronId,
    pub(super) attempt: u32,
    pub(super) since: Instant,
    pub(super) told: bool,
    /// It counts towards what the node bears.
    pub(super) counted: bool,
    pub(super) run: Run,
}

/// A moment on both clocks: one to tell people, one to measure with.
#[derive(Clone, Copy)]
pub(super) struct Began {
    pub(super) at: SystemTime,
    pub(super) instant: Instant,
}

impl Began {
    pub(super) fn now() -> Self {
        Self { at: clock::now(), instant: Instant::now() }
    }

    pub(super) fn spent(self, now: Instant) -> Spent {
        Spent { at: self.at, took: now.saturating_duration_since(self.instant) }
    }
}
