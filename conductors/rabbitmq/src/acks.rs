//! Which deliveries of one channel to acknowledge, and how: in groups where that is right.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// The delivery tags of one channel: they count up from 1 (AMQP 0-9-1, `basic.deliver`).
///
/// `multiple` acknowledges *everything* on the channel up to a tag, so a group must not reach across a
/// delivery that is still out. Above such a hole each is acknowledged by itself.
#[derive(Debug, Default)]
pub(crate) struct Acks {
    /// What is off our hands, or about to be: the last tag of each unbroken run by its first. Between two runs
    /// something is out, so the window bounds how many there are.
    gone: BTreeMap<u64, u64>,
    /// Those of them that the broker has not been told of.
    untold: BTreeSet<u64>,
    /// How many are gone.
    count: Arc<AtomicU64>,
}

/// One `basic.ack`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ack {
    pub(crate) tag: u64,
    pub(crate) multiple: bool,
}

impl Acks {
    /// Makes one that counts what is gone where others can see it.
    pub(crate) fn counting(count: Arc<AtomicU64>) -> Self {
        Self { count, ..Self::default() }
    }

    /// Notes that a delivery is to be acknowledged.
    pub(crate) fn acknowledge(&mut self, tag: u64) {
        self.returned(tag);
        self.untold.insert(tag);
    }

    /// Notes that a delivery went back to the broker by other means.
    pub(crate) fn returned(&mut self, tag: u64) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.not_ours(tag);
    }

    /// Notes a tag that the consumer was not brought.
    pub(crate) fn not_ours(&mut self, tag: u64) {
        let last = self.gone.remove(&(tag + 1)).unwrap_or(tag);
        match self.gone.range_mut(..tag).next_back() {
            Some((_, before)) if *before + 1 == tag => *before = last,
            _ => drop(self.gone.insert(tag, last)),
        }
    }

    /// Takes all that is to be sent, in order.
    pub(crate) fn take(&mut self) -> Vec<Ack> {
        self.take_group().into_iter().chain(self.take_singles()).collect()
    }

    /// Takes what lies below the first hole: one acknowledgement for all of it.
    pub(crate) fn take_group(&mut self) -> Option<Ack> {
        let floor = self.gone.get(&1).copied().unwrap_or(0);
        let above = self.untold.split_off(&(floor + 1));
        let below = std::mem::replace(&mut self.untold, above);
        // The last that the broker still counts as out: a group must end at one it knows.
        below.last().map(|&tag| Ack { tag, multiple: below.len() > 1 })
    }

    /// Takes what is left, one by one, in order.
    pub(crate) fn take_singles(&mut self) -> impl Iterator<Item = Ack> + use<> {
        let singles = std::mem::take(&mut self.untold);
        singles.into_iter().map(|tag| Ack { tag, multiple: false })
    }

    /// How many the broker has not been told of.
    pub(crate) fn untold(&self) -> usize {
        self.untold.len()
    }

    /// Whether the broker has been told of one that is to be acknowledged.
    pub(crate) fn is_told(&self, tag: u64) -> bool {
        !self.untold.contains(&tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(tag: u64, multiple: bool) -> Ack {
        Ack { tag, multiple }
    }

    #[test]
    fn what_is_done_in_a_row_is_one_group() {
        let mut acks = Acks::default();
        [2, 1, 3].into_iter().for_each(|tag| acks.acknowledge(tag));
        assert_eq!(acks.take(), [ack(3, true)]);
        assert_eq!(acks.take(), []);
    }

    #[test]
    fn no_group_reaches_across_a_hole() {
        let mut acks = Acks::default();
        [1, 3, 4].into_iter().for_each(|tag| acks.acknowledge(tag));
        assert_eq!(acks.take(), [ack(1, false), ack(3, false), ack(4, false)]);
        acks.acknowledge(5);
        acks.acknowledge(2);
        // 3 and 4 are acknowledged already; a group that ends at 5 covers 2 and 5.
        assert_eq!(acks.take(), [ack(5, true)]);
    }

    #[test]
    fn a_group_ends_at_a_tag_that_the_broker_still_knows() {
        let mut acks = Acks::default();
        acks.acknowledge(1);
        acks.returned(2);
        assert_eq!(acks.take(), [ack(1, false)]);
        acks.acknowledge(4);
        assert_eq!(acks.take(), [ack(4, false)]);
        acks.acknowledge(3);
        assert_eq!(
            acks.take(),
            [ack(3, false)],
            "4 was acknowledged before, and is not named again"
        );
    }

    #[test]
    fn what_waits_above_a_hole_joins_the_group_when_it_closes() {
        let mut acks = Acks::default();
        [1, 3, 4].into_iter().for_each(|tag| acks.acknowledge(tag));
        assert_eq!(acks.take_group(), Some(ack(1, false)));
        assert_eq!((acks.untold(), acks.is_told(1), acks.is_told(3)), (2, true, false));
        assert_eq!(acks.take_group(), None);
        acks.acknowledge(2);
        assert_eq!(acks.take_group(), Some(ack(4, true)));
        assert_eq!(acks.untold(), 0);
    }

    #[test]
    fn a_tag_that_is_not_ours_is_no_hole_and_does_not_count() {
        let mut acks = Acks::default();
        acks.acknowledge(1);
        acks.not_ours(2);
        acks.acknowledge(3);
        assert_eq!(acks.take(), [ack(3, true)]);
        assert_eq!(acks.count.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn one_delivery_that_stays_out_costs_no_memory() {
        let mut acks = Acks::default();
        for tag in 2..10_000 {
            acks.acknowledge(tag);
            assert_eq!(acks.take(), [ack(tag, false)]);
        }
        assert_eq!(acks.gone.len(), 1);
        acks.acknowledge(1);
        assert_eq!(acks.take(), [ack(1, false)]);
    }
}
