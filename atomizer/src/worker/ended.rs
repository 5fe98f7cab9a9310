//! What came of children that ended here a short while ago.
//!
//! When the node of a parent is lost, the parent begins anew elsewhere and asks the same children. What still runs is
//! adopted; what has ended is answered from here. A parent that failed, and tries again, is not: it may want to know anew.

use std::{
    collections::VecDeque,
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

use bytes::Bytes;
use rustc_hash::FxHashMap;
use tokio::time::Instant;

use crate::{Electron, ElectronId, Payload};

/// How long an output is kept: a broker notices that a node is lost within seconds, and a minute where it has to wait for
/// heartbeats.
const AGE_MAX: Duration = Duration::from_secs(2 * 60);

/// How many outputs are kept: as many as a fan-out has children in flight unless told otherwise.
const OUTPUTS_MAX: usize = 1024;
/// How many bytes they may have together.
const BYTES_MAX: usize = 1024 * 1024;
/// A larger output would push out many, and a larger input takes long to tell from others.
const PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// The last outputs of children whose parents run on other nodes.
#[derive(Debug, Default)]
pub(super) struct Ended {
    outputs: FxHashMap<ElectronId, Output>,
    /// In the order in which they are forgotten.
    order: VecDeque<ElectronId>,
    bytes: usize,
    hasher: RandomState,
}

#[derive(Debug)]
struct Output {
    payload: Payload,
    /// The hash of what was asked.
    asked: u64,
    at: Instant,
}

impl Ended {
    pub(super) fn remember(&mut self, electron: &Electron, output: &Payload) {
        let bytes = output.body.len();
        if bytes.max(electron.payload.body.len()) > PAYLOAD_BYTES_MAX {
            return;
        }
        // A copy: it may be a part of something large.
        let payload = Payload { body: Bytes::copy_from_slice(&output.body), ..output.clone() };
        let output = Output { payload, asked: self.hash(electron), at: Instant::now() };
        self.bytes += bytes;
        match self.outputs.insert(electron.id, output) {
            Some(before) => self.bytes -= before.payload.body.len(),
            None => self.order.push_back(electron.id),
        }
        while self.order.len() > OUTPUTS_MAX || self.bytes > BYTES_MAX {
            let oldest = self.order.pop_front().and_then(|id| self.outputs.remove(&id));
            self.bytes -= oldest.map_or(0, |output| output.payload.body.len());
        }
    }

    /// Returns the output for a later life of the parent, if the same was asked in the same try a short while ago.
    pub(super) fn output(&self, electron: &Electron) -> Option<Payload> {
        if electron.parent.is_none_or(|parent| parent.lives == 0) {
            return None;
        }
        let Output { payload, asked, at } = self.outputs.get(&electron.id)?;
        (at.elapsed() <= AGE_MAX && *asked == self.hash(electron)).then(|| payload.clone())
    }

    fn hash(&self, electron: &Electron) -> u64 {
        let Payload { content_type, body } = &electron.payload;
        let tries = electron.parent.map(|parent| parent.tries);
        self.hasher.hash_one((tries, content_type.as_str(), body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AtomId, Parent};

    fn child(index: u64, input: &str) -> Electron {
        let parent: ElectronId = "01932c07-e8f1-7a3b-9c4d-5e6f70819203".parse().unwrap();
        let atom = AtomId::from_static("child");
        let mut child =
            Electron::with_id(parent.child(index), atom, Payload::json(input.to_owned()));
        child.parent = Some(Parent::new(parent, index).lives(1));
        child
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_same_question_has_the_same_answer() {
        let mut ended = Ended::default();
        ended.remember(&child(0, "1"), &Payload::json("2"));
        assert_eq!(ended.output(&child(0, "1")), Some(Payload::json("2")));
        assert_eq!(ended.output(&child(0, "7")), None);
        assert_eq!(ended.output(&child(1, "1")), None);
        let mut next_try = child(0, "1");
        next_try.parent = next_try.parent.map(|parent| parent.tries(1));
        assert_eq!(ended.output(&next_try), None, "it wants to know anew");
        let mut first_life = child(0, "1");
        first_life.parent = first_life.parent.map(|parent| parent.lives(0));
        assert_eq!(
            ended.output(&first_life),
            None,
            "as one that is sent back, or whose parent tries again"
        );
        tokio::time::advance(AGE_MAX + Duration::from_millis(1)).await;
        assert_eq!(ended.output(&child(0, "1")), None, "too long ago");
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
        let large = Payload::bytes(vec![0; PAYLOAD_BYTES_MAX]);
        for index in 0..20 {
            ended.remember(&child(5000 + index, "1"), &large);
        }
        assert!(ended.bytes <= BYTES_MAX);
        assert_eq!(ended.outputs.len(), ended.order.len());
        assert_eq!(ended.output(&child(5019, "1")).as_ref(), Some(&large));
        let larger = Payload::bytes(vec![0; PAYLOAD_BYTES_MAX + 1]);
        ended.remember(&child(9000, "1"), &larger);
        assert_eq!(ended.output(&child(9000, "1")), None);
    }
}
