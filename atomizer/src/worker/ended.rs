//! What came of children that ended here a short while ago.
//!
//! When the node of a parent is lost, the parent begins anew elsewhere and asks the same children. What still runs is
//! adopted; what has ended is answered from here, if nobody on this node was told of it before.

use std::{
    collections::VecDeque,
    hash::{BuildHasher as _, RandomState},
};

use rustc_hash::FxHashMap;

use crate::{Electron, ElectronId, Payload};

/// How many outputs are kept: as many as a fan-out has children in flight unless told otherwise.
const OUTPUTS_MAX: usize = 1024;
/// How many bytes they may have together.
const BYTES_MAX: usize = 1024 * 1024;
/// A larger one would push out many.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;

/// The last outputs of children whose parents run on other nodes.
#[derive(Debug, Default)]
pub(super) struct Ended {
    outputs: FxHashMap<ElectronId, (u64, Payload)>,
    /// In the order in which they are forgotten.
    order: VecDeque<ElectronId>,
    bytes: usize,
    hasher: RandomState,
}

impl Ended {
    pub(super) fn remember(&mut self, electron: &Electron, output: &Payload) {
        if output.body.len() > OUTPUT_BYTES_MAX {
            return;
        }
        let asked = self.hasher.hash_one(&electron.payload.body);
        self.bytes += output.body.len();
        match self.outputs.insert(electron.id, (asked, output.clone())) {
            Some((_, before)) => self.bytes -= before.body.len(),
            None => self.order.push_back(electron.id),
        }
        while self.order.len() > OUTPUTS_MAX || self.bytes > BYTES_MAX {
            let oldest = self.order.pop_front().and_then(|id| self.outputs.remove(&id));
            self.bytes -= oldest.map_or(0, |(_, output)| output.body.len());
        }
    }

    /// Returns the output, if the same was asked.
    pub(super) fn output(&self, electron: &Electron) -> Option<Payload> {
        let (asked, output) = self.outputs.get(&electron.id)?;
        (*asked == self.hasher.hash_one(&electron.payload.body)).then(|| output.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AtomId;

    fn child(index: u64, input: &str) -> Electron {
        let parent: ElectronId = "01932c07-e8f1-7a3b-9c4d-5e6f70819203".parse().unwrap();
        Electron::with_id(
            parent.child(index),
            AtomId::from_static("child"),
            Payload::json(input.to_owned()),
        )
    }

    #[test]
    fn only_the_same_question_has_the_same_answer() {
        let mut ended = Ended::default();
        ended.remember(&child(0, "1"), &Payload::json("2"));
        assert_eq!(ended.output(&child(0, "1")), Some(Payload::json("2")));
        assert_eq!(ended.output(&child(0, "7")), None);
        assert_eq!(ended.output(&child(1, "1")), None);
    }

    #[test]
    fn what_is_kept_is_bounded_in_number_and_bytes() {
        let mut ended = Ended::default();
        for index in 0..=OUTPUTS_MAX as u64 {
            ended.remember(&child(index, "1"), &Payload::json("2"));
            ended.remember(&child(index, "1"), &Payload::json("3"));
        }
        assert_eq!(ended.output(&child(0, "1")), None, "the oldest makes room");
        assert_eq!(ended.output(&child(1, "1")), Some(Payload::json("3")));
        assert_eq!(ended.bytes, OUTPUTS_MAX);
        let large = Payload::bytes(vec![0; OUTPUT_BYTES_MAX]);
        for index in 0..20 {
            ended.remember(&child(5000 + index, "1"), &large);
        }
        assert!(ended.bytes <= BYTES_MAX);
        assert_eq!(ended.outputs.len(), ended.order.len());
        assert_eq!(ended.output(&child(5019, "1")).as_ref(), Some(&large));
        let larger = Payload::bytes(vec![0; OUTPUT_BYTES_MAX + 1]);
        ended.remember(&child(9000, "1"), &larger);
        assert_eq!(ended.output(&child(9000, "1")), None);
    }
}
