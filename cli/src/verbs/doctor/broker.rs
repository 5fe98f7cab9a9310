//! What is found out about the broker itself.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use atomizer::OpenError;
use atomizer_rabbitmq::{Operator, OperatorError, Probe, Reached};

use super::Finding;
use crate::shared::Shared;

/// How far apart clocks may be: what ids and events say of the order of things is read by people.
const SKEW_MAX: Duration = Duration::from_secs(2);

/// Says of each address whether it is of use, and of those that are what there is to know of them.
pub(super) fn probed(probes: &[Probe]) -> Vec<Finding> {
    let mut findings: Vec<_> = probes.iter().map(address).collect();
    let reached: Vec<_> = probes
        .iter()
        .filter_map(|probe| probe.outcome.as_ref().ok().map(|reached| (probe, reached)))
        .collect();
    let servers: BTreeSet<_> = reached.iter().map(|(_, reached)| reached.server.as_str()).collect();
    if servers.len() > 1 {
        let servers: Vec<_> = servers.into_iter().collect();
        findings.push(Finding::note(
            "version",
            format!("the addresses are of different versions: {}", servers.join(", ")),
            "as during an upgrade; otherwise, are they one cluster?",
        ));
    }
    if let Some((_, reached)) = reached.first() {
        findings.extend(version(reached));
        findings.push(heartbeat(reached));
    }
    if let Some((probe, _)) = reached
        .iter()
        .find(|(probe, reached)| !reached.encrypted && !is_this_machine(&probe.address))
    {
        findings.push(Finding::note(
            "encryption",
            format!("{} is not encrypted: whoever is on the way can read the password", probe.address),
            "where the network is not trusted, use amqps:// (the feature `tls` of atomizer-rabbitmq)",
        ));
    }
    findings
}

fn address(probe: &Probe) -> Finding {
    let Probe { address, took, outcome, .. } = probe;
    match outcome {
        Ok(reached) => {
            let encrypted = if reached.encrypted { ", encrypted" } else { "" };
            let (server, took) = (&reached.server, took.as_millis());
            Finding::ok("address", format!("{address}: {server} after {took} ms{encrypted}"))
        }
        // Its text begins with the address.
        Err(error) => Finding::wrong("address", error.to_string(), advice(error)),
    }
}

/// Says what to do when there is no connection.
fn advice(error: &OpenError) -> &'static str {
    let text = error.to_string();
    let says = |part: &str| text.contains(part);
    match error {
        _ if says("ACCESS_REFUSED - Login") => {
            "user or password is wrong; guest may connect from the broker's own machine only \
             (rabbitmqctl list_users, change_password)"
        }
        _ if says("access to vhost") && says("refused") => {
            "the user has no permissions in this virtual host (rabbitmqctl set_permissions)"
        }
        _ if says("vhost") && says("not found") => {
            "there is no such virtual host: is the end of the URL right? (rabbitmqctl list_vhosts, add_vhost)"
        }
        OpenError::Refused(_) => "the broker is there and declines: see its log",
        _ if says("Connection refused") => {
            "nothing listens there: is RabbitMQ running, and are host and port right?"
        }
        _ if says("no answer") => {
            "host or port is wrong, a firewall drops it, or the broker hangs (rabbitmq-diagnostics check_running)"
        }
        OpenError::Unreachable(_) => "is the name right, and the network there?",
        OpenError::Misconfigured(_) if says("too old") => "use RabbitMQ 3.10 or later",
        OpenError::Misconfigured(_) if says("ertificate") => {
            "name the authority in the URL, ?cacertfile=PATH, and see that the name of the host is in the certificate"
        }
        _ => "is this the port of AMQP, and amqp:// or amqps:// as the broker has it?",
    }
}

/// What is known to be wrong with a version, or lacking.
fn version(reached: &Reached) -> Vec<Finding> {
    let Some(version) = reached.version else {
        let what = format!("{} is not known to be RabbitMQ", reached.server);
        let advice = "quorum queues, confirms and safe dead-lettering are needed";
        return vec![Finding::note("version", what, advice)];
    };
    let server = &reached.server;
    let mut findings = Vec::new();
    if version < (3, 12) {
        findings.push(Finding::note(
            "version",
            format!("{server} has one consumer_timeout for all queues (30 min by default)"),
            "leave it at 30 min or more: nodes renew what they hold after 10 min (RabbitMq::hold_max)",
        ));
    }
    if version < (4, 0) {
        findings.push(Finding::note(
            "version",
            format!("{server} gets no fixes from its makers any more"),
            "plan to go to 4.x; nodes need no change",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("version", format!("nothing is known against {server}")));
    }
    findings
}

fn heartbeat(reached: &Reached) -> Finding {
    let heartbeat = reached.heartbeat;
    if heartbeat.is_zero() {
        let what = "there is no heartbeat: a broker that is gone without a word is not noticed";
        return Finding::wrong(
            "heartbeat",
            what,
            "set ?heartbeat=10 in the URL, or heartbeat in the broker's configuration",
        );
    }
    if heartbeat > Duration::from_secs(60) {
        let what = format!("a silent broker is given up after {:?} only", heartbeat * 2);
        return Finding::note("heartbeat", what, "?heartbeat=10 is the default");
    }
    Finding::ok("heartbeat", format!("every {heartbeat:?}"))
}

fn is_this_machine(address: &str) -> bool {
    let host = address.split_once("://").map_or("", |(_, host)| host);
    ["localhost:", "127.", "[::1]"].iter().any(|this| host.starts_with(this))
}

/// Tries whether a node could make its inbox.
pub(super) async fn declaring(shared: &Shared, operator: &Operator) -> Finding {
    let namespace = shared.namespace().replace('.', "\\.");
    match operator.try_declaring().await {
        Ok(()) => Finding::ok("permissions", "an inbox may be made, and was removed again"),
        Err(OperatorError::Refused(reason)) => Finding::wrong(
            "permissions",
            format!("an inbox may not be made: {reason}"),
            format!(
                "who only sees to dead letters needs none; all others need configure for ^{namespace}\\.inbox\\. at least \
                 (docs/topology.md, Permissions)"
            ),
        ),
        Err(error) => Finding::wrong(
            "permissions",
            format!("an inbox could not be made: {error}"),
            "has a majority of the brokers of the cluster, and memory and disk? (rabbitmqctl cluster_status)",
        ),
    }
}

/// Compares the broker's clock with ours.
pub(super) async fn clock(operator: &Operator) -> Finding {
    let before = now();
    let told = operator.clock().await;
    let after = now();
    match told {
        // It tells whole seconds, cut off.
        Ok(told) => {
            let ahead = told.duration_since(after).unwrap_or_default();
            let behind = before.duration_since(told + Duration::from_secs(1)).unwrap_or_default();
            let (skew, which) =
                if ahead > behind { (ahead, "ahead of") } else { (behind, "behind") };
            if skew > SKEW_MAX {
                let what =
                    format!("the broker's clock is {} s {which} this machine's", skew.as_secs());
                let advice = "let both follow one time (chrony, systemd-timesyncd): ids, events and dead letters say when";
                return Finding::wrong("clock", what, advice);
            }
            Finding::ok("clock", "that of the broker and that of this machine agree")
        }
        Err(error) => {
            let what = format!("the broker's clock cannot be asked for: {error}");
            Finding::note("clock", what, "nothing: it needs more permissions than work does")
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the clock of this machine is what is looked at")]
fn now() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do_fits_what_is_wrong() {
        let refused = |text: &str| advice(&OpenError::Refused(text.to_owned()));
        assert!(refused("ACCESS_REFUSED - Login was refused using …").contains("password"));
        assert!(refused("NOT_ALLOWED - vhost nowhere not found").contains("add_vhost"));
        let text = "NOT_ALLOWED - access to vhost 'jobs' refused for user 'alice'";
        assert!(refused(text).contains("set_permissions"));
        let gone = OpenError::Unreachable("Connection refused (os error 111)".to_owned());
        assert!(advice(&gone).contains("nothing listens there"));
    }

    #[test]
    fn this_machine_needs_no_encryption() {
        assert!(is_this_machine("amqp://127.0.0.1:5672/"));
        assert!(is_this_machine("amqp://[::1]:5672/") && is_this_machine("amqp://localhost:1/"));
        assert!(!is_this_machine("amqp://broker:5672/localhost:"));
    }
}
