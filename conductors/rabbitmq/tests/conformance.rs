//! The RabbitMQ conductor keeps the contract, on a real broker.

use atomizer::Conductor;
use atomizer_conformance::{World, conformance_tests, event_log_tests};
use atomizer_rabbitmq::RabbitMq;
use atomizer_test_support::{Proxy, Vhost, shared};
use tokio::task::spawn_blocking;

/// A virtual host of its own, reached through a proxy that can be cut.
struct OnBroker {
    vhost: Vhost,
    proxy: Proxy,
}

impl OnBroker {
    async fn new() -> Self {
        let world = spawn_blocking(|| {
            let broker = shared().expect("a broker");
            let vhost = broker.vhost().expect("a virtual host");
            let proxy = Proxy::start(broker.address()).expect("a proxy");
            Self { vhost, proxy }
        });
        world.await.expect("the world is made")
    }
}

#[async_trait::async_trait]
impl World for OnBroker {
    fn conductor(&self) -> Box<dyn Conductor> {
        let url = self.vhost.url_through(self.proxy.address());
        Box::new(RabbitMq::from_url(&url).expect("the URL is valid"))
    }

    async fn cut(&self) {
        self.proxy.cut();
    }
}

conformance_tests!(OnBroker::new());
event_log_tests!(OnBroker::new());
