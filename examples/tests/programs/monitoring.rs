//! What an agent serves to those who watch it.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    thread::sleep,
    time::{Duration, Instant},
};

use atomizer_test_support::{Broker, shared};

use crate::harness::{From, Program, run, unused_port};

/// How long anything may take that should happen.
const SOON: Duration = Duration::from_secs(60);

/// Returns where an agent that has just been started serves.
fn address(agent: &mut Program) -> String {
    let line = agent.wait_for(From::Stderr, "metrics at http://");
    let (_, url) = line.split_once("http://").expect("it was waited for");
    url.strip_suffix("/metrics").expect("it ends so").to_owned()
}

/// Returns the status and what follows it.
fn get(address: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(SOON)).expect("a time-out");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("{answer:?}")), answer)
}

fn until(address: &str, path: &str, wanted: impl Fn(u16, &str) -> bool) {
    let began = Instant::now();
    loop {
        let (status, answer) = get(address, path);
        if wanted(status, &answer) {
            return;
        }
        assert!(began.elapsed() < SOON, "{answer}");
        sleep(Duration::from_millis(20));
    }
}

/// Whether a series has this value, with all of these labels.
fn shows(text: &str, name: &str, labels: &[&str], value: &str) -> bool {
    text.lines().any(|line| {
        line.split(['{', ' ']).next() == Some(name)
            && labels.iter().all(|label| line.contains(label))
            && line.ends_with(&format!(" {value}"))
    })
}

#[test]
fn an_agent_shows_what_it_did() {
    let vhost = shared().expect("a broker").vhost().expect("a virtual host");
    let url = vhost.url();
    let mut agent = Program::start("agent", &["--amqp", &url, "--listen", "127.0.0.1:0"]);
    let address = address(&mut agent);
    assert!(address.starts_with("127.0.0.1:"), "{address}");
    agent.wait_for(From::Stderr, "serves montecarlo and montecarlo.toss");
    until(&address, "/readyz", |status, _| status == 200);
    let mut console = Program::start("console", &["--amqp", &url]);
    console.type_line("1e6");
    console.wait_for(From::Stdout, "pi=");
    assert_eq!(console.end().code, Some(0));
    let completed = r#"end="completed""#;
    let of = |atom: &str| format!(r#"atom="{atom}""#);
    until(&address, "/metrics", |_, text| {
        let ended = "atomizer_electrons_ended_total";
        let window = "atomizer_window_electrons";
        shows(text, ended, &[&of("montecarlo"), completed], "1")
            && shows(text, ended, &[&of("montecarlo.toss"), completed], "2000")
            && shows(text, "atomizer_attempts_total", &[&of("montecarlo.toss")], "2000")
            && shows(text, "atomizer_run_seconds_count", &[&of("montecarlo.toss")], "2000")
            && shows(text, "atomizer_electrons_in_flight", &[&of("montecarlo")], "0")
            && shows(text, "atomizer_sessions", &[r#"conductor="rabbitmq""#], "1")
            && shows(text, "atomizer_unconfirmed_messages", &[r#"conductor="rabbitmq""#], "0")
            && text.lines().any(|line| line.starts_with(window) && !line.ends_with(" 0"))
    });
    agent.signal("TERM");
    assert_eq!(agent.end().code, Some(0));
}

#[test]
fn several_agents_of_one_machine_each_find_an_address() {
    let vhost = shared().expect("a broker").vhost().expect("a virtual host");
    let start = || Program::start("agent", &["--amqp", &vhost.url()]);
    let mut agents = [start(), start()];
    let [first, second] = agents.each_mut().map(address);
    assert_ne!(first, second);
    for address in [first, second] {
        assert_eq!(get(&address, "/metrics").0, 200);
    }
}

#[test]
fn an_agent_is_alive_and_not_ready_while_its_broker_is_away() {
    let port = unused_port();
    let url = format!("amqp://127.0.0.1:{port}/");
    let mut agent = Program::start("agent", &["--amqp", &url, "--listen", "127.0.0.1:0"]);
    let of_agent = address(&mut agent);
    assert_eq!(get(&of_agent, "/healthz").0, 200);
    assert_eq!(get(&of_agent, "/readyz").0, 503);
    drop(agent);

    let broker = Broker::start().expect("a broker");
    let mut agent =
        Program::start("agent", &["--amqp", &broker.url("/"), "--listen", "127.0.0.1:0"]);
    let of_agent = address(&mut agent);
    until(&of_agent, "/readyz", |status, _| status == 200);
    broker.kill().expect("it runs");
    until(&of_agent, "/readyz", |status, text| {
        status == 503 && text.contains("no session of rabbitmq")
    });
    assert_eq!(get(&of_agent, "/healthz").0, 200);
    broker.start_again().expect("it starts again");
    until(&of_agent, "/readyz", |status, _| status == 200);
    until(&of_agent, "/metrics", |_, text| {
        shows(text, "atomizer_sessions_lost_total", &[], "1")
            && shows(text, "atomizer_sessions_reopened_total", &[], "1")
    });
}

#[test]
fn an_agent_serves_where_it_is_told_or_not_at_all() {
    let url = format!("amqp://127.0.0.1:{}/", unused_port());
    let wanted = format!("127.0.0.1:{}", unused_port());
    let mut agent = Program::start("agent", &["--amqp", &url, "--listen", &wanted]);
    assert_eq!(address(&mut agent), wanted);
    // An address that was chosen is not exchanged for another.
    let second = run("agent", &["--amqp", &url, "--listen", &wanted]);
    let error = second.failed_with(1);
    assert!(error.contains(&format!("failed to listen on {wanted}: ")), "{error}");
    let silent = run("agent", &["--amqp", &url, "--listen", "off", "--connect-timeout", "1s"]);
    assert!(!silent.failed_with(1).contains("metrics at"), "{silent:#?}");
}
