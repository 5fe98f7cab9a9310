//! A connection for one purpose, apart from those of sessions.

use std::{sync::Arc, time::Duration};

use atomizer::{NodeId, OpenError, SessionError};
use lapin::Channel;
use tokio::task::JoinSet;

use crate::{
    connect::{Address, Addresses, Connected, Patience},
    life::{CloseWhenDropped, Life, REQUEST_TIMEOUT, close, watch_over},
    server::Server,
};

/// A connection, and the task that watches over it.
pub(crate) struct Opened {
    pub(crate) connection: Arc<lapin::Connection>,
    pub(crate) life: Life,
    pub(crate) server: Server,
    _watching: JoinSet<()>,
    _close: CloseWhenDropped,
}

impl Opened {
    /// Opens a connection to the first address that is of use, in somebody's name and in a role that operators can read.
    pub(crate) async fn open(
        addresses: &Addresses,
        who: &NodeId,
        role: &str,
    ) -> Result<Self, OpenError> {
        let connect = |address: Address, patience: Patience| async move {
            Self::connect(&address, who, role, patience.connect).await
        };
        addresses.try_each(connect).await
    }

    /// Opens a connection to one address.
    pub(crate) async fn connect(
        address: &Address,
        who: &NodeId,
        role: &str,
        limit: Duration,
    ) -> Result<Self, OpenError> {
        let Connected { connection, events, server } = address.connect(who, role, limit).await?;
        let (connection, life) = (Arc::new(connection), Life::new());
        let mut watching = JoinSet::new();
        watching.spawn(watch_over(Arc::clone(&connection), events, life.clone()));
        let close = CloseWhenDropped::new(&connection);
        Ok(Self { connection, life, server, _watching: watching, _close: close })
    }

    pub(crate) async fn channel(&self) -> Result<Channel, SessionError> {
        self.life.bound(REQUEST_TIMEOUT, self.connection.create_channel()).await
    }

    pub(crate) async fn close(self) {
        self.life.end_with(SessionError::Closed);
        close(&self.connection).await;
    }
}
