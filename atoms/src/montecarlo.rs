//! Estimates π: the share of random points in the unit square that lie within the unit circle is π/4.

use std::{f64::consts::PI, fmt};

use atomizer::{Atom, Context, Kind, Options, Result};
use rand_pcg::{Pcg64, rand_core::Rng};
use serde::{Deserialize, Serialize};

/// Estimates π from as many tosses as are asked for, by way of [`Toss`].
///
/// The same request gives the same estimate, wherever its batches run and in whatever order.
#[derive(Default)]
pub struct MonteCarlo {
    on_progress: Option<OnProgress>,
}

type OnProgress = Box<dyn Fn(&Progress) + Send + Sync>;

impl MonteCarlo {
    /// Makes one that tells of each batch that is answered, wherever it ran.
    ///
    /// It tells of all requests that run on this node, those of others included: [`Progress::request`] says
    /// which one it is. `tell` is called between two answers and must not block.
    #[must_use]
    pub fn with_progress(tell: impl Fn(&Progress) + Send + Sync + 'static) -> Self {
        Self { on_progress: Some(Box::new(tell)) }
    }
}

impl Atom for MonteCarlo {
    const ID: &'static str = "montecarlo";
    const KIND: Kind = Kind::Spawner;
    type Input = Request;
    type Output = Estimate;

    async fn process(&self, cx: &Context, request: Request) -> Result<Estimate> {
        request.check()?;
        let found = cx
            .fan_out::<Toss>(request.batches())
            .fold(Progress::new(request), |mut progress, hits| {
                progress.add(hits);
                if let Some(tell) = &self.on_progress {
                    tell(&progress);
                }
                progress
            })
            .await?;
        Ok(Estimate::new(request.tosses, found.inside, found.electrons))
    }
}

impl fmt::Debug for MonteCarlo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MonteCarlo").finish_non_exhaustive()
    }
}

/// Tosses one batch of points and counts those inside the circle.
///
/// It computes from its beginning to its end, on threads for that.
#[derive(Clone, Copy, Debug, Default)]
pub struct Toss;

impl Atom for Toss {
    const ID: &'static str = "montecarlo.toss";
    type Input = Batch;
    type Output = Hits;

    fn options(&self) -> Options {
        Options::default().blocking()
    }

    async fn process(&self, _cx: &Context, batch: Batch) -> Result<Hits> {
        Ok(Hits { inside: toss(&batch) })
    }
}

/// Asks for an estimate of π.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// How many points are tossed in all; at least 1.
    pub tosses: u64,
    /// How many points one electron tosses; at least 1. The last may toss fewer.
    pub batch: u64,
    /// Chooses the points.
    pub seed: u64,
}

impl Request {
    /// Makes a request.
    ///
    /// # Errors
    /// [`InvalidRequest`] when there is nothing to toss.
    pub fn new(tosses: u64, batch: u64, seed: u64) -> Result<Self, InvalidRequest> {
        let request = Self { tosses, batch, seed };
        request.check().map(|()| request)
    }

    /// Says whether it can be met. The fields are public, and what came over the wire may be anything.
    ///
    /// # Errors
    /// [`InvalidRequest`] when there is nothing to toss.
    pub fn check(&self) -> Result<(), InvalidRequest> {
        match (self.tosses, self.batch) {
            (0, _) => Err(InvalidRequest::NoTosses),
            (_, 0) => Err(InvalidRequest::EmptyBatches),
            _ => Ok(()),
        }
    }

    /// Divides the tosses into batches, each with a stream of its own. An invalid request has none.
    pub fn batches(self) -> impl Iterator<Item = Batch> + Send + use<> {
        let Self { tosses, batch, seed } = self;
        let count = if batch == 0 { 0 } else { tosses.div_ceil(batch) };
        (0..count).map(move |stream| {
            let left = tosses - stream * batch;
            Batch { tosses: left.min(batch), seed, stream }
        })
    }
}

/// Says why a request cannot be met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidRequest {
    /// No estimate comes of no tosses.
    #[error("tosses must be at least 1")]
    NoTosses,
    /// Electrons that toss nothing would never be done.
    #[error("batch must be at least 1")]
    EmptyBatches,
}

/// An estimate of π and what it cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The estimate.
    pub pi: f64,
    /// How much it is above π; negative when it is below.
    pub error: f64,
    /// How many points were tossed.
    pub tosses: u64,
    /// How many of them lie inside the circle.
    pub inside: u64,
    /// How many electrons tossed them.
    pub electrons: u64,
}

impl Estimate {
    fn new(tosses: u64, inside: u64, electrons: u64) -> Self {
        let pi = 4.0 * inside as f64 / tosses as f64;
        Self { pi, error: pi - PI, tosses, inside, electrons }
    }
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Which request.
    pub request: Request,
    /// How many points are tossed, to within one batch.
    pub tosses: u64,
    /// How many of them lie inside the circle.
    pub inside: u64,
    /// How many electrons are answered.
    pub electrons: u64,
}

impl Progress {
    fn new(request: Request) -> Self {
        Self { request, tosses: 0, inside: 0, electrons: 0 }
    }

    fn add(&mut self, hits: Hits) {
        // Which batch this was is not known; only the last can be smaller than the others.
        self.tosses = self.request.tosses.min(self.tosses.saturating_add(self.request.batch));
        self.inside += hits.inside;
        self.electrons += 1;
    }
}

/// Asks for one batch of tosses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// How many points to toss.
    pub tosses: u64,
    /// The seed of the request.
    pub seed: u64,
    /// Which of the generator's streams to take the points from.
    pub stream: u64,
}

/// What came of one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hits {
    /// How many points lie inside the circle.
    pub inside: u64,
}

/// Tosses the points of a batch and counts those inside the circle.
///
/// One draw of 64 bits is a point: 31 bits each for x and y, taken as the middle of their cell in a grid of
/// 2³¹ by 2³¹ over the unit square. The test is exact, in integers, and the share of the grid's cells that
/// count as inside differs from π/4 by less than 10⁻¹²: less than any number of tosses could tell.
#[must_use]
pub fn toss(batch: &Batch) -> u64 {
    let mut points = Pcg64::new(state(batch.seed, batch.stream), u128::from(batch.stream));
    let mut inside = 0;
    for _ in 0..batch.tosses {
        inside += u64::from(is_inside(points.next_u64()));
    }
    inside
}

const COORDINATE_BITS: u32 = 31;

/// With the middles of cells, (x + ½)² + (y + ½)² ≤ r² becomes x(x + 1) + y(y + 1) + ½ ≤ r².
fn is_inside(point: u64) -> bool {
    const RADIUS_SQUARED: u64 = 1 << (2 * COORDINATE_BITS);
    // The high bits, in which the generator is best.
    let x = point >> (u64::BITS - COORDINATE_BITS);
    let y = (point >> (u64::BITS - 2 * COORDINATE_BITS)) & ((1 << COORDINATE_BITS) - 1);
    x * (x + 1) + y * (y + 1) < RADIUS_SQUARED
}

/// Chooses where a stream begins.
///
/// Streams that begin in the same state are related to each other step by step, for they differ in what each
/// step adds only. So every stream begins somewhere else.
fn state(seed: u64, stream: u64) -> u128 {
    let high = mixed(mixed(seed) ^ stream);
    let low = mixed(high);
    (u128::from(high) << 64) | u128::from(low)
}

/// One step of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
fn mixed(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests;
