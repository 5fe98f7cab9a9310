//! Sends letters back, or purges them: what is selected leaves the dead letters, everything else stays.

use std::{collections::HashSet, time::Duration};

use atomizer::{LetterId, Payload, SessionError};
use tokio::{sync::watch, task::JoinSet};

use super::{
    DeadLetters, DeadLettersError, Progress, Requeue, Selection,
    back::Back,
    publish::NotSent,
    walk::{Held, Walk},
};

/// How long letters are held that are not sent back: the broker ends a channel that holds them longer than its
/// `consumer_timeout`, 30 minutes by default. Then all are given back, and looked at again.
const HELD_MAX: Duration = Duration::from_secs(5 * 60);

type Outcome = Result<Progress, DeadLettersError>;

/// Dead letters on their way back, or out.
///
/// It goes on by itself, in a task of its own. [`stop`](Self::stop) ends it in order: the window that is under
/// way is finished, so that each letter is either done or where it was. A `Clearing` that is dropped stops as
/// well, but nobody waits for it: a program that ends right after must [`finish`](Self::finish) first.
///
/// ```no_run
/// # use atomizer_rabbitmq::{RabbitMq, Requeue, Selection};
/// # async fn send_back(rabbit: RabbitMq) -> Result<(), Box<dyn std::error::Error>> {
/// let mut clearing = rabbit.dead_letters().requeue(Selection::all(), Requeue::default());
/// loop {
///     tokio::select! {
///         progress = clearing.next() => match progress {
///             Some(progress) => println!("{} of {}", progress.done, progress.total),
///             None => break,
///         },
///         _ = tokio::signal::ctrl_c() => clearing.stop(),
///     }
/// }
/// println!("{} sent back", clearing.finish().await?.done);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "it stops when it is dropped"]
pub struct Clearing {
    progress: watch::Receiver<Progress>,
    stop: watch::Sender<bool>,
    task: JoinSet<Outcome>,
}

impl Clearing {
    pub(super) fn requeue(
        dead: DeadLetters,
        selection: Selection,
        options: Requeue,
        edited: Option<Payload>,
    ) -> Self {
        Self::start(|sweep| async move {
            let back = Box::new(Back::open(&dead, options, edited).await?);
            sweep.run(&dead, &selection, &mut Exit::Back(back)).await
        })
    }

    pub(super) fn purge(dead: DeadLetters, selection: Selection) -> Self {
        Self::start(|sweep| async move { sweep.run(&dead, &selection, &mut Exit::Purge).await })
    }

    fn start<F>(work: impl FnOnce(Sweep) -> F) -> Self
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        let (report, progress) = watch::channel(Progress::default());
        let (stop, stopped) = watch::channel(false);
        let mut task = JoinSet::new();
        task.spawn(work(Sweep {
            report,
            stopped,
            progress: Progress::default(),
            tried: HashSet::new(),
        }));
        Self { progress, stop, task }
    }

    /// Returns how far it has come.
    #[must_use]
    pub fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    /// Waits until it has come further; none when it has ended.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn next(&mut self) -> Option<Progress> {
        self.progress.changed().await.ok()?;
        Some(*self.progress.borrow_and_update())
    }

    /// Has it stop when the window that is under way is done. Calling it again changes nothing.
    ///
    /// A broker that is short of memory or disk takes nothing, and the window waits with it.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Waits for its end, and returns how far it came.
    ///
    /// # Errors
    /// [`DeadLettersError`] when the broker is not reached, or lost, or declines. What was not done is there
    /// still, and may be done by calling again. When the connection was lost, up to a window may have been sent
    /// back without having been removed.
    ///
    /// # Cancel safety
    /// When dropped it stops, as a `Clearing` does.
    pub async fn finish(mut self) -> Result<Progress, DeadLettersError> {
        match self.task.join_next().await {
            Some(Ok(outcome)) => outcome,
            _ => Err(DeadLettersError::interrupted(self.progress(), "the task ended")),
        }
    }
}

impl Drop for Clearing {
    fn drop(&mut self) {
        // It finishes its window, gives everything back, and ends; each step has a time limit, unless the
        // broker takes nothing for now.
        self.stop();
        self.task.detach_all();
    }
}

/// How letters leave.
enum Exit {
    Back(Box<Back>),
    Purge,
}

/// What is known while letters leave.
struct Sweep {
    report: watch::Sender<Progress>,
    stopped: watch::Receiver<bool>,
    progress: Progress,
    /// What was sent back, or cannot be: it may die again while this goes on, and is not to go round.
    tried: HashSet<LetterId>,
}

/// Why a walk ended without an error.
enum Ended {
    /// All were seen.
    Complete,
    Stopped,
    /// Letters were held for long.
    Stale,
}

impl Sweep {
    async fn run(mut self, dead: &DeadLetters, selection: &Selection, exit: &mut Exit) -> Outcome {
        loop {
            let mut walk = match Walk::open(dead).await {
                Ok(walk) => walk,
                Err(DeadLettersError::Interrupted { reason, .. }) => {
                    return Err(self.interrupted(reason));
                }
                Err(error) => return Err(error),
            };
            self.progress.kept = 0;
            let before = self.progress.done;
            let ended = self.walk(&mut walk, selection, exit, before).await;
            let given_back = walk.give_back().await;
            let ended = ended.map_err(|error| self.interrupted(error))?;
            given_back.map_err(|error| self.interrupted(error))?;
            if !matches!(ended, Ended::Stale) {
                if let Exit::Back(back) = exit {
                    back.close().await;
                }
                return Ok(self.progress);
            }
        }
    }

    fn interrupted(&self, reason: impl std::fmt::Display) -> DeadLettersError {
        DeadLettersError::interrupted(self.progress, reason)
    }

    async fn walk(
        &mut self,
        walk: &mut Walk,
        selection: &Selection,
        exit: &mut Exit,
        before: u64,
    ) -> Result<Ended, SessionError> {
        loop {
            if *self.stopped.borrow() {
                return Ok(Ended::Stopped);
            }
            // A window that is broken off would not go back in order.
            let Some(letters) = walk.next().await? else { return Ok(Ended::Complete) };
            self.progress.total = before + walk.total();
            let (mut selected, kept): (Vec<_>, Vec<_>) = letters.into_iter().partition(|held| {
                selection.fits(&held.letter) && !self.tried.contains(&held.letter.id)
            });
            self.progress.kept += kept.len() as u64;
            walk.refresh(&kept).await?;
            if selection.is_one() {
                selected.truncate(1);
            }
            while !selected.is_empty() {
                let window = match exit {
                    Exit::Purge => selected.len(),
                    Exit::Back(back) => tokio::select! {
                        biased;
                        () = stopped(&mut self.stopped) => return Ok(Ended::Stopped),
                        window = back.pace.take(back.window) => window,
                    },
                };
                let window: Vec<_> = selected.drain(..window.min(selected.len())).collect();
                self.clear(walk, window, exit).await?;
                if walk.age() > HELD_MAX {
                    return Ok(Ended::Stale);
                }
            }
            if selection.is_one() && self.progress.done + self.progress.refused > 0 {
                return Ok(Ended::Complete);
            }
            self.report.send_replace(self.progress);
        }
    }

    /// Clears one window: this is not interrupted.
    async fn clear(
        &mut self,
        walk: &mut Walk,
        window: Vec<Held>,
        exit: &mut Exit,
    ) -> Result<(), SessionError> {
        let mut failed = None;
        let tags: Vec<_> = match exit {
            Exit::Purge => window.iter().map(|held| held.tag).collect(),
            Exit::Back(back) => {
                let mut window = window;
                window.retain(|held| self.tried.insert(held.letter.id));
                let mut safe = Vec::new();
                for (held, sent) in window.iter().zip(back.send(&window).await?) {
                    match sent {
                        Ok(()) => safe.push(held.tag),
                        Err(NotSent::NotNow(reason)) => failed = Some(reason),
                        Err(error) => {
                            tracing::warn!(id = %held.letter.id, %error, "failed to send a dead letter back");
                            self.progress.refused += 1;
                        }
                    }
                }
                safe
            }
        };
        let done = tags.len() as u64;
        walk.remove(tags).await?;
        self.progress.done += done;
        self.report.send_replace(self.progress);
        failed.map_or(Ok(()), |reason| Err(SessionError::lost(reason)))
    }
}

/// Resolves when it is to stop.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error says that the handle is gone, which means the same.
    drop(stop.wait_for(|stop| *stop).await);
}
