//! Makes sure that something is there, and says what a refusal means.

use std::sync::Arc;

use atomizer::SendError;
use lapin::{
    Channel, Connection, ErrorKind,
    protocol::{AMQPErrorKind, AMQPSoftError},
};

use crate::{
    connect::plain,
    life::{Life, REPLY_SUCCESS, REQUEST_TIMEOUT},
};

/// Declares on the consuming connection of a session: the other one may be blocked.
#[derive(Clone, Debug)]
pub(crate) struct Declarer {
    pub(crate) connection: Arc<Connection>,
    pub(crate) life: Life,
}

impl Declarer {
    /// Makes sure that something is there. One that is there with other arguments is used as it is.
    pub(crate) async fn declare(
        &self,
        name: &str,
        declare: impl AsyncFnOnce(&Channel) -> lapin::Result<()>,
    ) -> Result<(), SendError> {
        let declaring = on_own_channel(&self.connection, declare);
        let declared = self.life.bound(REQUEST_TIMEOUT, async { Ok(declaring.await) }).await;
        let Err(error) = declared.map_err(|error| SendError::Unknown(error.to_string()))? else {
            return Ok(());
        };
        match refusal(&error) {
            Some(AMQPSoftError::PRECONDITIONFAILED) => {
                let reason = plain(&error);
                tracing::warn!(name, reason, "a queue is used that is not as it should be");
                Ok(())
            }
            Some(AMQPSoftError::ACCESSREFUSED) => Err(SendError::Refused(plain(&error))),
            _ => Err(SendError::Unknown(plain(&error))),
        }
    }
}

/// Tells what is not there from what cannot be told.
pub(crate) fn found<T>(asked: lapin::Result<T>) -> lapin::Result<Option<T>> {
    match asked {
        Ok(there) => Ok(Some(there)),
        Err(error) if refusal(&error) == Some(AMQPSoftError::NOTFOUND) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The reply code, when a request was refused at the cost of its channel.
pub(crate) fn refusal(error: &lapin::Error) -> Option<AMQPSoftError> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(code) => Some(code.clone()),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

/// Runs a request on a channel of its own: one that is refused costs the channel (AMQP 0-9-1, 2.2.4).
pub(crate) async fn on_own_channel<T>(
    connection: &Connection,
    request: impl AsyncFnOnce(&Channel) -> lapin::Result<T>,
) -> lapin::Result<T> {
    let channel = connection.create_channel().await?;
    let result = request(&channel).await?;
    channel.close(REPLY_SUCCESS, "done".into()).await?;
    Ok(result)
}
