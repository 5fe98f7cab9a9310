//! What a session does that nobody outside can have it do when it matters.

use atomizer::Payload;
use atomizer_test_support::{Vhost, shared};
use tokio::task::spawn_blocking;

use super::*;
use crate::RabbitMq;

async fn open(vhost: &Vhost) -> RabbitSession {
    let RabbitMq { addresses, topology, options, .. } = &RabbitMq::from_url(&vhost.url()).unwrap();
    let node = &NodeId::unique("node").unwrap();
    let open = |address: Address, patience| async move {
        RabbitSession::open(&address, topology, options, node, patience).await
    };
    addresses.try_each(open).await.unwrap()
}

/// What it has not acknowledged would come again, and be run again elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_ends_by_a_fault_acknowledges_what_it_has_gathered() {
    const COUNT: usize = 10;
    let vhost = spawn_blocking(|| shared().unwrap().vhost().unwrap()).await.unwrap();
    let atom = AtomId::from_static("gathered");
    let source = || Source::Atom(atom.clone());
    let session = open(&vhost).await;
    let window = NonZeroUsize::new(200).unwrap();
    let mut subscription = session.subscribe(source(), window).await.unwrap();
    let electron = || Electron::new(atom.clone(), Payload::json("1"));
    let sent: Vec<_> =
        std::iter::repeat_with(|| Envelope::new(To::Atom(atom.clone()), electron().into()))
            .take(COUNT + 1)
            .collect();
    for sent in session.send(&sent).await {
        sent.unwrap();
    }
    let mut taken = Vec::new();
    while taken.len() <= COUNT {
        taken.extend(subscription.next(window).await.unwrap());
    }
    let is_held = taken.pop().unwrap();
    let done = taken.into_iter().map(|delivery| (delivery.ticket, Outcome::done(Vec::new())));
    let settling = session.settle(done.collect());
    let ending = async { session.life.end("a test".to_owned()) };
    let (settled, ()) = tokio::join!(settling, ending);
    settled.into_iter().for_each(|settled| settled.unwrap());
    let next = open(&vhost).await;
    let mut subscription = next.subscribe(source(), window).await.unwrap();
    let again = subscription.next(window).await.unwrap();
    let counting = move || (vhost.queue_depth("atomizer.atom.gathered").unwrap().unwrap(), vhost);
    let (depth, vhost) = spawn_blocking(counting).await.unwrap();
    assert_eq!((again.len(), depth.ready + depth.unacknowledged), (1, 1));
    drop((is_held, again));
    next.close().await;
    spawn_blocking(move || drop(vhost)).await.unwrap();
}
