//! Messages that would hold up others: each is published over a channel of its own.
//!
//! One message can cost all others of its channel their time. A queue without a leader confirms nothing, and once a
//! few dozens for it are unconfirmed, RabbitMQ reads no more from their channel. And a message for an exchange that
//! its sender may not use closes the channel (403). So what goes where that was seen is published aside for a while:
//! whatever is the matter there costs nobody else anything, and one that is taken ends the suspicion.

use std::{
    collections::HashMap,
    fmt::Display,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use atomizer::SendError;
use lapin::{
    Channel, Confirmation, Connection, options::ConfirmSelectOptions, protocol::AMQPSoftError,
    types::ShortString,
};
use tokio::{
    sync::{Mutex as AsyncMutex, Semaphore},
    time::{Instant, timeout},
};

use crate::{
    connect::plain,
    declare::refusal,
    life::{Life, REQUEST_TIMEOUT},
    topology::Route,
};

/// How long a destination is remembered after the last fault that was seen there.
const KEPT: Duration = Duration::from_secs(60);
/// How many are remembered; the oldest is forgotten for another.
const KEPT_MAX: usize = 1024;
/// How many messages wait at a time in one session to be published aside, and are.
const PLACES_MAX: usize = 1024;
/// How many channels there are at a time: one for each destination, while there are no more.
const CHANNELS_MAX: usize = 64;
/// How long a message waits for others that have the same destination.
const TURN_TIMEOUT: Duration = Duration::from_secs(1);

/// Where messages go: one key of an exchange, or all of it. Their hash only (64 bits), for there is one for each
/// message under way. One that is taken for another's may be published aside, or hold up others, and is neither lost
/// nor misjudged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Destination(u64);

impl Destination {
    pub(crate) fn key(Route { exchange, key }: &Route) -> Self {
        Self::of(exchange.as_str(), Some(key.as_str()))
    }

    pub(crate) fn exchange(exchange: &str) -> Self {
        Self::of(exchange, None)
    }

    fn of(exchange: &str, key: Option<&str>) -> Self {
        let mut hasher = DefaultHasher::new();
        (exchange, key).hash(&mut hasher);
        Self(hasher.finish())
    }
}

/// What a broker calls an exchange: the default exchange has no name of its own.
pub(crate) fn named(exchange: &str) -> &str {
    if exchange.is_empty() { "amq.default" } else { exchange }
}

/// Held by the one that is published: a queue that takes nothing is asked once at a time.
type Turn = Arc<AsyncMutex<()>>;

#[derive(Debug)]
struct Suspect {
    since: Instant,
    turn: Turn,
}

/// Where a fault was seen; shared by all sessions of a conductor, for the fault has cost the session that saw it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Suspects(Arc<Mutex<HashMap<Destination, Suspect>>>);

impl Suspects {
    fn lock(&self) -> MutexGuard<'_, HashMap<Destination, Suspect>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has what goes there published aside from now on.
    pub(crate) fn add(&self, destination: Destination, name: impl Display) {
        let mut suspects = self.lock();
        let since = Instant::now();
        if let Some(suspect) = suspects.get_mut(&destination) {
            suspect.since = since;
            return;
        }
        suspects.retain(|_, suspect| suspect.since.elapsed() < KEPT);
        if suspects.len() >= KEPT_MAX {
            let oldest = suspects.iter().min_by_key(|(_, suspect)| suspect.since);
            if let Some(oldest) = oldest.map(|(oldest, _)| *oldest) {
                suspects.remove(&oldest);
            }
        }
        tracing::warn!(destination = %name, "what goes there is published aside for now");
        suspects.insert(destination, Suspect { since, turn: Turn::default() });
    }

    /// Returns what is suspected of the ways that this route goes.
    pub(crate) fn find(&self, route: &Route) -> Option<Found> {
        let suspects = self.lock();
        if suspects.is_empty() {
            return None;
        }
        [Destination::key(route), Destination::exchange(route.exchange.as_str())]
            .into_iter()
            .find_map(|destination| {
                let suspect = suspects.get(&destination)?;
                let (exchange, turn) = (route.exchange.clone(), Arc::clone(&suspect.turn));
                (suspect.since.elapsed() < KEPT).then_some(Found { destination, exchange, turn })
            })
    }

    /// Trusts a destination again.
    pub(crate) fn remove(&self, destination: Destination) {
        self.lock().remove(&destination);
    }
}

/// A suspected destination.
pub(crate) struct Found {
    destination: Destination,
    exchange: ShortString,
    turn: Turn,
}

/// The way aside of one session.
#[derive(Debug)]
pub(crate) struct Aside {
    pub(crate) suspects: Suspects,
    connection: Arc<Connection>,
    life: Life,
    /// For those that wait for their turn, too.
    places: Semaphore,
    channels: Semaphore,
}

impl Aside {
    pub(crate) fn new(suspects: Suspects, connection: Arc<Connection>, life: Life) -> Self {
        let (places, channels) = (Semaphore::new(PLACES_MAX), Semaphore::new(CHANNELS_MAX));
        Self { suspects, connection, life, places, channels }
    }

    /// Publishes over a new channel. What is returned is in the confirmation: there is nothing else on the channel.
    /// `way` is where it goes, or all that is suspected with it, and `name` what that is called.
    ///
    /// # Errors
    /// What is neither a refusal nor silence ends the session, as it would elsewhere.
    pub(crate) async fn publish(
        &self,
        Found { destination, exchange, turn }: Found,
        way: Destination,
        name: &str,
        publish: impl AsyncFnOnce(&Channel) -> lapin::Result<Confirmation>,
    ) -> lapin::Result<Result<Confirmation, SendError>> {
        let not_taken = |reason: String| Ok(Err(SendError::NotTaken(reason)));
        let Ok(_place) = self.places.try_acquire() else {
            return not_taken("many wait that are published aside".to_owned());
        };
        let waiting = async { (turn.lock().await, self.channels.acquire().await) };
        let Ok(_turn) = timeout(TURN_TIMEOUT, waiting).await else {
            return not_taken("others wait for the same destination".to_owned());
        };
        if !self.suspects.lock().contains_key(&destination) {
            return not_taken("it need not be published aside any more".to_owned());
        }
        // A channel that is not opened in time is not closed either.
        if self.life.is_blocked() {
            return not_taken("the broker takes nothing for now".to_owned());
        }
        let publishing = async {
            // Closed when it is dropped.
            let channel = self.connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            publish(&channel).await
        };
        match timeout(REQUEST_TIMEOUT, publishing).await {
            Ok(Ok(confirmation)) => {
                self.suspects.remove(destination);
                Ok(Ok(confirmation))
            }
            Ok(Err(error)) if refusal(&error) == Some(AMQPSoftError::ACCESSREFUSED) => {
                let exchange = exchange.as_str();
                self.suspects.add(Destination::exchange(exchange), named(exchange));
                Ok(Err(SendError::Refused(plain(&error))))
            }
            Ok(Err(error)) => Err(error),
            Err(_) => {
                if destination != way {
                    // Its exchange is not refused any more.
                    self.suspects.remove(destination);
                }
                self.suspects.add(way, name);
                not_taken(format!("no confirm within {REQUEST_TIMEOUT:?}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn route(key: usize) -> Route {
        Route { exchange: "exchange".into(), key: key.to_string().into() }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_suspected_is_bounded_and_forgotten_after_a_while() {
        let suspects = Suspects::default();
        for key in 0..=KEPT_MAX {
            suspects.add(Destination::key(&route(key)), key);
            advance(Duration::from_millis(1)).await;
        }
        assert!(suspects.find(&route(0)).is_none(), "the oldest makes room");
        assert!(suspects.find(&route(1)).is_some());
        suspects.remove(Destination::key(&route(1)));
        assert!(suspects.find(&route(1)).is_none());
        suspects.add(Destination::exchange("exchange"), "exchange");
        assert!(suspects.find(&route(1)).is_some(), "all of it is");
        advance(KEPT).await;
        assert!(suspects.find(&route(1)).is_none());
    }
}
