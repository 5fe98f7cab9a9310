//! The rules of event logs. [`event_log_tests!`](crate::event_log_tests) calls them all.

#![expect(clippy::missing_panics_doc, reason = "a rule that is broken panics: these are tests")]

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use atomizer::{EventLog, EventReader, NodeId, Pack, Position, Read};
use bytes::Bytes;
use tokio::time::sleep;

use crate::{World, node::soon};

fn log(world: &impl World) -> Arc<dyn EventLog> {
    world.conductor().event_log().expect("this world keeps events")
}

fn node(number: usize) -> NodeId {
    NodeId::unique(&format!("node{number}")).expect("it is a name")
}

/// Keeps so many packs, in order, and returns them as they are to be read.
async fn keep(log: &dyn EventLog, packs: usize) -> Vec<Bytes> {
    let mut writer = soon("writing", log.writer(&node(0))).await.expect("it is open");
    let packs: Vec<_> = (0..packs).map(|number| Pack::mark(&node(number))).collect();
    for pack in &packs {
        soon("a pack", writer.append(pack.clone())).await.expect("it is handed over");
    }
    for _ in &packs {
        assert!(soon("keeping", writer.kept()).await.expect("it is known"), "it is kept");
    }
    packs.into_iter().map(Pack::into_bytes).collect()
}

async fn read(log: &dyn EventLog, from: Position) -> Box<dyn EventReader> {
    soon("reading", log.reader(from)).await.expect("it is open")
}

async fn next(reader: &mut dyn EventReader) -> Read {
    soon("a pack", reader.next()).await.expect("it is read")
}

/// The next pack; all has been caught up with already, or is not to be.
async fn next_pack(reader: &mut dyn EventReader) -> (u64, Bytes) {
    match next(reader).await {
        Read::Pack { offset, bytes } => (offset, bytes),
        Read::CaughtUp { .. } => panic!("a pack is to come"),
    }
}

/// All packs that come before the reader has caught up, and what comes next.
async fn until_caught_up(reader: &mut dyn EventReader) -> (Vec<(u64, Bytes)>, Option<u64>) {
    let mut packs = Vec::new();
    loop {
        match next(reader).await {
            Read::Pack { offset, bytes } => packs.push((offset, bytes)),
            Read::CaughtUp { next } => return (packs, next),
        }
    }
}

fn bodies(packs: Vec<(u64, Bytes)>) -> Vec<Bytes> {
    packs.into_iter().map(|(_, bytes)| bytes).collect()
}

/// What is kept is read in order, with offsets that rise, and then what comes: without a gap between the two.
pub async fn what_is_kept_is_read_in_order_and_then_what_comes(world: &impl World) {
    let log = log(world);
    let kept = keep(&*log, 300).await;
    let mut reader = read(&*log, Position::Start).await;
    let (packs, end) = until_caught_up(&mut *reader).await;
    let offsets: Vec<_> = packs.iter().map(|(offset, _)| *offset).collect();
    assert!(offsets.is_sorted_by(|one, next| one < next), "{offsets:?}");
    let end = end.expect("who may write knows the end");
    assert!(offsets.last().is_some_and(|last| *last < end));
    assert_eq!(bodies(packs), kept);
    for bytes in keep(&*log, 3).await {
        let (offset, came) = next_pack(&mut *reader).await;
        assert_eq!(came, bytes);
        assert!(offset >= end);
    }
}

/// Who begins now has caught up at once, and gets what comes from then on.
pub async fn who_begins_now_gets_what_comes(world: &impl World) {
    let log = log(world);
    drop(keep(&*log, 3).await);
    let mut reader = read(&*log, Position::Now).await;
    assert_eq!(bodies(until_caught_up(&mut *reader).await.0), Vec::<Bytes>::new());
    for bytes in keep(&*log, 3).await {
        assert_eq!(next_pack(&mut *reader).await.1, bytes);
    }
}

/// Who goes on at an offset gets that pack and those after it.
pub async fn who_goes_on_at_an_offset_misses_nothing(world: &impl World) {
    let log = log(world);
    let kept = keep(&*log, 20).await;
    let (packs, _) = until_caught_up(&mut *read(&*log, Position::Start).await).await;
    let offset = packs[7].0;
    let (rest, end) = until_caught_up(&mut *read(&*log, Position::Offset(offset)).await).await;
    assert_eq!(bodies(rest), kept[7..]);
    let end = end.expect("who may write knows the end");
    let mut reader = read(&*log, Position::Offset(end)).await;
    assert_eq!(bodies(until_caught_up(&mut *reader).await.0), Vec::<Bytes>::new());
    let kept = keep(&*log, 1).await;
    assert_eq!(next_pack(&mut *reader).await.1, kept[0]);
}

/// Who begins at a time gets all that was kept since, and maybe some of what was kept before.
pub async fn who_begins_at_a_time_misses_nothing(world: &impl World) {
    let log = log(world);
    drop(keep(&*log, 3).await);
    // A log may tell seconds apart, and no more.
    sleep(Duration::from_millis(2100)).await;
    #[expect(clippy::disallowed_methods, reason = "it is the time of day that is meant")]
    let time = SystemTime::now();
    let kept = keep(&*log, 3).await;
    let (packs, _) = until_caught_up(&mut *read(&*log, Position::Time(time)).await).await;
    let packs = bodies(packs);
    assert!(packs.ends_with(&kept), "{packs:?}");
    let late = Position::Time(time + Duration::from_secs(3600));
    assert_eq!(bodies(until_caught_up(&mut *read(&*log, late).await).await.0), Vec::<Bytes>::new());
}

/// An offset of another log, which was there before this one, is no reason to read nothing for ever.
pub async fn an_offset_that_was_never_there_costs_nothing_that_comes(world: &impl World) {
    let log = log(world);
    drop(keep(&*log, 3).await);
    let mut reader = read(&*log, Position::Offset(1_000_000)).await;
    drop(until_caught_up(&mut *reader).await);
    let kept = keep(&*log, 1).await;
    while next_pack(&mut *reader).await.1 != kept[0] {}
}

/// Makes a `#[tokio::test]` of each rule for conductors that keep events, over the worlds that the expression, a future,
/// makes.
#[macro_export]
macro_rules! event_log_tests {
    ($world:expr) => {
        $crate::event_log_tests! { $world;
            what_is_kept_is_read_in_order_and_then_what_comes
            who_begins_now_gets_what_comes
            who_goes_on_at_an_offset_misses_nothing
            who_begins_at_a_time_misses_nothing
            an_offset_that_was_never_there_costs_nothing_that_comes
        }
    };
    ($world:expr; $($rule:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                $crate::event_log::$rule(&$world.await).await;
            }
        )*
    };
}
