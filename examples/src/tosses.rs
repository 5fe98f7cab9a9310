//! Estimates of π, as the programs write them, and who tossed what.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use atomizer::{Atom, Context, Options, Result};
use atomizer_atoms::{Batch, Estimate, Hits, Toss};
pub use atomizer_programs::progress::{Scaled, per_second};
use serde_json::json;

/// Chooses a batch so that there are some 2,000 electrons: enough to share among many cores and to lose
/// little when a node dies, few enough that their way there costs next to nothing.
///
/// Fewer than 1,000 tosses are as many electrons. No batch takes much longer than a tenth of a second, so
/// that a node can stop soon.
#[must_use]
pub fn batch_for(tosses: u64) -> u64 {
    const ELECTRONS: u64 = 2_000;
    const BATCH_MAX: u64 = 50_000_000;
    (tosses / ELECTRONS).clamp(1, BATCH_MAX)
}

/// An estimate and how long it took, as one line for machines:
///
/// `pi=3.14159265 error=-0.00000000 tosses=10 electrons=10 seconds=1.000 tosses_per_s=10`
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// The estimate.
    pub estimate: Estimate,
    /// How long it took, from the question to the answer.
    pub took: Duration,
}

impl Report {
    /// Returns how many tosses were done in each second.
    #[must_use]
    pub fn tosses_per_s(&self) -> f64 {
        per_second(self.estimate.tosses, self.took)
    }

    /// Returns how many electrons were done in each second.
    #[must_use]
    pub fn electrons_per_s(&self) -> f64 {
        per_second(self.estimate.electrons, self.took)
    }

    /// Returns the same as a line of JSON.
    #[must_use]
    pub fn json(&self) -> String {
        let Estimate { pi, error, tosses, electrons, inside } = self.estimate;
        json!({
            "pi": pi,
            "error": error,
            "tosses": tosses,
            "inside": inside,
            "electrons": electrons,
            "seconds": self.took.as_secs_f64(),
            "tosses_per_s": self.tosses_per_s().round(),
        })
        .to_string()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Estimate { pi, error, tosses, electrons, .. } = self.estimate;
        write!(
            f,
            "pi={pi:.8} error={error:+.8} tosses={tosses} electrons={electrons} seconds={:.3} \
             tosses_per_s={:.0}",
            self.took.as_secs_f64(),
            self.tosses_per_s(),
        )
    }
}

/// Counts the tosses of a node. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct TossCount(Arc<AtomicU64>);

impl TossCount {
    /// Returns how many tosses this node has done so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Returns [`Toss`], counted: an atom around an atom.
    #[must_use]
    pub fn atom(&self) -> impl Atom<Input = Batch, Output = Hits> + use<> {
        CountedToss { count: self.clone() }
    }
}

struct CountedToss {
    count: TossCount,
}

impl Atom for CountedToss {
    const ID: &'static str = Toss::ID;
    type Input = Batch;
    type Output = Hits;

    fn options(&self) -> Options {
        Toss.options()
    }

    async fn process(&self, cx: &Context, batch: Batch) -> Result<Hits> {
        let hits = Toss.process(cx, batch).await?;
        self.count.0.fetch_add(batch.tosses, Ordering::Relaxed);
        Ok(hits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_a_thousand_electrons() {
        for tosses in [1_u64, 999, 1_000, 1_999, 2_000, 3_999, 4_000, 1_000_000, 5_000_000_000] {
            let electrons = tosses.div_ceil(batch_for(tosses));
            assert!(electrons >= tosses.min(1_000), "{tosses} tosses in {electrons} electrons");
        }
    }

    #[test]
    fn the_line_for_machines_stays_as_it_is() {
        let estimate = Estimate { pi: 3.2, error: -0.25, tosses: 5, inside: 4, electrons: 5 };
        let report = Report { estimate, took: Duration::from_millis(1500) };
        assert_eq!(
            report.to_string(),
            "pi=3.20000000 error=-0.25000000 tosses=5 electrons=5 seconds=1.500 tosses_per_s=3"
        );
    }
}
