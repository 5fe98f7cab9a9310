//! Payloads that are no JSON.

use atomizer::{AtomId, CallError, Electron, FailureKind, Kind, Payload, RawAtom, prelude::*};

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

/// There are as many of these futures as sends and calls under way, and what is seldom needed is in none of them.
#[tokio::test]
async fn what_is_under_way_takes_little_room() {
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Reverse);
    let atomizer = builder.start().await.unwrap();
    let reverse = AtomId::from_static("reverse");
    let sending = atomizer.send_electron(Electron::new(reverse.clone(), Payload::bytes("ab")));
    let bytes = size_of_val(&sending);
    assert!(bytes <= 1536, "a send takes {bytes}");
    sending.await.unwrap();
    let calling = atomizer.call_raw(reverse, Payload::bytes("ab")).into_future();
    let bytes = size_of_val(&*calling);
    assert!(bytes <= 1536, "a call takes {bytes}");
    assert_eq!(calling.await.unwrap(), Payload::bytes("ba"));
}
