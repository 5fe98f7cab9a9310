//! Payloads that are no JSON.

use atomizer::{AtomId, CallError, FailureKind, Kind, Payload, RawAtom, prelude::*};

/// Reverses bytes, whatever they are.
struct Reverse;

impl RawAtom for Reverse {
    fn id(&self) -> AtomId {
        AtomId::from_static("reverse")
    }

    fn kind(&self) -> Kind {
        Kind::Atomic
    }

    fn options(&self) -> Options {
        Options::default()
    }

    async fn run(&self, _cx: &Context, payload: &Payload) -> Result<Payload> {
        if payload.body.is_empty() {
            return Err(AtomError::undecodable("nothing to reverse"));
        }
        Ok(Payload::bytes(payload.body.iter().rev().copied().collect::<Vec<_>>()))
    }
}

#[tokio::test]
async fn an_atom_may_take_and_give_plain_bytes() {
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Reverse);
    let atomizer = builder.start().await.unwrap();
    let reverse = |bytes: &[u8]| {
        let payload = Payload::bytes(bytes.to_vec());
        atomizer.call_raw(AtomId::from_static("reverse"), payload).into_future()
    };
    assert_eq!(reverse(b"\xff\x00\x01").await.unwrap(), Payload::bytes(&b"\x01\x00\xff"[..]));
    let Err(CallError::Failed(failure)) = reverse(b"").await else { panic!("it is refused") };
    assert_eq!(failure.kind, FailureKind::Undecodable);
}
