//! When what goes wrong, and how often it has.

use std::{
    collections::VecDeque,
    fmt,
    future::pending,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use atomizer::SessionError;
use tokio::sync::watch;

use super::{Fault, Op, life::Life};

/// Tells a [`Faulty`](super::Faulty) conductor how to misbehave, and what has come of it.
///
/// Each [`Op`] has a script, from which each call takes a step, whichever session it is of: what
/// [`next`](Self::next), [`times`](Self::times) and [`pass`](Self::pass) add is gone through in that order.
/// When it is at its end, what is said by [`always`](Self::always) goes on; and where nothing is, chance
/// decides, if [`random`](Self::random) has been called. A call takes its step when it is first polled, also
/// if it is dropped later.
#[derive(Clone, Default)]
pub struct Faults {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    script: Mutex<Script>,
    /// How often each operation was called, and how often a fault bit it.
    counts: watch::Sender<[Counts; Op::ALL.len()]>,
    /// How often what hangs was released.
    released: watch::Sender<u64>,
    sessions: Mutex<Vec<Weak<Life>>>,
}

#[derive(Clone, Copy, Default)]
struct Counts {
    calls: u64,
    bites: u64,
}

#[derive(Default)]
struct Script {
    lines: [Lines; Op::ALL.len()],
    random: Option<Random>,
}

/// The script of one operation.
#[derive(Default)]
struct Lines {
    /// What the next calls do, and how many of them; `None` is to behave.
    steps: VecDeque<(Option<Fault>, u64)>,
    always: Option<Fault>,
}

struct Random {
    numbers: SplitMix64,
    rate_percent: u8,
    ops: Vec<Op>,
    faults: Vec<Fault>,
}

impl Faults {
    /// Has the next call of an operation misbehave; after those that were told before.
    ///
    /// # Panics
    /// When the fault does not [fit](Fault::fits) the operation.
    pub fn next(&self, op: Op, fault: Fault) {
        self.times(op, fault, 1);
    }

    /// Has the next so many calls of an operation misbehave; after those that were told before.
    ///
    /// # Panics
    /// When the fault does not [fit](Fault::fits) the operation.
    pub fn times(&self, op: Op, fault: Fault, times: u64) {
        check(op, fault);
        self.add(op, Some(fault), times);
    }

    /// Has the next so many calls of an operation behave; after those that were told before.
    pub fn pass(&self, op: Op, times: u64) {
        self.add(op, None, times);
    }

    /// Has each call of an operation misbehave from the end of its script on.
    ///
    /// # Panics
    /// When the fault does not [fit](Fault::fits) the operation.
    pub fn always(&self, op: Op, fault: Fault) {
        check(op, fault);
        self.script().lines[op as usize].always = Some(fault);
    }

    /// Has calls of these operations misbehave by chance, in one of those ways that [fit](Fault::fits), from
    /// the end of their scripts on.
    ///
    /// The same seed gives the same numbers. Which call gets which depends on the order of the calls as well,
    /// so that only what runs on one thread runs again as it did. The `Debug` form shows the seed.
    pub fn random(
        &self,
        seed: u64,
        rate_percent: u8,
        ops: impl IntoIterator<Item = Op>,
        faults: impl IntoIterator<Item = Fault>,
    ) {
        self.script().random = Some(Random {
            numbers: SplitMix64 { seed, state: seed },
            rate_percent,
            ops: ops.into_iter().collect(),
            faults: faults.into_iter().collect(),
        });
    }

    /// Takes back all that was told, and releases what hangs.
    pub fn clear(&self) {
        *self.script() = Script::default();
        self.release();
    }

    /// Lets all calls that hang go on.
    pub fn release(&self) {
        self.shared.released.send_modify(|times| *times += 1);
    }

    /// Ends all open sessions by a fault, as a connection that is lost would. Returns how many there were.
    ///
    /// The sessions beneath are dropped: what they held is delivered again, the inbox of their node stays.
    /// Calls that are under way end with errors; those that hang go on hanging.
    pub fn end_sessions(&self, reason: impl fmt::Display) -> usize {
        let sessions = std::mem::take(&mut *self.sessions());
        let error = SessionError::lost(reason);
        sessions.iter().filter_map(Weak::upgrade).filter(|life| life.end(&error)).count()
    }

    /// Returns how often an operation was called.
    #[must_use]
    pub fn calls(&self, op: Op) -> u64 {
        self.shared.counts.borrow()[op as usize].calls
    }

    /// Returns how often a fault has bitten: how many calls of an operation misbehaved.
    #[must_use]
    pub fn count(&self, op: Op) -> u64 {
        self.shared.counts.borrow()[op as usize].bites
    }

    /// Waits until a fault has bitten an operation, now or at any time before.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn bitten(&self, op: Op) {
        self.bitten_times(op, 1).await;
    }

    /// Waits until faults have bitten an operation so often, counted from the beginning.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn bitten_times(&self, op: Op, times: u64) {
        let mut counts = self.shared.counts.subscribe();
        // The sender is in here, so that there is no error.
        drop(counts.wait_for(|counts| counts[op as usize].bites >= times).await);
    }

    /// Takes the step of a call that begins. Returns what is still to be done of it.
    pub(super) async fn before(&self, op: Op) -> Option<Fault> {
        let fault = self.step(op)?;
        if fault.is_after() {
            return Some(fault);
        }
        match fault {
            Fault::Hang => self.hang(op).await,
            Fault::Delay(delay) => {
                self.bite(op);
                tokio::time::sleep(delay).await;
            }
            Fault::Panic => self.panic(op),
            fault => {
                self.bite(op);
                return Some(fault);
            }
        }
        None
    }

    /// Takes the step of a call that does not wait.
    pub(super) fn now(&self, op: Op) {
        if self.step(op).is_some() {
            self.panic(op);
        }
    }

    /// Does what is left of a fault once the call is carried out. Returns whether the call is to err.
    pub(super) async fn after(&self, op: Op, fault: Option<Fault>) -> bool {
        match fault {
            Some(Fault::HangAfter) => self.hang(op).await,
            Some(Fault::PanicAfter) => self.panic(op),
            Some(Fault::ErrorAfter) => {
                self.bite(op);
                return true;
            }
            _ => {}
        }
        false
    }

    pub(super) fn add_session(&self, life: &Arc<Life>) {
        let mut sessions = self.sessions();
        sessions.retain(|session| session.strong_count() > 0);
        sessions.push(Arc::downgrade(life));
    }

    async fn hang(&self, op: Op) {
        // First this: who saw the bite may release at once.
        let mut released = self.shared.released.subscribe();
        self.bite(op);
        if released.changed().await.is_err() {
            pending().await
        }
    }

    fn panic(&self, op: Op) -> ! {
        self.bite(op);
        panic!("{op:?} panics {}", super::ON_PURPOSE);
    }

    fn step(&self, op: Op) -> Option<Fault> {
        self.shared.counts.send_modify(|counts| counts[op as usize].calls += 1);
        self.script().step(op)
    }

    fn bite(&self, op: Op) {
        self.shared.counts.send_modify(|counts| counts[op as usize].bites += 1);
    }

    fn add(&self, op: Op, fault: Option<Fault>, times: u64) {
        if times > 0 {
            self.script().lines[op as usize].steps.push_back((fault, times));
        }
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.shared.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sessions(&self) -> MutexGuard<'_, Vec<Weak<Life>>> {
        self.shared.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seed = self.script().random.as_ref().map(|random| random.numbers.seed);
        let bites = |op: &Op| (*op, self.count(*op));
        let bitten: Vec<_> = Op::ALL.iter().map(bites).filter(|(_, bites)| *bites > 0).collect();
        f.debug_struct("Faults").field("seed", &seed).field("bitten", &bitten).finish()
    }
}

fn check(op: Op, fault: Fault) {
    assert!(fault.fits(op), "{op:?} cannot misbehave by {fault:?}");
}

impl Script {
    fn step(&mut self, op: Op) -> Option<Fault> {
        let lines = &mut self.lines[op as usize];
        if let Some((fault, left)) = lines.steps.front_mut() {
            let fault = *fault;
            *left -= 1;
            if *left == 0 {
                lines.steps.pop_front();
            }
            return fault;
        }
        lines.always.or_else(|| self.random.as_mut()?.draw(op))
    }
}

impl Random {
    fn draw(&mut self, op: Op) -> Option<Fault> {
        let fitting: Vec<_> = self.faults.iter().filter(|fault| fault.fits(op)).collect();
        if !self.ops.contains(&op) || fitting.is_empty() {
            return None;
        }
        let bites = self.numbers.below(100) < u64::from(self.rate_percent);
        bites.then(|| *fitting[self.numbers.below(fitting.len() as u64) as usize])
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014): more than good enough to choose faults.
struct SplitMix64 {
    seed: u64,
    state: u64,
}

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

#[cfg(test)]
mod tests {
    use super::SplitMix64;

    #[test]
    fn the_numbers_are_those_of_splitmix64() {
        let mut numbers = SplitMix64 { seed: 1_234_567, state: 1_234_567 };
        let first = [numbers.next(), numbers.next()];
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }
}
