//! Shows how far a run has come: as a bar on a terminal, as a line per second anywhere else.

use std::{
    convert::Infallible,
    io::{self, IsTerminal as _},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::{MissedTickBehavior, interval_at};

use crate::tosses::{Scaled, per_second};

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
    show_parts(tosses, |time| {
        let done = done();
        let (Done::OfAll(count) | Done::Here(count)) = done;
        (count, describe(tosses, done, time))
    })
    .await
}

/// Shows on stderr how many of so many bytes have been read, until it is dropped.
pub async fn show_bytes(all: u64, read: impl Fn() -> u64) -> Infallible {
    show_parts(all, |time| {
        let bytes = read();
        let rate = Scaled(per_second(bytes, time));
        let text = format!("{}B of {}B, {rate}B/s", Scaled(bytes as f64), Scaled(all as f64));
        (bytes, text)
    })
    .await
}

/// Shows how many parts of all are done, and what is said of that after so long.
async fn show_parts(all: u64, look: impl Fn(Duration) -> (u64, String)) -> Infallible {
    let on_terminal = io::stderr().is_terminal();
    let period = Duration::from_millis(if on_terminal { 100 } else { 1_000 });
    let bar = Bar(on_terminal.then(|| new_bar(all)));
    let began = Instant::now();
    let mut ticks = interval_at(tokio::time::Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (done, text) = look(began.elapsed());
        match &bar.0 {
            Some(bar) => {
                bar.set_position(done.min(all));
                bar.set_message(text);
            }
            None => eprintln!("{text}"),
        }
    }
}

/// Takes the bar off the terminal when it is no longer shown, however that comes about.
struct Bar(Option<ProgressBar>);

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(all: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("[{bar:40}] {percent:>3}%  {msg}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
    ProgressBar::with_draw_target(Some(all), ProgressDrawTarget::stderr()).with_style(style)
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
    if let Some(left) = time_left(tosses, done, rate) {
        text.push_str(&format!(", {} left", humantime::format_duration(left)));
    }
    text
}

/// Returns the whole seconds that are left at this rate; `None` when nobody can tell.
fn time_left(tosses: u64, done: Done, rate: f64) -> Option<Duration> {
    let Done::OfAll(count) = done else { return None };
    let seconds = (tosses.saturating_sub(count) as f64 / rate).ceil();
    Duration::try_from_secs_f64(seconds).ok()
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
