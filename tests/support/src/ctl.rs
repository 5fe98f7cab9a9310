//! `rabbitmqctl`, for what the management interface tells late or not at all.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::error::BrokerError;
use crate::process;
use crate::settings::{Identity, only_on, set_common};
use crate::vhost::Depth;

/// A call takes half a second; much longer where the machine is busy.
const CALL_MAX: Duration = Duration::from_secs(60);

/// `rabbitmqctl`, set up for one node.
#[derive(Clone, Debug)]
pub(crate) struct Ctl {
    pub(crate) program: PathBuf,
    /// The node's folder, which holds its cookie.
    pub(crate) home: PathBuf,
    pub(crate) epmd_port: u16,
    pub(crate) identity: Identity,
    /// The network namespace of the node, if it has one of its own.
    pub(crate) namespace: Option<String>,
}

impl Ctl {
    pub(crate) fn run(&self, arguments: &[&str]) -> Result<String, BrokerError> {
        let mut command = match &self.namespace {
            None => Command::new(&self.program),
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(&self.program);
                command
            }
        };
        set_common(&mut command, &self.home, self.epmd_port, &self.identity);
        let only_here = only_on(self.identity.address);
        command.env("RABBITMQ_CTL_ERL_ARGS", only_here).arg("--quiet").args(arguments);
        let shown = arguments.first().copied().unwrap_or_default();
        let output = process::output(&mut command, &format!("rabbitmqctl {shown}"), CALL_MAX)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        Err(BrokerError::Ctl {
            command: arguments.join(" "),
            output: format!("{text}{}", String::from_utf8_lossy(&output.stderr)),
        })
    }

    /// Asks the queue's own process how much it holds.
    ///
    /// Everything else lags: the management interface, and for quorum queues `list_queues` too,
    /// show counters that are renewed every five seconds.
    pub(crate) fn depth(&self, vhost: &str, queue: &str) -> Result<Option<Depth>, BrokerError> {
        let program = format!(
            "{DEPTH} case rabbit_amqqueue:lookup(rabbit_misc:r({}, queue, {})) of
                {{ok, Q}} -> Depth(Q);
                _ -> none
            end.",
            binary(vhost),
            binary(queue)
        );
        let answer = self.run(&["eval", &program])?;
        let answer = answer.trim();
        if answer == "none" {
            return Ok(None);
        }
        parse_depth(answer).map(Some).ok_or_else(|| BrokerError::Unexpected {
            what: "a queue's depth",
            text: answer.to_owned(),
        })
    }

    /// Asks all queues of a virtual host how much they hold, as [`depth`](Self::depth) does one; a queue without a
    /// leader cannot tell.
    pub(crate) fn depths(&self, vhost: &str) -> Result<Vec<(String, Option<Depth>)>, BrokerError> {
        let program = format!(
            "{DEPTH} lists:foreach(
                fun(Q) ->
                    {{resource, _, queue, Name}} = amqqueue:get_name(Q),
                    io:format(\"~s ~w~n\", [Name, Depth(Q)])
                end,
                rabbit_amqqueue:list({})).",
            binary(vhost)
        );
        let answer = self.run(&["eval", &program])?;
        // The value of the last expression is written too.
        let lines = answer.lines().filter(|line| *line != "ok");
        let depth = |line: &str| {
            let (name, depth) = line.split_once(' ')?;
            let depth = if depth == LEADERLESS { None } else { Some(parse_depth(depth)?) };
            Some((name.to_owned(), depth))
        };
        let depths: Option<_> = lines.map(depth).collect();
        depths.ok_or(BrokerError::Unexpected { what: "the depths of queues", text: answer })
    }
}

/// What [`DEPTH`] says of a quorum queue without a leader.
const LEADERLESS: &str = "leaderless";

/// Tells how much a queue holds. From 4.3 on a queue takes no function of ours to carry out, only the name of one of
/// its own; before, that would have been the end of it.
const DEPTH: &str = "Depth = fun(Q) ->
    case amqqueue:get_type(Q) of
        rabbit_quorum_queue ->
            At = amqqueue:get_pid(Q),
            Answer =
                try ra:leader_query(At, fun rabbit_fifo:overview/1)
                catch error:function_clause ->
                    ra:leader_query(At, {rabbit_fifo, overview, []})
                end,
            case Answer of
                {ok, {_, O}, _} -> {maps:get(num_ready_messages, O), maps:get(num_checked_out, O)};
                _ -> leaderless
            end;
        _ ->
            [{_, R}, {_, U}] = rabbit_amqqueue:info(Q, [messages_ready, messages_unacknowledged]),
            {R, U}
    end
end,";

/// Finds a quorum queue as `Name`, the name that its processes on all nodes have.
const FIND: &str = "{ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(VHOST, queue, QUEUE)),
    {Name, _} = amqqueue:get_pid(Q),";

impl Ctl {
    /// Returns the node that leads a quorum queue, as this node knows.
    pub(crate) fn leader(&self, vhost: &str, queue: &str) -> Result<String, BrokerError> {
        let program = "{ok, _, {_, Leader}} = ra:members({Name, node()}),
            io:format(\"~s\", [Leader]).";
        let answer = self.run(&["eval", &format!("{}{program}", find(vhost, queue))])?;
        // The value of the last expression is written too.
        Ok(answer.trim().trim_end_matches("ok").trim().to_owned())
    }

    /// Has another node lead a quorum queue.
    pub(crate) fn lead(&self, vhost: &str, queue: &str, node: &str) -> Result<(), BrokerError> {
        let program = format!("ra:transfer_leadership({{Name, node()}}, {{Name, '{node}'}}).");
        self.run(&["eval", &format!("{}{program}", find(vhost, queue))]).map(drop)
    }
}

fn find(vhost: &str, queue: &str) -> String {
    FIND.replace("VHOST", &binary(vhost)).replace("QUEUE", &binary(queue))
}

/// Parses `{ready,unacknowledged}`.
fn parse_depth(answer: &str) -> Option<Depth> {
    let (ready, unacknowledged) = answer.strip_prefix('{')?.strip_suffix('}')?.split_once(',')?;
    Some(Depth {
        ready: ready.trim().parse().ok()?,
        unacknowledged: unacknowledged.trim().parse().ok()?,
    })
}

/// Returns the text as an Erlang binary, by its bytes so that nothing needs escaping.
fn binary(text: &str) -> String {
    let bytes: Vec<String> = text.bytes().map(|byte| byte.to_string()).collect();
    format!("<<{}>>", bytes.join(","))
}

#[cfg(test)]
mod tests {
    use super::{binary, parse_depth};
    use crate::vhost::Depth;

    #[test]
    fn erlang_is_spoken_well_enough() {
        assert_eq!(binary("a\""), "<<97,34>>");
        let depth = Depth { ready: 3, unacknowledged: 0 };
        assert_eq!(parse_depth("{3,0}"), Some(depth));
        assert_eq!(parse_depth("{error,x}"), None);
    }
}
