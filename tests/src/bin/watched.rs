//! A node whose atom succeeds, fails and panics, as its input says; for tests, which watch it and kill it.
//!
//! `watched URL` serves until its standard input ends, and then stops in order. The first line that it writes is its id,
//! the second where its metrics are.

use std::{env, io, thread, time::Duration};

use anyhow::Context as _;
use atomizer::prelude::*;
use atomizer_monitoring::Monitoring;
use atomizer_rabbitmq::RabbitMq;
use tokio::sync::oneshot;

struct Moody;

impl Atom for Moody {
    const ID: &'static str = "moody";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, number: u64) -> Result<u64> {
        tokio::time::sleep(Duration::from_millis(number % 8)).await;
        match number % 10 {
            3 => panic!("{number} is not to my liking"),
            7 => Err(AtomError::msg(format!("{number} is refused"))),
            _ => Ok(number + 1),
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = env::args().nth(1).context("usage: watched URL")?;
    let monitoring = Monitoring::serve(([127, 0, 0, 1], 0).into())?;
    let builder = Atomizer::builder().name("watched").conductor(RabbitMq::from_url(&url)?);
    let node = builder.atom(Moody).policy(Policy::retry(1)).start().await?;
    monitoring.watch(node.health());
    println!("{}\n{}", node.node(), monitoring.address());
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
