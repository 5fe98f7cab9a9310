//! A node whose atoms do what no atom should; for tests.
//!
//! `misfit URL` serves until it is told to stop, and exits with 1 and the report when its node fails.

use std::{env, process::ExitCode, time::Duration};

use anyhow::Context as _;
use atomizer::prelude::*;
use atomizer_rabbitmq::RabbitMq;
use tokio::runtime::Runtime;

/// Takes its process with it when it is told to.
struct Abort;

impl Atom for Abort {
    const ID: &'static str = "misfit.abort";
    type Input = bool;
    type Output = u32;

    fn options(&self) -> Options {
        Options::default().concurrency(4)
    }

    async fn process(&self, cx: &Context, aborts: bool) -> Result<u32> {
        if aborts {
            std::process::abort();
        }
        // Long enough that some are in work whenever the process goes.
        tokio::time::sleep(Duration::from_millis(20)).await;
        Ok(cx.electron().lives)
    }
}

/// Never yields, and does not end.
struct Block;

impl Atom for Block {
    const ID: &'static str = "misfit.block";
    type Input = ();
    type Output = ();

    fn options(&self) -> Options {
        Options::default().time_limit(Duration::from_millis(200))
    }

    async fn process(&self, _cx: &Context, (): ()) -> Result<()> {
        loop {
            std::thread::park();
        }
    }
}

fn main() -> ExitCode {
    let runtime = Runtime::new().expect("there are threads");
    let ended = runtime.block_on(serve());
    // What never yields is not waited for.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve() -> anyhow::Result<()> {
    let url = env::args().nth(1).context("usage: misfit URL")?;
    let builder = Atomizer::builder().name("misfit").conductor(RabbitMq::from_url(&url)?);
    let builder = builder.atom(Abort).atom(Block).stuck_max(2);
    let node = builder.drain_timeout(Duration::from_secs(2)).start().await?;
    println!("serves");
    Ok(node.run().await?)
}
