//! What can go wrong, and where.

use std::time::Duration;

#[cfg(doc)]
use super::Faults;

/// An operation of a conductor, of its sessions or of their subscriptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Op {
    /// [`Conductor::open`](atomizer::Conductor::open)
    Open,
    /// [`Session::limits`](atomizer::Session::limits)
    Limits,
    /// [`Session::reply_to`](atomizer::Session::reply_to)
    ReplyTo,
    /// [`Session::subscribe`](atomizer::Session::subscribe)
    Subscribe,
    /// [`Session::send`](atomizer::Session::send)
    Send,
    /// [`Session::settle`](atomizer::Session::settle)
    Settle,
    /// [`Session::park`](atomizer::Session::park)
    Park,
    /// [`Session::census`](atomizer::Session::census)
    Census,
    /// [`Session::ended`](atomizer::Session::ended)
    Ended,
    /// [`Session::close`](atomizer::Session::close)
    Close,
    /// [`Subscription::next`](atomizer::Subscription::next)
    Next,
    /// [`Subscription::stop`](atomizer::Subscription::stop)
    Stop,
}

impl Op {
    /// All of them, in the order of a session's life.
    pub const ALL: [Self; 12] = [
        Self::Open,
        Self::Limits,
        Self::ReplyTo,
        Self::Subscribe,
        Self::Send,
        Self::Settle,
        Self::Park,
        Self::Census,
        Self::Ended,
        Self::Close,
        Self::Next,
        Self::Stop,
    ];
}

/// One way to misbehave. Not each is possible in each operation: see [`fits`](Self::fits).
///
/// Where a call is not carried out, the tickets that were handed over with it are neither settled nor given
/// back before their subscription or session ends, unless it says otherwise here. With `Panic` and `Hang`
/// they are given back when the future is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// It is not carried out, and errs: `Unreachable` from `open`, `Unknown` from `send`, `settle` and `park`,
    /// and `Lost` from the rest. Nothing has ended: the same may be tried again.
    Error,
    /// It is carried out, and errs as with [`Error`](Self::Error) all the same. Whatever it would have
    /// returned is dropped: a session, a subscription, deliveries, the new ticket of what is parked.
    ErrorAfter,
    /// Nothing is sent: `send` says `NotTaken`; `settle` and `park` say `NotSafe`, and the ticket comes back.
    /// What is settled and emits nothing is settled.
    NotTaken,
    /// It is refused for good: `open` and `send` say `Refused`, `settle` says so of all that would be emitted.
    Refuse,
    /// The tickets are dropped, which gives their deliveries back, and said to be stale.
    Stale,
    /// The tickets are dropped, which gives their deliveries back; `settle` and `park` say `Unknown`.
    Drop,
    /// The promise of how many there are is broken: `send` and `settle` carry everything out and return one
    /// result too few, `next` returns no delivery.
    Fewer,
    /// All envelopes are sent twice, as after a confirm that was lost on its way.
    Twice,
    /// It takes so long to begin.
    Delay(Duration),
    /// It is not carried out and never returns: until [`Faults::release`], and then it is.
    Hang,
    /// It is carried out and never returns: until [`Faults::release`].
    HangAfter,
    /// It panics, and is not carried out.
    Panic,
    /// It is carried out, and panics.
    PanicAfter,
    /// The subscription ends: what came through it and is not settled is given back, its tickets are stale.
    EndSubscription,
    /// The session ends as with [`Faults::end_sessions`], and the call is not carried out; a session that
    /// is only being opened has ended when it is.
    EndSession,
}

impl Fault {
    /// Returns whether an operation can misbehave like this.
    #[must_use]
    pub fn fits(self, op: Op) -> bool {
        if matches!(op, Op::Limits | Op::ReplyTo) {
            return self == Self::Panic;
        }
        match self {
            Self::Error | Self::ErrorAfter => !matches!(op, Op::Ended | Op::Close | Op::Stop),
            Self::NotTaken => matches!(op, Op::Send | Op::Settle | Op::Park),
            Self::Refuse => matches!(op, Op::Open | Op::Send | Op::Settle),
            Self::Stale | Self::Drop => matches!(op, Op::Settle | Op::Park),
            Self::Fewer => matches!(op, Op::Send | Op::Settle | Op::Next),
            Self::Twice => op == Op::Send,
            Self::EndSubscription => op == Op::Next,
            Self::Delay(_)
            | Self::Hang
            | Self::HangAfter
            | Self::Panic
            | Self::PanicAfter
            | Self::EndSession => true,
        }
    }

    /// Returns whether it waits for the call to be carried out.
    pub(super) fn is_after(self) -> bool {
        matches!(self, Self::ErrorAfter | Self::HangAfter | Self::PanicAfter)
    }
}

#[cfg(test)]
mod tests {
    use super::Op;

    #[test]
    fn operations_stand_in_their_places() {
        for (place, op) in Op::ALL.into_iter().enumerate() {
            assert_eq!(op as usize, place);
        }
    }
}
