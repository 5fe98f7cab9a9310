//! How an electron leaves its run: to its end, to its next attempt, or back to the queue.

use std::{sync::Arc, time::Duration};

use futures::FutureExt;
use tokio::time::{Instant, sleep};

use super::{
    Step, Worker,
    held::{Began, Begun, Held, Running},
};
use crate::{
    Electron, ElectronId, EventKind, Failure, FailureKind, NodeError, ReplyTo,
    ask::Asker,
    error::{Directive, Failed},
    life::{Attempt, Fact, Leave, State},
    node::Stage,
    run::{Reported, RunId, RunResult, Success, What},
    settle::{Settled, Settlement, Verdict, Why, put_back, settle},
};

impl Worker {
    /// Settles all that has finished by now in one batch.
    pub(super) fn on_finished(&mut self, count: usize) {
        let mut batch = Vec::with_capacity(count);
        let mut reports = std::mem::take(&mut self.reports);
        for Reported { electron, run, what } in reports.drain(..) {
            let result = match what {
                What::Waits => {
                    self.on_waits(electron, run);
                    continue;
                }
                What::Ended(result) => result,
            };
            match self.take_running(electron, run) {
                Some(running) => self.finish(running, result, &mut batch),
                None => self.ended_late(run),
            }
        }
        self.reports = reports;
        self.settle(batch);
        self.start_ready();
    }

    /// Takes a run out of the table, if it is still the one that counts.
    pub(super) fn take_running(&mut self, electron: ElectronId, run: RunId) -> Option<Running> {
        let Some(Begun::Running(running)) = self.begun.get(&electron) else { return None };
        if running.run.id != run {
            return None;
        }
        if let Some((at, _)) = running.limit {
            self.alarms.remove(&(at, electron));
        }
        match self.begun.remove(&electron) {
            Some(Begun::Running(running)) => {
                self.out -= running.held.out();
                Some(running)
            }
            _ => None,
        }
    }

    /// A run that was given up has ended after all.
    pub(super) fn ended_late(&mut self, run: RunId) {
        if self.overdue.remove(&run).is_some_and(|overdue| overdue.counted) {
            self.asker.node.uncount_stuck();
        }
    }

    pub(super) fn finish(
        &mut self,
        running: Running,
        result: Option<RunResult>,
        batch: &mut Vec<Settlement>,
    ) {
        let Running { mut held, began, over, .. } = running;
        match result {
            Some(Ok(success)) => {
                held.on(Fact::Succeeded);
                self.remember(&held.electron, &success);
                let spent = began.spent(Instant::now());
                self.metrics.succeeded_after.record(spent.took);
                self.metrics.bytes_out.record(success.output.body.len() as f64);
                for (electron, ticket) in held.deliveries() {
                    batch.push(self.settler.done(ticket, electron, spent, &success));
                }
            }
            Some(Err(failed)) => self.after_failure(held, began, failed, batch),
            None => {
                // Whatever is begun now is dropped at once. To take more would make killers of it.
                let reason = "the runtime that atoms run on has stopped";
                self.let_go(&held, reason.to_owned());
                self.asker.node.critical.raise(NodeError::Supervisor(reason.into()));
            }
        }
        Running::tell_over(over);
    }

    /// Keeps the output of a child whose parent may begin anew without it: where that is in this process, both end
    /// together. What it sends besides is sent with it, and not kept.
    fn remember(&mut self, electron: &Electron, success: &Success) {
        let is_elsewhere = |to: &ReplyTo| to != self.asker.link.reply_to();
        let is_remote =
            electron.parent.is_some() && electron.reply_to.as_ref().is_some_and(is_elsewhere);
        if is_remote && success.spawned.is_empty() {
            self.ended.remember(electron, &success.output);
        }
    }

    pub(super) fn after_failure(
        &mut self,
        mut held: Held,
        began: Began,
        failed: Failed,
        batch: &mut Vec<Settlement>,
    ) {
        let Failed { failure, then } = failed;
        let now = Instant::now();
        self.metrics.failed_after.record(began.spent(now).took);
        let electron = &held.electron;
        let failure = self.stamp(failure, electron);
        let attempt = Attempt {
            electron: electron.id,
            failures: failure.attempt,
            kind: failure.kind,
            then,
            policy: self.policy(electron),
            asked: electron.reply_to.is_some(),
            passes: electron.passes,
            left: held.left(now),
            delay_max: self.asker.link.limits().delay_max,
            draining: self.draining,
        };
        held.alone = None;
        held.state = State::after_failure(&attempt);
        match held.state {
            State::Pausing(wait) => self.pause(held, failure, wait),
            State::Leaving(Leave::HandedOn(wait)) if then == Directive::GiveBack => {
                let mut electron = Electron::clone(&held.electron);
                let reason = failure.to_string();
                // One in a row is enough to know, and leaves room for what failed.
                if electron.history.last().is_some_and(|last| last.kind == FailureKind::GivenBack) {
                    electron.history.pop();
                }
                electron.remember(failure);
                held.electron = Arc::new(electron);
                self.hand_on(held, began, wait, reason);
            }
            State::Leaving(Leave::HandedOn(wait)) => self.requeue(held, began, failure, wait),
            State::Leaving(Leave::Failed { dead }) => {
                batch.extend(self.fail(held, began, &failure, dead));
            }
            state => unreachable!("a failure does not lead to {state:?}"),
        }
    }

    /// Answers all deliveries of an electron with a failure.
    pub(super) fn fail(
        &self,
        held: Held,
        began: Began,
        failure: &Failure,
        dead: bool,
    ) -> Vec<Settlement> {
        let spent = began.spent(Instant::now());
        let failed = |(electron, ticket)| {
            self.settler.failed(ticket, self.to_answer(electron), spent, failure.clone(), dead)
        };
        held.deliveries().map(failed).collect()
    }

    /// Returns what is to be answered; what was given up is not. Its parent may ask the same again by now, and would
    /// take that for the answer.
    fn to_answer(&self, electron: Arc<Electron>) -> Arc<Electron> {
        if self.asker.node.cancelled.contains(&electron) {
            Arc::new(Electron { reply_to: None, ..Electron::clone(&electron) })
        } else {
            electron
        }
    }

    /// Waits here for the next attempt.
    pub(super) fn pause(&mut self, mut held: Held, failure: Failure, wait: Duration) {
        let id = held.electron.id;
        let (attempt, why) = (failure.attempt, failure.clone());
        tracing::warn!(atom = %self.atom.id, electron = %id, %failure, ?wait, "failed, and is tried again");
        self.metrics.retries.increment(1);
        self.metrics.failure(failure.kind);
        self.emit(|atom| EventKind::Retried { electron: id, atom, attempt, failure: why, wait });
        let mut electron = Electron::clone(&held.electron);
        electron.attempts = attempt;
        electron.remember(failure.clone());
        held.electron = Arc::new(electron);
        let until = Instant::now() + wait;
        self.out += held.out();
        self.begun.insert(id, Begun::Pausing { held, failure, until });
        self.alarms.insert((until, id));
    }

    /// Puts an electron back, its failed attempt counted.
    pub(super) fn requeue(&self, held: Held, began: Began, failure: Failure, wait: Duration) {
        self.put_back(held, began, wait, &Why::Failed { failure, wait });
    }

    /// Puts an electron back, no attempt counted.
    pub(super) fn hand_on(&self, held: Held, began: Began, wait: Duration, reason: String) {
        self.put_back(held, began, wait, &Why::Untried(reason));
    }

    pub(super) fn put_back(&self, held: Held, began: Began, wait: Duration, why: &Why) {
        let now = Instant::now();
        let (spent, deadline) = (began.spent(now), held.left(now));
        let (delay, rest) = self.delay(wait);
        let batch = held.deliveries().map(|(electron, ticket)| {
            let mut copy = Electron::clone(&electron);
            copy.deadline = deadline;
            match why {
                Why::Untried(_) => copy.passes = copy.passes.saturating_add(1),
                Why::Late(_) => {}
                Why::Failed { failure, .. } => {
                    copy.attempts = failure.attempt;
                    // A pause that the drain cut short has put it in already.
                    if copy.history.last() != Some(failure) {
                        copy.remember(failure.clone());
                    }
                }
            }
            put_back(ticket, electron, spent, copy, delay, why)
        });
        let batch = batch.collect();
        self.settle_after(rest, batch);
    }

    /// Parts a wait into what the conductor does and what is waited out here.
    pub(super) fn delay(&self, wait: Duration) -> (Duration, Duration) {
        if wait <= self.asker.link.limits().delay_max {
            (wait, Duration::ZERO)
        } else {
            (Duration::ZERO, wait)
        }
    }

    /// Settles after a wait, which a node that drains does not wait out.
    pub(super) fn settle_after(&self, wait: Duration, batch: Vec<Settlement>) {
        let asker = self.asker.clone();
        self.asked.push(Box::pin(async move {
            tokio::select! {
                () = sleep(wait) => {}
                () = asker.node.reached(Stage::Draining) => {}
            }
            Step::Settled(settle(asker, batch).await)
        }));
    }

    pub(super) fn on_settled(&self, settled: Settled) {
        for (ending, result) in settled {
            match self.settler.decide(ending, result) {
                Verdict::Ended(ending) => {
                    ending.log(&self.atom.id);
                    ending.measure(&self.metrics);
                    self.emit(|atom| ending.into_event(atom));
                }
                Verdict::Again { settlement, after } => {
                    self.asked.push(Box::pin(again(self.asker.clone(), settlement, after)));
                }
            }
        }
    }

    pub(super) fn settle(&self, mut batch: Vec<Settlement>) {
        // One of these must not hold up the rest.
        for settlement in batch.extract_if(.., |settlement| settlement.is_alone()) {
            self.settle_now(vec![settlement]);
        }
        if !batch.is_empty() {
            self.settle_now(batch);
        }
    }

    fn settle_now(&self, batch: Vec<Settlement>) {
        let mut settling = Box::pin(settle(self.asker.clone(), batch));
        // A conductor that need not wait is done by now.
        match (&mut settling).now_or_never() {
            Some(settled) => self.on_settled(settled),
            None => self.asked.push(Box::pin(settling.map(Step::Settled))),
        }
    }
}

/// Tries again what was not taken.
async fn again(asker: Asker, mut settlement: Settlement, after: Duration) -> Step {
    sleep(after).await;
    settlement.park(&asker).await;
    Step::Settled(settle(asker, vec![settlement]).await)
}
