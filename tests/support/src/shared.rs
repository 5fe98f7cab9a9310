//! The one broker that tests share.

use std::sync::OnceLock;

use crate::broker::Broker;
use crate::env;
use crate::error::BrokerError;
use crate::node::Node;

/// Describes the broker to share; set by whoever starts the tests, see [`Node::describe`].
pub const SHARED_BROKER: &str = "ATOMIZER_TEST_BROKER";

#[derive(Debug)]
enum Shared {
    Given(Node),
    Own(Box<Broker>),
}

/// Returns the broker that tests share; each takes a virtual host of its own on it.
///
/// That is the one which [`SHARED_BROKER`] describes. Where it is unset, the first call in a
/// process starts one, and it ends with the process.
///
/// # Errors
///
/// When RabbitMQ is missing or does not start; every later call returns the same error.
pub fn shared() -> Result<&'static Node, &'static BrokerError> {
    static SHARED: OnceLock<Result<Shared, BrokerError>> = OnceLock::new();
    let found = SHARED.get_or_init(|| match env::text(SHARED_BROKER) {
        Some(description) => Node::from_description(&description).map(Shared::Given),
        None => Broker::start().map(Box::new).map(Shared::Own),
    });
    match found {
        Ok(Shared::Given(node)) => Ok(node),
        Ok(Shared::Own(broker)) => Ok(broker.node()),
        Err(error) => Err(error),
    }
}
