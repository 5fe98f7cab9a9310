//! What is typed wrongly, and readers that go away.

use std::{io, process::Stdio};

use atomizer_test_support::{Permissions, shared};

use crate::harness::{PASSWORD, command, run};

#[test]
fn wrongly_typed_is_said_and_exits_2() {
    for (arguments, what) in [
        (vec![], "Usage: atomizer"),
        (vec!["sned"], "unrecognized subcommand 'sned'"),
        (vec!["send"], "<ATOM>"),
        (vec!["send", "two words"], "is not a valid atom id"),
        (vec!["send", "double", "{\"a\":\n oops}"], "the input is no JSON: expected"),
        (vec!["send", "double", "{\"a\":\n oops}"], "at line 2 column 2"),
        (vec!["send", "double", ""], "the input is no JSON: EOF"),
        (vec!["call", "double", "-"], "stdin is no JSON"),
        (vec!["call", "double", "@/there/is/none"], "/there/is/none: No such file"),
        (vec!["send", "double", "1", "--after", "soon"], "--after"),
        (vec!["send", "double", "1", "--id", "7"], "--id"),
        (vec!["send", "double", "1", "--retry", "-1"], "--retry"),
        (vec!["call", "double", "1", "--timeout", "5"], "--timeout"),
        (vec!["queues", "--management", "https://alice:s3cret@host"], "only http:// is spoken"),
        (vec!["dead"], "Usage: atomizer dead"),
        (vec!["dead", "list", "--cause", "7"], "12 hexadecimal digits"),
        (vec!["dead", "show", "7"], "UUID"),
        (vec!["dead", "requeue"], "say which"),
        (vec!["dead", "requeue", "--all", "--atom", "double"], "cannot be used with"),
        (vec!["dead", "requeue", "--all", "--rate", "fast"], "such as 100/s"),
        (vec!["dead", "requeue", "--all", "--window", "0"], "--window"),
        (vec!["dead", "requeue", "--all", "--edit"], "<ID>"),
        (vec!["dead", "purge"], "say which"),
        (vec!["dead", "purge", "--all"], "say --yes"),
        (vec!["topology"], "Usage: atomizer topology"),
        (vec!["topology", "print", "--atom", "two words"], "is not a valid atom id"),
        (vec!["completions", "cmd"], "[possible values:"),
        (vec!["doctor", "--namespace", "two words"], "--namespace"),
        (vec!["doctor", "--url", "http://alice:s3cret@host/"], "neither with amqp://"),
        (vec!["--url=alice:s3cret@host", "doctor"], "for '--url <URL>'"),
        (vec!["doctor", "amqp://alice:s3cret@host/"], "unexpected argument"),
    ] {
        let ran = run(command(&arguments), "").ended_with(2);
        assert!(ran.stderr.contains(what), "{arguments:?}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{arguments:?}");
    }
}

#[test]
fn the_environment_keeps_its_passwords() {
    for arguments in [
        vec!["--help"],
        vec!["-h"],
        vec!["help", "dead", "requeue"],
        vec!["send", "--help"],
        vec!["queues", "--help"],
        vec!["completions", "bash"],
        vec!["topology", "print"],
    ] {
        let mut command = command(&arguments);
        command.env("ATOMIZER_URL", "amqp://alice:s3cret@host/");
        command.env("ATOMIZER_MANAGEMENT_URL", "http://alice:s3cret@host/");
        assert!(!run(command, "").ok().stdout.is_empty());
    }
    for (name, url) in
        [("ATOMIZER_URL", "amqp:/alice:s3cret@host"), ("ATOMIZER_MANAGEMENT_URL", "alice:s3cret@h")]
    {
        let mut command = command(&["queues"]);
        command.env(name, url);
        run(command, "").failed_with(2, "invalid value for");
    }
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let broker = shared().expect("a broker");
    let vhost = broker.vhost().unwrap();
    for arguments in
        [vec!["completions", "bash"], vec!["topology", "print"], vec!["--help"], vec!["doctor"]]
    {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut command = command(&arguments);
        command.env("ATOMIZER_URL", vhost.url()).stdout(Stdio::from(writer));
        assert_eq!(run(command, "").ok().stderr, "", "{arguments:?}");
    }
}

#[test]
fn completions_know_the_verbs() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = run(command(&["completions", shell]), "").ok().stdout;
        assert!(script.contains("requeue") && script.contains("doctor"), "{shell}");
    }
}

#[test]
fn a_broker_that_is_of_no_use_is_named_without_the_password() {
    let broker = shared().expect("a broker");
    let vhost = broker.vhost().unwrap();
    let alice = format!("alice-of-{}", vhost.name());
    broker.add_user(&alice, PASSWORD, vhost.name(), &Permissions::none()).unwrap();
    for (url, reason) in [
        (format!("amqp://alice:{PASSWORD}@127.0.0.1:1/"), "Connection refused"),
        (vhost.url_as(&alice, &format!("{PASSWORD}-not")), "ACCESS_REFUSED"),
        (broker.url_as(&alice, PASSWORD, "nowhere"), "nowhere"),
    ] {
        for verb in [
            vec!["send", "double", "1"],
            vec!["call", "double", "1", "--declare"],
            vec!["queues", "double"],
            vec!["dead", "list"],
            vec!["dead", "requeue", "--all"],
            vec!["dead", "purge", "--all", "--yes"],
            vec!["topology", "check"],
            vec!["topology", "apply"],
        ] {
            let mut command = command(&verb);
            command.env("ATOMIZER_URL", &url);
            run(command, "").failed_with(1, reason);
        }
    }
    broker.delete_user(&alice).unwrap();
}
