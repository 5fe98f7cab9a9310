//! What people type wrongly, and brokers that are not there.

use std::time::{Duration, Instant};

use atomizer_test_support::{Permissions, shared};

use crate::harness::{From, PASSWORD, Program, run, unused_port};

#[test]
fn wrongly_typed_is_said_and_exits_2() {
    for (program, arguments, what) in [
        ("montecarlo", vec!["--tosses", "-5"], "'-5' for '--tosses <N>': it must not be negative"),
        ("montecarlo", vec!["--tosses=-5"], "'-5' for '--tosses <N>': it must not be negative"),
        ("montecarlo", vec!["--tosses", "0"], "it must be at least 1"),
        ("montecarlo", vec!["--tosses", "many"], "expected a whole number"),
        ("montecarlo", vec!["--tosses", "1e20"], "it must be at most 18446744073709551615"),
        ("montecarlo", vec!["--batch", "0"], "it must be at least 1"),
        ("montecarlo", vec!["--seed", "-1"], "it must not be negative"),
        ("montecarlo", vec!["--toses", "5"], "--tosses"),
        ("montecarlo", vec!["amqp://alice:s3cret@host/"], "unexpected argument"),
        ("montecarlo", vec!["--ampq=amqp://alice:s3cret@host/"], "--amqp"),
        (
            "montecarlo",
            vec!["--amqp", "http://alice:s3cret@host/"],
            "it begins neither with amqp:// nor with amqps://",
        ),
        ("montecarlo", vec!["--amqp=alice:s3cret@host"], "for '--amqp <URL>'"),
        ("agent", vec!["--amqp", "amqp://alice:s3cret@host:port/"], "is not a RabbitMQ URL"),
        ("agent", vec!["--amqp", "amqp://h", "amqp://alice:s3cret@h"], "unexpected argument"),
        ("agent", vec!["--connect-timeout", "soon"], "--connect-timeout"),
        ("agent", vec!["--concurrency", "0"], "--concurrency"),
        ("agent", vec!["--concurrency", "-1"], "--concurrency"),
        ("agent", vec!["--listen", "9464"], "expected an address such as 127.0.0.1:9464, or off"),
        ("agent", vec!["--name", "two words"], "is not a valid node id"),
        ("console", vec!["--amqp", "amqps://alice:s3cret@host"], "TLS needs the feature `tls`"),
        ("console", vec!["--deadline", "soon"], "--deadline"),
        ("policies", vec!["--retry", "3"], "--retry"),
        ("policies", vec!["amqp://alice:s3cret@host/"], "unexpected argument"),
        ("housekeeper", vec!["--every", "0s"], "it must be longer than nothing"),
        ("housekeeper", vec!["--every", "often"], "--every"),
        ("housekeeper", vec!["--rounds", "0"], "it must be at least 1"),
        ("housekeeper", vec!["--fail-every", "-1"], "it must not be negative"),
        ("housekeeper", vec!["--older-than", "old"], "--older-than"),
        ("housekeeper", vec!["--folder", "/there/is/no/such"], "there is no such folder"),
        ("housekeeper", vec!["--amqp=alice:s3cret@host"], "for '--amqp <URL>'"),
        ("protobuf", vec!["--pixels", "0"], "it must be at least 1"),
        ("protobuf", vec!["--amqp=alice:s3cret@host"], "for '--amqp <URL>'"),
    ] {
        let ended = run(program, &arguments);
        let stderr = ended.failed_with(2);
        assert!(stderr.contains(what), "{program} {arguments:?}: {stderr}");
        assert_eq!(ended.stdout, "", "{program} {arguments:?}");
    }
}

#[test]
fn help_is_given_and_keeps_the_environment_to_itself() {
    let env = [("ATOMIZER_URL", "amqp://alice:s3cret@host/")];
    for program in ["montecarlo", "agent", "console", "housekeeper", "protobuf"] {
        for help in ["-h", "--help"] {
            let ended = Program::start_with(program, &[help], &env).end();
            assert_eq!(ended.code, Some(0), "{ended:#?}");
            assert!(ended.stdout.contains("--amqp <URL>"), "{ended:#?}");
            assert!(!format!("{ended:?}").contains(PASSWORD), "{ended:#?}");
        }
    }
}

#[test]
fn a_bad_url_in_the_environment_is_wrongly_typed_too() {
    for program in ["agent", "console"] {
        let env = [("ATOMIZER_URL", "amqp:/alice:s3cret@host/")];
        let ended = Program::start_with(program, &[], &env).end();
        assert!(ended.failed_with(2).contains("is not a RabbitMQ URL"), "{ended:#?}");
    }
}

#[test]
fn a_broker_that_is_not_there_is_tried_for_five_seconds() {
    let port = unused_port();
    let url = format!("amqp://alice:s3cret@127.0.0.1:{port}/jobs");
    for program in ["montecarlo", "console", "housekeeper", "protobuf"] {
        let start = Instant::now();
        let ended = run(program, &["--amqp", &url]);
        let stderr = ended.failed_with(1);
        let tried = format!("failed to connect to amqp://127.0.0.1:{port}/jobs within 5s: ");
        assert!(stderr.contains(&tried), "{stderr}");
        assert!(stderr.contains("Connection refused"), "{stderr}");
        let took = start.elapsed();
        assert!((2..15).contains(&took.as_secs()), "{took:?}");
    }
}

#[test]
fn an_agent_gives_up_when_it_is_told_to() {
    let url = format!("amqp://alice:s3cret@127.0.0.1:{}/", unused_port());
    let ended = run("agent", &["--amqp", &url, "--connect-timeout", "2s"]);
    assert!(ended.failed_with(1).contains("within 2s: "), "{ended:#?}");
}

#[test]
fn an_agent_keeps_trying_and_can_be_stopped_meanwhile() {
    let url = format!("amqp://alice:s3cret@127.0.0.1:{}/", unused_port());
    let mut agent = Program::start("agent", &["--amqp", &url]);
    agent.wait_for(From::Stderr, "keeps trying for ever");
    for _ in 0..3 {
        agent.wait_for(From::Stderr, "failed to open a session; next try in");
    }
    agent.signal("TERM");
    let ended = agent.end();
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    assert!(!ended.stderr.contains(PASSWORD), "{ended:#?}");
}

#[test]
fn a_broker_that_refuses_is_not_tried_again() {
    let broker = shared().expect("a broker");
    let vhost = broker.vhost().expect("a virtual host");
    let alice = format!("alice-of-{}", vhost.name());
    broker.add_user(&alice, PASSWORD, vhost.name(), &Permissions::all()).expect("a user");
    for (url, reason) in [
        (vhost.url_as(&alice, &format!("{PASSWORD}-not")), "ACCESS_REFUSED"),
        (broker.url_as(&alice, PASSWORD, "nowhere"), "nowhere"),
    ] {
        for program in ["montecarlo", "agent", "console"] {
            let start = Instant::now();
            let ended = run(program, &["--amqp", &url]);
            let stderr = ended.failed_with(1);
            assert!(stderr.contains("failed to connect to amqp://127.0.0.1:"), "{stderr}");
            assert!(stderr.contains("refused: ") && stderr.contains(reason), "{stderr}");
            let took = start.elapsed();
            assert!(took < Duration::from_secs(4), "{took:?}");
        }
    }
    broker.delete_user(&alice).expect("it goes");
}
