//! Dead letters, and a process that is killed while it sends them back.

use std::{
    collections::HashSet,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use atomizer::{
    Address, AtomId, Conductor, Electron, ElectronId, Envelope, Failure, FailureKind, NodeId,
    Payload, prelude::*,
};
use atomizer_rabbitmq::{Requeue, Selection};
use tokio::task::spawn_blocking;

use crate::{rabbit, vhost};

const LETTERS: usize = 1_000;
const WINDOW: usize = 16;

/// Remembers which electrons it was run for.
#[derive(Clone, Default)]
struct Remember(Arc<Mutex<HashSet<ElectronId>>>);

impl Remember {
    fn seen(&self) -> HashSet<ElectronId> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Atom for Remember {
    const ID: &'static str = "remember";
    type Input = usize;
    type Output = ();

    async fn process(&self, cx: &Context, _number: usize) -> Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(cx.electron().id);
        Ok(())
    }
}

/// Runs until so many are done, and is killed in the middle of what comes next.
fn send_back_and_be_killed(url: &str, done: usize) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_send_back"));
    command.args([url, "1000", &WINDOW.to_string()]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let enough = |line: &String| line.parse::<usize>().unwrap() >= done;
    assert!(lines.map_while(Result::ok).any(|line| enough(&line)), "it goes on");
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success(), "it did not end by itself");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_killed_sends_at_most_a_window_twice() {
    let vhost = vhost().await;
    let conductor = rabbit(&vhost);
    let session = conductor.open(&NodeId::unique("undertaker").unwrap()).await.unwrap();
    let atom = AtomId::from_static(Remember::ID);
    let envelopes: Vec<_> = (0..LETTERS)
        .map(|number| {
            let mut electron = Electron::new(atom.clone(), Payload::json(number.to_string()));
            electron.history.push(Failure::new(FailureKind::Error, "for a test"));
            Envelope::new(Address::DeadLetter(atom.clone()), electron.into())
        })
        .collect();
    assert!(session.send(&envelopes).await.iter().all(Result::is_ok));
    session.close().await;

    let (url, dead) = (vhost.url(), conductor.dead_letters());
    let kills = 2;
    spawn_blocking(move || (0..kills).for_each(|_| send_back_and_be_killed(&url, 200)))
        .await
        .unwrap();
    // Until the broker has seen that they are gone, it keeps what they held.
    let deadline = Instant::now() + Duration::from_secs(60);
    let depth = loop {
        dead.requeue(Selection::all(), Requeue::default()).finish().await.unwrap();
        let left = vhost.queue_depth("atomizer.dead").unwrap().expect("it is there");
        let sent = vhost.queue_depth("atomizer.atom.remember").unwrap().expect("it is there");
        if left.ready + left.unacknowledged == 0 {
            break sent;
        }
        assert!(Instant::now() < deadline, "{left:?}");
    };
    let twice = usize::try_from(depth.ready).unwrap().checked_sub(LETTERS).expect("none is lost");
    assert!(twice <= kills * WINDOW, "{twice} were sent twice");
    println!("kills={kills} window={WINDOW} sent_twice={twice}");

    let remember = Remember::default();
    let builder = Atomizer::builder().conductor(conductor).atom(remember.clone());
    let node = builder.start().await.unwrap();
    while remember.seen().len() < LETTERS {
        assert!(Instant::now() < deadline, "all of them arrive");
        tokio::task::yield_now().await;
    }
    node.drain().await.unwrap();
    assert_eq!(remember.seen().len(), LETTERS, "under the ids that they had");
    spawn_blocking(move || drop(vhost)).await.unwrap();
}
