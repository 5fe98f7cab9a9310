//! What becomes of an electron that arrives: begun at once, as a suspect, elsewhere, or not at all.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::{Instant, sleep};

use super::{
    EXPIRED, GIVEN_UP, Step, TICK, Worker,
    held::{Began, Held},
};
use crate::{
    Delivery, Electron, EventKind, Failure, FailureKind, Message, SettleError,
    admission::{Permit, Priority},
    ask::Asker,
    claim::Claim,
    clock,
    life::{Arrival, Fact, Leave, State},
    run::Success,
    settle::{Settlement, Spent},
};

impl Worker {
    pub(super) fn on_deliveries(&mut self, deliveries: Vec<Delivery>) {
        let mut unfit = Vec::new();
        let now = Instant::now();
        let until = self.hold_until(now);
        for Delivery { message, redeliveries, waited, sent_at, ticket } in deliveries {
            let electron = match message {
                Message::Electron(electron) => electron,
                other => {
                    unfit.push(self.settler.unreadable(ticket, other));
                    continue;
                }
            };
            let (id, attempt) = (electron.id, electron.attempts.saturating_add(1));
            self.metrics.received.increment(1);
            self.metrics.bytes_in.record(electron.payload.body.len() as f64);
            self.emit(|atom| EventKind::Received { electron: id, atom, attempt, redeliveries });
            let claim = Claim::Delivered { ticket, until };
            // Counted from here, and not beyond what the clock can tell.
            let left = electron.deadline.map(|deadline| deadline.saturating_sub(waited));
            let deadline = left.and_then(|left| now.checked_add(left));
            if electron.atom == self.atom.id {
                if self.is_begun_once(&electron, deadline) {
                    self.drop_duplicate(claim);
                    continue;
                }
                let begun = self.begun.get(&id);
                if begun.is_some_and(|begun| begun.held().is_asked_by(&electron)) {
                    self.adopt(electron, claim, deadline);
                    self.metrics.adopted.increment(1);
                    self.emit(|atom| EventKind::Adopted { electron: id, atom, attempt });
                    continue;
                }
                if let Some(output) = self.ended.output(&electron) {
                    self.metrics.adopted.increment(1);
                    self.emit(|atom| EventKind::Adopted { electron: id, atom, attempt });
                    let spent = Spent { at: clock::now(), took: Duration::ZERO };
                    let success = Success { output, spawned: Vec::new() };
                    unfit.push(self.settler.done(Some(claim), electron, spent, &success));
                    continue;
                }
            }
            let (ticket, adopted) = (Some(claim), Vec::new());
            let state = State::Gone;
            let inline = false;
            let sent = now.checked_sub(sent_at.map_or(waited, |at| waited_since(at).max(waited)));
            let held =
                Held { electron, state, ticket, inline, adopted, deadline, sent, alone: None };
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
            expired: held.is_expired(now) || held.is_cancelled(&self.asker.node.cancelled),
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
            let cancelled = self.asker.node.cancelled.contains(electron);
            (FailureKind::Expired, if cancelled { GIVEN_UP } else { EXPIRED }.to_owned())
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

    /// Finds out whether another node serves the atom, for all that waits to know.
    fn ask_who_serves(&mut self, held: Held) {
        self.avoiding.push(held);
        if self.avoiding.len() > 1 {
            return;
        }
        let (link, atom) = (Arc::clone(&self.asker.link), self.atom.id.clone());
        self.asked.push(Box::pin(async move {
            let Some(session) = link.session() else { return Step::Served(None) };
            let census = link.ask(&session, session.census(&atom)).await;
            let served = census.and_then(|census| census).ok();
            Step::Served(served.map(|census| census.subscribers > 1))
        }));
    }

    pub(super) fn on_served(&mut self, elsewhere: Option<bool>) {
        // Not to know is to suppose so, and to ask again later; but not for ever.
        const CENSUS_ERRORS_MAX: u32 = 5;
        self.census_errors = if elsewhere.is_some() { 0 } else { self.census_errors + 1 };
        let elsewhere = elsewhere.unwrap_or(self.census_errors < CENSUS_ERRORS_MAX);
        for mut held in std::mem::take(&mut self.avoiding) {
            let passes = held.electron.passes;
            match held.on(Fact::Served { elsewhere, passes }) {
                State::Leaving(Leave::HandedOn(wait)) => {
                    let reason = "it failed here last, and another node serves its atom".to_owned();
                    self.hand_on(held, Began::now(), wait, reason);
                }
                State::Suspect => self.suspects.push_back(held),
                _ => self.ready.push_back(held),
            }
        }
        self.next_suspect();
        self.start_ready();
    }

    /// Sends the first suspect on its way to its turn, if none is.
    fn next_suspect(&mut self) {
        if self.turn.is_some() || self.draining {
            return;
        }
        let Some(held) = self.suspects.pop_front() else { return };
        let asker = self.asker.clone();
        let permit = asker.node.admission.acquire(self.atom.lane, Priority::Start);
        self.turn = Some(Box::pin(async move {
            // The permit first: who has the turn must not wait for what others of this node hold.
            let Ok(permit) = permit.await else { return Step::Written(None) };
            Step::Written(write_life(asker, held).await.map(|held| (held, permit)))
        }));
    }

    pub(super) fn on_written(&mut self, begins: Option<(Held, Permit)>) {
        self.turn = None;
        if let Some((mut held, permit)) = begins {
            held.on(Fact::Written);
            let electron = &held.electron;
            let (id, lives) = (electron.id, electron.lives);
            let attempt = electron.attempts.saturating_add(1);
            self.metrics.suspected.increment(1);
            self.emit(|atom| EventKind::Suspected { electron: id, atom, attempt, lives });
            self.start(held, permit, Began::now());
        }
        self.next_suspect();
    }
}

/// How long ago something was that is known to the second. What may have been within the last one is taken for now.
fn waited_since(at: SystemTime) -> Duration {
    const HALF: Duration = Duration::from_millis(500);
    const UNSURE: Duration = Duration::from_secs(2);
    // An error says that the sender's clock is ahead.
    let waited = clock::now().duration_since(at).unwrap_or_default();
    if waited < UNSURE { Duration::ZERO } else { waited - HALF }
}

/// Waits for a suspect's turn, and writes into the electron that it is begun under suspicion once more: the
/// number must be there before the electron can take this node down.
async fn write_life(asker: Asker, mut held: Held) -> Option<Held> {
    let turn = Arc::clone(&asker.node.suspects).acquire_owned().await.ok()?;
    let session = asker.link.session()?;
    let mut electron = Electron::clone(&held.electron);
    electron.lives = electron.lives.saturating_add(1);
    electron.deadline = held.left(Instant::now());
    let electron = Arc::new(electron);
    let claim = held.ticket.take()?;
    let until = claim.until();
    let ticket = claim.ticket().await.ok()?;
    let parking = session.park(ticket, Arc::clone(&electron));
    let error = match asker.link.ask(&session, parking).await {
        Ok(Ok(ticket)) => {
            let ticket = Some(Claim::Parked(ticket));
            return Some(Held { electron, ticket, alone: Some(turn), ..held });
        }
        Ok(Err(error)) => error,
        Err(_) => return None,
    };
    tracing::warn!(electron = %electron.id, %error, "failed to write into a suspect");
    match error {
        // It never can be written: begun alone and uncounted is better than never.
        SettleError::NotSafe { ticket, failed }
            if failed.iter().any(|(_, error)| error.is_final()) =>
        {
            let ticket = Some(Claim::Delivered { ticket, until });
            Some(Held { ticket, alone: Some(turn), ..held })
        }
        error => {
            drop(turn);
            // With the error its ticket is given back. Without a pause that would be a hot loop.
            sleep(TICK).await;
            drop(error);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is known to the second is told apart from no time at all once it is certain.
    #[test]
    fn a_wait_is_known_within_a_second_or_taken_for_none() {
        let ago = |millis| waited_since(clock::now() - Duration::from_millis(millis)).as_millis();
        assert_eq!(ago(0), 0);
        assert_eq!(ago(1_500), 0, "it may have been sent within the last second");
        assert!((1_500..2_500).contains(&ago(2_001)));
        assert!((3_599_500..3_600_500).contains(&ago(3_600_000)));
        let ahead = clock::now() + Duration::from_secs(60);
        assert_eq!(waited_since(ahead), Duration::ZERO, "the sender's clock is ahead");
    }
}
