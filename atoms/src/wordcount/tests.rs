use std::{fs, path::PathBuf, process};

use atomizer::{Atomizer, Memory};

use super::{piece::PIECE_BYTES, *};

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("atomizer-words-{name}-{}", process::id()));
        fs::create_dir_all(path.join("within")).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.0.join(name), text).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

async fn count(folder: &Folder, top: usize) -> Words {
    let builder = Atomizer::builder().conductor(Memory::new()).atom(WordCount::default());
    let atomizer = builder.atom(CountWords).start().await.unwrap();
    let words = atomizer.call::<WordCount>(Corpus { path: folder.0.clone(), top }).await.unwrap();
    atomizer.drain().await.unwrap();
    words
}

#[tokio::test]
async fn the_most_frequent_words_of_all_files_come_first() {
    let folder = Folder::new("top");
    folder.write("one.txt", "To be, or not to be: that is the question.");
    folder.write("within/two.txt", "Über-Maß\nTO BE\n");
    folder.write("empty.txt", "");
    let words = count(&folder, 3).await;
    assert_eq!(words.top, [("be".to_owned(), 3), ("to".to_owned(), 3), ("is".to_owned(), 1)]);
    assert_eq!((words.words, words.distinct, words.electrons), (14, 10, 2));
    assert_eq!(words.unread, Vec::<String>::new());
}

#[tokio::test]
async fn what_cannot_be_read_is_told_and_the_rest_is_counted() {
    let folder = Folder::new("unread");
    folder.write("good.txt", "good good");
    folder.write("latin1.txt", b"caf\xe9");
    folder.write("within/blob", vec![b'x'; 2 * PIECE_BYTES as usize]);
    let words = count(&folder, 1).await;
    assert_eq!(words.top, [("good".to_owned(), 2)]);
    let [latin1, blob] = &words.unread[..] else { panic!("{:?}", words.unread) };
    assert!(latin1.ends_with("latin1.txt: not UTF-8"), "{latin1}");
    assert!(blob.contains("blob: no space or line break"), "{blob}");
}

#[tokio::test]
async fn a_word_on_the_border_of_two_pieces_counts_once() {
    let folder = Folder::new("border");
    // Of a length that does not divide that of a piece, so that borders fall at each place in it.
    let words_wanted = 4 * PIECE_BYTES / 7;
    folder.write("long.txt", "wörds ".repeat(usize::try_from(words_wanted).unwrap()));
    let words = count(&folder, 2).await;
    assert_eq!(words.top, [("wörds".to_owned(), words_wanted)]);
    assert_eq!((words.electrons, words.bytes), (4, words_wanted * 7));
}
