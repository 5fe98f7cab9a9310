//! The right to settle a delivery: as it was delivered, parked, or on the way from one to the other.

use tokio::{
    sync::oneshot::{self, error::TryRecvError},
    time::Instant,
};

use crate::{Epoch, Ticket};

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
