//! `atomizer doctor`.

mod broker;
mod namespace;

use atomizer::AtomId;
use atomizer_programs::{Exit, say};
use serde_json::{Value, json};

use crate::{output::one_line, shared::Shared};

/// Finds out what is wrong, and says what to do about it.
///
/// It connects to each address of the URL, looks at version, heartbeat and encryption, tries whether queues may be made (in
/// one that it removes again), compares clocks, and looks at what the namespace has: exchanges, queues, dead letters.
/// Nothing that stays is made.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  atomizer doctor
  atomizer doctor --atom mail --atom double
  ATOMIZER_URL=amqp://me:secret@a,b,c/jobs atomizer doctor --json

A line is 'ok', a 'note' that may be as it should, or 'wrong'. With --json: {\"level\", \"check\", \"what\", \"do\"}.
Exits with 1 when anything is wrong.")]
pub(crate) struct Arguments {
    /// An atom that is to be served; may be said several times.
    #[arg(long, value_parser = |text: &str| AtomId::try_new(text))]
    atom: Vec<AtomId>,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Ok,
    Note,
    Wrong,
}

impl Level {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Wrong => "wrong",
        }
    }
}

/// What was found out by one check.
#[derive(Debug)]
struct Finding {
    level: Level,
    check: &'static str,
    what: String,
    /// What to do about it; empty where nothing is to be done.
    advice: String,
}

impl Finding {
    fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self { level: Level::Ok, check, what: what.into(), advice: String::new() }
    }

    fn note(check: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Note, check, what: what.into(), advice: advice.into() }
    }

    fn wrong(check: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Wrong, check, what: what.into(), advice: advice.into() }
    }
}

pub(crate) async fn run(shared: &Shared, arguments: &Arguments) -> anyhow::Result<Exit> {
    let mut findings = Findings { shared, wrong: 0 };
    let operator = shared.rabbit()?.operator();
    let probes = operator.probe().await;
    let reached = probes.iter().any(|probe| probe.outcome.is_ok());
    for finding in broker::probed(&probes) {
        findings.say(finding)?;
    }
    if reached {
        findings.say(broker::declaring(shared, &operator).await)?;
        findings.say(broker::clock(&operator).await)?;
        for finding in namespace::topology(shared, &operator).await {
            findings.say(finding)?;
        }
        let (nodes, served) = namespace::nodes(shared).await;
        for finding in nodes {
            findings.say(finding)?;
        }
        for finding in namespace::atoms(shared, &operator, &arguments.atom).await {
            findings.say(finding)?;
        }
        let unnamed: Vec<_> =
            served.into_iter().filter(|atom| !arguments.atom.contains(atom)).collect();
        for finding in namespace::abandoned(&operator, &unnamed).await {
            findings.say(finding)?;
        }
        findings.say(namespace::dead(shared).await)?;
    }
    match findings.wrong {
        0 => Ok(Exit::Done),
        1 => anyhow::bail!("one thing is wrong"),
        wrong => anyhow::bail!("{wrong} things are wrong"),
    }
}

/// Says what is found as soon as it is: some checks take a while.
struct Findings<'a> {
    shared: &'a Shared,
    wrong: u32,
}

impl Findings<'_> {
    fn say(&mut self, finding: Finding) -> anyhow::Result<()> {
        let Finding { level, check, what, advice } = finding;
        self.wrong += u32::from(level == Level::Wrong);
        if self.shared.json {
            let advice = Some(advice).filter(|advice| !advice.is_empty());
            let level = level.as_str();
            let object: Value =
                json!({ "level": level, "check": check, "what": what, "do": advice });
            return say(object);
        }
        say(format_args!("{:<5}  {check:<12}  {}", level.as_str(), one_line(&what)))?;
        if !advice.is_empty() {
            say(format_args!("{:21}-> {advice}", ""))?;
        }
        Ok(())
    }
}
