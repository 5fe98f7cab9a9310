//! The right to settle a delivery: as it was delivered, parked, or on the way from one to the other.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::oneshot::{self, error::TryRecvError},
    time::Instant,
};

use crate::{Electron, Epoch, SendError, SettleError, Ticket, ask::Asker};

/// How long after a park that was declined the next is tried.
const PARK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// The right to settle one delivery.
#[derive(Debug)]
pub(crate) enum Claim {
    /// It is held as it was delivered. If it is here still at that moment, it is to be parked or given back.
    Delivered { ticket: Ticket, until: Option<Instant> },
    /// It is being parked, and its ticket is to come.
    Parking { epoch: Epoch, parked: oneshot::Receiver<Result<Ticket, NotParked>> },
    /// It may be held for as long as the session lives, outside of any window.
    Parked(Ticket),
    /// It has gone back, and comes again.
    Lost { epoch: Epoch, reason: String },
}

/// Why something is not parked.
#[derive(Debug)]
pub(crate) enum NotParked {
    /// It is held as before, and may be tried again at that moment.
    Kept {
        ticket: Ticket,
        until: Option<Instant>,
    },
    Lost {
        reason: String,
    },
}

impl Claim {
    pub(crate) fn epoch(&self) -> Epoch {
        match self {
            Self::Delivered { ticket, .. } | Self::Parked(ticket) => ticket.epoch(),
            Self::Parking { epoch, .. } | Self::Lost { epoch, .. } => *epoch,
        }
    }

    /// Until when it may be held as it is.
    pub(crate) fn until(&self) -> Option<Instant> {
        match self {
            Self::Delivered { until, .. } => *until,
            _ => None,
        }
    }

    /// Whether it counts against the window that it came through.
    pub(crate) fn is_delivered(&self) -> bool {
        matches!(self, Self::Delivered { .. })
    }

    pub(crate) fn is_parking(&self) -> bool {
        matches!(self, Self::Parking { .. })
    }

    pub(crate) fn is_parked(&self) -> bool {
        matches!(self, Self::Parked(_))
    }

    pub(crate) fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }

    /// Whether it has been held for too long as it was delivered.
    pub(crate) fn is_late(&self, now: Instant) -> bool {
        self.until().is_some_and(|until| until <= now)
    }

    /// Begins to park what is held as it was delivered. Returns its ticket, and where the result goes.
    pub(crate) fn park(&mut self) -> Option<(Ticket, oneshot::Sender<Result<Ticket, NotParked>>)> {
        if !self.is_delivered() {
            return None;
        }
        let (result, parked) = oneshot::channel();
        let parking = Self::Parking { epoch: self.epoch(), parked };
        match std::mem::replace(self, parking) {
            Self::Delivered { ticket, .. } => Some((ticket, result)),
            _ => None,
        }
    }

    /// Takes in what came of parking, if that is known.
    pub(crate) fn update(&mut self) {
        let Self::Parking { epoch, parked } = self else { return };
        *self = match parked.try_recv() {
            Ok(Ok(ticket)) => Self::Parked(ticket),
            Ok(Err(NotParked::Kept { ticket, until })) => Self::Delivered { ticket, until },
            Ok(Err(NotParked::Lost { reason })) => Self::Lost { epoch: *epoch, reason },
            Err(TryRecvError::Empty) => return,
            Err(TryRecvError::Closed) => Self::Lost { epoch: *epoch, reason: not_parked() },
        };
    }

    /// Returns the ticket, once it is known to be good.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) async fn ticket(self) -> Result<Ticket, String> {
        match self {
            Self::Delivered { ticket, .. } | Self::Parked(ticket) => Ok(ticket),
            Self::Parking { parked, .. } => match parked.await {
                Ok(Ok(ticket) | Err(NotParked::Kept { ticket, .. })) => Ok(ticket),
                Ok(Err(NotParked::Lost { reason })) => Err(reason),
                Err(_) => Err(not_parked()),
            },
            Self::Lost { reason, .. } => Err(reason),
        }
    }
}

fn not_parked() -> String {
    "parking did not end".to_owned()
}

/// Parks one delivery.
pub(crate) async fn park(
    asker: &Asker,
    ticket: Ticket,
    electron: Arc<Electron>,
) -> Result<Ticket, NotParked> {
    let lost = |error: &dyn std::fmt::Display| NotParked::Lost { reason: error.to_string() };
    let session = asker.link.session().ok_or_else(|| lost(&SettleError::Stale))?;
    let id = electron.id;
    let parking = session.park(ticket, electron);
    match asker.link.ask(&session, parking).await.map_err(|error| lost(&error))? {
        Ok(ticket) => Ok(ticket),
        Err(SettleError::NotSafe { ticket, failed }) => {
            let errors = || failed.iter().map(|(_, error)| error);
            tracing::warn!(electron = %id, error = ?errors().next(), "failed to park");
            // What never can be is held as it is; when a broker loses its patience, it is adopted.
            let is_final = errors().any(SendError::is_final);
            let until = if is_final { None } else { Instant::now().checked_add(PARK_AGAIN_AFTER) };
            Err(NotParked::Kept { ticket, until })
        }
        Err(error) => {
            tracing::warn!(electron = %id, %error, "lost while it was parked; it is adopted when it comes again");
            Err(lost(&error))
        }
    }
}
