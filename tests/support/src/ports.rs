//! Free ports on 127.0.0.1.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;

/// Below the ports which Linux (32768 and up) and macOS (49152 and up) give to outgoing
/// connections. A client that keeps reconnecting to a stopped broker whose port is one of those
/// sooner or later connects to itself, and then sits on the port.
const RANGE: Range<u16> = 20_000..32_000;

/// Ports of the range to try before leaving the choice to the system.
const TRIES: usize = 64;

/// Returns a random number; not for secrets.
pub(crate) fn random() -> u64 {
    // Each `RandomState` is keyed anew by the system's randomness.
    RandomState::new().build_hasher().finish()
}

/// Returns so many different ports that nobody listens on at the moment.
///
/// They are free, not reserved: whoever takes one meanwhile makes the start fail.
pub(crate) fn free(count: usize) -> io::Result<Vec<u16>> {
    // Held until all are found, so that no port is found twice.
    let held: Vec<TcpListener> = (0..count).map(|_| bind_one()).collect::<io::Result<_>>()?;
    held.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

fn bind_one() -> io::Result<TcpListener> {
    let width = u64::from(RANGE.end - RANGE.start);
    for _ in 0..TRIES {
        let offset = u16::try_from(random() % width).unwrap_or(0);
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, RANGE.start + offset)) {
            return Ok(listener);
        }
    }
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
}
