use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use atomizer::{Atomizer, CallError, Memory};
use proptest::prelude::{ProptestConfig, prop_assert, prop_assert_eq, proptest};

use super::*;

fn inside(batches: impl IntoIterator<Item = Batch>) -> u64 {
    batches.into_iter().map(|batch| toss(&batch)).sum()
}

async fn node(monte_carlo: MonteCarlo) -> Atomizer {
    let builder = Atomizer::builder().conductor(Memory::new()).atom(monte_carlo).atom(Toss);
    builder.start().await.expect("a node in memory starts")
}

#[test]
fn the_order_of_the_batches_does_not_matter() {
    let request = Request::new(100_003, 1_000, 7).unwrap();
    let batches: Vec<_> = request.batches().collect();
    let in_order = inside(batches.iter().copied());
    assert_eq!(inside(batches.iter().copied().rev()), in_order);
    assert_eq!(inside(request.batches()), in_order);
}

/// What a seed stands for must not change: two versions may share the work of one request.
#[test]
fn a_seed_means_the_same_for_ever() {
    let tossed = [(1, 0), (1, 1), (2, 0), (u64::MAX, u64::MAX)]
        .map(|(seed, stream)| toss(&Batch { tosses: 100_000, seed, stream }));
    assert_eq!(tossed, [78_245, 78_637, 78_227, 78_711]);
}

#[test]
fn no_two_batches_share_a_point() {
    let request = Request::new(64_000, 1_000, 0).unwrap();
    let mut seen = HashSet::new();
    for Batch { tosses, seed, stream } in request.batches() {
        let mut points = Pcg64::new(state(seed, stream), u128::from(stream));
        for _ in 0..tosses {
            // 64,000 of 2⁶⁴ values: two that are equal by chance are one in 10¹⁰ runs, and the seed is fixed.
            assert!(seen.insert(points.next_u64()), "stream {stream} repeats another");
        }
    }
}

#[test]
fn the_circle_is_where_it_should_be() {
    let point = |x: u64, y: u64| (x << 33) | (y << 2);
    let last = (1 << COORDINATE_BITS) - 1;
    assert!(is_inside(point(0, 0)));
    assert!(is_inside(point(last, 0)), "the middle of the last cell is left of 1");
    assert!(is_inside(point(0, last)));
    assert!(!is_inside(point(last, last)));
    // sin 45° and cos 45°, a few cells inside and outside.
    let diagonal = (f64::from(1_u32 << COORDINATE_BITS) / 2_f64.sqrt()) as u64;
    assert!(is_inside(point(diagonal - 2, diagonal - 2)));
    assert!(!is_inside(point(diagonal + 2, diagonal + 2)));
}

#[tokio::test]
async fn the_estimate_is_close_to_pi() {
    let atomizer = node(MonteCarlo::default()).await;
    for seed in 0..5 {
        let request = Request::new(400_000, 1_000, seed).unwrap();
        let estimate = atomizer.call::<MonteCarlo>(request).await.unwrap();
        // The standard deviation of 4 times a mean of trials that succeed with probability π/4.
        let sigma = (PI * (4.0 - PI) / 400_000.0).sqrt();
        assert!(estimate.error.abs() < 5.0 * sigma, "{estimate:?}");
        assert_eq!((estimate.tosses, estimate.electrons), (400_000, 400));
        assert_eq!(estimate.inside, inside(request.batches()));
    }
    atomizer.drain().await.unwrap();
}

#[tokio::test]
async fn progress_tells_of_every_batch() {
    let (told, last) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (count, position) = (Arc::clone(&told), Arc::clone(&last));
    let atomizer = node(MonteCarlo::with_progress(move |progress| {
        count.fetch_add(1, Ordering::Relaxed);
        position.store(progress.tosses, Ordering::Relaxed);
    }))
    .await;
    atomizer.call::<MonteCarlo>(Request::new(10_500, 1_000, 3).unwrap()).await.unwrap();
    assert_eq!((told.load(Ordering::Relaxed), last.load(Ordering::Relaxed)), (11, 10_500));
    atomizer.drain().await.unwrap();
}

#[tokio::test]
async fn nothing_to_toss_is_an_error() {
    assert_eq!(Request::new(0, 1, 1), Err(InvalidRequest::NoTosses));
    assert_eq!(Request::new(1, 0, 1), Err(InvalidRequest::EmptyBatches));
    let atomizer = node(MonteCarlo::default()).await;
    for (tosses, batch, what) in
        [(0, 1, "tosses must be at least 1"), (1, 0, "batch must be at least 1")]
    {
        let request = Request { tosses, batch, seed: 1 };
        let error = atomizer.call::<MonteCarlo>(request).await.unwrap_err();
        assert!(matches!(&error, CallError::Failed(failure) if failure.message == what), "{error}");
    }
    atomizer.drain().await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn batches_divide_a_request_exactly(tosses in 0_u64..5_000, batch in 1_u64..6_000, seed: u64) {
        let request = Request { tosses, batch, seed };
        let batches: Vec<_> = request.batches().collect();
        prop_assert_eq!(batches.iter().map(|batch| batch.tosses).sum::<u64>(), tosses);
        prop_assert_eq!(batches.len() as u64, tosses.div_ceil(batch));
        for (at, each) in batches.iter().enumerate() {
            let is_last = at + 1 == batches.len();
            prop_assert_eq!((each.seed, each.stream), (seed, at as u64));
            prop_assert!(each.tosses == batch || (is_last && (1..batch).contains(&each.tosses)));
        }
    }

    #[test]
    fn huge_requests_do_not_overflow(tosses in u64::MAX - 1_000.., batch in u64::MAX / 16..) {
        let batches: Vec<_> = Request { tosses, batch, seed: 0 }.batches().collect();
        prop_assert_eq!(batches.iter().map(|batch| batch.tosses).sum::<u64>(), tosses);
    }
}
