//! What an orchestrator is told.

use std::time::Duration;

use atomizer::{OpenError, prelude::*};
use atomizer_conformance::{Fault, Faulty, Op};

use crate::client::{get, serve, sum, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_has_no_node_yet_is_alive_and_not_ready() {
    let monitoring = serve();
    let health = get(monitoring.address(), "/healthz");
    assert_eq!((health.status, health.body.as_str()), (200, "alive: no node has started\n"));
    let ready = get(monitoring.address(), "/readyz");
    assert_eq!((ready.status, ready.body.as_str()), (503, "no node has started\n"));
}

/// Runs until it is cancelled, and a bit longer than that.
struct Slow;

impl Atom for Slow {
    const ID: &'static str = "slow";
    type Input = ();
    type Output = ();

    async fn process(&self, cx: &Context, (): ()) -> Result<()> {
        cx.cancelled().await;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_drains_is_not_ready_and_one_that_has_stopped_is_not_alive() {
    let monitoring = serve();
    let address = monitoring.address();
    let builder = Atomizer::builder().name("drainer").conductor(Memory::new()).atom(Slow);
    let atomizer = builder.drain_timeout(Duration::from_secs(2)).start().await.unwrap();
    monitoring.watch(atomizer.health());
    let ready = get(address, "/readyz");
    assert_eq!((ready.status, ready.body), (200, format!("{}: ready\n", atomizer.node())));
    assert_eq!(get(address, "/healthz").status, 200);

    atomizer.send::<Slow>(()).await.unwrap();
    until(address, "/metrics", |answer| {
        sum(&answer.body, "atomizer_electrons_in_flight", &[]) == Some(1.0)
    })
    .await;
    let draining = async {
        let not_ready = until(address, "/readyz", |answer| answer.status == 503).await;
        assert_eq!(not_ready.body, format!("{}: draining\n", atomizer.node()));
        assert_eq!(get(address, "/healthz").status, 200, "it is to come to its end in peace");
    };
    let (drained, ()) = tokio::join!(atomizer.drain(), draining);
    drained.unwrap();
    let stopped = get(address, "/healthz");
    assert_eq!((stopped.status, stopped.body), (503, format!("{}: stopped\n", atomizer.node())));
    assert_eq!(get(address, "/readyz").status, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_session_is_lost_is_not_ready_until_it_has_another() {
    let monitoring = serve();
    let address = monitoring.address();
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    let builder = Atomizer::builder().conductor(faulty).conductor(Memory::new());
    let atomizer = builder.atom(Slow).start().await.unwrap();
    monitoring.watch(atomizer.health());
    assert_eq!(get(address, "/readyz").status, 200);

    faults.always(Op::Open, Fault::Error);
    faults.end_sessions("as told");
    let lost = until(address, "/readyz", |answer| answer.status == 503).await;
    assert_eq!(lost.body, format!("{}: no session of memory\n", atomizer.node()));
    assert_eq!(get(address, "/healthz").status, 200, "to begin anew would not help");
    let of_first = [("conductor", "memory")];
    let text = until(address, "/metrics", |answer| {
        sum(&answer.body, "atomizer_session_failures_total", &of_first) >= Some(1.0)
            && sum(&answer.body, "atomizer_window_electrons", &of_first) == Some(0.0)
    });
    let text = text.await.body;
    assert_eq!(sum(&text, "atomizer_sessions", &of_first), Some(0.0), "{text}");
    assert_eq!(sum(&text, "atomizer_sessions", &[("conductor", "memory-2")]), Some(1.0), "{text}");

    faults.clear();
    until(address, "/readyz", |answer| answer.status == 200).await;
    let text = get(address, "/metrics").body;
    assert_eq!(sum(&text, "atomizer_sessions_reopened_total", &of_first), Some(1.0), "{text}");
    atomizer.drain().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_has_failed_is_not_alive_and_the_probe_does_not_say_why() {
    let monitoring = serve();
    let address = monitoring.address();
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    let builder = Atomizer::builder().conductor(faulty);
    let atomizer = builder.give_up_after(Duration::from_millis(10)).start().await.unwrap();
    monitoring.watch(atomizer.health());
    faults.always(Op::Open, Fault::Error);
    faults.end_sessions("as told");
    atomizer.run().await.unwrap_err();
    let failed = get(address, "/healthz");
    assert_eq!((failed.status, failed.body), (503, format!("{}: failed\n", atomizer.node())));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_start_that_failed_had_opened_is_not_counted_as_open() {
    let monitoring = serve();
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    faults.always(Op::Open, Fault::Refuse);
    let builder = Atomizer::builder().conductor(Memory::new()).conductor(faulty);
    let error = builder.start().await.unwrap_err();
    let atomizer::StartError::Open { source: OpenError::Refused(_), .. } = error else {
        panic!("{error}")
    };
    until(monitoring.address(), "/metrics", |answer| {
        sum(&answer.body, "atomizer_sessions", &[]) == Some(0.0)
    })
    .await;
}
