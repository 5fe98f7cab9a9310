//! One program at a time.

use atomizer_test_support::shared;

use crate::harness::{From, Program, Report, run};

#[test]
fn montecarlo_alone_estimates_pi() {
    let arguments = ["--tosses", "2_000_001", "--seed", "7"];
    let report = run("montecarlo", &arguments).report();
    assert_eq!(report.tosses, 2_000_001);
    assert!(report.electrons >= 1_000, "{report:?}");
    assert_eq!(run("montecarlo", &arguments).report(), report, "the same seed, the same estimate");
    let few = run("montecarlo", &["--tosses", "10", "--batch", "20"]).report();
    assert_eq!((few.tosses, few.electrons), (10, 1));
}

#[test]
fn montecarlo_writes_json() {
    let ended = run("montecarlo", &["--tosses", "1e4", "--json"]);
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    let [line] = ended.stdout.lines().collect::<Vec<_>>()[..] else { panic!("{ended:#?}") };
    assert!(line.starts_with('{') && line.ends_with('}'), "{line}");
    assert!(line.contains(r#""tosses":10000"#) && line.contains(r#""inside":"#), "{line}");
}

#[test]
fn montecarlo_says_how_far_it_is_and_stops_on_ctrl_c() {
    let mut program = Program::start("montecarlo", &["--tosses", "1e13"]);
    program.wait_for(From::Stderr, "of 10.0 T tosses, ");
    program.signal("INT");
    let ended = program.end();
    assert_eq!(ended.code, Some(130), "{ended:#?}");
    assert_eq!(ended.stdout, "");
}

#[test]
fn the_console_survives_bad_input() {
    let vhost = shared().expect("a broker").vhost().expect("a virtual host");
    let _agent = Program::start("agent", &["--amqp", &vhost.url()]);
    let mut console = Program::start("console", &["--amqp", &vhost.url()]);
    for (line, reason) in [
        ("many", "\"many\" is no number of tosses: expected a whole number"),
        ("-5", "it must not be negative"),
        ("0", "it must be at least 1"),
    ] {
        console.type_line(line);
        console.wait_for(From::Stderr, reason);
    }
    console.type_line("");
    console.type_line("1_500");
    let report = Report::parse(&console.wait_for(From::Stdout, "pi="));
    assert_eq!((report.tosses, report.electrons), (1_500, 1_500));
    console.type_line("500");
    let report = Report::parse(&console.wait_for(From::Stdout, "pi="));
    assert_eq!((report.tosses, report.electrons), (500, 500));
    assert_eq!(console.end().code, Some(0));
}

#[test]
fn the_console_says_when_nobody_answers() {
    let vhost = shared().expect("a broker").vhost().expect("a virtual host");
    let mut console = Program::start("console", &["--amqp", &vhost.url(), "--deadline", "5s"]);
    console.type_line("1000");
    console.wait_for(From::Stderr, "no answer yet; is an agent running?");
    console.wait_for(From::Stderr, "error: no answer to electron");
    console.type_line("nonsense");
    console.wait_for(From::Stderr, "no number of tosses");
    let ended = console.end();
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{ended:#?}");
}
