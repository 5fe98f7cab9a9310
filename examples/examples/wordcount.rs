//! Counts the words of a folder of text files: a map over pieces of files, and a reduction of what comes back.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use atomizer::{Atomizer, Memory};
use atomizer_atoms::{Corpus, CountWords, WordCount, Words};
use atomizer_examples::{Exit, progress, say, tosses::Scaled};
use clap::Parser;
use tokio::signal::ctrl_c;

/// Counts the words of a file, or of all files in a folder, and shows the most frequent.
///
/// A word is a run of letters and digits, in lower case. Files are read in pieces of 1 MiB, one electron each, on the
/// cores of this machine. What is no text in UTF-8, or cannot be read, is told on stderr; the rest is counted.
///
/// The last line on stdout is for machines: words=.. distinct=.. bytes=.. electrons=.. unread=.. seconds=..
#[derive(Parser)]
#[command(
    name = "wordcount",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrongly typed or nothing at PATH, 130 interrupted."
)]
struct Options {
    /// A text file, or a folder of them.
    #[arg(value_name = "PATH", value_parser = existing)]
    path: PathBuf,
    /// How many words to show.
    #[arg(long, value_name = "N", default_value_t = 10)]
    top: usize,
    /// Print one line of JSON and nothing else on stdout.
    #[arg(long)]
    json: bool,
}

fn existing(path: &str) -> io::Result<PathBuf> {
    fs::metadata(path).map(|_| path.into())
}

fn main() -> ExitCode {
    atomizer_examples::run("warn", wordcount)
}

async fn wordcount(options: Options) -> anyhow::Result<Exit> {
    let read = Arc::new(AtomicU64::new(0));
    let told = Arc::clone(&read);
    let counter = WordCount::with_progress(move |bytes| told.store(bytes, Ordering::Relaxed));
    let builder = Atomizer::builder().name("wordcount").conductor(Memory::new());
    let builder = builder.atom(counter).atom(CountWords).drain_timeout(Duration::from_millis(200));
    let node = builder.start().await?;
    let (began, all) = (Instant::now(), bytes(&options.path));
    let corpus = Corpus { path: options.path, top: options.top };
    let call = node.call::<WordCount>(corpus).deadline(Duration::MAX);
    let answer = tokio::select! {
        answer = call.into_future() => answer.context("the words are not counted"),
        never = progress::show_bytes(all, || read.load(Ordering::Relaxed)) => match never {},
        interrupted = ctrl_c() => {
            interrupted?;
            node.drain().await?;
            return Ok(Exit::Interrupted);
        }
    };
    node.drain().await?;
    let words = answer?;
    for unread in &words.unread {
        eprintln!("not counted: {unread}");
    }
    print(&words, began.elapsed(), options.json)?;
    Ok(Exit::Done)
}

/// How much there is to read, as far as that can be told.
fn bytes(path: &Path) -> u64 {
    let Ok(about) = fs::metadata(path) else { return 0 };
    if !about.is_dir() {
        return about.len();
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let within = entries.filter(|entry| entry.file_type().is_ok_and(|kind| !kind.is_symlink()));
    within.map(|entry| bytes(&entry.path())).sum()
}

fn print(words: &Words, took: Duration, json: bool) -> anyhow::Result<()> {
    let Words { top, words, distinct, bytes, electrons, unread } = words;
    let seconds = took.as_secs_f64();
    if json {
        return say(serde_json::json!({
            "top": top, "words": words, "distinct": distinct, "bytes": bytes,
            "electrons": electrons, "unread": unread, "seconds": seconds,
        }));
    }
    let width = top.first().map_or(0, |(_, count)| count.to_string().len());
    for (word, count) in top {
        say(format_args!("{count:>width$}  {word}"))?;
    }
    let rate = Scaled(*words as f64 / seconds);
    say(format_args!("{words} words, {distinct} different, {rate} words/s"))?;
    let unread = unread.len();
    say(format_args!(
        "words={words} distinct={distinct} bytes={bytes} electrons={electrons} unread={unread} seconds={seconds:.3}"
    ))
}
