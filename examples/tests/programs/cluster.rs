//! Many agents on one broker, and what becomes of the work when some of it all goes away.

use std::time::{Duration, Instant};

use atomizer_test_support::{Broker, shared};

use crate::harness::{From, Program, Report, run};

/// A run long enough to be disturbed, also where the agents are built without optimisation.
const TOSSES: &str = "2e8";
const SEED: &str = "42";

/// One electron at a time each, so that the run takes long enough however many cores there are.
fn agents(count: usize, url: &str) -> Vec<Program> {
    let mut agents: Vec<_> = (0..count)
        .map(|_| Program::start("agent", &["--amqp", url, "--concurrency", "1"]))
        .collect();
    for agent in &mut agents {
        agent.wait_for(From::Stderr, "serves montecarlo and montecarlo.toss");
    }
    agents
}

fn ask(url: &str) -> Program {
    let mut console = Program::start("console", &["--amqp", url, "--seed", SEED]);
    console.type_line(TOSSES);
    console
}

/// Waits until an agent has begun to work.
fn works(agent: &mut Program) {
    agent.wait_for(From::Stderr, "at work");
}

/// The same run on one node alone.
fn undisturbed() -> Report {
    run("montecarlo", &["--tosses", TOSSES, "--seed", SEED]).report()
}

fn answer(mut console: Program) -> Report {
    let report = Report::parse(&console.wait_for(From::Stdout, "pi="));
    assert_eq!(console.end().code, Some(0));
    report
}

/// Stops an agent in order and returns how many electrons it served.
fn served(agent: Program) -> u64 {
    agent.signal("TERM");
    let ended = agent.end();
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    let total = ended.stderr.lines().find_map(|line| line.split_once("served "));
    let number = total.and_then(|(_, rest)| rest.split(' ').next());
    number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{ended:#?}"))
}

#[test]
fn three_agents_share_the_work() {
    let vhost = shared().expect("a broker").vhost().expect("a virtual host");
    let mut agents = agents(3, &vhost.url());
    let console = ask(&vhost.url());
    agents.iter_mut().for_each(works);
    let report = answer(console);
    assert_eq!(report, undisturbed());
    // This program is one more node, and shares the work of its own request.
    let shared = run("montecarlo", &["--tosses", "1e7", "--seed", SEED, "--amqp", &vhost.url()]);
    assert_eq!(shared.report(), run("montecarlo", &["--tosses", "1e7", "--seed", SEED]).report());
    let served: Vec<u64> = agents.into_iter().map(served).collect();
    assert!(served.iter().all(|&electrons| electrons > 50), "{served:?}");
    // One more than its batches: the spawner itself.
    assert!(served.iter().sum::<u64>() > report.electrons, "{served:?}");
}

#[test]
fn an_agent_that_is_killed_costs_nothing() {
    let expected = undisturbed();
    let vhost = shared().expect("a broker").vhost().expect("a virtual host");
    let mut agents = agents(3, &vhost.url());
    let mut console = ask(&vhost.url());
    agents.iter_mut().for_each(works);
    // The first two: one of the three runs the spawner, and sometimes it is one of these.
    for agent in agents.drain(..2) {
        agent.signal("KILL");
        drop(agent);
    }
    assert!(!console.has_answered(), "it was killed in the middle of the run");
    assert_eq!(answer(console), expected);
}

#[test]
fn an_agent_stops_soon_in_the_middle_of_work() {
    let vhost = shared().expect("a broker").vhost().expect("a virtual host");
    let mut agents = agents(1, &vhost.url());
    let mut console = Program::start("console", &["--amqp", &vhost.url()]);
    console.type_line("1e10");
    for agent in &mut agents {
        agent.wait_for(From::Stderr, "electrons in all");
    }
    let start = Instant::now();
    agents.into_iter().for_each(|agent| assert!(served(agent) > 0));
    let took = start.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert!(!console.has_answered(), "it stopped in the middle of the run");
}

#[test]
fn a_restart_of_the_broker_costs_nothing() {
    let expected = undisturbed();
    let broker = Broker::start().expect("a broker");
    let mut agents = agents(2, &broker.url("/"));
    let mut console = ask(&broker.url("/"));
    agents.iter_mut().for_each(works);
    broker.stop().expect("it stops");
    assert!(!console.has_answered(), "it was stopped in the middle of the run");
    broker.start_again().expect("it starts again");
    assert_eq!(answer(console), expected);
    for agent in &mut agents {
        agent.wait_for(From::Stderr, "session opened");
    }
}

#[test]
fn a_crash_of_the_broker_costs_nothing() {
    let expected = undisturbed();
    let broker = Broker::start().expect("a broker");
    let mut agents = agents(2, &broker.url("/"));
    let mut console = ask(&broker.url("/"));
    agents.iter_mut().for_each(works);
    broker.flush().expect("it writes to disk");
    broker.kill().expect("it dies");
    assert!(!console.has_answered(), "it was killed in the middle of the run");
    broker.start_again().expect("it starts again");
    assert_eq!(answer(console), expected);
}

/// Gone for good: the agent says what, for how long and how often it tried, and exits.
#[test]
fn an_agent_whose_broker_is_gone_for_good_exits_with_the_report() {
    let broker = Broker::start().expect("a broker");
    let url = broker.url("/");
    let mut agent = Program::start("agent", &["--amqp", &url, "--give-up-after", "2s"]);
    agent.wait_for(From::Stderr, "serves montecarlo and montecarlo.toss");
    broker.kill().expect("it runs");
    let killed = Instant::now();
    let ended = agent.end();
    let report = ended.failed_with(1);
    assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", killed.elapsed());
    for part in ["error: the last conductor, rabbitmq, is given up: ", "gone since 20", "tries"] {
        assert!(report.contains(part), "{part:?} is not in {report}");
    }
}
