//! Ten thousand dead letters on their way back.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use atomizer::{ElectronId, prelude::*};
use serde_json::json;

use crate::harness::{Double, Place, Running, blocking, soon};

const LETTERS: usize = 10_000;
const OTHERS: usize = 50;
const RATE: u64 = 2_000;

/// Remembers which electrons it was run for.
#[derive(Clone, Default)]
struct Remember(Arc<Mutex<HashSet<ElectronId>>>);

impl Remember {
    fn seen(&self) -> HashSet<ElectronId> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Atom for Remember {
    const ID: &'static str = Double::ID;
    type Input = u64;
    type Output = ();

    async fn process(&self, cx: &Context, _input: u64) -> Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(cx.electron().id);
        Ok(())
    }
}

/// How many a command says were sent back.
fn sent_back(stdout: &str) -> usize {
    let count = stdout.strip_suffix(" sent back\n").and_then(|count| count.parse().ok());
    count.unwrap_or_else(|| panic!("{stdout:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_go_back_at_a_rate_each_once_though_it_is_interrupted_twice() {
    let place = Place::new().await;
    let every = LETTERS / OTHERS;
    let message = |number: usize| match number % (every + 1) {
        0 => format!("of another cause, {number}"),
        _ => format!("account {number} is closed"),
    };
    let messages: Vec<_> = (0..LETTERS + OTHERS).map(message).collect();
    let ids = place.bury(&messages).await;
    let (others, expected): (Vec<_>, HashSet<_>) = {
        let all = ids.iter().enumerate();
        let is_other = |number: usize| number.is_multiple_of(every + 1);
        (
            all.clone().filter(|(number, _)| is_other(*number)).map(|(_, id)| *id).collect(),
            all.filter(|(number, _)| !is_other(*number)).map(|(_, id)| *id).collect(),
        )
    };
    assert_eq!((expected.len(), others.len()), (LETTERS, OTHERS));
    let causes = place.run(&["dead", "list", "--json"]).await.ok().json();
    assert_eq!(causes[0]["count"], json!(LETTERS));
    let key = causes[0]["cause"].as_str().unwrap().to_owned();

    let (mut done, rate) = (0, format!("{RATE}/s"));
    for _ in 0..2 {
        let (url, key, rate) = (place.url(), key.clone(), rate.clone());
        let ran = blocking(move || {
            let arguments = ["dead", "requeue", "--cause", &key, "--rate", &rate, "--url", &url];
            let mut running = Running::start(&arguments);
            // A line a second.
            running.wait_for(" sent back, ");
            running.interrupt();
            running.end()
        })
        .await
        .ended_with(130);
        let sent = sent_back(&ran.stdout);
        assert!(sent > 0 && ran.stderr.contains("goes on with the rest"), "{ran:?}");
        done += sent;
        let depth = place.with(|vhost| vhost.queue_depth("atomizer.atom.double").unwrap()).await;
        assert_eq!(usize::try_from(depth.unwrap().ready).unwrap(), done, "as it says");
    }
    assert!(done < LETTERS, "{done}");
    let begun = Instant::now();
    let ran = place.run(&["dead", "requeue", "--cause", &key, "--rate", &rate]).await.ok();
    let rest = sent_back(&ran.stdout);
    let took = begun.elapsed();
    assert_eq!(done + rest, LETTERS);
    let least = Duration::from_secs_f64(rest as f64 / RATE as f64).mul_f64(0.9);
    assert!(took >= least, "{rest} in {took:?}");
    println!("interrupted_at={done} rest={rest} took={took:?}");
    // Once more changes nothing.
    let ran = place.run(&["dead", "requeue", "--cause", &key]).await.ok();
    assert_eq!(sent_back(&ran.stdout), 0);

    let depths = place.with(|vhost| {
        ["atomizer.atom.double", "atomizer.dead"].map(|queue| vhost.queue_depth(queue).unwrap())
    });
    let ready = depths.await.map(|depth| usize::try_from(depth.unwrap().ready).unwrap());
    assert_eq!(ready, [LETTERS, OTHERS], "none twice, and no other");
    let remember = Remember::default();
    let builder = Atomizer::builder().conductor(place.rabbit()).atom(remember.clone());
    let node = builder.start().await.unwrap();
    soon(async {
        while remember.seen().len() < LETTERS {
            tokio::task::yield_now().await;
        }
    })
    .await;
    node.drain().await.unwrap();
    assert!(remember.seen() == expected, "the same ids");
    place.leave().await;
}
