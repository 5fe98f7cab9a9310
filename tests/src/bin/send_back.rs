//! Sends all dead letters back; for tests, which kill it.
//!
//! `send_back URL RATE WINDOW` says after each window how many are done.

use std::{env, num::NonZeroU32, num::NonZeroUsize, time::Duration};

use anyhow::Context as _;
use atomizer_rabbitmq::{RabbitMq, Requeue, Selection};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = env::args().skip(1);
    let mut argument = || arguments.next().context("usage: send_back URL RATE WINDOW");
    let dead = RabbitMq::from_url(&argument()?)?.dead_letters();
    let rate: NonZeroU32 = argument()?.parse()?;
    let window: NonZeroUsize = argument()?.parse()?;
    let options = Requeue::default().rate(rate, Duration::from_secs(1)).window(window);
    let mut clearing = dead.requeue(Selection::all(), options);
    while let Some(progress) = clearing.next().await {
        println!("{}", progress.done);
    }
    clearing.finish().await?;
    Ok(())
}
