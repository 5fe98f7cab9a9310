//! A node that squares and adds up; for tests, which kill it.
//!
//! `adder URL` serves until its standard input ends, and then stops in order. `adder URL N` has the numbers below N squared
//! by whoever serves, the outcomes sent to the result address `squares`, and is gone.

use std::{env, io, thread, time::Duration};

use anyhow::Context as _;
use atomizer::{ResultsId, prelude::*};
use atomizer_rabbitmq::RabbitMq;
use tokio::sync::oneshot;

/// Takes a moment, so that there is work in hand whenever the process is killed.
struct Square;

impl Atom for Square {
    const ID: &'static str = "adder.square";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, number: u64) -> Result<u64> {
        tokio::time::sleep(Duration::from_millis(number % 8)).await;
        Ok(number.pow(2))
    }
}

/// Adds up the squares of 1 to its input.
struct Sum;

impl Atom for Sum {
    const ID: &'static str = "adder.sum";
    type Input = u64;
    type Output = u64;

    async fn process(&self, cx: &Context, upto: u64) -> Result<u64> {
        Ok(cx.fan_out::<Square>(1..=upto).fold(0, |sum, square| sum + square).await?)
    }
}

/// Has numbers squared, and waits for none.
struct Scatter;

impl Atom for Scatter {
    const ID: &'static str = "adder.scatter";
    const KIND: Kind = Kind::Spawner;
    type Input = u64;
    type Output = usize;

    async fn process(&self, cx: &Context, count: u64) -> Result<usize> {
        let squares = cx.result_address(&ResultsId::from_static("squares")).await?;
        Ok(cx.spawning().results_to(squares).all::<Square>(0..count).await?)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = env::args().nth(1).context("usage: adder URL")?;
    let builder = Atomizer::builder().name("adder").conductor(RabbitMq::from_url(&url)?);
    if let Some(count) = env::args().nth(2) {
        let node = builder.atom(Scatter).start().await?;
        node.call::<Scatter>(count.parse()?).await?;
        return Ok(node.drain().await?);
    }
    // Its nodes are killed at random, again and again, which is no fault of an electron that was there each time.
    // And it is started while brokers are killed, which may take long to answer.
    let builder = builder.atom(Square).atom(Sum).lives_max(100).connect_timeout(None);
    let node = builder.start().await?;
    let (end, ended) = oneshot::channel();
    thread::spawn(move || {
        drop(io::copy(&mut io::stdin(), &mut io::sink()));
        end.send(())
    });
    tokio::select! {
        failed = node.run() => failed?,
        _ = ended => node.drain().await?,
    }
    Ok(())
}
