//! `cargo xtask ci`.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::cargo::{cargo, has, root};
use crate::{
    bench::{self, Recovery},
    stream, test, versions,
};

/// The README's first command, and how the last line of its output begins.
const EXAMPLE: &str = "cargo run --release --example montecarlo";
const EXAMPLE_SAYS: &str = "pi=3.14";

/// The other RabbitMQ to test on, beside the installed one.
const NEWER_RABBITMQ: &str = "4.0";

/// What is tested on it: what depends on what the broker does.
const ON_NEWER_RABBITMQ: [&str; 2] = ["atomizer-rabbitmq", "atomizer-tests"];

/// How the table tells of a step that was not taken.
const SKIPPED: &str = "SKIPPED";

/// What a step came to, where it did not fail.
enum Outcome {
    Done,
    Skipped(String),
}

type Step = (&'static str, fn() -> Result<Outcome>);

const STEPS: [Step; 9] = [
    ("format", format),
    ("clippy", clippy),
    ("documentation", documentation),
    ("dependencies", dependencies),
    ("tests", tests),
    ("tests of TLS", tests_of_tls),
    ("newer broker", tests_on_newer),
    ("recovery", recovery),
    ("first example", first_example),
];

/// Takes the steps in order and stops at the first that fails.
pub(crate) fn run() -> Result<()> {
    let mut rows = Vec::new();
    let mut result = Ok(());
    for (name, step) in STEPS {
        println!("\n== {name}");
        let start = Instant::now();
        let outcome = step();
        let took = start.elapsed();
        match outcome {
            Ok(Outcome::Done) => rows.push((name, took, "ok".to_owned())),
            Ok(Outcome::Skipped(why)) => {
                println!("\n!! {SKIPPED}: {why}\n");
                rows.push((name, took, format!("{SKIPPED}: {why}")));
            }
            Err(error) => {
                rows.push((name, took, "FAILED".to_owned()));
                result = Err(error.context(format!("the step \"{name}\" failed")));
                break;
            }
        }
    }
    print_table(&rows);
    for (name, _, outcome) in rows.iter().filter(|(_, _, outcome)| outcome.starts_with(SKIPPED)) {
        println!("!! {name}: {outcome}");
    }
    result
}

fn print_table(rows: &[(&str, Duration, String)]) {
    println!("\n{:<14} {:>8}  outcome", "step", "seconds");
    for (name, took, outcome) in rows {
        println!("{name:<14} {:>8.1}  {outcome}", took.as_secs_f64());
    }
}

fn format() -> Result<Outcome> {
    call(&mut cargo(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<Outcome> {
    call(&mut cargo("clippy --workspace --all-targets -- -D warnings".split(' ')))?;
    // Features that are left out unless they are asked for.
    let tls = "clippy --package atomizer-rabbitmq --features tls --all-targets -- -D warnings";
    call(&mut cargo(tls.split(' ')))
}

fn documentation() -> Result<Outcome> {
    let mut command = cargo(["doc", "--workspace", "--no-deps"]);
    call(command.env("RUSTDOCFLAGS", "-D warnings"))
}

fn dependencies() -> Result<Outcome> {
    if !has("deny") {
        return Ok(Outcome::Skipped("cargo-deny is not installed".to_owned()));
    }
    call(&mut cargo("deny check bans licenses sources".split(' ')))
}

fn tests() -> Result<Outcome> {
    let options = test::Options { yes: true, ..test::Options::default() };
    test::run(&options).map(|()| Outcome::Done)
}

/// Tests what only a feature has, which would make the build heavier for all the rest.
fn tests_of_tls() -> Result<Outcome> {
    let packages = vec!["atomizer-rabbitmq".to_owned()];
    let extra = ["--features", "tls", "tls::"].map(str::to_owned).to_vec();
    let options = test::Options { yes: true, packages, extra, ..test::Options::default() };
    test::run(&options).map(|()| Outcome::Done)
}

/// Tests on a newer RabbitMQ, where one can be had.
fn tests_on_newer() -> Result<Outcome> {
    let version = NEWER_RABBITMQ.parse().context("it is a version")?;
    if let Err(error) = versions::ensure(Some(&version), true) {
        let why = format!("nothing was tested on RabbitMQ {NEWER_RABBITMQ}: {error:#}");
        return Ok(Outcome::Skipped(why));
    }
    let packages = ON_NEWER_RABBITMQ.map(str::to_owned).to_vec();
    let rabbitmq = Some(version);
    let options = test::Options { yes: true, rabbitmq, packages, ..test::Options::default() };
    test::run(&options).map(|()| Outcome::Done)
}

/// Brings about each fault once, and sees everything recover.
fn recovery() -> Result<Outcome> {
    bench::recovery(&Recovery::smoke()).map(|()| Outcome::Done)
}

/// Does what a newcomer does first.
fn first_example() -> Result<Outcome> {
    let readme =
        fs::read_to_string(root().join("README.md")).context("failed to read README.md")?;
    ensure!(readme.contains(EXAMPLE), "README.md does not tell to type `{EXAMPLE}`");
    let mut command = cargo(EXAMPLE.split(' ').skip(1));
    let keep_last = |last: &mut String, line: &str| {
        if !line.trim().is_empty() {
            line.trim().clone_into(last);
        }
    };
    let ended = stream::run(&mut command, drop, keep_last)?;
    ensure!(ended.status.success(), "`{EXAMPLE}` failed: {}", ended.status);
    let last = ended.stdout;
    ensure!(
        last.starts_with(EXAMPLE_SAYS),
        "the last line should begin with {EXAMPLE_SAYS} and is: {last}"
    );
    Ok(Outcome::Done)
}

fn call(command: &mut Command) -> Result<Outcome> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("failed to run {command:?}"))?;
    if !status.success() {
        bail!("cargo failed: {status}");
    }
    Ok(Outcome::Done)
}
