//! `atomizer dead list`.

use std::{collections::HashMap, time::SystemTime};

use atomizer::{Cause, CauseKey, DeadLetter, LetterId};
use atomizer_programs::{Exit, say, signals};
use atomizer_rabbitmq::{Listing, Selection};
use serde_json::{Value, json};

use super::Filter;
use crate::{
    output::{json_time, one_line, time},
    rows::Rows,
    shared::Shared,
};

/// How many causes are told apart; of all others it is counted how many there are.
const CAUSES_MAX: usize = 10_000;

/// Lists dead letters by what they died of, most frequent first; they stay where they are.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Two letters have the same cause when they are of the same atom, ended in the same way, and with the same words but for
numbers and ids.

With --json a cause is {\"cause\", \"count\", \"atom\", \"reason\", \"detail\", \"oldest\", \"newest\", \"example\"}, and a letter
{\"id\", \"cause\", \"atom\", \"reason\", \"detail\", \"died_at\", \"attempts\", \"payload_bytes\"}.")]
pub(super) struct Arguments {
    #[command(flatten)]
    filter: Filter,
    /// List each letter, oldest first.
    #[arg(long)]
    each: bool,
}

pub(super) async fn run(shared: &Shared, arguments: &Arguments) -> anyhow::Result<Exit> {
    let selection = arguments.filter.narrow(Selection::all());
    let mut listing = shared.dead_letters()?.list(selection);
    let listed = tokio::select! {
        listed = async {
            if arguments.each {
                each(shared, &mut listing).await
            } else {
                by_cause(shared, &mut listing).await
            }
        } => listed.map(|()| Exit::Done),
        stopped = signals::stop() => stopped.map(|()| Exit::Interrupted).map_err(Into::into),
    };
    // What it has seen goes back before this process is gone.
    listing.close().await;
    listed
}

async fn each(shared: &Shared, listing: &mut Listing) -> anyhow::Result<()> {
    while let Some(letter) = listing.next().await.transpose()? {
        let cause = letter.cause().key();
        if shared.json {
            say(json!({
                "id": letter.id.to_string(),
                "cause": cause.to_string(),
                "atom": letter.atom.as_ref().map(|atom| atom.as_str()),
                "reason": letter.reason.to_string(),
                "detail": letter.detail,
                "died_at": json_time(letter.died_at),
                "attempts": letter.attempts,
                "payload_bytes": letter.payload_bytes,
            }))?;
        } else {
            let (died_at, atom) = (time(letter.died_at), of(&letter));
            let why = why(&letter.reason.to_string(), &letter.detail);
            say(format_args!("{}  {died_at}  {cause}  {atom}  {why}", letter.id))?;
        }
    }
    Ok(())
}

async fn by_cause(shared: &Shared, listing: &mut Listing) -> anyhow::Result<()> {
    let (mut groups, mut others) = (HashMap::<CauseKey, Group>::new(), 0_u64);
    while let Some(letter) = listing.next().await.transpose()? {
        let cause = letter.cause();
        let key = cause.key();
        if groups.len() >= CAUSES_MAX && !groups.contains_key(&key) {
            others += 1;
            continue;
        }
        groups.entry(key).or_insert_with(|| Group::new(cause, letter.id)).add(&letter);
    }
    let mut groups: Vec<_> = groups.into_iter().collect();
    groups.sort_by(|(one_key, one), (key, other)| {
        other.count.cmp(&one.count).then_with(|| one_key.cmp(key))
    });
    if others > 0 {
        eprintln!("warning: {others} more are of causes beyond the first {CAUSES_MAX}");
    }
    if shared.json {
        return groups.iter().try_for_each(|(key, group)| say(group.json(*key)));
    }
    if groups.is_empty() {
        eprintln!("there are none");
        return Ok(());
    }
    let mut rows = Rows::new(["COUNT", "CAUSE", "ATOM", "OLDEST", "NEWEST", "REASON"]);
    for (key, group) in &groups {
        let Cause { atom, reason, detail, .. } = &group.cause;
        rows.push([
            group.count.to_string(),
            key.to_string(),
            atom.as_ref().map_or("-", |atom| atom.as_str()).to_owned(),
            time(group.oldest),
            time(group.newest),
            why(&reason.to_string(), detail),
        ]);
    }
    rows.lines().into_iter().try_for_each(say)
}

/// Those that died of the same.
struct Group {
    cause: Cause,
    count: u64,
    example: LetterId,
    oldest: Option<SystemTime>,
    newest: Option<SystemTime>,
}

impl Group {
    fn new(cause: Cause, example: LetterId) -> Self {
        Self { cause, count: 0, example, oldest: None, newest: None }
    }

    fn add(&mut self, letter: &DeadLetter) {
        self.count += 1;
        let Some(at) = letter.died_at else { return };
        self.oldest = Some(self.oldest.map_or(at, |oldest| oldest.min(at)));
        self.newest = Some(self.newest.map_or(at, |newest| newest.max(at)));
    }

    fn json(&self, key: CauseKey) -> Value {
        json!({
            "cause": key.to_string(),
            "count": self.count,
            "atom": self.cause.atom.as_ref().map(|atom| atom.as_str()),
            "reason": self.cause.reason.to_string(),
            "detail": self.cause.detail,
            "oldest": json_time(self.oldest),
            "newest": json_time(self.newest),
            "example": self.example.to_string(),
        })
    }
}

fn of(letter: &DeadLetter) -> &str {
    letter.atom.as_ref().map_or("-", |atom| atom.as_str())
}

fn why(reason: &str, detail: &str) -> String {
    let separator = if detail.is_empty() { "" } else { ": " };
    one_line(&format!("{reason}{separator}{detail}"))
}
