//! What is held for long is parked: it takes up no place in a window, and no broker loses its patience with it.
//!
//! That is what has begun and goes on beyond [`Limits::hold_max`](crate::Limits::hold_max), and parents that wait
//! while the window is full: their children could not be delivered. What has not begun in that time goes back to
//! the end of its queue.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    Step, Worker,
    held::{Began, Begun, Held},
};
use crate::{
    Electron, ElectronId, EventKind,
    claim::{Claim, park},
    life::Fact,
    run::RunId,
    settle::Why,
};

impl Worker {
    /// Until when a delivery may be held that came now.
    pub(super) fn hold_until(&self, now: Instant) -> Option<Instant> {
        now.checked_add(self.asker.link.limits().hold_max)
    }

    /// Notes that a run waits without a permit.
    pub(super) fn on_waits(&mut self, electron: ElectronId, run: RunId) {
        if let Some(Begun::Running(running)) = self.begun.get_mut(&electron)
            && running.run.id == run
            && !running.listed
        {
            running.listed = true;
            self.parents.push_back((electron, run));
        }
        // Those that have ended since are in there too.
        if self.parents.len() > 2 * self.begun.len() + 64 {
            let begun = &self.begun;
            self.parents.retain(|(electron, run)| match begun.get(electron) {
                Some(Begun::Running(running)) => running.run.id == *run,
                _ => false,
            });
        }
    }

    /// Parks parents that wait while nothing more can be delivered, the oldest first.
    pub(super) fn park_parents(&mut self) {
        while !self.parents.is_empty() && self.is_full() {
            let Some((electron, run)) = self.parents.pop_front() else { return };
            if let Some(Begun::Running(running)) = self.begun.get_mut(&electron)
                && running.run.id == run
            {
                running.listed = false;
                if running.run.slot.is_waiting() {
                    self.park(electron);
                }
            }
        }
    }

    /// Whether all that is out is begun or on its way, so that nothing is left to begin, nor can be delivered.
    fn is_full(&self) -> bool {
        let waiting = self.suspects.len() + self.avoiding.len() + usize::from(self.turn.is_some());
        let leaving = self.asked.len().saturating_sub(self.parking);
        self.ready.is_empty() && waiting + leaving + self.out >= self.atom.window.get()
    }

    /// Parks each delivery of an electron.
    fn park(&mut self, id: ElectronId) {
        let Some(begun) = self.begun.get_mut(&id) else { return };
        let held = begun.held_mut();
        self.out -= held.out();
        let left = held.left(Instant::now());
        let Held { electron, ticket, adopted, .. } = held;
        let adopted = adopted.iter_mut().map(|(electron, claim)| (&*electron, claim));
        for (electron, claim) in adopted.chain(ticket.as_mut().map(|claim| (&*electron, claim))) {
            let Some((ticket, result)) = claim.park() else { continue };
            let electron = with_deadline(electron, left);
            let asker = self.asker.clone();
            self.parking += 1;
            self.asked.push(Box::pin(async move {
                // An error says that it is not held any more: its ticket is dropped, and so gives it back.
                drop(result.send(park(&asker, ticket, electron).await));
                Step::Parked(id)
            }));
        }
    }

    pub(super) fn on_parked(&mut self, id: ElectronId) {
        self.parking -= 1;
        let Some(begun) = self.begun.get_mut(&id) else { return };
        let held = begun.held_mut();
        self.out -= held.out();
        let was_parked = held.ticket.as_ref().is_some_and(Claim::is_parked);
        held.claims_mut().for_each(Claim::update);
        self.out += held.out();
        if !was_parked && held.ticket.as_ref().is_some_and(Claim::is_parked) {
            let attempt = held.electron.attempts.saturating_add(1);
            self.metrics.parked.increment(1);
            self.emit(|atom| EventKind::Parked { electron: id, atom, attempt });
        }
    }

    /// Parks what has begun, and puts back what has not, when it has been held for too long.
    pub(super) fn let_go_of_late(&mut self, now: Instant) {
        let mut late = Vec::new();
        for (id, begun) in &mut self.begun {
            if begun.held_mut().claims_mut().any(|claim| claim.is_late(now)) {
                late.push(*id);
            }
            // Parents whose parking failed, or that waited when they were looked at last.
            if let Begun::Running(running) = begun
                && !running.listed
                && running.held.out() > 0
                && running.run.slot.is_waiting()
            {
                running.listed = true;
                self.parents.push_back((*id, running.run.id));
            }
        }
        late.into_iter().for_each(|id| self.park(id));

        let is_late = |held: &Held| held.ticket.as_ref().is_some_and(|claim| claim.is_late(now));
        // What was delivered before goes back as such.
        self.suspects.retain(|held| !is_late(held));
        self.avoiding.retain(|held| !is_late(held));
        if self.ready.iter().any(is_late) {
            let ready = std::mem::take(&mut self.ready);
            let (late, ready): (VecDeque<_>, _) = ready.into_iter().partition(is_late);
            self.ready = ready;
            for mut held in late {
                held.on(Fact::Late);
                let reason = "it waited too long for a permit".to_owned();
                self.put_back(held, Began::now(), Duration::ZERO, &Why::Late(reason));
            }
        }
    }
}

/// An electron as it is to be given back: with what is left of its deadline.
fn with_deadline(electron: &Arc<Electron>, left: Option<Duration>) -> Arc<Electron> {
    let mut electron = Arc::clone(electron);
    if electron.deadline.is_some() {
        Arc::make_mut(&mut electron).deadline = left;
    }
    electron
}
