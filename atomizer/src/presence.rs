//! Which nodes there are: what each says of itself, and when it was last heard of.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{AtomId, event::micros};

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Presence {
    /// The name of its machine; empty where the system does not tell.
    pub host: String,
    /// The number of its process on that machine.
    pub process: u32,
    /// The version of Atomizer that it was built with.
    pub version: String,
    /// How long it has been there. As JSON: whole microseconds.
    #[serde(with = "micros", rename = "uptime_us")]
    pub uptime: Duration,
    /// How many electrons run at this moment.
    pub running: usize,
    /// How many may run at once.
    pub concurrency: usize,
    /// How many parents wait for their children, without a permit.
    pub waiting: usize,
    /// What it serves.
    pub atoms: Vec<Serving>,
}

/// One atom that a node serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Serving {
    /// The atom.
    pub atom: AtomId,
    /// How many of its electrons run at this moment.
    pub running: usize,
    /// How many may run at once.
    pub concurrency: usize,
}

impl Presence {
    /// How often a node says that it is there: every 3 s.
    pub const PERIOD: Duration = Duration::from_secs(3);
    /// How long a node may be silent until it is taken to be gone: 10 s, which is three signs of life.
    pub const SILENCE_MAX: Duration = Duration::from_secs(10);
}

impl fmt::Display for Presence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, process, version, uptime, running, concurrency, waiting, atoms } = self;
        let uptime = humantime::format_duration(Duration::from_secs(uptime.as_secs()));
        write!(f, "alive for {uptime} on {host} ({process}), version {version}: ")?;
        write!(f, "{running} of {concurrency} run, {waiting} wait; serves")?;
        if atoms.is_empty() {
            f.write_str(" nothing")?;
        }
        for (at, Serving { atom, running, concurrency }) in atoms.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma} {atom} ({running} of {concurrency})")?;
        }
        Ok(())
    }
}
