//! Fan-out: every child counts once, failures are values, the window is a bound.

use std::{
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use atomizer::{CallError, FailureKind, prelude::*};
use futures::StreamExt;

use crate::atoms::{Gated, Obedient, Order, until};

struct Square;

impl Atom for Square {
    const ID: &'static str = "square";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
        if input == 13 {
            return Err(AtomError::msg("13 brings bad luck"));
        }
        Ok(input * input)
    }
}

struct Squares;

impl Atom for Squares {
    const ID: &'static str = "squares";
    const KIND: Kind = Kind::Spawner;
    type Input = (u64, u64);
    type Output = Vec<u64>;

    async fn process(&self, cx: &Context, (from, to): (u64, u64)) -> Result<Vec<u64>> {
        Ok(cx.fan_out::<Square>(from..to).window(NonZeroUsize::new(7).unwrap()).collect().await?)
    }
}

async fn start() -> Atomizer {
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Square).atom(Squares);
    builder.start().await.unwrap()
}

#[tokio::test]
async fn outputs_are_collected_in_the_order_of_the_inputs() {
    let squares = start().await.call::<Squares>((100, 600)).await.unwrap();
    assert_eq!(squares, (100..600).map(|n| n * n).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_fan_out_over_nothing_is_empty() {
    assert!(start().await.call::<Squares>((5, 5)).await.unwrap().is_empty());
}

#[tokio::test]
async fn the_first_failure_names_its_child() {
    let atomizer = start().await;
    let Err(CallError::Failed(failure)) = atomizer.call::<Squares>((10, 20)).await else {
        panic!("one child fails")
    };
    assert_eq!(failure.kind, FailureKind::Error);
    assert!(failure.message.starts_with("child 3 failed: error: 13 brings bad luck"), "{failure}");
    assert_eq!(atomizer.call::<Squares>((0, 3)).await.unwrap(), [0, 1, 4], "the node goes on");
}

#[tokio::test]
async fn a_stream_tells_of_every_child() {
    struct Survey;
    impl Atom for Survey {
        const ID: &'static str = "survey";
        type Input = ();
        type Output = (Vec<usize>, u64);
        async fn process(&self, cx: &Context, (): ()) -> Result<(Vec<usize>, u64)> {
            let (mut failed, mut sum) = (Vec::new(), 0);
            let mut children = std::pin::pin!(cx.fan_out::<Square>(0..100).stream());
            while let Some((index, result)) = children.next().await {
                match result {
                    Ok(square) => sum += square,
                    Err(_) => failed.push(index),
                }
            }
            Ok((failed, sum))
        }
    }
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Square).atom(Survey);
    let atomizer = builder.start().await.unwrap();
    let (failed, sum) = atomizer.call::<Survey>(()).await.unwrap();
    assert_eq!((failed, sum), (vec![13], (0..100).map(|n| n * n).sum::<u64>() - 169));
}

#[tokio::test]
async fn inputs_are_taken_as_the_window_has_room() {
    struct Slow {
        taken: Arc<AtomicUsize>,
    }
    impl Atom for Slow {
        const ID: &'static str = "slow";
        type Input = ();
        type Output = u64;
        async fn process(&self, cx: &Context, (): ()) -> Result<u64> {
            let inputs = (0..100).inspect(|_| {
                self.taken.fetch_add(1, Ordering::SeqCst);
            });
            let window = NonZeroUsize::new(8).unwrap();
            Ok(cx.fan_out::<Gated>(inputs).window(window).fold(0, |sum, n| sum + n).await?)
        }
    }
    let (gated, taken) = (Gated::new(Options::default()), Arc::new(AtomicUsize::new(0)));
    let slow = Slow { taken: Arc::clone(&taken) };
    let builder = Atomizer::builder().conductor(Memory::new()).atom(gated.clone()).atom(slow);
    let atomizer = builder.start().await.unwrap();
    let mut events = atomizer.events();
    let call = tokio::task::spawn(atomizer.call::<Slow>(()).into_future());
    let of_gated = |kind: &atomizer::EventKind| matches!(kind, atomizer::EventKind::Started { atom, .. } if atom.as_str() == Gated::ID);
    for _ in 0..8 {
        until(&mut events, of_gated).await;
    }
    assert_eq!(taken.load(Ordering::SeqCst), 8, "the window is full");
    gated.open(100);
    assert_eq!(call.await.unwrap().unwrap(), 4950);
    assert!(gated.running_most.load(Ordering::SeqCst) <= 8);
}

#[tokio::test]
async fn a_call_within_an_atom_frees_its_slot() {
    struct Relay;
    impl Atom for Relay {
        const ID: &'static str = "relay";
        type Input = String;
        type Output = String;
        async fn process(&self, cx: &Context, text: String) -> Result<String> {
            Ok(cx.call::<Obedient>(Order::Echo(text)).await?)
        }
    }
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Relay).atom(Obedient);
    let atomizer = builder.concurrency(1).start().await.unwrap();
    assert_eq!(atomizer.call::<Relay>("over".into()).await.unwrap(), "over");
}
