//! When a broker that takes nothing is left for another.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use atomizer::Address;
use tokio::time::Instant;

/// How many messages the broker may decline in a row before the next session is tried, on another node if there
/// is one: for ten seconds and more after the leader of a queue was killed, a node may decline everything that is
/// for it (seen with 3.10.8).
pub(crate) const DECLINED_MAX: u32 = 20;
/// How long a session is kept at the least when the last was given up because the broker took nothing: twice as long
/// each time. A slow disk confirms late, and no other session would do better.
const KEPT_MIN: Duration = Duration::from_secs(2);
const KEPT_MAX: Duration = Duration::from_secs(30);

/// When a session was last given up because the broker took nothing, and how long to keep what followed; shared by
/// all sessions of a conductor.
#[derive(Clone, Debug, Default)]
pub(crate) struct Moves(Arc<Mutex<Option<(Instant, Duration)>>>);

impl Moves {
    /// True when the session may be given up: it was kept long enough.
    pub(crate) fn may(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let keep = match *last {
            Some((moved, keep)) if moved.elapsed() < keep => return false,
            // One that fared well for longer met a fault of its own.
            Some((moved, keep)) if moved.elapsed() < 4 * keep => (2 * keep).min(KEPT_MAX),
            _ => KEPT_MIN,
        };
        *last = Some((Instant::now(), keep));
        true
    }
}

/// How a session fares with what it publishes.
///
/// A queue that is full declines, too, and no other session would do better. So one that has had messages taken is
/// given up only when the broker declines what is for different addresses.
#[derive(Debug)]
pub(crate) struct Declines {
    in_a_row: u32,
    /// For whom the first of them was.
    first: Option<Address>,
    /// Whether another was for somebody else.
    several: bool,
    moves: Moves,
}

impl Declines {
    pub(crate) fn new(moves: Moves) -> Self {
        Self { in_a_row: 0, first: None, several: false, moves }
    }

    pub(crate) fn taken(&mut self) {
        if self.in_a_row > 0 {
            (self.in_a_row, self.first, self.several) = (0, None, false);
        }
    }

    /// Notes that the broker declined one. True when the session is to be given up for it. `proven` tells whether it
    /// has ever had a message taken.
    pub(crate) fn declined(&mut self, to: &Address, proven: bool) -> bool {
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.several |= self.first.get_or_insert_with(|| to.clone()) != to;
        self.in_a_row >= DECLINED_MAX && (self.several || !proven) && self.moves.may()
    }
}

#[cfg(test)]
mod tests {
    use atomizer::AtomId;
    use tokio::time::advance;

    use super::*;

    static QUEUE: Address = Address::Atom(AtomId::from_static("declining"));
    static OTHER: Address = Address::Atom(AtomId::from_static("other"));

    /// How often the session is given up when so many are declined in a row, before anything was taken.
    fn unproven(declines: &mut Declines, count: u32) -> usize {
        (0..count).filter(|_| declines.declined(&QUEUE, false)).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_is_given_up_when_many_are_declined_in_a_row_but_not_one_after_the_other() {
        let moves = Moves::default();
        let mut first = Declines::new(moves.clone());
        for _ in 0..10 {
            assert_eq!(unproven(&mut first, DECLINED_MAX - 1), 0);
            first.taken();
        }
        assert_eq!(unproven(&mut first, DECLINED_MAX), 1);
        let mut second = Declines::new(moves);
        assert_eq!(unproven(&mut second, 1000), 0, "it is kept for a while");
        advance(KEPT_MIN).await;
        assert_eq!(unproven(&mut second, 1), 1);
        let mut given_up = 0;
        for _ in 0..600 {
            advance(Duration::from_secs(1)).await;
            given_up += unproven(&mut second, 1);
        }
        assert!((20..=24).contains(&given_up), "each is kept longer, up to a bound: {given_up}");
        advance(4 * KEPT_MAX).await;
        assert_eq!(unproven(&mut second, 1), 1);
        advance(KEPT_MIN).await;
        assert_eq!(unproven(&mut second, 1), 1, "that is forgotten after a while");
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_queue_costs_no_session_that_has_had_messages_taken() {
        let mut declines = Declines::new(Moves::default());
        assert!((0..10_000).all(|_| !declines.declined(&QUEUE, true)));
        assert!(declines.declined(&OTHER, true), "the broker takes nothing at all");
        advance(KEPT_MAX).await;
        declines.taken();
        let given_up =
            |number| declines.declined(if number % 2 == 0 { &QUEUE } else { &OTHER }, true);
        assert_eq!((1..=2 * DECLINED_MAX).map(given_up).position(|given_up| given_up), Some(19));
    }
}
