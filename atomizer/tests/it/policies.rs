//! What follows a failure: tried again here, then elsewhere, then given up.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use atomizer::{
    AtomId, CallError, Electron, ElectronId, EventKind, Failure, FailureKind, Message, NodeId,
    Payload, ReplyTo, prelude::*,
};
use tokio::time::Instant;

use crate::atoms::{Obedient, until};

/// One attempt, as its atom saw it.
#[derive(Clone, Debug)]
struct Seen {
    electron: ElectronId,
    node: NodeId,
    attempt: u32,
    history: Vec<Failure>,
    at: Instant,
}

type Attempts = Arc<Mutex<Vec<Seen>>>;

/// How a [`Fickle`] fails.
#[derive(Clone, Copy)]
enum Fault {
    Error,
    Panic,
    Final,
    RetryAfter(Duration),
    GiveBack,
}

/// Fails so many times, then succeeds.
#[derive(Clone)]
struct Fickle {
    failures: u32,
    fault: Fault,
    options: Options,
    seen: Attempts,
}

impl Fickle {
    fn new(failures: u32) -> Self {
        let (fault, options) = (Fault::Error, Options::default());
        Self { failures, fault, options, seen: Arc::default() }
    }

    fn failing_by(self, fault: Fault) -> Self {
        Self { fault, ..self }
    }

    fn with(self, options: Options) -> Self {
        Self { options, ..self }
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Atom for Fickle {
    const ID: &'static str = "fickle";
    type Input = ();
    type Output = u32;

    fn options(&self) -> Options {
        self.options.clone()
    }

    async fn process(&self, cx: &Context, (): ()) -> Result<u32> {
        self.seen.lock().unwrap().push(Seen {
            electron: cx.electron().id,
            node: cx.node().clone(),
            attempt: cx.attempt(),
            history: cx.history().to_vec(),
            at: Instant::now(),
        });
        let attempt = cx.attempt();
        let error = AtomError::msg(format!("failure {attempt}"));
        match self.fault {
            _ if attempt > self.failures => Ok(attempt),
            Fault::Error => Err(error),
            Fault::Panic => panic!("failure {attempt}"),
            Fault::Final => Err(error.do_not_retry()),
            Fault::RetryAfter(wait) => Err(error.retry_after(wait)),
            Fault::GiveBack => Err(error.give_back()),
        }
    }
}

async fn node(memory: &Memory, atom: &Fickle) -> Atomizer {
    Atomizer::builder().conductor(memory.clone()).atom(atom.clone()).start().await.unwrap()
}

fn at_once() -> Backoff {
    Backoff::none()
}

async fn failure(call: impl IntoFuture<Output = Result<u32, CallError>>) -> Failure {
    match call.await {
        Err(CallError::Failed(failure)) => failure,
        other => panic!("expected a failure, not {other:?}"),
    }
}

fn dead_letter(memory: &Memory) -> Arc<Electron> {
    match &memory.take_dead_letters()[..] {
        [Message::Electron(dead)] => Arc::clone(dead),
        other => panic!("one dead letter: {other:?}"),
    }
}

#[tokio::test]
async fn a_retry_runs_here_and_sees_what_went_before() {
    for fault in [Fault::Error, Fault::Panic] {
        let atom = Fickle::new(2).failing_by(fault);
        let atomizer = node(&Memory::new(), &atom).await;
        let call = atomizer.call::<Fickle>(()).policy(Policy::retry(3).backoff(at_once()));
        assert_eq!(call.await.unwrap(), 3);
        let seen = atom.seen();
        let attempts: Vec<_> = seen.iter().map(|seen| (seen.attempt, seen.history.len())).collect();
        assert_eq!(attempts, [(1, 0), (2, 1), (3, 2)]);
        let last = &seen[2].history[1];
        assert_eq!((last.message.as_str(), last.attempt), ("failure 2", 2));
        assert_eq!(last.node.as_ref(), Some(atomizer.node()));
    }
}

#[tokio::test]
async fn retries_that_are_used_up_are_answered_and_leave_a_dead_letter() {
    let memory = Memory::new();
    let atom = Fickle::new(u32::MAX);
    let atomizer = node(&memory, &atom).await;
    let call = atomizer.call::<Fickle>(()).policy(Policy::retry(2).backoff(at_once()));
    let failure = failure(call).await;
    assert_eq!((failure.attempt, failure.message.as_str()), (3, "failure 3"));
    let dead = dead_letter(&memory);
    assert_eq!((dead.attempts, dead.history.len()), (3, 3));
    assert_eq!(atom.seen().len(), 3);
}

#[tokio::test]
async fn only_the_first_and_the_last_eight_failures_are_kept() {
    let memory = Memory::new();
    let atom = Fickle::new(u32::MAX);
    let atomizer = node(&memory, &atom).await;
    let call = atomizer.call::<Fickle>(()).policy(Policy::retry(29).backoff(at_once()));
    assert_eq!(failure(call).await.attempt, 30);
    let attempts: Vec<_> =
        dead_letter(&memory).history.iter().map(|failure| failure.attempt).collect();
    let expected: Vec<_> = (1..=8).chain(23..=30).collect();
    assert_eq!(attempts, expected);
}

#[tokio::test]
async fn the_electron_decides_before_the_atom_and_the_atom_before_the_node() {
    async fn attempts(electron: Option<Policy>, atom: Option<Policy>, of_node: Policy) -> u32 {
        let options = Options::default();
        let options = atom.map_or(options.clone(), |policy| options.policy(policy));
        let atom = Fickle::new(u32::MAX).with(options);
        let builder = Atomizer::builder().conductor(Memory::new()).atom(atom).policy(of_node);
        let atomizer = builder.start().await.unwrap();
        let call = atomizer.call::<Fickle>(());
        failure(match electron {
            Some(policy) => call.policy(policy),
            None => call,
        })
        .await
        .attempt
    }
    let retry = |times| Policy::retry(times).backoff(at_once());
    assert_eq!(attempts(None, None, Policy::fail()).await, 1);
    assert_eq!(attempts(None, None, retry(1)).await, 2);
    assert_eq!(attempts(None, Some(retry(2)), retry(1)).await, 3);
    assert_eq!(attempts(Some(retry(3)), Some(retry(2)), retry(1)).await, 4);
    assert_eq!(attempts(Some(Policy::fail()), Some(retry(2)), retry(1)).await, 1);
}

#[tokio::test(start_paused = true)]
async fn attempts_are_as_far_apart_as_the_backoff_says() {
    let atom = Fickle::new(3);
    let atomizer = node(&Memory::new(), &atom).await;
    let backoff = Backoff::exponential(Duration::from_secs(1)).jitter_percent(0);
    let call = atomizer.call::<Fickle>(()).policy(Policy::retry(3).backoff(backoff));
    call.await.unwrap();
    let times: Vec<_> = atom.seen().iter().map(|seen| seen.at).collect();
    let apart: Vec<_> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs()).collect();
    assert_eq!(apart, [1, 2, 4]);
}

#[tokio::test]
async fn an_error_that_says_so_is_not_tried_again() {
    let memory = Memory::new();
    let atom = Fickle::new(1).failing_by(Fault::Final);
    let atomizer = node(&memory, &atom).await;
    let policy = Policy::retry(5).then_requeue(5).backoff(at_once());
    assert_eq!(failure(atomizer.call::<Fickle>(()).policy(policy)).await.attempt, 1);
    assert_eq!(atom.seen().len(), 1);
    assert_eq!(dead_letter(&memory).attempts, 1);
}

#[tokio::test(start_paused = true)]
async fn an_error_may_say_when_to_try_again() {
    let atom = Fickle::new(1).failing_by(Fault::RetryAfter(Duration::from_secs(7)));
    let atomizer = node(&Memory::new(), &atom).await;
    let call = atomizer.call::<Fickle>(()).policy(Policy::retry(1));
    assert_eq!(call.await.unwrap(), 2);
    let seen = atom.seen();
    assert_eq!((seen[1].at - seen[0].at).as_secs(), 7);
}

#[tokio::test]
async fn what_is_requeued_goes_to_another_node() {
    const ELECTRONS: usize = 200;
    let memory = Memory::new();
    // Few at a time, so that each gets its share.
    let few = Options::default().concurrency(4);
    let (bad, good) = (Fickle::new(u32::MAX).with(few.clone()), Fickle::new(0).with(few));
    let failing = node(&memory, &bad).await;
    let working = node(&memory, &good).await;
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let policy = Policy::requeue(3).backoff(at_once());
    let calls = (0..ELECTRONS).map(|_| asker.call::<Fickle>(()).policy(policy).into_future());
    for output in futures::future::join_all(calls).await {
        output.expect("it finishes on the node that works");
    }
    let mut tries = HashMap::new();
    for seen in bad.seen() {
        *tries.entry(seen.electron).or_insert(0) += 1;
        assert_eq!(&seen.node, failing.node());
    }
    assert!(!tries.is_empty(), "the bad one got its share");
    assert!(tries.values().all(|tries| *tries == 1), "at most one try there: {tries:?}");
    assert_eq!(good.seen().len(), ELECTRONS);
    // The attempt that failed is counted, and told.
    let second = good.seen().into_iter().find(|seen| seen.attempt == 2).expect("one was requeued");
    assert_eq!(second.history[0].node.as_ref(), Some(failing.node()));
    working.drain().await.unwrap();
}

#[tokio::test]
async fn what_is_requeued_comes_back_where_no_other_node_serves_it() {
    let atom = Fickle::new(2);
    let atomizer = node(&Memory::new(), &atom).await;
    let call = atomizer.call::<Fickle>(()).policy(Policy::requeue(2).backoff(at_once()));
    assert_eq!(call.await.unwrap(), 3);
}

#[tokio::test]
async fn retries_come_before_requeues() {
    let memory = Memory::new();
    let (bad, good) = (Fickle::new(u32::MAX), Fickle::new(0));
    let failing = node(&memory, &bad).await;
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let mut events = failing.events();
    let policy = Policy::retry(2).then_requeue(1).backoff(at_once());
    let call = tokio::spawn(asker.call::<Fickle>(()).policy(policy).into_future());
    until(&mut events, |kind| matches!(kind, EventKind::Started { .. })).await;
    let working = node(&memory, &good).await;
    let requeued = until(&mut events, |kind| matches!(kind, EventKind::Requeued { .. })).await;
    assert_eq!(requeued.attempt(), Some(3));
    assert_eq!(call.await.unwrap().unwrap(), 4);
    assert_eq!((bad.seen().len(), good.seen().len()), (3, 1));
    working.drain().await.unwrap();
}

#[tokio::test]
async fn what_is_given_back_goes_elsewhere_and_is_no_attempt() {
    let memory = Memory::new();
    let unable = Fickle::new(u32::MAX).failing_by(Fault::GiveBack);
    let able = Fickle::new(0);
    let first = node(&memory, &unable).await;
    let mut events = first.events();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let call = tokio::spawn(asker.call::<Fickle>(()).into_future());
    until(&mut events, |kind| matches!(kind, EventKind::HandedOn { .. })).await;
    let second = node(&memory, &able).await;
    assert_eq!(call.await.unwrap().unwrap(), 1, "it is the first attempt still");
    let history = &able.seen()[0].history;
    assert_eq!(history[0].kind, FailureKind::GivenBack);
    second.drain().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_given_back_for_ever_ends_and_is_no_hot_loop() {
    let memory = Memory::new();
    let unable = Fickle::new(u32::MAX).failing_by(Fault::GiveBack);
    let atomizer = node(&memory, &unable).await;
    let began = Instant::now();
    let call = atomizer.call::<Fickle>(()).deadline(Duration::from_secs(100_000));
    let failure = failure(call.policy(Policy::retry(1))).await;
    assert_eq!((failure.kind, failure.attempt), (FailureKind::GivenBack, 1));
    assert_eq!(unable.seen().len(), 1001);
    assert!(began.elapsed() > Duration::from_secs(990), "{:?}", began.elapsed());
    // One of a thousand in a row is enough to know, and the one that ended it.
    assert_eq!(dead_letter(&memory).history.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_long_wait_is_spent_in_the_queue() {
    let memory = Memory::new();
    let (first, second) = (Fickle::new(1), Fickle::new(0));
    let leaving = node(&memory, &first).await;
    let mut events = leaving.events();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let minute = Backoff::constant(Duration::from_secs(60)).jitter_percent(0);
    let call = asker.call::<Fickle>(()).policy(Policy::retry(1).backoff(minute));
    let call = tokio::spawn(call.into_future());
    until(&mut events, |kind| matches!(kind, EventKind::Requeued { .. })).await;
    // Nothing holds it: the node can go, and another take over when the time has come.
    let drained = Instant::now();
    leaving.drain().await.unwrap();
    assert!(drained.elapsed() < Duration::from_secs(1));
    let _working = node(&memory, &second).await;
    assert_eq!(call.await.unwrap().unwrap(), 2);
    assert_eq!((second.seen()[0].at - first.seen()[0].at).as_secs(), 60);
}

/// A node that dies between two attempts takes with it what it alone knew: the electron comes again with the
/// attempts that were written when it was last put back. So does one whose session is lost in between.
#[tokio::test(start_paused = true)]
async fn a_session_lost_between_retries_leaves_the_attempts_last_written() {
    let memory = Memory::new();
    let atom = Fickle::new(u32::MAX);
    let serving = node(&memory, &atom).await;
    let mut events = serving.events();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let backoff = Backoff::constant(Duration::from_secs(5)).jitter_percent(0);
    let policy = Policy::retry(2).backoff(backoff);
    let call = tokio::spawn(asker.call::<Fickle>(()).policy(policy).into_future());
    until(&mut events, |kind| matches!(kind, EventKind::Retried { attempt: 2, .. })).await;
    memory.cut();
    let Err(CallError::Failed(failure)) = call.await.unwrap() else { panic!("it always fails") };
    assert_eq!(failure.attempt, 3);
    let attempts: Vec<_> = atom.seen().iter().map(|seen| seen.attempt).collect();
    assert_eq!(attempts, [1, 2, 1, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_drains_hands_on_what_waits_for_its_next_attempt() {
    let memory = Memory::new();
    let (first, second) = (Fickle::new(u32::MAX), Fickle::new(0));
    let leaving = node(&memory, &first).await;
    let mut events = leaving.events();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let backoff = Backoff::constant(Duration::from_secs(5)).jitter_percent(0);
    let call = asker.call::<Fickle>(()).policy(Policy::retry(9).backoff(backoff));
    let call = tokio::spawn(call.into_future());
    until(&mut events, |kind| matches!(kind, EventKind::Retried { attempt: 2, .. })).await;
    let working = node(&memory, &second).await;
    leaving.drain().await.unwrap();
    assert_eq!(call.await.unwrap().unwrap(), 3, "two attempts were written when it was handed on");
    assert_eq!(second.seen()[0].history.len(), 2);
    working.drain().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_nobody_wants_any_more_is_not_begun_and_is_answered() {
    let memory = Memory::new();
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let mut electron = Electron::new(AtomId::of::<Fickle>(), Payload::json("null"));
    electron.deadline = Some(Duration::from_secs(5));
    electron.reply_to = Some(ReplyTo::new(asker.node().as_str()));
    let mut answers = asker.events();
    asker.send_electron(electron.clone()).await.unwrap();
    electron.reply_to = None;
    asker.send_electron(electron).await.unwrap();
    tokio::time::advance(Duration::from_secs(5)).await;
    let atom = Fickle::new(0);
    let late = node(&memory, &atom).await;
    let mut events = late.events();
    // Answered: nobody waits for this one, and that is told.
    until(&mut answers, |kind| matches!(kind, EventKind::AnswerDropped { .. })).await;
    while memory.take_dead_letters().is_empty() {
        until(&mut events, |kind| matches!(kind, EventKind::Failed { .. })).await;
    }
    assert!(atom.seen().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_nobody_wants_any_more_is_not_gone_on_with() {
    struct Endless;
    impl Atom for Endless {
        const ID: &'static str = "endless";
        type Input = ();
        type Output = ();
        async fn process(&self, _cx: &Context, (): ()) -> Result<()> {
            std::future::pending().await
        }
    }
    let memory = Memory::new();
    let serving =
        Atomizer::builder().conductor(memory.clone()).atom(Endless).start().await.unwrap();
    let mut events = serving.events();
    let asker = Atomizer::builder().conductor(memory).atom(Obedient).start().await.unwrap();
    let call = asker.call::<Endless>(()).deadline(Duration::from_secs(30)).into_future();
    let (error, failed) =
        tokio::join!(call, until(&mut events, |kind| matches!(kind, EventKind::Failed { .. })));
    assert!(matches!(error, Err(CallError::Deadline { .. })), "{error:?}");
    let EventKind::Failed { failure, dead, .. } = failed.kind else { unreachable!() };
    assert_eq!((failure.kind, dead), (FailureKind::Expired, false));
}

/// A copy that this node may not put back: the electron ends, instead of being held for ever.
#[tokio::test(start_paused = true)]
async fn what_cannot_be_put_back_ends() {
    let memory = Memory::new();
    let atom = Fickle::new(u32::MAX);
    let narrow = memory.clone().payload_bytes_max(3);
    let _serving = node(&narrow, &atom).await;
    let asker = Atomizer::builder().conductor(memory.clone()).start().await.unwrap();
    let call = asker.call::<Fickle>(()).policy(Policy::requeue(5).backoff(at_once()));
    let failure = failure(call).await;
    assert_eq!((failure.attempt, failure.message.as_str()), (1, "failure 1"));
    assert_eq!(dead_letter(&memory).attempts, 1);
}
