//! What is sent is safe, or it is known not to be.

use atomizer::{
    Address, AtomId, CallError, Conductor, Electron, Envelope, NodeId, Payload, ReplyTo, SendError,
    prelude::*,
};
use atomizer_test_support::{Permissions, shared};
use lapin::{Connection, ConnectionProperties, options::BasicGetOptions, types::ShortString};

use crate::support::{Double, blocking, rabbit, soon, vhost};

#[tokio::test(flavor = "multi_thread")]
async fn each_returned_message_is_told_of_its_own_publish() {
    let vhost = vhost().await;
    let conductor = rabbit(&vhost.url());
    let session = conductor.open(&NodeId::unique("sender").unwrap()).await.unwrap();
    let atom = AtomId::from_static("taken");
    // It declares the queue. Who does that at the same moment as others may be told that it is not ready.
    let first = Electron::new(atom.clone(), Payload::json("first"));
    let first = session.send(&[Envelope::new(Address::Atom(atom.clone()), first.into())]).await;
    assert!(first[0].is_ok(), "{first:?}");
    let envelopes: Vec<_> = (0..20_000)
        .map(|number| {
            let electron = Electron::new(atom.clone(), Payload::json(number.to_string()));
            let to = match number % 7 {
                3 => Address::Reply(ReplyTo::new(format!("nobody.{}", number % 3))),
                _ => Address::Atom(atom.clone()),
            };
            Envelope::new(to, electron.into())
        })
        .collect();
    // Many callers at once, so that confirms of many come together.
    let batches = envelopes.chunks(50).map(|batch| session.send(batch));
    let results = soon(futures::future::join_all(batches)).await.into_iter().flatten();
    for (number, result) in results.enumerate() {
        let unroutable = matches!(result, Err(SendError::Unroutable(_)));
        assert_eq!(unroutable, number % 7 == 3, "{number}: {result:?}");
        assert!(unroutable || result.is_ok(), "{number}: {result:?}");
    }
    session.close().await;
    blocking(move || drop(vhost)).await;
}

/// There are as many of these futures as messages under way, and what is seldom needed is in none of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_send_under_way_takes_little_room() {
    let vhost = vhost().await;
    let session = rabbit(&vhost.url()).open(&NodeId::unique("sender").unwrap()).await.unwrap();
    let electron = Electron::new(AtomId::from_static("small"), Payload::json("1"));
    let envelope = Envelope::new(Address::Atom(electron.atom.clone()), electron.into());
    let envelopes = [envelope];
    let sending = session.send(&envelopes);
    let bytes = size_of_val(&*sending);
    assert!(bytes <= 1024, "{bytes}");
    assert_eq!(soon(sending).await, [Ok(())]);
    session.close().await;
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_without_saying_is_not_said() {
    let vhost = vhost().await;
    let session = rabbit(&vhost.url()).open(&NodeId::unique("sender").unwrap()).await.unwrap();
    let atom = AtomId::from_static("plain");
    let properties = ConnectionProperties::default();
    let connection = Connection::connect(&vhost.url(), properties).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    for (payload, content_type) in
        [(Payload::json("1"), None), (Payload::bytes("1"), Some("application/octet-stream"))]
    {
        let electron = Electron::new(atom.clone(), payload.clone());
        let envelope = Envelope::new(Address::Atom(atom.clone()), electron.into());
        assert_eq!(session.send(&[envelope]).await, [Ok(())]);
        let options = BasicGetOptions { no_ack: true };
        let sent = channel.basic_get("atomizer.atom.plain".into(), options).await.unwrap().unwrap();
        let properties = &sent.properties;
        assert_eq!(*properties.kind(), None);
        assert_eq!(properties.content_type().as_ref().map(ShortString::as_str), content_type);
    }
    session.close().await;
    blocking(move || drop(vhost)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_may_not_declare_is_told_so() {
    let vhost = blocking(|| {
        let broker = shared().unwrap();
        let vhost = broker.vhost().unwrap();
        let own = Permissions::new(r"^atomizer(\.dead|\.due|\.lost|\.inbox\..*)?$", ".*", ".*");
        broker.add_user("caller", "secret", vhost.name(), &own).unwrap();
        vhost
    })
    .await;
    let url = vhost.url_as("caller", "secret");
    let atomizer = Atomizer::builder().conductor(rabbit(&url)).start().await.unwrap();
    let error = soon(atomizer.call::<Double>(1).into_future()).await.unwrap_err();
    let CallError::NotSent { source: SendError::Refused(reason), .. } = error else {
        panic!("expected a refusal, not {error:?}")
    };
    assert!(reason.contains("ACCESS_REFUSED"), "{reason}");
    atomizer.drain().await.unwrap();
    blocking(move || {
        vhost.node().delete_user("caller").unwrap();
        drop(vhost);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_with_more_headers_than_fit_is_kept_without_those_of_others() {
    let vhost = vhost().await;
    let conductor = rabbit(&vhost.url());
    let session = conductor.open(&NodeId::unique("sender").unwrap()).await.unwrap();
    let mut electron = Electron::new(AtomId::from_static("any"), Payload::json("1"));
    electron.extra.insert("x-long".into(), "x".repeat(20_000).into());
    let to = |to: Address| [Envelope::new(to, electron.clone().into())];
    let sent = session.send(&to(Address::Atom(AtomId::from_static("any")))).await;
    assert!(matches!(sent[0], Err(SendError::TooLarge { .. })), "{sent:?}");
    let dead = session.send(&to(Address::DeadLetter(AtomId::from_static("any")))).await;
    assert!(dead[0].is_ok(), "{dead:?}");
    session.close().await;
    blocking(move || drop(vhost)).await;
}
