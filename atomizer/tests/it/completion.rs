//! When a fan-out or a group is complete: by all, by the first failure, by enough, in time.

use std::time::Duration;

use atomizer::{
    Address, AtomId, ChildError, Conductor, Envelope, FanOutError, Partial, Payload, Properties,
    prelude::*,
};
use futures::{Stream, StreamExt, stream};
use serde::{Deserialize, Serialize};

const CHILDREN: u64 = 1000;
/// How long the children take that end by their time limit.
const LIMIT: Duration = Duration::from_secs(1);

/// Of each hundred one fails, one panics, one takes too long, and one answers twice.
struct Troubled(Memory);

impl Atom for Troubled {
    const ID: &'static str = "troubled";
    type Input = u64;
    type Output = u64;

    fn options(&self) -> Options {
        Options::default().time_limit(LIMIT)
    }

    async fn process(&self, cx: &Context, number: u64) -> Result<u64> {
        match number % 100 {
            7 => return Err(AtomError::msg("7")),
            17 => panic!("17"),
            27 => std::future::pending().await,
            37 => {
                let session = self.0.open(cx.node()).await.unwrap();
                let reply_to = cx.electron().reply_to.clone().unwrap();
                let output = Payload::json(number.to_string());
                let answer = Properties::new(cx.electron(), cx.node().clone(), Ok(output));
                let answer = Envelope::new(Address::Reply(reply_to), answer.into());
                session.send(&[answer]).await.remove(0).unwrap();
            }
            _ => {}
        }
        Ok(number)
    }
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
enum Rule {
    FirstFailure,
    Stream,
    Tolerate(usize),
    Enough(usize),
    EnoughOf { outputs: usize, tolerated: usize },
    Within(Duration),
}

/// Asks a thousand, and says in words what came of them.
struct Survey;

impl Atom for Survey {
    const ID: &'static str = "survey";
    const KIND: Kind = Kind::Spawner;
    type Input = Rule;
    type Output = String;

    async fn process(&self, cx: &Context, rule: Rule) -> Result<String> {
        let all = cx.fan_out::<Troubled>(0..CHILDREN);
        let lenient = match rule {
            Rule::FirstFailure => {
                let Err(ChildError { index, .. }) = all.fold(0, |sum, number| sum + number).await
                else {
                    return Ok("all succeeded".to_owned());
                };
                return Ok(format!("one failed that {}", fate(index)));
            }
            Rule::Stream => return Ok(tally(all.stream()).await),
            Rule::Tolerate(failures) => all.tolerate(failures),
            Rule::Enough(outputs) => all.enough(outputs),
            Rule::EnoughOf { outputs, tolerated } => all.enough(outputs).tolerate(tolerated),
            Rule::Within(time) => all.within(time),
        };
        Ok(match lenient.collect().await {
            Ok(Partial { value, failures, given_up, end, .. }) => {
                assert!(value.is_sorted(), "in the order of the inputs");
                assert!(value.iter().all(|(index, output)| *index as u64 == *output));
                assert!(failures.iter().all(|failure| fate(failure.index) == "fails"));
                let (outputs, failures) = (value.len(), failures.len());
                format!("{end:?}: {outputs} outputs, {failures} failures, {given_up} given up")
            }
            Err(FanOutError::TooManyFailures { tolerated, failures }) => {
                format!("too many failures: {} where {tolerated} are tolerated", failures.len())
            }
            Err(error @ FanOutError::TooFewOutputs { .. }) => {
                let error = error.to_string();
                // Which is the last, and how it failed, differs.
                let (error, last) = error.split_once("; the last was child ").unwrap();
                assert!(last.contains(": "), "the cause is told: {last}");
                error.to_owned()
            }
            Err(error) => return Err(error.into()),
        })
    }
}

fn fate(index: usize) -> &'static str {
    if matches!(index % 100, 7 | 17 | 27) { "fails" } else { "does not fail" }
}

async fn tally(children: impl Stream<Item = (usize, Result<u64, CallError>)>) -> String {
    let mut children = std::pin::pin!(children);
    let (mut seen, mut failures) = (vec![0; 1000], 0);
    while let Some((index, came)) = children.next().await {
        seen[index] += 1;
        failures += usize::from(came.is_err());
    }
    let once = seen.iter().filter(|times| **times == 1).count();
    format!("{once} once, {failures} failures")
}

#[tokio::test(start_paused = true)]
async fn a_thousand_children_of_which_some_fail_end_as_each_rule_says() {
    let late = LIMIT / 2;
    let table = [
        (Rule::FirstFailure, "one failed that fails"),
        (Rule::Stream, "1000 once, 30 failures"),
        (Rule::Tolerate(30), "All: 970 outputs, 30 failures, 0 given up"),
        (Rule::Tolerate(29), "too many failures: 30 where 29 are tolerated"),
        (Rule::Tolerate(0), "too many failures: 1 where 0 are tolerated"),
        (Rule::Enough(970), "Enough: 970 outputs, 20 failures, 10 given up"),
        (Rule::Enough(971), "too few outputs: 970, where 971 were wanted; failed: 30"),
        (Rule::Enough(0), "Enough: 0 outputs, 0 failures, 0 given up"),
        (
            Rule::EnoughOf { outputs: 970, tolerated: 19 },
            "too many failures: 20 where 19 are tolerated",
        ),
        (Rule::Within(late), "Late: 970 outputs, 20 failures, 10 given up"),
        (Rule::Within(2 * LIMIT), "All: 970 outputs, 30 failures, 0 given up"),
        (Rule::Within(Duration::ZERO), "Late: 0 outputs, 0 failures, 0 given up"),
    ];
    let memory = Memory::new();
    let builder = Atomizer::builder().conductor(memory.clone()).atom(Survey);
    let atomizer = builder.atom(Troubled(memory)).start().await.unwrap();
    for (rule, expected) in table {
        assert_eq!(atomizer.call::<Survey>(rule).await.unwrap(), expected, "{rule:?}");
    }
}

struct Upper;

impl Atom for Upper {
    const ID: &'static str = "upper";
    type Input = String;
    type Output = String;

    async fn process(&self, _cx: &Context, text: String) -> Result<String> {
        Ok(text.to_uppercase())
    }
}

/// Asks different atoms together; the last may be told to fail.
struct Mixed;

impl Atom for Mixed {
    const ID: &'static str = "mixed";
    const KIND: Kind = Kind::Spawner;
    type Input = (u64, Option<usize>);
    type Output = (Option<u64>, Option<String>, Option<String>, Vec<usize>);

    async fn process(
        &self,
        cx: &Context,
        (number, tolerated): Self::Input,
    ) -> Result<Self::Output> {
        let mut group = cx.group();
        let number = group.call::<Troubled>(number);
        let text = group.call::<Upper>("typed".to_owned());
        let raw = group.call_raw(AtomId::from_static("upper"), Payload::json("\"by id\""));
        let (mut answers, failures) = match tolerated {
            None => (group.join().await?, Vec::new()),
            Some(tolerated) => {
                let Partial { value, failures, .. } = group.tolerate(tolerated).join().await?;
                (value, failures)
            }
        };
        let raw =
            answers.take(raw).map(|payload| String::from_utf8_lossy(&payload.body).into_owned());
        let failed = failures.iter().map(|failure| failure.index).collect();
        Ok((answers.take(number), answers.take(text), raw, failed))
    }
}

#[tokio::test(start_paused = true)]
async fn a_group_answers_each_member_in_its_own_type() {
    let memory = Memory::new();
    let builder = Atomizer::builder().conductor(memory.clone()).atom(Mixed).atom(Upper);
    let atomizer = builder.atom(Troubled(memory)).start().await.unwrap();
    let (typed, by_id) = (Some("TYPED".to_owned()), Some("\"BY ID\"".to_owned()));
    let answer = atomizer.call::<Mixed>((37, None)).await.unwrap();
    assert_eq!(answer, (Some(37), typed.clone(), by_id.clone(), vec![]));
    let answer = atomizer.call::<Mixed>((17, Some(1))).await.unwrap();
    assert_eq!(answer, (None, typed, by_id, vec![0]));
    for tolerated in [None, Some(0)] {
        let error = atomizer.call::<Mixed>((7, tolerated)).await.unwrap_err();
        assert!(error.to_string().contains("child 0"), "{error}");
    }
}

#[tokio::test]
async fn the_inputs_of_a_stream_are_asked_for_as_they_come() {
    struct Streams;
    impl Atom for Streams {
        const ID: &'static str = "streams";
        const KIND: Kind = Kind::Spawner;
        type Input = ();
        type Output = Vec<String>;
        async fn process(&self, cx: &Context, (): ()) -> Result<Vec<String>> {
            // Each is made of what came of the one before: it does not end if that is waited for in vain.
            let (tell, told) = tokio::sync::mpsc::channel(1);
            tell.send("a".to_owned()).await?;
            let inputs = stream::unfold(told, async |mut told| Some((told.recv().await?, told)));
            let mut outputs = std::pin::pin!(cx.fan_out_stream::<Upper>(inputs).stream());
            let (mut tell, mut collected) = (Some(tell), Vec::new());
            while let Some((_, output)) = outputs.next().await {
                let output = output?;
                match &tell {
                    Some(tell) if collected.len() < 3 => tell.send(format!("{output}b")).await?,
                    _ => tell = None,
                }
                collected.push(output);
            }
            Ok(collected)
        }
    }
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Upper).atom(Streams);
    let atomizer = builder.start().await.unwrap();
    let outputs = atomizer.call::<Streams>(()).await.unwrap();
    assert_eq!(outputs, ["A", "AB", "ABB", "ABBB"]);
}
