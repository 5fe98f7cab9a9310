//! `cargo xtask sabotage`.

mod copy;
mod guard;
mod patch;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use atomizer_test_support::{Broker, SHARED_BROKER};

use self::copy::Copy;
use self::guard::{Ended, Guard};
use self::patch::{Patch, Test};
use crate::cargo::{cargo_in, root, target};
use crate::counts::{Counts, Runner};
use crate::install;

/// Where the patches are, below the root of the workspace.
const PATCHES: &str = "tests/sabotage";

/// How long one test may take. One that takes longer has noticed that something is wrong.
const TEST_MAX: Duration = Duration::from_secs(120);

/// The packages whose tests need RabbitMQ.
const NEED_RABBITMQ: [&str; 5] = [
    "atomizer-cli",
    "atomizer-rabbitmq",
    "atomizer-tests",
    "atomizer-examples",
    "atomizer-test-support",
];

/// What `cargo xtask sabotage` can be told.
#[derive(Debug, Default, clap::Args)]
#[command(after_help = "\
A patch is a file tests/sabotage/NAME.patch:

  test: atomizer-conformance::memory a_dropped_ticket_releases
  # Comments, as many lines as are needed: what breaks, and why that must be noticed.
  diff --git a/PATH b/PATH
  ...

The name of the test is that which `cargo nextest list` prints. `git diff -U1` makes a diff that survives
changes nearby.

Examples:
  cargo xtask sabotage         apply all patches, one after the other
  cargo xtask sabotage NAME    apply only this one
  cargo xtask sabotage --list  list them with their tests")]
pub(crate) struct Options {
    /// List the patches, and the test that has to notice each.
    #[arg(long)]
    list: bool,
    /// The patches to apply, by name; all where none is named.
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

/// What came of a patch.
enum Verdict {
    /// The test failed, as it must.
    Caught,
    /// The test passed.
    Missed,
    /// It is not known what the test makes of it.
    Error(String),
}

/// Applies the patches one by one, and prints the line that sums them up last.
pub(crate) fn run(options: &Options) -> Result<()> {
    let patches = select(patch::read_all(&root().join(PATCHES))?, &options.names)?;
    if options.list {
        for patch in &patches {
            println!("{}: {}", patch.name, patch.test);
        }
        return Ok(());
    }
    let caught = if patches.is_empty() { 0 } else { run_all(&patches)? };
    println!("caught {caught} of {}", patches.len());
    ensure!(!patches.is_empty(), "there is no patch in {PATCHES}");
    ensure!(caught == patches.len(), "not every patch was caught");
    Ok(())
}

fn select(patches: Vec<Patch>, names: &[String]) -> Result<Vec<Patch>> {
    for name in names {
        ensure!(patches.iter().any(|patch| patch.name == *name), "there is no patch {name}");
    }
    let selected = |patch: &Patch| names.is_empty() || names.contains(&patch.name);
    Ok(patches.into_iter().filter(selected).collect())
}

/// Returns how many of the patches were caught.
fn run_all(patches: &[Patch]) -> Result<usize> {
    let broker = start_broker(patches)?;
    let workshop = Workshop::new(patches, broker)?;
    let sound = workshop.check_sound(patches)?;
    let mut caught = 0;
    for patch in patches {
        let start = Instant::now();
        let verdict = match &sound[&patch.test] {
            None => workshop.sabotage(patch)?,
            Some(why) => Verdict::Error(format!("without the patch {why}")),
        };
        let (name, test) = (&patch.name, &patch.test);
        let took = start.elapsed().as_secs_f64();
        match verdict {
            Verdict::Caught => {
                caught += 1;
                println!("caught {name} in {took:.1} s: {test}");
            }
            Verdict::Missed => println!("MISSED {name} in {took:.1} s: {test}"),
            Verdict::Error(why) => println!("ERROR {name}: {why}"),
        }
    }
    Ok(caught)
}

fn start_broker(patches: &[Patch]) -> Result<Option<Broker>> {
    if !patches.iter().any(|patch| NEED_RABBITMQ.contains(&patch.test.package())) {
        return Ok(None);
    }
    install::ensure_rabbitmq(false)?;
    Broker::start().context("failed to start a private RabbitMQ").map(Some)
}

/// A copy of the tree, and what is needed to run tests in it.
struct Workshop {
    // The order matters: the guard removes the copy, and ends what runs in it, before the broker ends.
    copy: Copy,
    guard: Guard,
    /// Built things and logs. It stays, so that only what has changed is built the next time.
    target: PathBuf,
    broker: Option<Broker>,
}

impl Workshop {
    fn new(patches: &[Patch], broker: Option<Broker>) -> Result<Self> {
        // Beside what cargo builds of the workspace itself.
        let target = target()?.join("sabotage");
        fs::create_dir_all(&target)
            .with_context(|| format!("failed to make {}", target.display()))?;
        let lock = File::create(target.join("lock")).context("failed to make the lock")?;
        if lock.try_lock().is_err() {
            println!("waiting for another run to end");
            lock.lock().context("failed to lock")?;
        }
        let folder = copy::folder(root());
        let guard = Guard::start(&folder, &lock)?;
        let copy = Copy::make(root(), &folder, target.join("touched"))?;
        copy.touch(patches)?;
        Ok(Self { copy, guard, target, broker })
    }

    /// Runs the tests unpatched. Returns for each what is wrong with it, if anything is.
    fn check_sound<'a>(&self, patches: &'a [Patch]) -> Result<BTreeMap<&'a Test, Option<String>>> {
        let mut binaries: BTreeMap<&str, Vec<&'a Test>> = BTreeMap::new();
        for patch in patches {
            let tests = binaries.entry(&patch.test.binary).or_default();
            if !tests.contains(&&patch.test) {
                tests.push(&patch.test);
            }
        }
        let start = Instant::now();
        let mut sound = BTreeMap::new();
        for tests in binaries.values() {
            // All of a binary in one run; one by one only where that fails, to know which.
            let wrong = self.check_all(tests)?;
            for test in tests {
                let wrong = match &wrong {
                    Some(_) if tests.len() > 1 => self.check_all(&[test])?,
                    wrong => wrong.clone(),
                };
                sound.insert(*test, wrong);
            }
        }
        let fine = sound.values().filter(|wrong| wrong.is_none()).count();
        let took = start.elapsed().as_secs_f64();
        println!("without patches {fine} of {} tests pass, in {took:.1} s", sound.len());
        Ok(sound)
    }

    /// Builds and runs tests of one binary that have to pass. Returns what is wrong.
    fn check_all(&self, tests: &[&Test]) -> Result<Option<String>> {
        let name = match tests {
            [test] => test.to_string(),
            _ => tests[0].binary.clone(),
        };
        let name = name.replace([':', '/', ' '], "-");
        let log = self.target.join(format!("without-patch-{name}.log"));
        if let Some(why) = self.build(tests[0], &log)? {
            return Ok(Some(why));
        }
        Ok(match self.test(tests, &log)? {
            Verdict::Missed => None,
            Verdict::Caught => Some(format!("the test fails: see {}", log.display())),
            Verdict::Error(why) => Some(why),
        })
    }

    fn sabotage(&self, patch: &Patch) -> Result<Verdict> {
        let changed = match self.copy.apply(patch)? {
            Ok(changed) => changed,
            Err(why) => return Ok(Verdict::Error(format!("it does not apply: {why}"))),
        };
        let log = self.target.join(format!("{}.log", patch.name));
        let verdict = match self.build(&patch.test, &log)? {
            None => self.test(&[&patch.test], &log)?,
            Some(why) => Verdict::Error(why),
        };
        self.copy.revert(changed)?;
        Ok(verdict)
    }

    /// Builds all of a package that its tests may need, programs too. Returns why that failed, if it did.
    fn build(&self, test: &Test, log: &Path) -> Result<Option<String>> {
        let arguments = ["test", "--no-run", "--package", test.package()];
        let ended = self.run(&self.cargo(&arguments), log, None)?;
        let text = fs::read_to_string(log).unwrap_or_default();
        Ok(match ended {
            Ended::Exited(status) if status.success() => None,
            _ => {
                let error = text.lines().find(|line| line.starts_with("error"));
                let error = error.unwrap_or("cargo failed");
                Some(format!("it does not build: {error}: see {}", log.display()))
            }
        })
    }

    /// Runs tests of one binary that is built.
    fn test(&self, tests: &[&Test], log: &Path) -> Result<Verdict> {
        let test = tests[0];
        let mut arguments = vec!["test", "--package", test.package()];
        let target = match test.target() {
            Ok(target) => target,
            Err(error) => return Ok(Verdict::Error(format!("{error:#}"))),
        };
        arguments.extend(&target);
        arguments.extend(["--", "--exact"]);
        arguments.extend(tests.iter().map(|test| test.path.as_str()));
        let limit = TEST_MAX.saturating_mul(u32::try_from(tests.len()).unwrap_or(u32::MAX));
        let ended = self.run(&self.cargo(&arguments), log, Some(limit))?;
        let bytes = fs::read(log).with_context(|| format!("failed to read {}", log.display()))?;
        Ok(judge(&String::from_utf8_lossy(&bytes), ended, tests.len() as u64))
    }

    fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = cargo_in(self.copy.folder(), arguments.iter().copied());
        command.env("CARGO_TARGET_DIR", &self.target).env("CARGO_TERM_COLOR", "never");
        if let Some(broker) = &self.broker {
            command.env(SHARED_BROKER, broker.describe());
        }
        command
    }

    fn run(&self, command: &Command, log: &Path, limit: Option<Duration>) -> Result<Ended> {
        let out = File::create(log).with_context(|| format!("failed to make {}", log.display()))?;
        let err = out.try_clone().context("failed to share the log")?;
        self.guard.run(command, Stdio::from(out), Stdio::from(err), limit)
    }
}

/// Tells from what a run of so many tests wrote whether they failed.
fn judge(text: &str, ended: Ended, tests: u64) -> Verdict {
    let running = |line: &str| {
        let number = line.strip_prefix("running ")?.split(' ').next()?;
        number.parse::<u64>().ok()
    };
    let begun: u64 = text.lines().filter_map(running).sum();
    if begun < tests {
        return Verdict::Error("the test is not there".to_owned());
    }
    let mut counts = Counts::default();
    text.lines().for_each(|line| counts.read(Runner::Libtest, line));
    match ended {
        Ended::Exited(status) if status.success() && counts.passed == tests => Verdict::Missed,
        Ended::Exited(status) if status.success() => {
            Verdict::Error("the test is not run: is it ignored?".to_owned())
        }
        // It failed, or took its process with it, or never came to its end.
        Ended::Exited(_) | Ended::TimedOut => Verdict::Caught,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use super::{Ended, Verdict, judge, patch};
    use crate::cargo::root;

    fn verdict(text: &str, code: i32) -> &'static str {
        match judge(text, Ended::Exited(ExitStatus::from_raw(code << 8)), 1) {
            Verdict::Caught => "caught",
            Verdict::Missed => "missed",
            Verdict::Error(_) => "error",
        }
    }

    #[test]
    fn only_a_test_that_was_run_and_did_not_pass_has_caught_something() {
        let result = "running 1 test\ntest result: ok. 1 passed; 0 failed; finished";
        assert_eq!(verdict(result, 0), "missed");
        let result = "running 1 test\ntest result: FAILED. 0 passed; 1 failed; finished";
        assert_eq!(verdict(result, 101), "caught");
        assert_eq!(verdict("running 1 test\nmemory allocation failed", 134), "caught");
        let result = "running 0 tests\ntest result: ok. 0 passed; 0 failed; finished";
        assert_eq!(verdict(result, 0), "error");
        let result = "running 1 test\ntest result: ok. 0 passed; 0 failed; 1 ignored; finished";
        assert_eq!(verdict(result, 0), "error");
        assert_eq!(verdict("error: no test target named `it`", 101), "error");
        assert!(matches!(judge("running 1 test", Ended::TimedOut, 1), Verdict::Caught));
    }

    #[test]
    fn the_patches_of_this_repository_are_understood() {
        let patches = patch::read_all(&root().join(super::PATCHES)).unwrap();
        assert!(!patches.is_empty());
        for patch in patches {
            assert!(patch.test.target().is_ok(), "{}: {}", patch.name, patch.test);
        }
    }
}
