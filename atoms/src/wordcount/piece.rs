//! Files, and the pieces that they are read in.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, ErrorKind, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// How long a piece is: what is counted in it fits well into one message.
pub(super) const PIECE_BYTES: u64 = 1024 * 1024;
/// A file in which nothing separates words for so long is no text.
const WORD_BYTES_MAX: usize = 64 * 1024;

/// A part of a file: the words that begin in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Which file.
    pub path: PathBuf,
    /// The first byte of the piece.
    pub from: u64,
    /// The byte after its last.
    pub to: u64,
}

impl Piece {
    /// Returns how long it is.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.to.saturating_sub(self.from)
    }

    /// Reads the words that begin in it, and so the rest of its last, but not that of a word that began before.
    pub(super) fn read(&self) -> io::Result<String> {
        let mut file = File::open(&self.path)?;
        // The byte before tells whether a word begins with the first.
        let begin = self.from.saturating_sub(1);
        file.seek(SeekFrom::Start(begin))?;
        let mut bytes = Vec::new();
        file.by_ref().take(self.to.saturating_sub(begin)).read_to_end(&mut bytes)?;
        if self.from > 0 {
            let separator = bytes.iter().position(u8::is_ascii_whitespace);
            bytes.drain(..separator.unwrap_or(bytes.len()));
        }
        // No word begins here when there is nothing, or one that began before goes on.
        if bytes.last().is_some_and(|last| !last.is_ascii_whitespace()) {
            read_word(&mut file, &mut bytes)?;
        }
        String::from_utf8(bytes).map_err(|_| io::Error::new(ErrorKind::InvalidData, "not UTF-8"))
    }
}

/// Reads up to the next separator, or to the end.
fn read_word(file: &mut File, bytes: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = [0; 4096];
    let before = bytes.len();
    while bytes.len() - before < WORD_BYTES_MAX {
        let count = file.read(&mut buffer)?;
        let read = &buffer[..count];
        let separator = read.iter().position(u8::is_ascii_whitespace);
        bytes.extend_from_slice(&read[..separator.unwrap_or(count)]);
        if count == 0 || separator.is_some() {
            return Ok(());
        }
    }
    let reason = format!("no space or line break within {WORD_BYTES_MAX} bytes: this is no text");
    Err(io::Error::new(ErrorKind::InvalidData, reason))
}

/// The pieces of all files of a folder, found as they are asked for.
pub(super) struct Pieces {
    /// What is still to be looked at.
    paths: Vec<PathBuf>,
    /// The file that is being divided: what is left of it.
    file: Option<Piece>,
    unread: BTreeSet<String>,
}

impl Pieces {
    /// # Errors
    /// When there is nothing at the path.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
        Ok(Self { paths: vec![path], file: None, unread: BTreeSet::new() })
    }

    /// What could not be looked at, and why.
    pub(super) fn unread(self) -> BTreeSet<String> {
        self.unread
    }

    fn look_at(&mut self, path: PathBuf) -> io::Result<()> {
        let about = fs::symlink_metadata(&path)?;
        if about.is_dir() {
            let mut within = Vec::new();
            for entry in fs::read_dir(&path)? {
                within.push(entry?.path());
            }
            // Taken from the end: in order.
            within.sort_unstable_by(|path, other| other.cmp(path));
            self.paths.extend(within);
        } else if about.is_file() && about.len() > 0 {
            self.file = Some(Piece { path, from: 0, to: about.len() });
        }
        Ok(())
    }
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        loop {
            if let Some(left) = &mut self.file {
                if left.bytes() > 0 {
                    let to = left.to.min(left.from + PIECE_BYTES);
                    let piece = Piece { to, ..left.clone() };
                    left.from = to;
                    return Some(piece);
                }
                self.file = None;
            }
            let path = self.paths.pop()?;
            if let Err(error) = self.look_at(path.clone()) {
                self.unread.insert(format!("{}: {error}", path.display()));
            }
        }
    }
}
