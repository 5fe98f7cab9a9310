//! The faults: how each is brought about, how it is proven to have bitten, and when the broker can serve again.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use atomizer::EventKind;
use atomizer_bench::now;
use atomizer_test_support::{Broker, Node, Permissions, Proxy, Vhost};
use clap::ValueEnum;
use tokio::task::block_in_place;

use crate::flow::{Flow, PATIENCE};

/// Given up after twice this many seconds of silence.
const HEARTBEAT_S: u32 = 1;
const EXCHANGE: &str = "atomizer";
const QUEUE: &str = "atomizer.atom.note";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Fault {
    BrokerRestarted,
    BrokerKilled,
    ConnectionsClosed,
    ExchangeDeleted,
    AcknowledgementTimedOut,
    PermissionTaken,
    ConnectionRefused,
    ConsumerCancelled,
    BrokerFrozen,
    HalfOpen,
    Blocked,
    AddressRefuses,
    ConsumerForgotten,
}

/// What one run came to.
#[derive(Debug)]
pub(crate) struct Recovery {
    /// From when the fault began until the node noticed.
    pub(crate) detection: Duration,
    /// From when the broker could serve, and the node had noticed, until electrons flowed.
    pub(crate) recovery: Duration,
    /// Confirmed electrons that never ran.
    pub(crate) lost: usize,
}

/// When a fault began, was noticed, and was over.
struct Moments {
    begun: SystemTime,
    noticed: SystemTime,
    over: SystemTime,
}

/// Brings about a fault while electrons flow, and waits until they flow again.
pub(crate) async fn run(fault: Fault, broker: &Broker) -> Result<Recovery> {
    let vhost = block_in_place(|| broker.vhost())?;
    let proxies = [Proxy::start(broker.address())?, Proxy::start(broker.address())?];
    let url = url(fault, broker, &vhost, &proxies)?;
    let mut flow = Flow::start(&url).await?;
    let Moments { begun, noticed, over } =
        strike(fault, &mut flow, broker, &vhost, &proxies).await?;
    let since = noticed.max(over);
    let recovery = flow.flows_again(since).await;
    let recovery = recovery.with_context(|| format!("the node told:{}", flow.told()))?;
    let lost = flow.end().await?;
    block_in_place(|| drop((vhost, proxies)));
    Ok(Recovery { detection: noticed.duration_since(begun)?, recovery, lost })
}

fn url(fault: Fault, broker: &Broker, vhost: &Vhost, [one, other]: &[Proxy; 2]) -> Result<String> {
    let url = match fault {
        Fault::HalfOpen => vhost.url_through(one.address()),
        Fault::AddressRefuses => vhost
            .url_through(one.address())
            .replace(&one.address().to_string(), &format!("{},{}", one.address(), other.address())),
        Fault::PermissionTaken => {
            permit(broker, vhost, &Permissions::all())?;
            vhost.url_as(&user(vhost), "secret")
        }
        _ => vhost.url(),
    };
    Ok(format!("{url}?heartbeat={HEARTBEAT_S}"))
}

async fn strike(
    fault: Fault,
    flow: &mut Flow,
    broker: &Broker,
    vhost: &Vhost,
    proxies: &[Proxy; 2],
) -> Result<Moments> {
    match fault {
        Fault::BrokerRestarted => restart(flow, broker, Broker::stop).await,
        Fault::BrokerKilled => {
            // A queue that was declared a moment ago does not outlive a crash of RabbitMQ 3.10.
            block_in_place(|| broker.flush())?;
            restart(flow, broker, Broker::kill).await
        }
        Fault::ConnectionsClosed => {
            let close = || vhost.close_connections("a fault");
            at_once(flow, session_lost, "CONNECTION_FORCED", || Ok(close()?)).await
        }
        Fault::ExchangeDeleted => {
            let delete = || delete(vhost, &format!("exchanges/{}/{EXCHANGE}", vhost.name()));
            at_once(flow, session_lost, "NOT_FOUND", delete).await
        }
        Fault::AcknowledgementTimedOut => time_out(flow, broker, vhost).await,
        Fault::PermissionTaken => take_permission(flow, broker, vhost).await,
        Fault::ConnectionRefused => refuse_connections(flow, broker, vhost).await,
        Fault::ConsumerCancelled => {
            // With the queue goes what is in it, confirmed or not: that is no loss of ours.
            flow.pause().await?;
            let delete = || delete(vhost, &format!("queues/{}/{QUEUE}", vhost.name()));
            let moments = at_once(flow, subscription_lost, "", delete).await?;
            flow.resume();
            Ok(moments)
        }
        Fault::BrokerFrozen => {
            let begun = now();
            block_in_place(|| broker.pause())?;
            let noticed = flow.noticed(begun, session_lost, "").await;
            block_in_place(|| broker.resume())?;
            Ok(Moments { begun, noticed: noticed?, over: now() })
        }
        Fault::HalfOpen => {
            let begun = now();
            proxies[0].stall(true);
            let noticed = flow.noticed(begun, session_lost, "").await?;
            proxies[0].stall(false);
            Ok(Moments { begun, noticed, over: now() })
        }
        Fault::Blocked => block(flow, broker).await,
        Fault::AddressRefuses => {
            let used = proxies.iter().find(|proxy| proxy.connections() > 0);
            let used = used.context("neither proxy is used")?;
            at_once(flow, session_lost, "", || {
                used.refuse(true);
                used.cut();
                Ok(())
            })
            .await
        }
        Fault::ConsumerForgotten => {
            let forget = format!(
                "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"{}\">>, queue, <<\"{QUEUE}\">>)),
                 [{{ok, _, _}} = ra:process_command(amqqueue:get_pid(Q),
                     rabbit_fifo:make_checkout({{element(2, C), element(1, C)}}, cancel, #{{}}))
                  || C <- rabbit_amqqueue:consumers(Q)].",
                vhost.name()
            );
            let forget = || eval(broker, &forget).map(drop);
            at_once(flow, subscription_lost, "forgotten", forget).await
        }
    }
}

/// A fault after which the broker can serve at once.
async fn at_once(
    flow: &mut Flow,
    by: fn(&EventKind) -> bool,
    says: &str,
    fault: impl FnOnce() -> Result<()>,
) -> Result<Moments> {
    let begun = now();
    block_in_place(fault)?;
    let noticed = flow.noticed(begun, by, says).await?;
    Ok(Moments { begun, noticed, over: noticed })
}

async fn restart<E>(
    flow: &mut Flow,
    broker: &Broker,
    end: impl FnOnce(&Broker) -> Result<(), E>,
) -> Result<Moments>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let begun = now();
    block_in_place(|| end(broker))?;
    let noticed = flow.noticed(begun, session_lost, "").await?;
    let over = block_in_place(|| {
        thread::scope(|scope| {
            let serves = scope.spawn(|| serves_from(broker.address()));
            broker.start_again()?;
            serves.join().map_err(|_| anyhow::anyhow!("the probe panicked"))?
        })
    })?;
    Ok(Moments { begun, noticed, over })
}

/// Waits until the broker speaks AMQP; returns since when.
fn serves_from(address: SocketAddr) -> Result<SystemTime> {
    let begun = now();
    while begun.elapsed()? < PATIENCE {
        let answers = || -> std::io::Result<()> {
            let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"AMQP\0\0\x09\x01")?;
            stream.read_exact(&mut [0])
        };
        if answers().is_ok() {
            return Ok(now());
        }
        thread::sleep(Duration::from_millis(10));
    }
    anyhow::bail!("the broker does not come back")
}

async fn time_out(flow: &mut Flow, broker: &Broker, vhost: &Vhost) -> Result<Moments> {
    // The time-out, and how often a channel looks whether it is over, in milliseconds.
    eval(
        broker,
        "application:set_env(rabbit, consumer_timeout, 1000),
         application:set_env(rabbit, channel_tick_interval, 200).",
    )?;
    // Read by channels as they begin.
    let closed = now();
    block_in_place(|| vhost.close_connections("new limits"))?;
    flow.noticed(closed, session_lost, "").await?;
    flow.flows_again(now()).await?;
    let begun = now();
    flow.hold_one().await?;
    let noticed = flow.noticed(begun, subscription_lost, "").await;
    eval(
        broker,
        "application:set_env(rabbit, consumer_timeout, 1800000),
         application:set_env(rabbit, channel_tick_interval, 60000).",
    )?;
    flow.let_go();
    let noticed = noticed?;
    Ok(Moments { begun, noticed, over: noticed })
}

fn user(vhost: &Vhost) -> String {
    format!("user-{}", vhost.name())
}

fn permit(broker: &Broker, vhost: &Vhost, permissions: &Permissions) -> Result<()> {
    Ok(block_in_place(|| broker.add_user(&user(vhost), "secret", vhost.name(), permissions))?)
}

/// 403, at the next publish.
async fn take_permission(flow: &mut Flow, broker: &Broker, vhost: &Vhost) -> Result<Moments> {
    let begun = now();
    permit(broker, vhost, &Permissions::none())?;
    // Channels remember what was allowed for a while; new ones ask.
    block_in_place(|| vhost.close_connections("a fault"))?;
    let noticed = flow.noticed(begun, session_lost, "").await?;
    flow.noticed(begun, open_failed, "ACCESS_REFUSED").await?;
    permit(broker, vhost, &Permissions::all())?;
    let over = now();
    Ok(Moments { begun, noticed, over })
}

/// 530, when a connection is made.
async fn refuse_connections(flow: &mut Flow, broker: &Broker, vhost: &Vhost) -> Result<Moments> {
    let limit = |connections: &str| {
        let limits = format!("{{\"max-connections\": {connections}}}");
        block_in_place(|| broker.ctl(&["set_vhost_limits", "--vhost", vhost.name(), &limits]))
    };
    let begun = now();
    limit("0")?;
    block_in_place(|| vhost.close_connections("a fault"))?;
    let noticed = flow.noticed(begun, session_lost, "").await?;
    flow.noticed(begun, open_failed, "NOT_ALLOWED").await?;
    let cleared = format!(
        "ok = rabbit_vhost_limit:clear(<<\"{}\">>, <<\"tests\">>), os:system_time(microsecond).",
        vhost.name()
    );
    let over = time_of(&eval(broker, &cleared)?)?;
    Ok(Moments { begun, noticed, over })
}

async fn block(flow: &Flow, broker: &Broker) -> Result<Moments> {
    let begun = now();
    eval(broker, "rabbit_alarm:set_alarm({{resource_limit, memory, node()}, []}).")?;
    let stuck = flow.is_stuck().await;
    let noticed = now();
    let cleared = eval(
        broker,
        "rabbit_alarm:clear_alarm({resource_limit, memory, node()}), os:system_time(microsecond).",
    )?;
    stuck?;
    Ok(Moments { begun, noticed, over: time_of(&cleared)? })
}

fn eval(node: &Node, expression: &str) -> Result<String> {
    Ok(block_in_place(|| node.ctl(&["eval", expression]))?)
}

/// Parses microseconds since the epoch.
fn time_of(answer: &str) -> Result<SystemTime> {
    let micros = answer.trim().parse().with_context(|| format!("not a time: {answer}"))?;
    Ok(SystemTime::UNIX_EPOCH + Duration::from_micros(micros))
}

fn delete(vhost: &Vhost, path: &str) -> Result<()> {
    let deleted = block_in_place(|| vhost.node().manage("DELETE", &format!("/api/{path}"), None))?;
    ensure!(deleted.is_null(), "not deleted: {deleted}");
    Ok(())
}

fn session_lost(kind: &EventKind) -> bool {
    matches!(kind, EventKind::SessionLost { .. })
}

fn subscription_lost(kind: &EventKind) -> bool {
    matches!(kind, EventKind::SubscriptionLost { atom: Some(_), .. })
}

fn open_failed(kind: &EventKind) -> bool {
    matches!(kind, EventKind::OpenFailed { .. })
}
