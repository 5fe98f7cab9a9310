//! What time brings: limits that fire, pauses that end, runs that hold their thread or do not stop.

use tokio::time::Instant;

use super::{
    ALONE_MAX, GIVEN_UP, STUCK_AFTER, TICK, Worker,
    held::{Begun, Held, Overdue, Running},
};
use crate::{ElectronId, EventKind, FailureKind, Kind, error::Failed, life::Fact, run::Run};

impl Worker {
    pub(super) fn on_alarm(&mut self, now: Instant) {
        while let Some(&(at, electron)) = self.alarms.first().filter(|(at, _)| *at <= now) {
            self.alarms.remove(&(at, electron));
            self.look_at(electron, now);
        }
        if self.next_tick <= now {
            self.next_tick = now + TICK;
            self.on_tick(now);
        }
        self.start_ready();
    }

    /// Ends what nobody wants any more: its time is over. What has not begun ends when its turn comes.
    pub(super) fn on_cancelled(&mut self, now: Instant) {
        let cancelled = &self.asker.node.cancelled;
        let waiting = self.ready.iter_mut().chain(&mut self.suspects).chain(&mut self.avoiding);
        for held in waiting {
            if held.is_cancelled(cancelled) {
                held.deadline = Some(now);
            }
        }
        let mut over = Vec::new();
        for (id, begun) in &mut self.begun {
            // What runs inline with its parent's permit ends with that.
            let is_lent = matches!(begun, Begun::Running(running) if running.over.is_some());
            let held = begun.held_mut();
            if !is_lent && held.is_cancelled(cancelled) {
                held.deadline = Some(now);
                over.push(*id);
            }
        }
        for electron in over {
            match self.begun.get_mut(&electron) {
                Some(Begun::Running(running)) => running.limit = Some((now, FailureKind::Expired)),
                Some(Begun::Pausing { until, .. }) => *until = now,
                None => {}
            }
            self.look_at(electron, now);
        }
        self.start_ready();
    }

    /// Stops a run whose time is over, or begins the next attempt.
    pub(super) fn look_at(&mut self, electron: ElectronId, now: Instant) {
        match self.begun.get(&electron) {
            Some(Begun::Running(Running { limit: Some((at, kind)), run, .. })) if *at <= now => {
                let (run, kind) = (run.id, *kind);
                if let Some(running) = self.take_running(electron, run) {
                    self.give_up(running, kind, now);
                }
            }
            Some(Begun::Pausing { until, .. }) if *until <= now => {
                if let Some(Begun::Pausing { mut held, .. }) = self.begun.remove(&electron) {
                    self.out -= held.out();
                    held.on(Fact::Rested);
                    self.ready.push_back(held);
                }
            }
            _ => {}
        }
    }

    /// Ends a run for everyone but itself: its slot is free, and its asker is answered, whether it stops or not.
    /// The slot of a singleton waits for the true end.
    pub(super) fn give_up(&mut self, running: Running, kind: FailureKind, now: Instant) {
        let Running { held, began, limit, run, over, .. } = running;
        let message = match limit {
            Some((at, FailureKind::TimedOut)) => {
                let limit = humantime::format_duration(at.saturating_duration_since(began.instant));
                format!("did not finish within {limit}")
            }
            _ if held.is_cancelled(&self.asker.node.cancelled) => GIVEN_UP.to_owned(),
            _ => "its deadline passed while it ran".to_owned(),
        };
        if self.atom.kind != Kind::Singleton {
            run.slot.revoke();
        }
        self.stop(&held, run, now);
        let mut batch = Vec::new();
        self.after_failure(held, began, Failed::new(kind, message), &mut batch);
        self.settle(batch);
        Running::tell_over(over);
    }

    /// Stops a run, and keeps it in mind until it has ended.
    pub(super) fn stop(&mut self, held: &Held, mut run: Run, since: Instant) {
        let (electron, attempt) = (held.electron.id, held.electron.attempts.saturating_add(1));
        // The next attempt may ask for the same children before this one has let go of them.
        let cancelled = &self.asker.node.cancelled;
        cancelled.end_round(cancelled.round());
        run.abort();
        let id = run.id;
        let overdue = Overdue { electron, attempt, since, told: false, counted: false, run };
        self.overdue.insert(id, overdue);
    }

    pub(super) fn on_tick(&mut self, now: Instant) {
        let next_tick = self.next_tick;
        let mut blocking = Vec::new();
        for (id, begun) in &mut self.begun {
            let Begun::Running(running) = begun else { continue };
            if let Some((at, _)) = running.limit.filter(|(at, _)| *at <= next_tick) {
                self.alarms.insert((at, *id));
            }
            if now.saturating_duration_since(running.began.instant) >= ALONE_MAX {
                running.held.alone = None;
            }
            let polls = running.run.slot.polls();
            let in_one_poll = running.run.slot.is_polled() && polls == running.polls;
            running.polls = polls;
            if in_one_poll && !self.atom.options.is_blocking() && !running.told {
                running.told = true;
                blocking.push((*id, running.held.electron.attempts.saturating_add(1)));
            }
        }
        for (electron, attempt) in blocking {
            tracing::warn!(atom = %self.atom.id, %electron, "blocks its thread; is `Options::blocking` missing?");
            self.metrics.blocking.increment(1);
            self.emit(|atom| EventKind::Blocking { electron, atom, attempt });
        }
        self.tell_of_overdue(now);
        self.let_go_of_late(now);
    }

    pub(super) fn tell_of_overdue(&mut self, now: Instant) {
        let mut stuck = Vec::new();
        for overdue in self.overdue.values_mut() {
            let overdue_for = now.saturating_duration_since(overdue.since);
            // What waits for a thread, to be dropped on it, is not what holds one.
            if !overdue.run.slot.is_polled() {
                continue;
            }
            if !overdue.told && overdue_for >= TICK {
                overdue.told = true;
                stuck.push((overdue.electron, overdue.attempt, overdue_for));
            }
            // Blocking atoms have threads of their own: they hold up nobody.
            if !overdue.counted && overdue_for >= STUCK_AFTER && !self.atom.options.is_blocking() {
                overdue.counted = true;
                self.asker.node.count_stuck(&format!("{} {}", self.atom.id, overdue.electron));
            }
        }
        for (electron, attempt, overdue) in stuck {
            tracing::warn!(atom = %self.atom.id, %electron, "does not stop after its time limit");
            self.metrics.stuck.increment(1);
            self.emit(|atom| EventKind::Stuck { electron, atom, attempt, overdue });
        }
    }
}
