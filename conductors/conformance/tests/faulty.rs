//! Without faults nothing can be told from the conductor beneath; with them it does what it is told.

use std::{num::NonZeroUsize, panic::AssertUnwindSafe, pin::pin, sync::Arc, time::Duration};

use atomizer::{
    Address, AtomId, Conductor, Delivery, Electron, ElectronId, Envelope, Memory, Message, NodeId,
    OpenError, Outcome, Payload, ReplyTo, SendError, Session, SessionError, SettleError, Source,
    Subscription, Ticket,
};
use atomizer_conformance::{Fault, Faults, Faulty, Op, World, conformance_tests};
use tokio::{task::JoinSet, time::Instant};

struct Transparent {
    memory: Memory,
    faulty: Faulty,
}

impl Transparent {
    fn new() -> Self {
        let memory = Memory::new();
        Self { faulty: Faulty::new(memory.clone()), memory }
    }
}

#[async_trait::async_trait]
impl World for Transparent {
    fn conductor(&self) -> Box<dyn Conductor> {
        Box::new(self.faulty.clone())
    }

    async fn cut(&self) {
        self.memory.cut();
    }
}

mod without_faults {
    use super::*;

    conformance_tests!(async { Transparent::new() });
}

/// As [`Transparent`], but cut by a fault.
struct Cut(Faulty);

#[async_trait::async_trait]
impl World for Cut {
    fn conductor(&self) -> Box<dyn Conductor> {
        Box::new(self.0.clone())
    }

    async fn cut(&self) {
        self.0.faults().end_sessions("cut");
    }
}

mod with_sessions_that_end {
    use super::*;

    conformance_tests!(async { Cut(Faulty::new(Memory::new())) });
}

const ATOM: AtomId = AtomId::from_static("faulty.atom");
const FOREVER: Duration = Duration::from_secs(3600);

/// A session over a conductor that can misbehave, and one beside it that cannot.
struct Fixture {
    faulty: Faulty,
    faults: Faults,
    session: Arc<dyn Session>,
    other: Arc<dyn Session>,
}

impl Fixture {
    async fn new() -> Self {
        let memory = Memory::new();
        let other = memory.open(&node("other")).await.expect("memory opens");
        let faulty = Faulty::new(memory);
        let session = faulty.open(&node("faulty")).await.expect("no fault is set");
        Self { faults: faulty.faults(), faulty, session, other }
    }

    /// Sends an electron by the session beside, and takes one by that which can misbehave.
    async fn taken(&self) -> (Box<dyn Subscription>, ElectronId, Ticket) {
        assert_eq!(self.other.send(&[to_atom(electron())]).await, [Ok(())]);
        let mut taker = take(&self.session).await;
        let delivery = one(&mut taker).await;
        (taker, id_of(&delivery), delivery.ticket)
    }

    /// Returns how many electrons wait.
    async fn ready(&self) -> u64 {
        self.other.census(&ATOM).await.expect("it is open").ready
    }
}

fn node(name: &str) -> NodeId {
    NodeId::unique(name).expect("names in tests are valid")
}

fn electron() -> Electron {
    Electron::new(ATOM, Payload::bytes("body"))
}

fn to_atom(electron: Electron) -> Envelope {
    Envelope::new(Address::Atom(ATOM), electron.into())
}

async fn take(session: &Arc<dyn Session>) -> Box<dyn Subscription> {
    let window = NonZeroUsize::new(8).expect("not 0");
    session.subscribe(Source::Atom(ATOM), window).await.expect("it is granted")
}

async fn one(taker: &mut Box<dyn Subscription>) -> Delivery {
    taker.next(NonZeroUsize::MIN).await.expect("it lives").remove(0)
}

fn id_of(delivery: &Delivery) -> ElectronId {
    match &delivery.message {
        Message::Electron(electron) => electron.id,
        other => panic!("expected an electron, not {other:?}"),
    }
}

fn done(ticket: Ticket) -> Vec<(Ticket, Outcome)> {
    vec![(ticket, Outcome::done(Vec::new()))]
}

async fn settle(session: &Arc<dyn Session>, ticket: Ticket) -> Result<(), SettleError> {
    session.settle(done(ticket)).await.remove(0)
}

/// Returns whether a call panics.
async fn panics<T>(call: impl Future<Output = T>) -> bool {
    use std::task::Poll;
    let mut call = pin!(call);
    std::future::poll_fn(move |cx| {
        let polled = std::panic::catch_unwind(AssertUnwindSafe(|| call.as_mut().poll(cx)));
        match polled {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(_)) => Poll::Ready(false),
            Err(_) => Poll::Ready(true),
        }
    })
    .await
}

/// Returns whether a call hangs. With a paused clock this takes no time.
async fn hangs<T>(call: impl Future<Output = T>) -> bool {
    tokio::time::timeout(FOREVER, call).await.is_err()
}

/// Calls an operation once, in a session of its own, whatever comes of it.
async fn call(fixture: &Fixture, op: Op) {
    if op == Op::Open {
        drop(fixture.faulty.open(&node("another")).await);
        return;
    }
    let session = &fixture.session;
    match op {
        Op::Limits => drop(session.limits()),
        Op::ReplyTo => drop(session.reply_to()),
        Op::Subscribe => drop(session.subscribe(Source::Inbox, NonZeroUsize::MIN).await),
        Op::Send => drop(session.send(&[to_atom(electron())]).await),
        Op::Settle => {
            let (_taker, _, ticket) = fixture.taken().await;
            drop(session.settle(done(ticket)).await);
        }
        Op::Park => {
            let (_taker, _, ticket) = fixture.taken().await;
            drop(session.park(ticket, Arc::new(electron())).await);
        }
        Op::Census => drop(session.census(&ATOM).await),
        Op::Ended => {
            session.close().await;
            session.ended().await;
        }
        Op::Close => session.close().await,
        Op::Next => {
            assert_eq!(fixture.other.send(&[to_atom(electron())]).await, [Ok(())]);
            drop(take(session).await.next(NonZeroUsize::MIN).await);
        }
        Op::Stop => take(session).await.stop().await,
        other => panic!("{other:?} is not known here"),
    }
}

#[tokio::test(start_paused = true)]
async fn every_operation_panics_and_hangs_on_demand_and_then_behaves() {
    for op in Op::ALL {
        for fault in [Fault::Panic, Fault::PanicAfter, Fault::Hang, Fault::HangAfter] {
            if !fault.fits(op) {
                continue;
            }
            let fixture = Fixture::new().await;
            fixture.faults.next(op, fault);
            if matches!(fault, Fault::Panic | Fault::PanicAfter) {
                assert!(panics(call(&fixture, op)).await, "{op:?} {fault:?}");
            } else {
                assert!(hangs(call(&fixture, op)).await, "{op:?} {fault:?}");
            }
            fixture.faults.bitten(op).await;
            assert_eq!(fixture.faults.count(op), 1, "{op:?} {fault:?}");
            assert!(!hangs(call(&fixture, op)).await, "{op:?} is well after {fault:?}");
            assert_eq!(fixture.faults.count(op), 1, "{op:?} {fault:?}");
        }
    }
}

#[tokio::test]
async fn every_fault_that_fits_bites_once() {
    let faults = [
        Fault::Error,
        Fault::ErrorAfter,
        Fault::NotTaken,
        Fault::Refuse,
        Fault::Stale,
        Fault::Drop,
        Fault::Fewer,
        Fault::Twice,
        Fault::EndSubscription,
        Fault::EndSession,
    ];
    for op in Op::ALL {
        for fault in faults.into_iter().filter(|fault| fault.fits(op)) {
            let fixture = Fixture::new().await;
            fixture.faults.next(op, fault);
            call(&fixture, op).await;
            assert_eq!(fixture.faults.count(op), 1, "{op:?} {fault:?}");
        }
    }
}

#[tokio::test]
#[should_panic(expected = "Open cannot misbehave by Stale")]
async fn a_fault_that_does_not_fit_is_refused() {
    Faults::default().next(Op::Open, Fault::Stale);
}

#[tokio::test]
async fn opening_fails_as_told() {
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    let node = node("node");
    faults.next(Op::Open, Fault::Error);
    faults.pass(Op::Open, 1);
    faults.times(Op::Open, Fault::Refuse, 2);
    faults.next(Op::Open, Fault::EndSession);
    assert!(matches!(faulty.open(&node).await, Err(OpenError::Unreachable(_))));
    assert!(faulty.open(&node).await.is_ok());
    assert!(matches!(faulty.open(&node).await, Err(OpenError::Refused(_))));
    assert!(matches!(faulty.open(&node).await, Err(OpenError::Refused(_))));
    let ended = faulty.open(&node).await.unwrap();
    assert!(matches!(ended.ended().await, SessionError::Lost(_)));
    assert!(faulty.open(&node).await.is_ok());
    faults.always(Op::Open, Fault::Error);
    for _ in 0..5 {
        assert!(faulty.open(&node).await.is_err());
    }
    faults.clear();
    assert!(faulty.open(&node).await.is_ok());
    assert_eq!((faults.count(Op::Open), faults.calls(Op::Open)), (9, 12));
}

#[tokio::test]
async fn a_settlement_that_errs_is_not_carried_out_and_comes_again_at_the_end() {
    let fixture = Fixture::new().await;
    let (_taker, _, ticket) = fixture.taken().await;
    fixture.faults.next(Op::Settle, Fault::Error);
    let settled = settle(&fixture.session, ticket).await;
    assert!(matches!(settled, Err(SettleError::Unknown(_))), "{settled:?}");
    assert_eq!(fixture.ready().await, 0, "nobody knows yet");
    assert_eq!(fixture.faults.end_sessions("lost"), 1);
    assert_eq!(fixture.ready().await, 1);
}

#[tokio::test]
async fn a_settlement_may_be_carried_out_and_err() {
    let fixture = Fixture::new().await;
    let (_taker, _, ticket) = fixture.taken().await;
    fixture.faults.next(Op::Settle, Fault::ErrorAfter);
    let settled = settle(&fixture.session, ticket).await;
    assert!(matches!(settled, Err(SettleError::Unknown(_))), "{settled:?}");
    fixture.faults.end_sessions("lost");
    assert_eq!(fixture.ready().await, 0);
}

#[tokio::test]
async fn a_settlement_may_drop_its_tickets() {
    for fault in [Fault::Drop, Fault::Stale, Fault::Panic] {
        let fixture = Fixture::new().await;
        let (mut taker, id, ticket) = fixture.taken().await;
        fixture.faults.next(Op::Settle, fault);
        match fault {
            Fault::Panic => assert!(panics(fixture.session.settle(done(ticket))).await),
            _ => {
                let settled = settle(&fixture.session, ticket).await;
                let stale = matches!(settled, Err(SettleError::Stale));
                assert_eq!(stale, fault == Fault::Stale, "{settled:?}");
            }
        }
        let again = one(&mut taker).await;
        assert_eq!((id_of(&again), again.redeliveries), (id, 1));
        settle(&fixture.session, again.ticket).await.unwrap();
    }
}

#[tokio::test]
async fn what_is_not_taken_gives_the_ticket_back() {
    let fixture = Fixture::new().await;
    let (_taker, _, ticket) = fixture.taken().await;
    fixture.faults.next(Op::Settle, Fault::NotTaken);
    fixture.faults.next(Op::Park, Fault::NotTaken);
    let emit = vec![to_atom(electron())];
    let settled = fixture.session.settle(vec![(ticket, Outcome::done(emit))]).await.remove(0);
    let Err(SettleError::NotSafe { ticket, failed }) = settled else { panic!("{settled:?}") };
    assert!(matches!(failed[..], [(_, SendError::NotTaken(_))]), "{failed:?}");
    let parked = fixture.session.park(ticket, Arc::new(electron())).await;
    let Err(SettleError::NotSafe { ticket, .. }) = parked else { panic!("{parked:?}") };
    settle(&fixture.session, ticket).await.unwrap();
    fixture.faults.end_sessions("lost");
    assert_eq!(fixture.ready().await, 0, "nothing was sent, and it is settled");
}

#[tokio::test]
async fn what_is_sent_is_lost_or_doubled_as_told() {
    let fixture = Fixture::new().await;
    let told = [
        (Fault::Error, SendError::Unknown("on purpose".into()), 0),
        (Fault::ErrorAfter, SendError::Unknown("on purpose".into()), 1),
        (Fault::NotTaken, SendError::NotTaken("on purpose".into()), 1),
        (Fault::Refuse, SendError::Refused("on purpose".into()), 1),
    ];
    for (fault, error, ready) in told {
        fixture.faults.next(Op::Send, fault);
        assert_eq!(fixture.session.send(&[to_atom(electron())]).await, [Err(error)]);
        assert_eq!(fixture.ready().await, ready, "{fault:?}");
    }
    fixture.faults.next(Op::Send, Fault::Twice);
    assert_eq!(fixture.session.send(&[to_atom(electron())]).await, [Ok(())]);
    assert_eq!(fixture.ready().await, 3);
    fixture.faults.next(Op::Send, Fault::Fewer);
    assert_eq!(fixture.session.send(&[to_atom(electron())]).await, []);
    assert_eq!(fixture.ready().await, 4);
}

#[tokio::test]
async fn a_subscription_that_ends_gives_back_what_came_through_it() {
    let fixture = Fixture::new().await;
    let (mut taker, id, ticket) = fixture.taken().await;
    let parked = fixture.session.park(ticket, Arc::new(electron())).await.unwrap();
    let (_, _, kept) = fixture.taken().await;
    fixture.other.send(&[to_atom(electron())]).await.remove(0).unwrap();
    let held = one(&mut taker).await;
    let first = id_of(&held);
    fixture.faults.next(Op::Next, Fault::EndSubscription);
    assert!(taker.next(NonZeroUsize::MIN).await.is_err());
    assert!(taker.next(NonZeroUsize::MIN).await.is_err(), "it has ended for good");
    let settled = settle(&fixture.session, held.ticket).await;
    assert!(matches!(settled, Err(SettleError::Stale)), "{settled:?}");
    let again = one(&mut take(&fixture.session).await).await;
    assert_eq!(id_of(&again), first);
    assert_ne!(first, id);
    settle(&fixture.session, parked).await.expect("what is parked outlives its subscription");
    settle(&fixture.session, kept).await.expect("another subscription goes on");
}

#[tokio::test]
async fn a_subscription_misbehaves_and_loses_nothing() {
    let fixture = Fixture::new().await;
    let (mut taker, id, ticket) = fixture.taken().await;
    drop(ticket);
    for fault in [Fault::Error, Fault::ErrorAfter] {
        fixture.faults.next(Op::Next, fault);
        assert!(taker.next(NonZeroUsize::MIN).await.is_err());
    }
    fixture.faults.next(Op::Next, Fault::Fewer);
    assert_eq!(taker.next(NonZeroUsize::MIN).await.unwrap().len(), 0);
    fixture.faults.next(Op::Next, Fault::PanicAfter);
    assert!(panics(taker.next(NonZeroUsize::MIN)).await);
    assert_eq!(id_of(&one(&mut taker).await), id);
}

#[tokio::test]
async fn an_ended_session_gives_everything_back_while_its_tickets_are_held() {
    let fixture = Fixture::new().await;
    let inbox = fixture.session.reply_to();
    let (mut taker, _, ticket) = fixture.taken().await;
    assert_eq!(fixture.faults.end_sessions("the plug was pulled"), 1);
    assert_eq!(fixture.ready().await, 1);
    assert_eq!(fixture.session.ended().await.to_string(), "the plug was pulled");
    assert!(taker.next(NonZeroUsize::MIN).await.is_err());
    assert!(settle(&fixture.session, ticket).await.is_err());
    assert!(fixture.session.census(&ATOM).await.is_err());
    assert!(fixture.session.subscribe(Source::Inbox, NonZeroUsize::MIN).await.is_err());
    assert!(fixture.session.send(&[to_atom(electron())]).await[0].is_err());
    fixture.session.close().await;
    assert_eq!(fixture.ready().await, 1, "neither settled nor sent");
    let answer = Envelope::new(Address::Reply(inbox), electron().into());
    assert_eq!(fixture.other.send(&[answer]).await, [Ok(())], "the inbox is still there");
    assert_eq!(fixture.faults.end_sessions("again"), 0);
}

#[tokio::test]
async fn an_end_reaches_calls_that_are_under_way() {
    let fixture = Fixture::new().await;
    let mut taker = take(&fixture.session).await;
    let mut calls = JoinSet::new();
    calls.spawn(async move { taker.next(NonZeroUsize::MIN).await.map(drop).unwrap_err() });
    let session = Arc::clone(&fixture.session);
    calls.spawn(async move { session.ended().await });
    while fixture.faults.calls(Op::Next) + fixture.faults.calls(Op::Ended) < 2 {
        tokio::task::yield_now().await;
    }
    fixture.faults.end_sessions("lost");
    let ended = calls.join_all().await;
    assert!(ended.iter().all(|error| error.to_string() == "lost"), "{ended:?}");
}

#[tokio::test]
async fn an_end_by_an_operation_ends_the_session() {
    for op in Op::ALL.into_iter().filter(|op| Fault::EndSession.fits(*op) && *op != Op::Open) {
        let fixture = Fixture::new().await;
        fixture.faults.next(op, Fault::EndSession);
        if op == Op::Ended {
            fixture.session.ended().await;
        } else {
            call(&fixture, op).await;
        }
        assert!(matches!(fixture.session.ended().await, SessionError::Lost(_)), "{op:?}");
    }
}

#[tokio::test]
async fn what_hangs_goes_on_when_it_is_released() {
    let fixture = Fixture::new().await;
    let (_taker, _, ticket) = fixture.taken().await;
    fixture.faults.next(Op::Settle, Fault::Hang);
    let session = Arc::clone(&fixture.session);
    let mut settling = JoinSet::new();
    settling.spawn(async move { settle(&session, ticket).await });
    fixture.faults.bitten(Op::Settle).await;
    fixture.faults.release();
    settling.join_all().await.remove(0).unwrap();
    fixture.faults.end_sessions("lost");
    assert_eq!(fixture.ready().await, 0, "it was carried out");
}

#[tokio::test(start_paused = true)]
async fn a_delayed_call_is_carried_out_later() {
    let fixture = Fixture::new().await;
    fixture.faults.next(Op::Send, Fault::Delay(FOREVER));
    let start = Instant::now();
    assert_eq!(fixture.session.send(&[to_atom(electron())]).await, [Ok(())]);
    assert!(start.elapsed() >= FOREVER);
    assert_eq!(fixture.ready().await, 1);
}

#[tokio::test]
async fn one_seed_is_one_course_of_events() {
    let course = async |seed| {
        let fixture = Fixture::new().await;
        let faults = [Fault::Error, Fault::NotTaken, Fault::Twice, Fault::EndSubscription];
        fixture.faults.random(seed, 30, [Op::Send, Op::Census], faults);
        let mut course = Vec::new();
        for _ in 0..200 {
            course.extend(fixture.session.send(&[to_atom(electron())]).await);
            assert!(fixture.session.subscribe(Source::Inbox, NonZeroUsize::MIN).await.is_ok());
        }
        let ready = fixture.ready().await;
        assert!(format!("{:?}", fixture.faults).contains(&format!("seed: Some({seed})")));
        let bites = fixture.faults.count(Op::Send);
        assert!((30..=90).contains(&bites), "{bites} of 200 is not about 30 %");
        (course, ready, bites)
    };
    assert_eq!(course(7).await, course(7).await);
    assert_ne!(course(7).await, course(8).await);
}

#[tokio::test]
async fn a_shared_conductor_can_be_wrapped() {
    let shared: Arc<dyn Conductor> = Arc::new(Memory::new());
    let faulty = Faulty::from(Arc::clone(&shared));
    assert_eq!(faulty.id(), shared.id());
    let session = faulty.open(&node("node")).await.unwrap();
    let gone = Envelope::new(Address::Reply(ReplyTo::new("nobody")), electron().into());
    let sent = session.send(&[gone]).await.remove(0);
    assert!(matches!(sent, Err(SendError::Unroutable(_))), "{sent:?}");
}
