//! The small programs: policies, housekeeper, protobuf and wordcount.

use std::{fs, path::PathBuf, process};

use atomizer_test_support::shared;

use crate::harness::{Ended, From, Program, run};

fn in_order(ended: &Ended) {
    assert_eq!(ended.code, Some(0), "{ended:#?}");
}

/// Checks that the lines are there, each after the one before.
fn follow_each_other(text: &str, lines: &[&str]) {
    let mut rest = text;
    for line in lines {
        let (_, after) = rest.split_once(line).unwrap_or_else(|| panic!("no {line:?} in {rest}"));
        rest = after;
    }
}

#[test]
fn policies_shows_what_follows_each_failure() {
    let ended = run("policies", &[]);
    in_order(&ended);
    assert_eq!(ended.stderr, "", "the log is for those who ask for it");
    follow_each_other(
        &ended.stdout,
        &[
            "Retry here · Policy::retry(2)\n",
            "flaky  attempt 1 fails: the line is dead; again here in 50ms\n",
            "flaky  attempt 2 fails: the line is dead; again here in 100ms\n",
            "flaky  attempt 3 succeeds\n",
            "is answered: delivered after [the line is dead, the line is dead]\n",
            "Requeue elsewhere · Policy::requeue(1)\n",
            "flaky  attempt 1 fails: the van is broken; back in the queue for 50ms\n",
            "sound  attempt 2 succeeds\n",
            "Error: retry after · Policy::retry(1)\n",
            "flaky  attempt 1 fails: the gate is shut; again here in 300ms\n",
            "Error: give back · Policy::fail()\n",
            "flaky  attempt 1 hands it on: given back: the van is full",
            "sound  attempt 1 succeeds\n",
            "Dead letters",
            "failed attempts: 4\n",
            "sound  attempt 4 nobody is at home\n",
            "failed attempts: 1\n",
            "flaky  attempt 1 no such street\n",
        ],
    );
    let (_, summary) = ended.stdout.split_once("\nSummary ").expect("a summary");
    let rows: Vec<_> = summary.lines().skip(1).map(|row| row.split_at(33)).collect();
    let counted: Vec<_> = rows.iter().map(|(row, _)| row.split_at(24).1.trim()).collect();
    assert_eq!(counted, ["1", "3", "2", "4", "4", "1", "2", "1"], "{summary}");
    let nodes: Vec<_> = rows.iter().map(|(_, rest)| rest.split_whitespace().next()).collect();
    let expected = ["flaky", "flaky", "sound", "sound", "sound", "flaky", "flaky", "sound"];
    assert_eq!(nodes, expected.map(Some), "{summary}");
}

#[test]
fn policies_logs_when_it_is_asked_to() {
    let ended = Program::start_with("policies", &[], &[("RUST_LOG", "warn")]).end();
    in_order(&ended);
    assert!(ended.stderr.contains("failed, and is tried again"), "{ended:#?}");
}

#[test]
fn housekeeper_ends_after_its_rounds() {
    let ended = run("housekeeper", &["--every", "1s", "--rounds", "3"]);
    in_order(&ended);
    follow_each_other(
        &ended.stderr,
        &[
            "life 1 begins",
            "round 1: 2 files swept, 2 in this life",
            "round 2: 2 files swept, 4 in this life",
            "round 3: 2 files swept, 6 in this life",
            "life 1 ends: 6 files in 3 rounds",
            "ended in order",
        ],
    );
    assert!(!own_folder(&ended).exists(), "it leaves nothing behind: {ended:#?}");
}

#[test]
fn housekeeper_starts_again_with_fresh_state_when_it_fails() {
    let ended = run("housekeeper", &["--every", "1s", "--rounds", "3", "--fail-every", "2"]);
    in_order(&ended);
    follow_each_other(
        &ended.stderr,
        &[
            "round 2: 2 files swept, 4 in this life",
            "life 1 ends: 4 files in 2 rounds",
            "failed; starts again",
            "life 2 begins",
            "round 3: 2 files swept, 2 in this life",
            "life 2 ends: 2 files in 1 rounds",
            "ended in order",
        ],
    );
}

#[test]
fn housekeeper_ends_in_order_when_it_is_told_to() {
    for signal in ["TERM", "INT"] {
        let mut program = Program::start("housekeeper", &["--every", "1s"]);
        // By the second round it listens to signals.
        program.wait_for(From::Stderr, "round 2: 2 files swept");
        program.signal(signal);
        let ended = program.end();
        in_order(&ended);
        follow_each_other(&ended.stderr, &["life 1 ends: ", "ended in order"]);
        assert!(!own_folder(&ended).exists(), "it leaves nothing behind: {ended:#?}");
    }
}

#[test]
fn housekeeper_removes_nothing_but_old_temporary_files() {
    let folder = std::env::temp_dir().join(format!("to-be-swept-{}", process::id()));
    fs::create_dir(&folder).expect("a folder");
    fs::create_dir(folder.join("folder.tmp")).expect("a folder");
    for name in ["one.tmp", "two.txt", "three.tmp.bak", "folder.tmp/four.tmp"] {
        fs::write(folder.join(name), "content").expect("a file");
    }
    let path = folder.to_str().expect("it is text").to_owned();
    let sweep = |older_than: &[&str]| {
        let mut arguments = vec!["--every", "1s", "--rounds", "1", "--folder", &path];
        arguments.extend(older_than);
        in_order(&run("housekeeper", &arguments));
        let mut left: Vec<_> = (fs::read_dir(&folder).expect("it is still there"))
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("it is text"))
            .collect();
        left.sort();
        left
    };
    let all = ["folder.tmp", "one.tmp", "three.tmp.bak", "two.txt"];
    assert_eq!(sweep(&[]), all, "none is an hour old");
    assert_eq!(sweep(&["--older-than", "0s"]), ["folder.tmp", "three.tmp.bak", "two.txt"]);
    assert!(folder.join("folder.tmp/four.tmp").exists(), "what is deeper stays");
    fs::remove_dir_all(&folder).expect("it goes");
}

#[test]
fn housekeeper_works_behind_a_broker() {
    let vhost = shared().expect("a broker").vhost().expect("a virtual host");
    let arguments = ["--every", "3s", "--rounds", "2", "--amqp", &vhost.url()];
    let ended = run("housekeeper", &arguments);
    in_order(&ended);
    follow_each_other(&ended.stderr, &["round 1: ", "round 2: ", "ended in order"]);
    assert!(ended.stderr.contains("4 files in 2 rounds"), "{ended:#?}");
}

#[test]
fn protobuf_is_answered_and_copies_nothing() {
    let vhost = shared().expect("a broker").vhost().expect("a virtual host");
    let here = run("protobuf", &["--pixels", "1024"]);
    in_order(&here);
    follow_each_other(
        &here.stdout,
        &[
            "asked      1036 bytes of application/x-protobuf\n",
            "answered   ",
            " bytes of application/x-protobuf\n",
            "pixels     1024\n",
            "brightness 127.500\n",
            "copied     nothing\n",
            "refused    undecodable payload: it is application/json, not application/x-protobuf\n",
        ],
    );
    let over_rabbitmq = run("protobuf", &["--pixels", "1024", "--amqp", &vhost.url()]);
    in_order(&over_rabbitmq);
    assert_eq!(over_rabbitmq.stdout, here.stdout, "it is the same over RabbitMQ");
}

#[test]
fn protobuf_says_what_is_too_large() {
    let ended = run("protobuf", &["--pixels", "20e6"]);
    let stderr = ended.failed_with(1);
    assert!(stderr.contains("more than the 16777216 that can be carried"), "{stderr}");
}

fn own_folder(ended: &Ended) -> PathBuf {
    let after = ended.stderr.split_once("sweeps ").expect("it says which folder").1;
    PathBuf::from(after.split(' ').next().expect("a path"))
}

#[test]
fn wordcount_shows_the_most_frequent_words_and_tells_what_it_cannot_read() {
    let folder = std::env::temp_dir().join(format!("atomizer-wordcount-{}", process::id()));
    fs::create_dir_all(folder.join("more")).unwrap();
    fs::write(folder.join("one.txt"), "the cat and the dog\n").unwrap();
    fs::write(folder.join("more/two.txt"), "The end.\n").unwrap();
    fs::write(folder.join("more/picture"), [0xff, 0xd8, 0xff]).unwrap();
    let path = folder.to_str().unwrap();
    let ended = run("wordcount", &["--top", "2", path]);
    let json = run("wordcount", &["--json", path]);
    fs::remove_dir_all(&folder).unwrap();
    in_order(&ended);
    follow_each_other(
        &ended.stdout,
        &["3  the\n", "1  and\n", "words=7 distinct=5 bytes=29 electrons=2 unread=1 seconds="],
    );
    follow_each_other(&ended.stderr, &["not counted: ", "more/picture: not UTF-8"]);
    in_order(&json);
    assert!(json.stdout.starts_with('{') && json.stdout.contains(r#"["the",3]"#), "{json:#?}");
}

#[test]
fn wordcount_exits_2_where_there_is_nothing() {
    let ended = run("wordcount", &["/nowhere/at/all"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:#?}");
    assert!(
        ended.stderr.contains("/nowhere/at/all") && ended.stderr.contains("No such file"),
        "{ended:#?}"
    );
}
