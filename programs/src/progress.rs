//! Shows how far a run has come: as a bar on a terminal, as a line per second anywhere else.

use std::{
    convert::Infallible,
    fmt,
    io::{self, IsTerminal as _},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::{MissedTickBehavior, interval_at};

/// How far a run has come, and what is said of it.
#[derive(Clone, Debug)]
pub struct Shown {
    /// How many parts are done.
    pub done: u64,
    /// How many there are.
    pub all: u64,
    /// It in words.
    pub text: String,
}

/// Shows on stderr what `look` sees, until it is dropped; it is told for how long the run has gone on.
pub async fn show(look: impl Fn(Duration) -> Shown) -> Infallible {
    let on_terminal = io::stderr().is_terminal();
    let period = Duration::from_millis(if on_terminal { 100 } else { 1_000 });
    let bar = Bar(on_terminal.then(new_bar));
    let began = Instant::now();
    let mut ticks = interval_at(tokio::time::Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Shown { done, all, text } = look(began.elapsed());
        match &bar.0 {
            Some(bar) => {
                bar.set_length(all);
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

fn new_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("[{bar:40}] {percent:>3}%  {msg}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style)
}

/// Returns a rate; 0 while no time has passed.
#[must_use]
pub fn per_second(count: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

/// Returns the whole seconds that are left at a rate; none when nobody can tell.
#[must_use]
pub fn time_left(done: u64, all: u64, per_second: f64) -> Option<Duration> {
    let seconds = (all.saturating_sub(done) as f64 / per_second).ceil();
    Duration::try_from_secs_f64(seconds).ok()
}

/// A number as people read it: `3.4 M` for 3,400,000.
#[derive(Clone, Copy, Debug)]
pub struct Scaled(pub f64);

impl fmt::Display for Scaled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            number if number < 999.5 => write!(f, "{number:.0}"),
            number if number < 999.95e3 => write!(f, "{:.1} k", number / 1e3),
            number if number < 999.95e6 => write!(f, "{:.1} M", number / 1e6),
            number if number < 999.95e9 => write!(f, "{:.1} G", number / 1e9),
            number => write!(f, "{:.1} T", number / 1e12),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_scaled() {
        let scaled =
            [0.0, 999.4, 999.6, 3.4e6, 999.99e6, 1.2e10, 5e15].map(|n| Scaled(n).to_string());
        assert_eq!(scaled, ["0", "999", "1.0 k", "3.4 M", "1.0 G", "12.0 G", "5000.0 T"]);
    }

    #[test]
    fn how_long_it_takes_yet_is_told_where_it_can_be() {
        assert_eq!(time_left(25, 100, 50.0), Some(Duration::from_secs(2)));
        assert_eq!(time_left(0, 100, 0.0), None);
    }
}
