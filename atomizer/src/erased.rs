//! The only place where bytes become types and types become bytes.

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::{Atom, AtomError, AtomId, Context, Kind, Options, Payload, RawAtom, Result};

#[async_trait]
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

    async fn run(&self, cx: &Context, payload: Payload) -> Result<Payload> {
        let input = decode(&payload).map_err(AtomError::undecodable)?;
        // The bytes are not needed while the atom works, which may be long.
        drop(payload);
        let output = self.process(cx, input).await?;
        Ok(encode(&output)?)
    }
}

pub(crate) fn decode<T: DeserializeOwned>(payload: &Payload) -> Result<T, serde_json::Error> {
    serde_json::from_slice(&payload.body)
}

pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Payload, serde_json::Error> {
    serde_json::to_vec(value).map(|bytes| Payload::json(Bytes::from(bytes)))
}
