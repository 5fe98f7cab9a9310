//! The only place where bytes become types and types become bytes.

use std::{cell::Cell, mem};

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::{Atom, AtomError, AtomId, Context, Kind, Options, Payload, RawAtom, Result};

impl<A: Atom> RawAtom for A {
    fn id(&self) -> AtomId {
        AtomId::of::<A>()
    }

    fn kind(&self) -> Kind {
        A::KIND
    }

    fn options(&self) -> Options {
        Atom::options(self)
    }

    async fn run(&self, cx: &Context, payload: &Payload) -> Result<Payload> {
        let input = decode(payload).map_err(AtomError::undecodable)?;
        let output = self.process(cx, input).await?;
        Ok(encode(&output)?)
    }
}

pub(crate) fn decode<T: DeserializeOwned>(payload: &Payload) -> Result<T, serde_json::Error> {
    serde_json::from_slice(&payload.body)
}

/// Longer payloads are not worth a copy.
const SCRATCH_BYTES_MAX: usize = 4096;

thread_local! {
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Small payloads are written to a buffer that is used again, and copied to where they fit exactly: one
/// allocation in place of several, which is much of what a small electron costs.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Payload, serde_json::Error> {
    let mut buffer = SCRATCH.take();
    buffer.clear();
    serde_json::to_writer(&mut buffer, value)?;
    if buffer.len() > SCRATCH_BYTES_MAX {
        return Ok(Payload::json(mem::take(&mut buffer)));
    }
    let payload = Payload::json(Bytes::copy_from_slice(&buffer));
    SCRATCH.set(buffer);
    Ok(payload)
}
