//! Children that their parent gives up, on another node.

use std::sync::Arc;

use atomizer::{EventKind, prelude::*};
use tokio::{sync::Notify, time::Instant};

use crate::support::{blocking, rabbit, soon, until, vhost};

/// Never ends.
struct Endless;

impl Atom for Endless {
    const ID: &'static str = "endless";
    type Input = u64;
    type Output = u64;

    fn options(&self) -> Options {
        Options::default().concurrency(2)
    }

    async fn process(&self, _cx: &Context, _: u64) -> Result<u64> {
        std::future::pending().await
    }
}

/// Asks many, and gives them up when it is told to.
struct Fickle(Arc<Notify>);

impl Atom for Fickle {
    const ID: &'static str = "fickle";
    const KIND: Kind = Kind::Spawner;
    type Input = u64;
    type Output = u64;

    async fn process(&self, cx: &Context, children: u64) -> Result<u64> {
        tokio::select! {
            sum = cx.fan_out::<Endless>(0..children).fold(0, |sum, number| sum + number) => Ok(sum?),
            () = self.0.notified() => Ok(0),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn children_that_are_given_up_end_on_the_node_that_has_them() {
    const CHILDREN: u64 = 200;
    let vhost = vhost().await;
    let changes_its_mind = Arc::new(Notify::new());
    let fickle = Fickle(Arc::clone(&changes_its_mind));
    let parents = Atomizer::builder().conductor(rabbit(&vhost.url())).atom(fickle);
    let parents = parents.start().await.unwrap();
    let children = Atomizer::builder().conductor(rabbit(&vhost.url())).atom(Endless);
    let children = children.start().await.unwrap();
    let mut told = children.events();
    let given_up = |kind: &EventKind| {
        assert!(!matches!(kind, EventKind::Started { .. }), "no more are begun");
        matches!(kind, EventKind::Failed { failure, .. } if failure.message == "who asked gave it up")
    };
    let giving_up = async {
        for _ in 0..2 {
            until(&mut told, |kind| matches!(kind, EventKind::Started { .. })).await;
        }
        let begun = Instant::now();
        changes_its_mind.notify_one();
        until(&mut told, given_up).await;
        println!("the first heard of it after {:?}", begun.elapsed());
        for _ in 1..CHILDREN {
            until(&mut told, given_up).await;
        }
    };
    let (sum, ()) = tokio::join!(soon(parents.call::<Fickle>(CHILDREN).into_future()), giving_up);
    assert_eq!(sum.unwrap(), 0);
    children.drain().await.unwrap();
    parents.drain().await.unwrap();
    let left = blocking(move || vhost.queue_depth("atomizer.atom.endless").unwrap()).await;
    assert_eq!(left.unwrap_or_default(), Default::default(), "nothing is left");
}
