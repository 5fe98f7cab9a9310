//! What these tests share.

use std::{sync::Arc, time::Duration};

use atomizer::{AtomError, EventKind, EventStream, prelude::*};
use atomizer_rabbitmq::RabbitMq;
use atomizer_test_support::{Broker, Vhost, shared};
use tokio::task::spawn_blocking;

/// Runs what blocks, such as starting a broker, beside the runtime.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    spawn_blocking(work).await.unwrap()
}

pub(crate) async fn vhost() -> Vhost {
    blocking(|| shared().expect("a broker").vhost().unwrap()).await
}

pub(crate) async fn delete_queue(vhost: &Arc<Vhost>, queue: &str) {
    let path = format!("/api/queues/{}/{queue}", vhost.name());
    let vhost = Arc::clone(vhost);
    blocking(move || vhost.node().manage("DELETE", &path, None).unwrap()).await;
}

/// Leaves a queue as it is when brokers are lost while they make it: its member here is new, has heard of others, and
/// is never elected by them.
pub(crate) async fn lose_leader(vhost: &Arc<Vhost>, queue: &str) {
    let expression = format!(
        "Resource = rabbit_misc:r(<<\"{vhost}\">>, queue, <<\"{queue}\">>),
         {{ok, Q}} = rabbit_amqqueue:lookup(Resource),
         {{Name, _}} = amqqueue:get_pid(Q),
         Id = {{Name, node()}},
         ok = ra:force_delete_server(quorum_queues, Id),
         Uid = ra:new_uid(atom_to_binary(Name)),
         ok = ra:start_server(quorum_queues, #{{
             cluster_name => Name, id => Id, uid => Uid, log_init_args => #{{uid => Uid}},
             initial_members => [Id, {{Name, 'lost1@localhost'}}, {{Name, 'lost2@localhost'}}],
             machine => {{module, rabbit_fifo, #{{name => Name, queue_resource => Resource}}}}}}).",
        vhost = vhost.name()
    );
    let vhost = Arc::clone(vhost);
    blocking(move || vhost.node().ctl(&["eval", &expression]).unwrap()).await;
}

/// Stops the process of a queue, and leaves the queue as it is.
pub(crate) async fn stop_queue(vhost: &Arc<Vhost>, queue: &str) {
    on_process(vhost, queue, "ra:stop_server(quorum_queues, Id)").await;
}

pub(crate) async fn start_queue(vhost: &Arc<Vhost>, queue: &str) {
    on_process(vhost, queue, "ra:restart_server(quorum_queues, Id)").await;
}

/// Stops what serves the streams of a virtual host, again and again for two seconds: the broker starts it again by itself.
pub(crate) async fn stop_streams(vhost: &Arc<Vhost>) {
    let expression = format!(
        "Stop = fun() -> [supervisor:terminate_child(osiris_server_sup, Id)
           || {{Id, _, _, _}} <- supervisor:which_children(osiris_server_sup),
              string:find(Id, \"{}\") =/= nomatch] end,
         [_ | _] = Stop(),
         spawn(fun() -> [{{Stop(), timer:sleep(10)}} || _ <- lists:seq(1, 200)] end).",
        vhost.name()
    );
    let vhost = Arc::clone(vhost);
    blocking(move || vhost.node().ctl(&["eval", &expression]).unwrap()).await;
}

async fn on_process(vhost: &Arc<Vhost>, queue: &str, act: &str) {
    let expression = format!(
        "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"{vhost}\">>, queue, <<\"{queue}\">>)),
         {{Name, _}} = amqqueue:get_pid(Q),
         Id = {{Name, node()}},
         ok = {act}.",
        vhost = vhost.name()
    );
    let vhost = Arc::clone(vhost);
    blocking(move || vhost.node().ctl(&["eval", &expression]).unwrap()).await;
}

/// Whether a node tells its operator what is the matter with a queue.
pub(crate) fn says_that_it_has_no_leader(kind: &EventKind, queue: &str) -> bool {
    says(kind, [queue, "without a leader", "docs/failures.md"])
}

pub(crate) fn says_that_it_is_down(kind: &EventKind, queue: &str) -> bool {
    says(kind, [queue, "its process may be down", "docs/failures.md"])
}

fn says(kind: &EventKind, parts: [&str; 3]) -> bool {
    let EventKind::SubscriptionLost { error, .. } = kind else { return false };
    parts.iter().all(|part| error.contains(part))
}

/// Waits until so many messages are in a queue, taken or not.
pub(crate) async fn until_it_holds(vhost: &Arc<Vhost>, queue: &'static str, messages: u64) {
    soon(async {
        loop {
            let vhost = Arc::clone(vhost);
            let depth = blocking(move || vhost.queue_depth(queue).unwrap()).await;
            if depth.is_some_and(|depth| depth.ready + depth.unacknowledged == messages) {
                return;
            }
        }
    })
    .await;
}

/// How long an [impatient](impatient) server lets a delivery be held. It looks twice a second.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);

/// Starts a server that closes the channel of who holds a delivery for long.
pub(crate) async fn impatient() -> Arc<Broker> {
    let start = || {
        let broker = Broker::start().unwrap();
        let patience = PATIENCE.as_millis();
        let set = format!(
            "application:set_env(rabbit, consumer_timeout, {patience}),
             application:set_env(rabbit, channel_tick_interval, 500)."
        );
        broker.ctl(&["eval", &set]).unwrap();
        Arc::new(broker)
    };
    blocking(start).await
}

pub(crate) fn rabbit(url: &str) -> RabbitMq {
    RabbitMq::from_url(url).unwrap()
}

pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(90), future).await.expect("it happens soon")
}

pub(crate) async fn until(
    events: &mut EventStream,
    mut fits: impl FnMut(&EventKind) -> bool,
) -> EventKind {
    soon(async {
        loop {
            // Events that are missed are of electrons, of which there are many.
            if let Ok(event) = events.next().await.expect("the node lives")
                && fits(&event.kind)
            {
                return event.kind;
            }
        }
    })
    .await
}

pub(crate) struct Double;

impl Atom for Double {
    const ID: &'static str = "double";
    type Input = u64;
    type Output = u64;

    async fn process(&self, _cx: &Context, input: u64) -> Result<u64> {
        input.checked_mul(2).ok_or_else(|| AtomError::msg("too large to double"))
    }
}

pub(crate) async fn serve(url: &str) -> Atomizer {
    Atomizer::builder().conductor(rabbit(url)).atom(Double).start().await.unwrap()
}
