//! Every way for an electron to end: it is answered, and the node goes on.

use std::time::Duration;

use atomizer::{
    Address, AtomId, CallError, Conductor, Electron, Envelope, EventKind, Failure, FailureKind,
    Message, NodeId, Payload, ReplyTo, prelude::*,
};
use atomizer_conformance::{Fault, Faulty, Op};

use crate::atoms::{Obedient, Order, until};

async fn node(memory: &Memory) -> Atomizer {
    Atomizer::builder().conductor(memory.clone()).atom(Obedient).start().await.unwrap()
}

/// Asks, expects a failure, and sees that the node goes on.
async fn failure(atomizer: &Atomizer, order: Order) -> Failure {
    let failure = match atomizer.call::<Obedient>(order).await {
        Err(CallError::Failed(failure)) => failure,
        other => panic!("expected a failure, not {other:?}"),
    };
    assert_eq!(failure.node.as_ref(), Some(atomizer.node()));
    assert_eq!(failure.attempt, 1);
    let goes_on = atomizer.call::<Obedient>(Order::Echo("alive".into())).await.unwrap();
    assert_eq!(goes_on, "alive");
    failure
}

#[tokio::test]
async fn an_error_is_answered_and_the_node_goes_on() {
    let atomizer = node(&Memory::new()).await;
    let failure = failure(&atomizer, Order::Fail("out of cheese".into())).await;
    assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::Error, "out of cheese"));
}

#[tokio::test]
async fn a_panic_is_answered_and_the_node_goes_on() {
    let atomizer = node(&Memory::new()).await;
    let failure = failure(&atomizer, Order::Panic("at the disco".into())).await;
    assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::Panic, "at the disco"));
}

#[tokio::test]
async fn an_undecodable_payload_is_answered_and_the_node_goes_on() {
    let atomizer = node(&Memory::new()).await;
    let call = atomizer.call_raw(AtomId::of::<Obedient>(), Payload::json("{\"Dance\":1}"));
    let Err(CallError::Failed(failure)) = call.await else { panic!("it cannot be decoded") };
    assert_eq!(failure.kind, FailureKind::Undecodable);
    assert!(failure.message.contains("unknown variant `Dance`"), "{failure}");
    atomizer.call::<Obedient>(Order::Echo("alive".into())).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_time_limit_is_answered_and_the_node_goes_on() {
    struct Limited;
    impl Atom for Limited {
        const ID: &'static str = "limited";
        type Input = ();
        type Output = ();
        fn options(&self) -> Options {
            Options::default().time_limit(Duration::from_millis(1500))
        }
        async fn process(&self, _cx: &Context, (): ()) -> Result<()> {
            std::future::pending().await
        }
    }
    let atomizer =
        Atomizer::builder().conductor(Memory::new()).atom(Limited).start().await.unwrap();
    for _ in 0..3 {
        let Err(CallError::Failed(failure)) = atomizer.call::<Limited>(()).await else {
            panic!("it never ends by itself")
        };
        assert_eq!(failure.kind, FailureKind::TimedOut);
        assert_eq!(failure.message, "did not finish within 1s 500ms");
    }
}

#[tokio::test(start_paused = true)]
async fn the_electrons_time_limit_goes_before_the_atoms() {
    let memory = Memory::new();
    let atomizer = node(&memory).await;
    let payload =
        Payload::json(serde_json::to_vec(&Order::Sleep(Duration::from_secs(60))).unwrap());
    let mut electron = Electron::new(AtomId::of::<Obedient>(), payload);
    electron.time_limit = Some(Duration::from_secs(1));
    let mut events = atomizer.events();
    atomizer.send_electron(electron).await.unwrap();
    let event = until(&mut events, |kind| matches!(kind, EventKind::Failed { .. })).await;
    let EventKind::Failed { failure, .. } = event.kind else { unreachable!() };
    assert_eq!(failure.kind, FailureKind::TimedOut);
}

#[tokio::test]
async fn an_electron_for_another_atom_is_answered() {
    let memory = Memory::new();
    let atomizer = node(&memory).await;
    let asker = NodeId::unique("asker").unwrap();
    let session = memory.open(&asker).await.unwrap();
    let mut electron = Electron::new(AtomId::from_static("elsewhere"), Payload::json("1"));
    electron.reply_to = Some(session.reply_to());
    let id = electron.id;
    let mut events = atomizer.events();
    let wrong_queue = Address::Atom(AtomId::of::<Obedient>());
    session.send(&[Envelope::new(wrong_queue, electron.into())]).await[0].clone().unwrap();
    let event = until(&mut events, |kind| matches!(kind, EventKind::Failed { .. })).await;
    let EventKind::Failed { electron, failure, .. } = event.kind else { unreachable!() };
    assert_eq!((electron, failure.kind), (id, FailureKind::UnknownAtom));
}

#[tokio::test]
async fn an_answer_too_large_is_answered_as_a_failure() {
    let atomizer = node(&Memory::new().payload_bytes_max(1000)).await;
    let failure = failure(&atomizer, Order::Large(2000)).await;
    assert_eq!(failure.kind, FailureKind::AnswerTooLarge);
}

#[tokio::test]
async fn a_failure_nobody_asked_about_is_a_dead_letter_with_its_history() {
    let memory = Memory::new();
    let atomizer = node(&memory).await;
    let mut events = atomizer.events();
    let id = atomizer.send::<Obedient>(Order::Fail("alone".into())).await.unwrap();
    until(&mut events, |kind| matches!(kind, EventKind::Failed { .. })).await;
    let dead = memory.take_dead_letters();
    let [Message::Electron(dead)] = &dead[..] else { panic!("one dead letter: {dead:?}") };
    assert_eq!((dead.id, dead.attempts), (id, 1));
    assert_eq!(dead.history.len(), 1);
    assert_eq!(dead.history[0].message, "alone");
    assert_eq!(dead.history[0].node.as_ref(), Some(atomizer.node()));
}

#[tokio::test]
async fn an_asker_that_is_gone_leaves_its_answer_unclaimed() {
    let memory = Memory::new();
    let atomizer = node(&memory).await;
    let mut events = atomizer.events();
    for order in [Order::Echo("anyone?".into()), Order::Fail("no one".into())] {
        let payload = Payload::json(serde_json::to_vec(&order).unwrap());
        let mut electron = Electron::new(AtomId::of::<Obedient>(), payload);
        electron.reply_to = Some(ReplyTo::new("gone-for-good"));
        atomizer.send_electron(electron).await.unwrap();
    }
    let completed = until(&mut events, |kind| matches!(kind, EventKind::Completed { .. })).await;
    let failed = until(&mut events, |kind| matches!(kind, EventKind::Failed { .. })).await;
    for event in [completed, failed] {
        let reason = "(unclaimed: there is no reply address gone-for-good)";
        assert!(event.to_string().contains(reason), "{event}");
    }
    assert_eq!(memory.take_dead_letters().len(), 1, "a failure that nobody hears of is kept");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_refused_is_not_tried_for_ever() {
    let memory = Memory::new();
    let faulty = Faulty::new(memory.clone());
    let faults = faulty.faults();
    let serving = Atomizer::builder().conductor(faulty).atom(Obedient).start().await.unwrap();
    let mut events = serving.events();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    for order in [Order::Echo("listen".into()), Order::Fail("hear".into())] {
        faults.next(Op::Settle, Fault::Refuse);
        let call = asker.call::<Obedient>(order).deadline(Duration::from_secs(5));
        let (error, ended) = tokio::join!(call.into_future(), until(&mut events, ended));
        assert!(matches!(error, Err(CallError::Deadline { .. })), "{error:?}");
        assert!(ended.to_string().contains("(unclaimed: refused: "), "{ended}");
    }
    assert_eq!(memory.take_dead_letters().len(), 1, "a failure that nobody hears of is kept");
    let answer = asker.call::<Obedient>(Order::Echo("again".into())).await;
    assert_eq!(answer.unwrap(), "again");
}

fn ended(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Completed { .. } | EventKind::Failed { .. })
}

#[tokio::test(start_paused = true)]
async fn a_call_ends_at_its_deadline() {
    // No node has the atom.
    let atomizer = Atomizer::builder().conductor(Memory::new()).start().await.unwrap();
    let call = atomizer.call::<Obedient>(Order::Echo("anyone?".into()));
    let error = call.deadline(Duration::from_secs(5)).await.unwrap_err();
    assert!(matches!(error, CallError::Deadline { .. }), "{error}");
}

#[tokio::test]
async fn a_call_ends_when_its_node_stops() {
    let atomizer = Atomizer::builder().conductor(Memory::new()).start().await.unwrap();
    let call = atomizer.call::<Obedient>(Order::Echo("anyone?".into())).into_future();
    let stop = async {
        tokio::task::yield_now().await;
        atomizer.drain().await.unwrap();
    };
    let (error, ()) = tokio::join!(call, stop);
    assert!(matches!(error, Err(CallError::Stopped)), "{error:?}");
    let late = atomizer.call::<Obedient>(Order::Echo("too late".into())).await;
    assert!(matches!(late, Err(CallError::Stopped)), "{late:?}");
}
