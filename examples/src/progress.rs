//! Shows how far a run has come: as a bar on a terminal, as a line per second anywhere else.

use std::{convert::Infallible, time::Duration};

use atomizer_programs::progress::{Scaled, Shown, per_second, show as show_parts, time_left};

/// How far a run of tosses has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// So many tosses of the run are done.
    OfAll(u64),
    /// So many are done on this node; how many elsewhere is not known here.
    Here(u64),
}

/// Shows on stderr how far a run of `tosses` has come, until it is dropped.
pub async fn show(tosses: u64, done: impl Fn() -> Done) -> Infallible {
    show_parts(|time| {
        let done = done();
        let (Done::OfAll(count) | Done::Here(count)) = done;
        Shown { done: count, all: tosses, text: describe(tosses, done, time) }
    })
    .await
}

/// Shows on stderr how many of so many bytes have been read, until it is dropped.
pub async fn show_bytes(all: u64, read: impl Fn() -> u64) -> Infallible {
    show_parts(|time| {
        let bytes = read();
        let rate = Scaled(per_second(bytes, time));
        let text = format!("{}B of {}B, {rate}B/s", Scaled(bytes as f64), Scaled(all as f64));
        Shown { done: bytes, all, text }
    })
    .await
}

fn describe(tosses: u64, done: Done, time: Duration) -> String {
    let (count, place) = match done {
        Done::OfAll(count) => (count, ""),
        Done::Here(count) => (count, " here"),
    };
    let rate = per_second(count, time);
    let mut text = format!(
        "{} of {} tosses{place}, {} tosses/s{place}",
        Scaled(count as f64),
        Scaled(tosses as f64),
        Scaled(rate)
    );
    if let Done::OfAll(count) = done
        && let Some(left) = time_left(count, tosses, rate)
    {
        text.push_str(&format!(", {} left", humantime::format_duration(left)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_is_said() {
        let second = Duration::from_secs(1);
        assert_eq!(
            describe(10_000_000, Done::OfAll(2_500_000), second),
            "2.5 M of 10.0 M tosses, 2.5 M tosses/s, 3s left"
        );
        assert_eq!(
            describe(10_000_000, Done::Here(500), second),
            "500 of 10.0 M tosses here, 500 tosses/s here"
        );
        assert_eq!(describe(10, Done::OfAll(0), second), "0 of 10 tosses, 0 tosses/s");
    }
}
