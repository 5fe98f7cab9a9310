//! A conductor that misbehaves in every way: what it costs, and whom.

use std::time::Duration;

use atomizer::{CallError, EventKind, NodeError, prelude::*};
use atomizer_conformance::{Fault, Faults, Faulty, Op};
use tokio::{task::JoinSet, time::Instant};

use crate::atoms::{Obedient, Order, until};

struct World {
    faults: Faults,
    serving: Atomizer,
    asker: Atomizer,
}

/// A node behind a conductor that misbehaves, and one that asks through a sound one.
async fn world() -> World {
    let memory = Memory::new();
    let faulty = Faulty::new(memory.clone());
    let faults = faulty.faults();
    let builder = Atomizer::builder().conductor(faulty).atom(Obedient);
    let serving = builder.drain_timeout(Duration::from_secs(60)).start().await.unwrap();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    World { faults, serving, asker }
}

/// Asks so many times at once, and expects each to be answered.
async fn all_answered(asker: &Atomizer, count: usize) {
    let mut calls = JoinSet::new();
    for number in 0..count {
        let asker = asker.clone();
        calls.spawn(async move {
            let text = number.to_string();
            let answer = asker.call::<Obedient>(Order::Echo(text.clone())).await;
            assert_eq!(answer.unwrap(), text);
        });
    }
    while let Some(answered) = calls.join_next().await {
        answered.unwrap();
    }
}

/// Does this to a node at work, and sees that nothing is lost and the node goes on.
async fn survives(op: Op, fault: Fault) {
    let World { faults, serving, asker } = world().await;
    all_answered(&asker, 3).await;
    faults.times(op, fault, 2);
    // What comes with a session comes with the next one; and what a conductor never says cannot be noticed.
    let ends = matches!(op, Op::Open | Op::Limits | Op::ReplyTo | Op::Subscribe | Op::Ended);
    if ends {
        faults.end_sessions("for the next to misbehave");
    }
    let unnoticed = matches!(
        (op, fault),
        (Op::Next, Fault::Hang | Fault::HangAfter) | (Op::Settle, Fault::Error)
    );
    let unstick = async {
        if unnoticed {
            faults.bitten(op).await;
            faults.clear();
            faults.end_sessions("nothing came of it");
        }
    };
    let began = Instant::now();
    let rounds = async {
        for round in 0..5 {
            all_answered(&asker, 4).await;
            if ends && round == 0 {
                faults.end_sessions("once more");
            }
        }
    };
    tokio::join!(rounds, unstick);
    assert!(faults.count(op) > 0, "{op:?} {fault:?} did not bite");
    assert!(began.elapsed() < Duration::from_secs(600), "{op:?} {fault:?}: {:?}", began.elapsed());
    faults.clear();
    serving.drain().await.unwrap();
}

/// Every way in which what a node needs to work can go wrong.
const OPS: [Op; 7] =
    [Op::Open, Op::Limits, Op::ReplyTo, Op::Subscribe, Op::Next, Op::Settle, Op::Ended];

const FAULTS: [Fault; 14] = [
    Fault::Error,
    Fault::ErrorAfter,
    Fault::NotTaken,
    Fault::Refuse,
    Fault::Stale,
    Fault::Drop,
    Fault::Fewer,
    Fault::Hang,
    Fault::HangAfter,
    Fault::Panic,
    Fault::PanicAfter,
    Fault::EndSubscription,
    Fault::EndSession,
    Fault::Delay(Duration::from_secs(3)),
];

#[tokio::test(start_paused = true)]
async fn a_conductor_that_misbehaves_in_any_way_costs_no_electron() {
    let mut tried = 0;
    for op in OPS {
        for fault in FAULTS {
            // What may not be answered is not.
            if fault.fits(op) && (op, fault) != (Op::Settle, Fault::Refuse) {
                survives(op, fault).await;
                tried += 1;
            }
        }
    }
    assert!(tried > 40, "{tried} ways were tried");
}

#[tokio::test(start_paused = true)]
async fn sending_through_a_conductor_that_misbehaves_is_made_good() {
    for fault in FAULTS {
        // Who hangs waits for room, for all that can be told: the deadline of the call is what ends it.
        let hangs = matches!(fault, Fault::Hang | Fault::HangAfter);
        if !fault.fits(Op::Send) || hangs || fault == Fault::Refuse {
            continue;
        }
        let World { faults, serving, .. } = world().await;
        faults.times(Op::Send, fault, 2);
        all_answered(&serving, 10).await;
        assert!(faults.count(Op::Send) > 0, "{fault:?} did not bite");
        faults.clear();
        serving.drain().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_send_that_never_returns_ends_with_its_call() {
    let World { faults, serving, .. } = world().await;
    faults.always(Op::Send, Fault::Hang);
    let call = serving.call::<Obedient>(Order::Echo(String::new()));
    let error = call.deadline(Duration::from_secs(5)).await.unwrap_err();
    assert!(matches!(error, CallError::Deadline { .. }), "{error}");
    serving.drain().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_suspect_that_cannot_be_written_comes_again() {
    for fault in FAULTS {
        if !fault.fits(Op::Park) {
            continue;
        }
        let memory = Memory::new();
        let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
        // It was delivered before.
        let call = tokio::spawn(asker.call::<Obedient>(Order::Echo("again".into())).into_future());
        crate::suspects::killed_with_it(&memory, atomizer::AtomId::of::<Obedient>(), 1).await;
        let faulty = Faulty::new(memory);
        let faults = faulty.faults();
        faults.times(Op::Park, fault, 2);
        let builder = Atomizer::builder().conductor(faulty).atom(Obedient);
        let serving = builder.start().await.unwrap();
        let unstick = async {
            if fault == Fault::Error {
                faults.bitten(Op::Park).await;
                faults.clear();
                faults.end_sessions("nothing came of it");
            }
        };
        let (answer, ()) = tokio::join!(call, unstick);
        assert_eq!(answer.unwrap().unwrap(), "again", "{fault:?}");
        assert!(faults.count(Op::Park) > 0, "{fault:?} did not bite");
        serving.drain().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn draining_does_not_wait_for_a_conductor_that_does_not_answer() {
    for op in [Op::Stop, Op::Close] {
        for fault in [Fault::Hang, Fault::Panic] {
            let World { faults, serving, asker } = world().await;
            all_answered(&asker, 3).await;
            faults.always(op, fault);
            let began = Instant::now();
            serving.drain().await.unwrap();
            assert!(began.elapsed() < Duration::from_secs(30), "{op:?} {fault:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn one_conductor_that_fails_for_good_fails_alone() {
    let (memory, faulty) = (Memory::new(), Faulty::new(Memory::new()));
    let faults = faulty.faults();
    let builder = Atomizer::builder().conductor(faulty).conductor(memory.clone()).atom(Obedient);
    let serving = builder.give_up_after(Duration::from_secs(30)).start().await.unwrap();
    let mut events = serving.events();
    faults.always(Op::Open, Fault::Error);
    faults.end_sessions("for good");
    let gone = until(&mut events, |kind| matches!(kind, EventKind::ConductorGone { .. })).await;
    assert_eq!(gone.conductor.map(|id| id.to_string()).as_deref(), Some("memory"));
    let asker = Atomizer::builder().conductor(memory).start().await.unwrap();
    all_answered(&asker, 10).await;
    // What this node asks goes through the one that is gone, and says so.
    let error = serving.call::<Obedient>(Order::Echo(String::new())).await.unwrap_err();
    assert!(matches!(error, CallError::NotSent { .. }), "{error}");
    serving.drain().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_last_conductor_gone_for_good_ends_the_node_with_a_report() {
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    let builder = Atomizer::builder().conductor(faulty).atom(Obedient);
    let serving = builder.give_up_after(Duration::from_secs(30)).start().await.unwrap();
    let mut events = serving.events();
    let began = Instant::now();
    faults.always(Op::Open, Fault::Error);
    faults.end_sessions("for good");
    let report = serving.run().await;
    let Err(NodeError::ConductorsGone { conductor, failures, .. }) = &report else {
        panic!("the node gives up: {report:?}")
    };
    assert_eq!(conductor.to_string(), "memory");
    assert!(*failures > 20, "it was tried all the time: {failures}");
    assert_eq!(began.elapsed().as_secs() / 10, 3);
    let text = report.unwrap_err().to_string();
    assert!(text.contains("memory, is given up") && text.contains("gone since"), "{text}");
    until(&mut events, |kind| matches!(kind, EventKind::Critical { .. })).await;
}

#[tokio::test(start_paused = true)]
async fn a_conductor_that_keeps_panicking_is_given_up() {
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    let serving = Atomizer::builder().conductor(faulty).atom(Obedient).start().await.unwrap();
    faults.always(Op::Open, Fault::Panic);
    faults.end_sessions("for the next to panic");
    let report = serving.run().await;
    assert!(matches!(report, Err(NodeError::ConductorsGone { .. })), "{report:?}");
    assert_eq!(faults.count(Op::Open), 5);
}

#[tokio::test]
async fn a_decoder_that_panics_costs_its_electron_only() {
    struct Picky;
    #[derive(serde::Serialize)]
    struct Explosive;
    impl<'de> serde::Deserialize<'de> for Explosive {
        fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
            panic!("while it was decoded")
        }
    }
    impl Atom for Picky {
        const ID: &'static str = "picky";
        type Input = Explosive;
        type Output = ();
        async fn process(&self, _cx: &Context, _: Explosive) -> Result<()> {
            Ok(())
        }
    }
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Picky).atom(Obedient);
    let atomizer = builder.start().await.unwrap();
    let Err(CallError::Failed(failure)) = atomizer.call::<Picky>(Explosive).await else {
        panic!("it panics")
    };
    assert_eq!(failure.message, "while it was decoded");
    all_answered(&atomizer, 3).await;
}
