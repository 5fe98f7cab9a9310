//! Letters one after the other, while they stay where they are.

use atomizer::{DeadLetter, SessionError};
use tokio::{sync::mpsc, task::JoinSet};

use super::{DeadLetters, DeadLettersError, Progress, Selection, walk::Walk};

/// How many letters wait for who lists them.
const AHEAD: usize = 64;

/// Dead letters, oldest first.
///
/// It holds what it has seen until it has ended, is [closed](Self::close) or dropped. Who reads slowly should
/// collect first: the broker ends a listing that takes longer than its `consumer_timeout`, 30 minutes by
/// default, and nothing is lost by that.
#[derive(Debug)]
#[must_use = "it does nothing unless it is read"]
pub struct Listing {
    letters: mpsc::Receiver<Result<DeadLetter, DeadLettersError>>,
    /// The task that reads. It outlives a listing that is dropped for as long as giving back takes.
    reading: JoinSet<()>,
}

impl Listing {
    pub(super) fn start(dead: DeadLetters, selection: Selection, whole: bool) -> Self {
        let (found, letters) = mpsc::channel(AHEAD);
        let mut reading = JoinSet::new();
        reading.spawn(async move {
            if let Err(error) = read(&dead, &selection, whole, &found).await {
                // An error says that nobody listens any more.
                drop(found.send(Err(error)).await);
            }
        });
        Self { letters, reading }
    }

    /// Returns the next letter; none after the last one, when everything was given back.
    ///
    /// # Errors
    /// [`DeadLettersError`] when the broker is not reached, or lost. It is the last then.
    ///
    /// # Cancel safety
    /// Safe: no letter is skipped.
    pub async fn next(&mut self) -> Option<Result<DeadLetter, DeadLettersError>> {
        self.letters.recv().await
    }

    /// Gives everything back, and waits until the broker has it.
    ///
    /// # Cancel safety
    /// Safe: it goes on without.
    pub async fn close(mut self) {
        self.letters.close();
        while self.reading.join_next().await.is_some() {}
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        // It sees that nobody reads, gives everything back, and ends; each step has a time limit.
        self.letters.close();
        self.reading.detach_all();
    }
}

async fn read(
    dead: &DeadLetters,
    selection: &Selection,
    whole: bool,
    found: &mpsc::Sender<Result<DeadLetter, DeadLettersError>>,
) -> Result<(), DeadLettersError> {
    let mut walk = Walk::open(dead).await?;
    let mut progress = Progress::default();
    let read = read_all(&mut walk, &mut progress, selection, whole, found).await;
    let given_back = walk.give_back().await;
    read.and(given_back).map_err(|error| DeadLettersError::interrupted(progress, error))
}

async fn read_all(
    walk: &mut Walk,
    progress: &mut Progress,
    selection: &Selection,
    whole: bool,
    found: &mpsc::Sender<Result<DeadLetter, DeadLettersError>>,
) -> Result<(), SessionError> {
    loop {
        // A window that is broken off would not go back in order.
        let Some(letters) = walk.next().await? else { return Ok(()) };
        progress.total = walk.total();
        walk.refresh(&letters).await?;
        for held in letters {
            if !selection.fits(&held.letter) {
                progress.kept += 1;
                continue;
            }
            let letter = if whole { held.letter } else { held.letter.without_message() };
            if found.send(Ok(letter)).await.is_err() {
                return Ok(());
            }
            progress.done += 1;
            if selection.is_one() {
                return Ok(());
            }
        }
    }
}
