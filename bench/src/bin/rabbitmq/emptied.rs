//! When the broker counts no message in a queue any more.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use atomizer_test_support::Vhost;
use tokio::task::block_in_place;

/// How long a queue may take to be empty once its last message was taken.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// Watches, in the broker, for the moment at which a quorum queue holds nothing, ready or unacknowledged.
///
/// No client can tell: the broker does not answer acknowledgements, and a client that closes its connection right
/// after the last one may find some of them undone. The queue's own process is asked every millisecond.
pub(crate) struct Emptied<'a> {
    vhost: &'a Vhost,
    key: String,
}

impl<'a> Emptied<'a> {
    /// Begins to watch a queue that is there and holds something.
    pub(crate) fn watch(vhost: &'a Vhost, queue: &str) -> Result<Self> {
        let key = format!("{{atomizer_bench, <<\"{}\">>}}", vhost.name());
        let watch = format!(
            "{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"{}\">>, queue, <<\"{queue}\">>)),
            Leader = amqqueue:get_pid(Queue),
            Count = fun(State) -> rabbit_fifo:query_messages_ready(State)
                                + rabbit_fifo:query_messages_checked_out(State) end,
            Watch = fun Again() ->
                case ra:leader_query(Leader, Count) of
                    {{ok, {{_, 0}}, _}} ->
                        persistent_term:put({key}, os:system_time(microsecond));
                    _ -> timer:sleep(1), Again()
                end
            end,
            spawn(Watch), watching.",
            vhost.name()
        );
        let answer = block_in_place(|| vhost.node().ctl(&["eval", &watch]))?;
        ensure!(answer.trim() == "watching", "the broker does not watch: {answer}");
        Ok(Self { vhost, key })
    }

    /// Waits until it is so; returns since when, by the clock of this machine.
    pub(crate) fn wait(&self) -> Result<SystemTime> {
        let begun = Instant::now();
        loop {
            if let Some(at) = self.at()? {
                return Ok(at);
            }
            ensure!(begun.elapsed() < WAIT_MAX, "the queue is not empty after {WAIT_MAX:?}");
        }
    }

    fn at(&self) -> Result<Option<SystemTime>> {
        let ask = format!("persistent_term:get({}, none).", self.key);
        let answer = block_in_place(|| self.vhost.node().ctl(&["eval", &ask]))?;
        if answer.trim() == "none" {
            return Ok(None);
        }
        let micros = answer.trim().parse().with_context(|| format!("not a time: {answer}"))?;
        Ok(Some(UNIX_EPOCH + Duration::from_micros(micros)))
    }
}
