//! Delays on the broker's clock: a ladder of queues, one for each bit of a duration in milliseconds.
//!
//! What is to come later is published with its delay in binary before its routing key, one word a bit, most
//! significant first, and walks down the ladder. At each rung the bit decides:
//!
//! ```text
//!              ┌── 1 ──► queue <ns>.delay.k, for 2^k ms ──┐
//!  <ns>.delay.k┤                                          ├─► <ns>.delay.k-1 ─► … ─► <ns>.due ─► its atom
//!              └── 0 ──────────────────────────────────────┘
//! ```
//!
//! All that is in one queue waits equally long, so nothing waits behind what comes later: a time-to-live of each
//! message in one queue would, for the broker looks at the head only. A rung is passed once at the most, so the
//! broker does not take the way for a cycle. The rungs are quorum queues that hand on at least once: what waits
//! survives whatever the broker survives, and its time runs on meanwhile.
//!
//! Handing on at least once has a trap: what has nowhere to go stays, and a few dozens of it block a rung for
//! all. So `<ns>.due` has an alternate exchange: what is due for an atom whose queue was deleted meanwhile goes to
//! the dead letters.
//!
//! Weighed against it: *a queue for each duration*, which is one hop instead of one for each bit that is set, and
//! needs as many queues as there are durations, each of which must not expire while it holds something; and *coarse
//! rungs, with the rest waited out by whoever receives it*, which needs nodes that are there and have room.

use std::{ops::RangeInclusive, time::Duration};

use atomizer::{AtomId, SendError};
use tokio::sync::OnceCell;

use crate::{
    declare::Declarer,
    plan::{Kind, Object},
    topology::{Route, Topology, atom_key, dead_lettering, milliseconds},
};

/// The longest delay.
pub(crate) const DELAY_MAX: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// The rungs by the bit that they stand for: from 32 ms, which is the grain of all delays, to 24.8 days.
const RUNGS: RangeInclusive<u32> = 5..=31;

impl Topology {
    fn rung(&self, bit: u32) -> String {
        self.name(&format!("delay.{bit}"))
    }

    pub(crate) fn due(&self) -> String {
        self.name("due")
    }

    pub(crate) fn lost(&self) -> String {
        self.name("lost")
    }

    /// Where what passes a rung goes next.
    fn below(&self, bit: u32) -> String {
        if bit == *RUNGS.start() { self.due() } else { self.rung(bit - 1) }
    }

    /// Where to publish what an atom is to receive after `delay`, never earlier: rounded up to the grain, and at
    /// most what the ladder can say.
    pub(crate) fn delayed(&self, atom: &AtomId, delay: Duration) -> Route {
        let grain = 1_u128 << RUNGS.start();
        let grains = delay.as_nanos().div_ceil(grain * 1_000_000).max(1);
        let wait = u32::try_from(grains * grain).unwrap_or(u32::MAX);
        let bits = RUNGS.rev().map(|bit| if wait >> bit & 1 == 1 { "1." } else { "0." });
        let key = bits.collect::<String>() + &atom_key(atom);
        // The rungs above the first bit that is set have nothing to say.
        Route { exchange: self.rung(wait.ilog2()).into(), key: key.into() }
    }

    /// Where what was delayed comes out.
    pub(crate) fn where_delays_end(&self) -> [Object; 3] {
        [
            Object::exchange(&self.lost(), Kind::Fanout),
            Object::binding(&self.lost(), &self.dead_queue(), ""),
            Object::exchange_or_else(&self.due(), Kind::Topic, &self.lost()),
        ]
    }

    /// Leads what is due for an atom to its queue.
    pub(crate) fn when_due(&self, atom: &AtomId) -> Object {
        let key = "*.".repeat(RUNGS.count()) + &atom_key(atom);
        Object::binding(&self.due(), &self.atom_queue(atom), &key)
    }

    /// The whole ladder, from the bottom: whatever is on it has somewhere to go.
    pub(crate) fn ladder(&self) -> impl Iterator<Item = Vec<Object>> {
        RUNGS.map(|bit| self.of_rung(bit))
    }

    /// One rung, above those that are there.
    fn of_rung(&self, bit: u32) -> Vec<Object> {
        let (rung, below) = (self.rung(bit), self.below(bit));
        let mut waiting = dead_lettering(&below, None);
        waiting.insert("x-message-ttl".into(), milliseconds(Duration::from_millis(1 << bit)));
        let position = "*.".repeat((RUNGS.end() - bit) as usize);
        vec![
            Object::exact_queue(&rung, waiting),
            Object::exchange(&rung, Kind::Topic),
            Object::binding(&rung, &rung, &format!("{position}1.#")),
            Object::passage(&rung, &below, &format!("{position}0.#")),
        ]
    }
}

/// The ladder as one session has it: made when the first delay is asked for.
#[derive(Debug)]
pub(crate) struct Ladder {
    topology: Topology,
    declarer: Declarer,
    made: OnceCell<()>,
}

impl Ladder {
    pub(crate) fn new(topology: Topology, declarer: Declarer) -> Self {
        Self { topology, declarer, made: OnceCell::new() }
    }

    /// Makes sure that the ladder is there. A session asks the broker once.
    ///
    /// # Errors
    /// As those of a declaration. The next call goes on where this one failed, and so it does when this one is
    /// dropped.
    pub(crate) async fn make(&self) -> Result<(), SendError> {
        let making = async || {
            for rung in self.topology.ladder() {
                let making = self.topology.make_sure(&self.declarer.connection, &rung);
                self.declarer.make(making).await?;
            }
            Ok(())
        };
        self.made.get_or_try_init(making).await.copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATOM: AtomId = AtomId::from_static("mail.send");

    /// How long the ladder keeps what is published there, in milliseconds.
    fn waits(delay: Duration) -> u64 {
        let route = Topology::new("ns").delayed(&ATOM, delay);
        let bits = route.key.as_str().strip_suffix(".atom.mail.send").unwrap();
        let bits = bits.split('.').zip(RUNGS.rev());
        let set: Vec<u32> = bits.filter(|(bit, _)| *bit == "1").map(|(_, rung)| rung).collect();
        assert_eq!(route.exchange.as_str(), format!("ns.delay.{}", set[0]));
        set.into_iter().map(|bit| 1 << bit).sum()
    }

    #[test]
    fn a_delay_is_rounded_up_to_the_grain() {
        let milliseconds = Duration::from_millis;
        for (delay, expected) in [(0, 32), (1, 32), (32, 32), (33, 64), (50, 64), (90_000, 90_016)]
        {
            assert_eq!(waits(milliseconds(delay)), expected, "{delay} ms");
        }
        assert_eq!(waits(milliseconds(64) + Duration::from_nanos(1)), 96);
        assert_eq!(waits(DELAY_MAX), 2_592_000_000);
        assert_eq!(waits(Duration::MAX), u64::from(u32::MAX) - 31);
    }

    #[test]
    fn the_longest_names_fit_in_a_routing_key() {
        let atom = AtomId::try_new("a".repeat(128)).unwrap();
        let route = Topology::new("ns").delayed(&atom, DELAY_MAX);
        assert!(route.key.as_str().len() <= 255);
    }
}
