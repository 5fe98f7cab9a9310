//! Golden vectors: what is written today must be read for ever, and written alike by every version 1.

use std::time::{Duration, UNIX_EPOCH};

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::FailureKind;

const ID: &str = "01932c07-e8f1-7a3b-9c4d-5e6f70819203";
const PARENT: &str = "01932c07-e8f1-7a3b-9c4d-000000000001";

fn minimal() -> Electron {
    let atom = AtomId::from_static("montecarlo.toss");
    Electron::with_id(ID.parse().unwrap(), atom, Payload::json(r#"{"tosses":10}"#))
}

fn full() -> Electron {
    let mut failure = Failure::new(FailureKind::TimedOut, "did not finish within 1s");
    failure.node = Some(NodeId::from_static("agent-0badcafe"));
    failure.attempt = 1;
    Electron {
        reply_to: Some(ReplyTo::new("atomizer.inbox.console-12345678")),
        correlation_id: Some("my-own".into()),
        sender: Some(NodeId::from_static("console-12345678")),
        parent: Some(Parent::new(PARENT.parse().unwrap(), 3)),
        attempts: 1,
        time_limit: Some(Duration::from_millis(1500)),
        history: vec![failure],
        extra: Extra::from([("traceparent".into(), json!("00-0af7-b7ad-01"))]),
        ..minimal()
    }
}

fn answer(outcome: Result<Payload, Failure>) -> Properties {
    Properties {
        electron: ID.parse().unwrap(),
        correlation_id: None,
        atom: AtomId::from_static("montecarlo.toss"),
        node: NodeId::from_static("agent-0badcafe"),
        attempt: 2,
        started_at: UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456),
        duration: Duration::from_micros(2500),
        outcome,
    }
}

/// Everything but the body, as JSON.
fn shown(wire: &Wire) -> Value {
    json!({
        "type": wire.kind, "message_id": wire.id, "correlation_id": wire.correlation_id,
        "reply_to": wire.reply_to, "content_type": wire.content_type, "headers": wire.headers,
    })
}

#[test]
fn golden_minimal_electron() {
    let wire = Wire::from(&Message::from(minimal()));
    let expected = json!({
        "type": "electron", "message_id": ID, "correlation_id": null, "reply_to": null,
        "content_type": "application/json",
        "headers": { "atomizer-atom": "montecarlo.toss" },
    });
    assert_eq!(shown(&wire), expected);
    assert_eq!(wire.body, r#"{"tosses":10}"#, "the payload is the body, as it is");
}

#[test]
fn golden_full_electron() {
    let wire = Wire::from(&Message::from(full()));
    let expected = json!({
        "type": "electron", "message_id": ID, "correlation_id": "my-own",
        "reply_to": "atomizer.inbox.console-12345678", "content_type": "application/json",
        "headers": {
            "atomizer-atom": "montecarlo.toss",
            "atomizer-sender": "console-12345678",
            "atomizer-parent": PARENT,
            "atomizer-index": "3",
            "atomizer-attempt": "1",
            "atomizer-time-limit-ms": "1500",
            "atomizer-history":
                r#"[{"kind":"timed_out","message":"did not finish within 1s","node":"agent-0badcafe","attempt":1}]"#,
            "traceparent": "00-0af7-b7ad-01",
        },
    });
    assert_eq!(shown(&wire), expected);
}

#[test]
fn golden_answer() {
    let wire = Wire::from(&Message::from(answer(Ok(Payload::json("42")))));
    let expected = json!({
        "type": "answer", "message_id": null, "correlation_id": ID, "reply_to": null,
        "content_type": "application/json",
        "headers": {
            "atomizer-atom": "montecarlo.toss",
            "atomizer-node": "agent-0badcafe",
            "atomizer-attempt": "2",
            "atomizer-started-at": "2023-11-14T22:13:20.123456Z",
            "atomizer-duration-us": "2500",
        },
    });
    assert_eq!(shown(&wire), expected);
    assert_eq!(wire.body, "42");
}

#[test]
fn golden_failure() {
    let failure = Failure::new(FailureKind::Panic, "at the disco");
    let wire = Wire::from(&Message::from(answer(Err(failure))));
    assert_eq!(wire.headers["atomizer-status"], "failed");
    assert_eq!(wire.body, r#"{"kind":"panic","message":"at the disco","attempt":0}"#);
}

#[test]
fn golden_cancel() {
    let cancel = Cancel::new(NodeId::from_static("agent-0badcafe"), 2, vec![ID.parse().unwrap()]);
    let wire = Wire::from(&Message::from(cancel.clone()));
    let expected = json!({
        "type": "cancel", "message_id": null, "correlation_id": null, "reply_to": null,
        "content_type": "application/json",
        "headers": { "atomizer-sender": "agent-0badcafe", "atomizer-round": "2" },
    });
    assert_eq!(shown(&wire), expected);
    assert_eq!(wire.body, format!("[\"{ID}\"]"));
    let Message::Cancel(read) = Message::from_wire(&wire, None) else {
        panic!("expected a cancel")
    };
    assert_eq!(*read, cancel);
}

fn read_electron(wire: &Wire, queue: Option<&AtomId>) -> Electron {
    match Message::from_wire(wire, queue) {
        Message::Electron(electron) => Arc::unwrap_or_clone(electron),
        other => panic!("expected an electron, not {other:?}"),
    }
}

/// What goes without saying may be said all the same.
#[test]
fn what_is_spelled_out_is_read_as_what_is_left_out() {
    let mut answered = answer(Ok(Payload::json("42")));
    answered.attempt = 1;
    let left_out = Wire::from(&Message::from(answered.clone()));
    let mut spelled_out = left_out.clone();
    for (name, value) in [(header::VERSION, "1"), (header::ELECTRON, ID), (header::ATTEMPT, "1")] {
        assert!(!left_out.headers.contains_key(name));
        spelled_out.put_header(name, value.into());
    }
    for wire in [left_out, spelled_out] {
        let Message::Answer(read) = Message::from_wire(&wire, None) else {
            panic!("expected an answer")
        };
        assert_eq!(*read, answered);
    }
    let mut electron = Wire::from(&Message::from(full()));
    electron.put_header(header::VERSION, "1".into());
    assert_eq!(read_electron(&electron, None), full());
}

fn reason(wire: &Wire) -> String {
    match Message::from_wire(wire, None) {
        Message::Unreadable(unreadable) => {
            assert_eq!(unreadable.wire, *wire, "kept whole");
            unreadable.reason.clone()
        }
        other => panic!("expected something unreadable, not {other:?}"),
    }
}

#[test]
fn what_is_written_is_read() {
    for electron in [minimal(), full()] {
        assert_eq!(read_electron(&Wire::from(&Message::from(electron.clone())), None), electron);
    }
    for outcome in [Ok(Payload::bytes("\u{0}")), Err(Failure::new(FailureKind::Error, "no"))] {
        let written = answer(outcome);
        let Message::Answer(read) =
            Message::from_wire(&Wire::from(&Message::from(written.clone())), None)
        else {
            panic!("expected an answer")
        };
        assert_eq!(*read, written);
    }
}

#[test]
fn a_sender_that_knows_nothing_of_atomizer_is_understood() {
    let queue = AtomId::from_static("double");
    let wire = Wire {
        reply_to: Some("amq.rabbitmq.reply-to.g1".into()),
        correlation_id: Some("17".into()),
        body: "21".into(),
        ..Wire::default()
    };
    let electron = read_electron(&wire, Some(&queue));
    assert_eq!(electron.atom, queue);
    assert_eq!(electron.payload, Payload::json("21"));
    assert_eq!(electron.correlation_id.as_deref(), Some("17"));
    let properties = Properties::new(&electron, NodeId::from_static("n"), Ok(Payload::json("42")));
    assert_eq!(Wire::from(&Message::from(properties)).correlation_id.as_deref(), Some("17"));
}

#[test]
fn what_cannot_be_read_says_why_and_is_kept_whole() {
    let written = || Wire::from(&Message::from(full()));
    let with = |name: &str, value: Value| {
        let mut wire = written();
        wire.headers.insert(name.into(), value);
        wire
    };
    let newer = reason(&with(header::VERSION, json!("2")));
    assert!(newer.contains("version 2 is newer than 1"), "{newer}");
    let number = reason(&with(header::ATTEMPT, json!("many")));
    assert!(number.contains("atomizer-attempt: invalid digit"), "{number}");
    let list = reason(&with(header::ATOM, json!(["a"])));
    assert!(list.contains("not text"), "{list}");
    let id = reason(&Wire { id: Some("17".into()), ..written() });
    assert!(id.contains("\"17\" is not a valid electron id"), "{id}");
    let kind = reason(&Wire { kind: Some("positron".into()), ..written() });
    assert!(kind.contains("unknown type \"positron\""), "{kind}");
    let nameless = reason(&Wire::default());
    assert!(nameless.contains("atomizer-atom is missing"), "{nameless}");
}

#[test]
fn a_number_sent_as_a_number_is_read() {
    let mut wire = Wire::from(&Message::from(minimal()));
    wire.headers.insert(header::ATTEMPT.into(), json!(4));
    assert_eq!(read_electron(&wire, None).attempts, 4);
}

proptest! {
    #[test]
    fn any_electron_survives_the_wire(
        body in proptest::collection::vec(any::<u8>(), 0..200),
        content_type in "[a-z]{1,10}/[a-z.+-]{1,10}",
        correlation_id in proptest::option::of("\\PC{0,40}"),
        index in proptest::option::of(any::<u64>()),
        attempts in any::<u32>(),
        time_limit_ms in proptest::option::of(any::<u64>()),
        messages in proptest::collection::vec("\\PC{0,60}", 0..4),
        extra in proptest::collection::btree_map("x-[a-z]{1,8}", "\\PC{0,40}", 0..4),
    ) {
        let mut electron = minimal();
        electron.payload = Payload { content_type: content_type.as_str().into(), body: body.into() };
        electron.correlation_id = correlation_id;
        electron.parent =
            index.map(|index| Parent::new(PARENT.parse().unwrap(), index).round(u64::from(attempts)));
        electron.attempts = attempts;
        electron.time_limit = time_limit_ms.map(Duration::from_millis);
        electron.history =
            messages.into_iter().map(|text| Failure::new(FailureKind::Error, text)).collect();
        electron.extra = extra.into_iter().map(|(name, text)| (name, Value::from(text))).collect();
        prop_assert_eq!(read_electron(&Wire::from(&Message::from(electron.clone())), None), electron);
    }

    #[test]
    fn no_message_makes_the_reader_panic(
        kind in proptest::option::of("electron|answer|\\PC{0,8}"),
        id in proptest::option::of("\\PC{0,40}"),
        headers in proptest::collection::btree_map(
            "atomizer-(version|atom|sender|parent|index|attempt|time-limit-ms|history|electron|status|node|started-at|duration-us)",
            "\\PC{0,40}",
            0..12,
        ),
        body in proptest::collection::vec(any::<u8>(), 0..60),
    ) {
        let headers = headers.into_iter().map(|(name, text)| (name, Value::from(text))).collect();
        drop(Message::from_wire(&Wire { kind, id, headers, body: body.into(), ..Wire::default() }, None));
    }
}
