//! How the value that runs an electron comes about.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU32, Ordering},
};

use atomizer::{CallError, EventKind, FailureKind, prelude::*};

use crate::atoms::until;

/// Keeps count behind a mutex, and panics while it holds it when it is told to.
#[derive(Default)]
struct Counter {
    count: Mutex<u32>,
}

impl Clone for Counter {
    fn clone(&self) -> Self {
        Self { count: Mutex::new(*self.count.lock().unwrap()) }
    }
}

impl Atom for Counter {
    const ID: &'static str = "counter";
    type Input = bool;
    type Output = u32;

    async fn process(&self, _cx: &Context, panics: bool) -> Result<u32> {
        let mut count = self.count.lock().map_err(|_| AtomError::msg("poisoned"))?;
        assert!(!panics, "while it holds its mutex");
        *count += 1;
        Ok(*count)
    }
}

fn builder() -> atomizer::Builder {
    Atomizer::builder().conductor(Memory::new())
}

async fn three_counts(atomizer: &Atomizer) -> [u32; 3] {
    let mut counts = [0; 3];
    for count in &mut counts {
        *count = atomizer.call::<Counter>(false).await.unwrap();
    }
    counts
}

#[tokio::test]
async fn a_shared_value_is_one_for_all_electrons() {
    let atomizer = builder().atom(Counter::default()).start().await.unwrap();
    assert_eq!(three_counts(&atomizer).await, [1, 2, 3]);
}

#[tokio::test]
async fn each_electron_may_have_a_value_of_its_own() {
    let atomizer = builder().atom_per_electron(Counter::default).start().await.unwrap();
    assert_eq!(three_counts(&atomizer).await, [1, 1, 1]);
}

#[tokio::test]
async fn each_electron_may_begin_with_a_copy() {
    let seventh = Counter { count: Mutex::new(7) };
    let atomizer = builder().atom_copied(seventh).start().await.unwrap();
    assert_eq!(three_counts(&atomizer).await, [8, 8, 8]);
}

#[tokio::test]
async fn a_value_that_a_panic_poisoned_is_made_afresh() {
    let atomizer = builder().atom_from(Counter::default).start().await.unwrap();
    let mut events = atomizer.events();
    assert_eq!(three_counts(&atomizer).await, [1, 2, 3]);
    let Err(CallError::Failed(failure)) = atomizer.call::<Counter>(true).await else {
        panic!("it panics")
    };
    assert_eq!(failure.kind, FailureKind::Panic);
    assert_eq!(atomizer.call::<Counter>(false).await.unwrap(), 1, "it begins anew");
    until(&mut events, |kind| matches!(kind, EventKind::Renewed { .. })).await;
}

#[tokio::test]
async fn a_value_that_cannot_be_made_costs_its_electron_only() {
    let made = Arc::new(AtomicU32::new(0));
    let make = move || {
        // The first is asked for its options, the second does not come about.
        assert_ne!(made.fetch_add(1, Ordering::SeqCst), 1, "cannot be made");
        Counter::default()
    };
    let atomizer = builder().atom_per_electron(make).start().await.unwrap();
    let Err(CallError::Failed(failure)) = atomizer.call::<Counter>(false).await else {
        panic!("it cannot be made")
    };
    assert_eq!(failure.kind, FailureKind::Panic);
    assert_eq!(atomizer.call::<Counter>(false).await.unwrap(), 1);
}
