//! Children that parents hand over to be run inline: begun at once with the parent's permit, and without a ticket.

use std::sync::Arc;

use super::{
    Worker,
    held::{Began, Begun, Held, Running},
};
use crate::{
    ElectronId,
    admission::Slot,
    inline::{Child, Handed},
    life::State,
};

impl Worker {
    pub(super) fn on_handed(&mut self, handed: Handed) {
        match handed {
            Handed::Child(child) => self.on_child(child),
            Handed::GivenUp { electron, slot } => self.on_given_up(electron, &slot),
        }
    }

    fn on_child(&mut self, Child { electron, slot, over }: Child) {
        // It runs already, for an earlier life of its parent: it goes through the queue, and is adopted there if it asks
        // the same.
        if self.begun.contains_key(&electron.id) || self.taking.contains_key(&electron.id) {
            return;
        }
        let began = Began::now();
        let deadline = electron.deadline.and_then(|left| began.instant.checked_add(left));
        let (state, adopted) = (State::Ready, Vec::new());
        let (ticket, inline, sent, alone) = (None, true, None, None);
        let held = Held { electron, state, ticket, inline, adopted, deadline, sent, alone };
        match self.unexpired(held, began) {
            Some(held) => self.run_in(slot, held, Some(over), began),
            None => Running::tell_over(Some(over)),
        }
    }

    /// Stops a child that its parent does not wait for any more. What was delivered of it meanwhile goes back.
    fn on_given_up(&mut self, electron: ElectronId, slot: &Arc<Slot>) {
        let Some(Begun::Running(Running { run, .. })) = self.begun.get(&electron) else { return };
        if !Arc::ptr_eq(&run.slot, slot) {
            return;
        }
        let run = run.id;
        if let Some(running) = self.take_running(electron, run) {
            let (held, began) = (running.held, Began::now());
            let took = running.began.spent(began.instant).took;
            self.metrics.failed_after.record(took);
            self.let_go(&held, "its parent gave it up".to_owned());
            self.stop(&held, running.run, began.instant);
        }
    }
}
