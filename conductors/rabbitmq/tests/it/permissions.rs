//! The least permissions of each role, as `docs/topology.md` has them.

use std::{sync::Arc, time::Duration};

use atomizer::{
    Address, AtomId, CallError, Conductor, Electron, Envelope, EventKind, Filter, Message, Monitor,
    NodeId, OpenError, Payload, Position, ResultsId, Seen, SendError, Session, Source, prelude::*,
};
use atomizer_rabbitmq::{RabbitMq, Requeue, Selection, TopologyMode};
use atomizer_test_support::{Permissions, Vhost};
use tokio::task::JoinSet;

use crate::support::{Double, blocking, rabbit, serve, soon, until, vhost};

/// A virtual host with users, who go with it.
struct Users {
    vhost: Vhost,
    names: Vec<String>,
}

impl Users {
    /// A virtual host where all is that anyone needs: what an operator has made.
    async fn new() -> Self {
        let vhost = vhost().await;
        let atomizer = serve(&vhost.url()).await;
        let delay = Duration::from_millis(50);
        atomizer.send_after::<Double>(delay, 1).await.unwrap();
        atomizer.result_address(&RESULTS).await.unwrap();
        atomizer.drain().await.unwrap();
        Self { vhost, names: Vec::new() }
    }

    /// The conductor of a user who may do this, and makes nothing that is not his own.
    async fn add(&mut self, [configure, write, read]: [&str; 3]) -> RabbitMq {
        let name = format!("{}-{}", self.vhost.name(), self.names.len());
        self.names.push(name.clone());
        let permissions = Permissions::new(configure, write, read);
        let (node, vhost) = (self.vhost.node().clone(), self.vhost.name().to_owned());
        let url = self.vhost.url_as(&name, "secret");
        blocking(move || node.add_user(&name, "secret", &vhost, &permissions).unwrap()).await;
        rabbit(&url).topology(TopologyMode::Passive)
    }

    async fn remove(self) {
        blocking(move || {
            for name in &self.names {
                self.vhost.node().delete_user(name).unwrap();
            }
            drop(self.vhost);
        })
        .await;
    }
}

const RESULTS: ResultsId = ResultsId::from_static("evening");

const CALLER: [&str; 3] =
    [r"^atomizer\.inbox\.", r"^atomizer($|\.events$|\.delay\.)", r"^atomizer\.inbox\."];
const WORKER: [&str; 3] = [
    r"^atomizer\.(inbox|lease)\.",
    r"^(atomizer($|\.events$|\.(inbox|lease|delay)\.)|amq\.default$)",
    r"^atomizer($|\.(atom|inbox|lease)\.)",
];
const MONITOR: [&str; 3] = ["^$", r"^atomizer\.events$", r"^atomizer\.events$"];
const OPERATOR: [&str; 3] = ["^$", r"^(atomizer|amq\.default)$", r"^atomizer\.dead$"];
const READER: [&str; 3] = [r"^atomizer\.inbox\.", "^atomizer$", r"^atomizer\.(inbox|results)\."];

async fn start(conductor: RabbitMq) -> Atomizer {
    soon(Atomizer::builder().conductor(conductor).start()).await.unwrap()
}

async fn work(conductor: RabbitMq) -> Atomizer {
    soon(Atomizer::builder().conductor(conductor).atom(Double).start()).await.unwrap()
}

/// Sends an electron, takes it, and parks it.
async fn park(session: &dyn Session) {
    let atom = AtomId::from_static("double");
    let electron = Electron::new(atom.clone(), Payload::json("1"));
    let envelope = Envelope::new(Address::Atom(atom.clone()), electron.into());
    soon(session.send(&[envelope])).await.remove(0).unwrap();
    let one = 1.try_into().unwrap();
    let mut taker = soon(session.subscribe(Source::Atom(atom), one)).await.unwrap();
    let delivery = soon(taker.next(one)).await.unwrap().remove(0);
    let Message::Electron(electron) = &delivery.message else { panic!("{delivery:?}") };
    soon(session.park(delivery.ticket, Arc::clone(electron))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_does_its_work_with_the_least_permissions() {
    let mut users = Users::new().await;
    let conductor = users.add(WORKER).await;
    let session = soon(conductor.open(&NodeId::unique("parker").unwrap())).await.unwrap();
    park(&*session).await;
    soon(session.close()).await;
    let worker = work(conductor).await;
    let caller = start(users.add(CALLER).await).await;
    assert_eq!(soon(caller.call::<Double>(4).into_future()).await.unwrap(), 8);
    let delay = Duration::from_millis(50);
    soon(caller.send_after::<Double>(delay, 4)).await.unwrap();
    let mut electron = Electron::new(AtomId::from_static("double"), Payload::json("4"));
    electron.reply_to = Some(soon(caller.result_address(&RESULTS)).await.unwrap());
    soon(caller.send_electron(electron)).await.unwrap();
    let reader = start(users.add(READER).await).await;
    let mut results = reader.results(RESULTS);
    let outcome = soon(results.next()).await.unwrap();
    assert_eq!(outcome.output::<Double>().unwrap(), 8);
    soon(results.done()).await;
    drop(results);
    reader.drain().await.unwrap();
    // It fails, and nobody is told: it dies.
    soon(caller.send::<Double>(u64::MAX)).await.unwrap();

    let dead = users.add(OPERATOR).await.dead_letters();
    soon(async { while dead.census().await.unwrap().ready == 0 {} }).await;
    // A letter that was delivered eight times is written anew.
    for _ in 0..10 {
        let mut listing = dead.list(Selection::all());
        soon(listing.next()).await.unwrap().unwrap();
        soon(listing.close()).await;
    }
    let mut requeue = dead.requeue(Selection::all(), Requeue::default());
    let mut last = None;
    while let Some(progress) = soon(requeue.next()).await {
        last = Some(progress);
    }
    assert_eq!(last.unwrap().done, 1);
    let nodes = [caller.node().clone(), worker.node().clone()];
    caller.drain().await.unwrap();
    worker.drain().await.unwrap();
    // What they did is told: to who may write, and to who may only read.
    for conductor in [users.add(MONITOR).await, users.add(["^$", "^$", MONITOR[2]]).await] {
        let monitor = Monitor::new(&conductor).unwrap().from(Position::Start);
        let monitor = monitor.filter(Filter::new().kind("stopped"));
        let mut events = soon(monitor.open()).await.unwrap();
        let mut stopped = Vec::new();
        while let Seen::Event(event) = soon(events.next()).await {
            stopped.push(event.node);
        }
        assert!(nodes.iter().all(|node| stopped.contains(node)), "{stopped:?}");
    }
    users.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_less_a_role_is_refused() {
    let mut users = Users::new().await;
    let no_inbox = users.add(["^$", CALLER[1], CALLER[2]]).await;
    let error = soon(no_inbox.open(&NodeId::unique("node").unwrap())).await.unwrap_err();
    assert!(matches!(error, OpenError::Refused(_)), "{error:?}");

    let no_send = users.add([CALLER[0], r"^atomizer\.inbox\.", CALLER[2]]).await;
    let caller = start(no_send).await;
    let error = soon(caller.send::<Double>(4)).await.unwrap_err();
    let refused = |error: &CallError| {
        matches!(error, CallError::NotSent { source: SendError::Refused(_), .. })
    };
    assert!(refused(&error), "{error:?}");
    caller.drain().await.unwrap();

    let no_work = users.add([WORKER[0], WORKER[1], r"^atomizer\.(inbox|lease)\."]).await;
    let session = soon(no_work.open(&NodeId::unique("node").unwrap())).await.unwrap();
    let atom = Source::Atom(AtomId::from_static("double"));
    let error = soon(session.subscribe(atom, 1.try_into().unwrap())).await.err().unwrap();
    assert!(error.to_string().contains("ACCESS_REFUSED"), "{error}");
    soon(session.close()).await;
    users.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_makes_what_is_needed_has_the_whole_namespace() {
    let mut users = Users { vhost: vhost().await, names: Vec::new() };
    let (all, and_answers) = (r"^atomizer($|\.)", r"^(atomizer($|\.)|amq\.default$)");
    let worker = users.add([all, and_answers, all]).await.topology(TopologyMode::Declare);
    let session = soon(worker.open(&NodeId::unique("parker").unwrap())).await.unwrap();
    park(&*session).await;
    soon(session.close()).await;
    let worker = work(worker).await;
    let caller = users.add([all, all, all]).await.topology(TopologyMode::Declare);
    let caller = start(caller).await;
    assert_eq!(soon(caller.call::<Double>(4).into_future()).await.unwrap(), 8);
    soon(caller.send_after::<Double>(Duration::from_millis(50), 4)).await.unwrap();
    caller.drain().await.unwrap();
    worker.drain().await.unwrap();
    users.remove().await;
}

/// What it may not answer it does not run over and over.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_may_not_answer_ends_what_it_is_asked_unclaimed() {
    let mut users = Users::new().await;
    let write = r"^atomizer($|\.(lease|delay)\.)";
    let worker = work(users.add([WORKER[0], write, WORKER[2]]).await).await;
    let mut events = worker.events();
    let caller = start(users.add(CALLER).await).await;
    let mut asked = JoinSet::new();
    asked.spawn(caller.call::<Double>(4).into_future());
    let unclaimed =
        |kind: &EventKind| matches!(kind, EventKind::Completed { unclaimed: Some(_), .. });
    let EventKind::Completed { unclaimed, .. } = until(&mut events, unclaimed).await else {
        unreachable!("it was waited for")
    };
    assert!(unclaimed.is_some_and(|reason| reason.contains("amq.default")));
    asked.shutdown().await;
    caller.drain().await.unwrap();
    worker.drain().await.unwrap();
    users.remove().await;
}
