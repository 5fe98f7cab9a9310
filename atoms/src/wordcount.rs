//! Counts words: a map over pieces of files, and a reduction of what was counted in each.

mod piece;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    path::PathBuf,
};

use atomizer::{Atom, AtomError, CallError, Context, Kind, Options, Partial, Result};
use serde::{Deserialize, Serialize};

pub use piece::Piece;
use piece::Pieces;

/// Counts the words of all files in a folder, by way of [`CountWords`].
///
/// Files are read where the pieces are counted: over a broker, all nodes must see them under the same path.
#[derive(Default)]
pub struct WordCount {
    on_progress: Option<OnProgress>,
}

type OnProgress = Box<dyn Fn(u64) + Send + Sync>;

impl WordCount {
    /// Makes one that tells how many bytes have been read of the files of a request, after each piece.
    ///
    /// `tell` is called between two answers and must not block.
    #[must_use]
    pub fn with_progress(tell: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self { on_progress: Some(Box::new(tell)) }
    }
}

/// Asks for the words of a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Corpus {
    /// A file, or a folder, of which all files are read, those of its folders included. Symbolic links in it are not
    /// followed.
    pub path: PathBuf,
    /// How many of the most frequent words are wanted.
    pub top: usize,
}

/// The words of a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Words {
    /// The most frequent, the most frequent first; among equals in alphabetical order.
    pub top: Vec<(String, u64)>,
    /// How many words there are.
    pub words: u64,
    /// How many different words there are.
    pub distinct: u64,
    /// How many bytes were read.
    pub bytes: u64,
    /// How many electrons counted.
    pub electrons: u64,
    /// What could not be read, and why, as in `notes/old.txt: not UTF-8`.
    pub unread: Vec<String>,
}

#[derive(Default)]
struct Tally {
    words: HashMap<String, u64>,
    bytes: u64,
    electrons: u64,
}

impl Tally {
    fn add(mut self, counted: Counted) -> Self {
        for (word, count) in counted.words {
            *self.words.entry(word).or_default() += count;
        }
        self.bytes += counted.bytes;
        self.electrons += 1;
        self
    }

    fn report(self, top: usize, unread: BTreeSet<String>) -> Words {
        let (words, distinct) = (self.words.values().sum(), self.words.len() as u64);
        let mut most: Vec<_> = self.words.into_iter().collect();
        most.sort_unstable_by(|(word, count), (other, count_of_other)| {
            count_of_other.cmp(count).then_with(|| word.cmp(other))
        });
        most.truncate(top);
        let Self { bytes, electrons, .. } = self;
        Words { top: most, words, distinct, bytes, electrons, unread: unread.into_iter().collect() }
    }
}

impl Atom for WordCount {
    const ID: &'static str = "wordcount";
    const KIND: Kind = Kind::Spawner;
    type Input = Corpus;
    type Output = Words;

    async fn process(&self, cx: &Context, corpus: Corpus) -> Result<Words> {
        let mut pieces = Pieces::of(&corpus.path)?;
        let counting = cx.fan_out::<CountWords>(pieces.by_ref()).tolerate(usize::MAX);
        let counted = counting.fold(Tally::default(), |tally, counted| {
            let tally = tally.add(counted);
            if let Some(tell) = &self.on_progress {
                tell(tally.bytes);
            }
            tally
        });
        let Partial { value: tally, failures, .. } = counted.await?;
        let mut unread = pieces.unread();
        for failure in failures {
            match failure.source {
                CallError::Failed(failure) => drop(unread.insert(failure.message)),
                error => return Err(error.into()),
            }
        }
        Ok(tally.report(corpus.top, unread))
    }
}

impl fmt::Debug for WordCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WordCount").finish_non_exhaustive()
    }
}

/// Counts the words of a piece of a file.
///
/// A word is a run of letters and digits, in lower case.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountWords;

/// What was counted in a piece.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// How often each word is there.
    pub words: BTreeMap<String, u64>,
    /// How long the piece is.
    pub bytes: u64,
}

impl Atom for CountWords {
    const ID: &'static str = "wordcount.count";
    type Input = Piece;
    type Output = Counted;

    fn options(&self) -> Options {
        Options::default().blocking()
    }

    async fn process(&self, _cx: &Context, piece: Piece) -> Result<Counted> {
        let unread = |error| AtomError::msg(format!("{}: {error}", piece.path.display()));
        // The same file would fail the same.
        let text = piece.read().map_err(|error| unread(error).do_not_retry())?;
        let mut words = BTreeMap::new();
        for word in text.split(|character: char| !character.is_alphanumeric()) {
            if !word.is_empty() {
                *words.entry(word.to_lowercase()).or_default() += 1;
            }
        }
        Ok(Counted { words, bytes: piece.bytes() })
    }
}

#[cfg(test)]
mod tests;
