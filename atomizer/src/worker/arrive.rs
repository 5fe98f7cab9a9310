//! What becomes of an electron that arrives: begun at once, as a suspect, elsewhere, or not at all.

use std::sync::Arc;

use tokio::time::{Instant, sleep};

use super::{
    Step, TICK, Worker,
    held::{Began, Begun, Held, Running},
};
use crate::{
    Delivery, Electron, EventKind, Failure, FailureKind, Message,
    ask::Asker,
    life::{Arrival, Fact, Leave, State},
    link::SharedSession,
    settle::Settlement,
};

impl Worker {
    pub(super) fn on_deliveries(&mut self, deliveries: Vec<Delivery>) {
        let mut unfit = Vec::new();
        let now = Instant::now();
        for Delivery { message, redeliveries, waited, ticket } in deliveries {
            let electron = match message {
                Message::Electron(electron) => electron,
                other => {
                    unfit.push(self.settler.unreadable(ticket, other));
                    continue;
                }
            };
            let (id, attempt) = (electron.id, electron.attempts.saturating_add(1));
            self.emit(|atom| EventKind::Received { electron: id, atom, attempt, redeliveries });
            if let Some(begun) = self.begun.get_mut(&id).filter(|_| electron.atom == self.atom.id) {
                let (Begun::Running(Running { held, .. }) | Begun::Pausing { held, .. }) = begun;
                held.adopt(electron, ticket);
                self.emit(|atom| EventKind::Adopted { electron: id, atom, attempt });
                continue;
            }
            // Counted from here, and not beyond what the clock can tell.
            let left = electron.deadline.map(|deadline| deadline.saturating_sub(waited));
            let deadline = left.and_then(|left| now.checked_add(left));
            let (ticket, adopted) = (Some(ticket), Vec::new());
            let state = State::Gone;
            let held = Held { electron, state, ticket, adopted, deadline, alone: None };
            self.arrive(held, redeliveries, now, &mut unfit);
        }
        self.settle(unfit);
        self.start_ready();
    }

    pub(super) fn arrive(
        &mut self,
        mut held: Held,
        redeliveries: u32,
        now: Instant,
        unfit: &mut Vec<Settlement>,
    ) {
        let electron = &held.electron;
        let arrival = Arrival {
            misdirected: electron.atom != self.atom.id,
            expired: held.is_expired(now),
            asked: electron.reply_to.is_some(),
            // What is done at most once is taken for good before it begins: what comes again was not begun.
            suspect: redeliveries > 0 && !self.atom.options.is_at_most_once(),
            lives: electron.lives,
            lives_max: self.asker.node.rules.lives_max,
            failed_here: self.failed_here(electron),
            passes: electron.passes,
        };
        held.state = State::arrive(&arrival);
        match held.state {
            State::Ready => self.ready.push_back(held),
            State::Suspect => {
                self.suspects.push_back(held);
                self.next_suspect();
            }
            State::Avoiding { .. } => self.ask_who_serves(held),
            State::Leaving(Leave::Failed { dead }) => {
                let failure = self.unfit(&held.electron, &arrival);
                unfit.extend(self.fail(held, Began::now(), &failure, dead));
            }
            state => unreachable!("nothing arrives in {state:?}"),
        }
    }

    /// Why an electron is not begun.
    pub(super) fn unfit(&self, electron: &Electron, arrival: &Arrival) -> Failure {
        let (kind, message) = if arrival.misdirected {
            let message = format!("{} is not {}, whose queue this is", electron.atom, self.atom.id);
            (FailureKind::UnknownAtom, message)
        } else if arrival.expired {
            (FailureKind::Expired, "its deadline passed before it was begun".to_owned())
        } else {
            let lives = electron.lives;
            let message =
                format!("its node was lost each of the {lives} times that it was begun alone");
            (FailureKind::Killer, message)
        };
        self.stamp(Failure::new(kind, message), electron)
    }

    /// Whether this node failed it last, and put it back for another.
    pub(super) fn failed_here(&self, electron: &Electron) -> bool {
        let last = electron.history.last();
        last.is_some_and(|last| {
            last.node.as_ref() == Some(&self.asker.node.id)
                && (last.kind == FailureKind::GivenBack
                    || self.policy(electron).was_requeued(electron.attempts))
        })
    }

    /// Finds out whether another node serves the atom. Not to know is to suppose so, and to ask again later.
    pub(super) fn ask_who_serves(&self, held: Held) {
        let (session, link) = (self.intake.session(), Arc::clone(&self.asker.link));
        let atom = self.atom.id.clone();
        let asking = async move {
            let elsewhere = match session {
                Some(session) => match link.ask(&session, session.census(&atom)).await {
                    Ok(Ok(census)) => census.subscribers > 1,
                    Ok(Err(_)) | Err(_) => true,
                },
                None => true,
            };
            Step::Served(held, elsewhere)
        };
        self.asked.push(Box::pin(asking));
    }

    pub(super) fn on_served(&mut self, mut held: Held, elsewhere: bool) {
        let passes = held.electron.passes;
        match held.on(Fact::Served { elsewhere, passes }) {
            State::Leaving(Leave::HandedOn(wait)) => {
                let reason = "it failed here last, and another node serves its atom".to_owned();
                self.hand_on(held, Began::now(), wait, reason);
            }
            // Released by being dropped.
            _ if self.draining => {}
            State::Suspect => {
                self.suspects.push_back(held);
                self.next_suspect();
            }
            _ => {
                self.ready.push_back(held);
                self.start_ready();
            }
        }
    }

    /// Sends the first suspect on its way to its turn, if none is.
    pub(super) fn next_suspect(&mut self) {
        if self.turn.is_some() || self.draining {
            return;
        }
        let Some(held) = self.suspects.pop_front() else { return };
        let (asker, session) = (self.asker.clone(), self.intake.session());
        self.turn =
            Some(Box::pin(async move { Step::Written(write_life(asker, session, held).await) }));
    }

    pub(super) fn on_written(&mut self, held: Option<Held>) {
        self.turn = None;
        if let Some(mut held) = held {
            held.on(Fact::Written);
            let electron = &held.electron;
            let (id, attempt, lives) = (electron.id, electron.attempts + 1, electron.lives);
            self.emit(|atom| EventKind::Suspected { electron: id, atom, attempt, lives });
            self.ready.push_front(held);
            self.start_ready();
        }
        self.next_suspect();
    }
}

/// Waits for a suspect's turn, and writes into the electron that it is begun under suspicion once more: the
/// number must be there before the electron can take this node down.
async fn write_life(asker: Asker, session: Option<SharedSession>, mut held: Held) -> Option<Held> {
    let turn = Arc::clone(&asker.node.suspects).acquire_owned().await.ok()?;
    let session = session?;
    let mut electron = Electron::clone(&held.electron);
    electron.lives = electron.lives.saturating_add(1);
    electron.deadline = held.left(Instant::now());
    let electron = Arc::new(electron);
    let ticket = held.ticket.take()?;
    let parking = session.park(ticket, Arc::clone(&electron));
    match asker.link.ask(&session, parking).await {
        Ok(Ok(ticket)) => Some(Held { electron, ticket: Some(ticket), alone: Some(turn), ..held }),
        Ok(Err(error)) => {
            tracing::warn!(electron = %electron.id, %error, "failed to write into a suspect; it comes again");
            // With the error its ticket is given back. Without a pause that would be a hot loop.
            sleep(TICK).await;
            drop(error);
            None
        }
        Err(_) => None,
    }
}
