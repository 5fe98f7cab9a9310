//! What a node measures: each name with its meaning, and the handles that count.
//!
//! It goes through the facade of the crate `metrics`, so it is for the program to say where to. Handles are made once, for
//! a worker, a link or a node: whoever counts looks nothing up. Without a recorder they are empty, and to count is a branch.
//!
//! Gauges are moved by differences, and put back by whoever moved them: so several nodes of one process add up, and what has
//! ended counts for nothing. No label has a value that electrons bring: not their ids, not the texts of errors.

use ::metrics::{
    Counter, Gauge, Histogram, Key, KeyName, Label, Level as Verbosity, Metadata, Recorder,
    SharedString, Unit, with_recorder,
};

use crate::{AtomId, ConductorId, FailureKind};

/// One metric, as it is described to a recorder.
#[derive(Debug)]
struct Metric {
    name: &'static str,
    kind: Kind,
    unit: Unit,
    meaning: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

const fn counter(name: &'static str, meaning: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, unit: Unit::Count, meaning }
}

const fn gauge(name: &'static str, meaning: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, unit: Unit::Count, meaning }
}

const fn histogram(name: &'static str, unit: Unit, meaning: &'static str) -> Metric {
    Metric { name, kind: Kind::Histogram, unit, meaning }
}

static RECEIVED: Metric = counter("atomizer_electrons_received_total", "Electrons that arrived.");
static ADOPTED: Metric = counter(
    "atomizer_electrons_adopted_total",
    "Electrons that arrived while they were worked on here, or had just ended: one run answers both.",
);
static ENDED: Metric = counter(
    "atomizer_electrons_ended_total",
    "Electrons whose end is safe, by end: completed, failed (answered), dead (a dead letter), unreadable (a dead letter).",
);
static RETURNED: Metric = counter(
    "atomizer_electrons_returned_total",
    "Electrons that left and come again, by reason: requeued after a failure, handed_on untried, not_settled here.",
);
static ATTEMPTS: Metric = counter("atomizer_attempts_total", "Runs that began.");
static RETRIES: Metric =
    counter("atomizer_retries_total", "Attempts that failed and are followed by another here.");
static FAILURES: Metric = counter(
    "atomizer_failures_total",
    "Failures by kind: attempts that failed, and electrons that ended without one.",
);
static UNCLAIMED: Metric = counter(
    "atomizer_answers_unclaimed_total",
    "Electrons that ended and whose asker could not be told.",
);
static SUSPECTED: Metric = counter(
    "atomizer_electrons_suspected_total",
    "Electrons that were begun alone, because they may be what ended a node.",
);
static PARKED: Metric =
    counter("atomizer_electrons_parked_total", "Electrons that were parked, for they take long.");
static BLOCKING: Metric =
    counter("atomizer_runs_blocking_total", "Runs that held their thread for a second.");
static STUCK: Metric = counter(
    "atomizer_runs_stuck_total",
    "Runs that did not stop within a second of being told to.",
);
static IN_FLIGHT: Metric = gauge(
    "atomizer_electrons_in_flight",
    "Electrons that have begun: they run, wait for their children, or pause before the next attempt.",
);
static WAITING: Metric =
    gauge("atomizer_electrons_waiting", "Electrons that were received and have not begun.");
static WINDOW: Metric = gauge(
    "atomizer_window_electrons",
    "How many electrons a subscription may hold that are not settled; 0 while there is none.",
);
static RUN: Metric = histogram(
    "atomizer_run_seconds",
    Unit::Seconds,
    "How long runs took, by result: succeeded or failed.",
);
static QUEUE_WAIT: Metric = histogram(
    "atomizer_queue_wait_seconds",
    Unit::Seconds,
    "How long electrons waited to be begun, since they were sent as far as the conductor knows, or else received.",
);
static PAYLOAD: Metric = histogram(
    "atomizer_payload_bytes",
    Unit::Bytes,
    "How large payloads are, by direction: in (received) or out (returned).",
);
static PARENTS: Metric =
    gauge("atomizer_parents_waiting", "Runs that wait for their children, without a permit.");
static SESSIONS: Metric = gauge("atomizer_sessions", "Sessions that are open: 1 or 0 for a node.");
static REOPENED: Metric =
    counter("atomizer_sessions_reopened_total", "Sessions that were opened after one was lost.");
static LOST: Metric = counter("atomizer_sessions_lost_total", "Sessions that ended by a fault.");
static OPEN_FAILED: Metric =
    counter("atomizer_session_failures_total", "Tries to open a session that failed.");
static SUBSCRIPTIONS_LOST: Metric = counter(
    "atomizer_subscriptions_lost_total",
    "Subscriptions that ended by a fault or could not be made.",
);
static UNCONFIRMED: Metric = gauge(
    "atomizer_unconfirmed_messages",
    "Messages that are being sent and are not known to be safe, those included that wait for a session.",
);
static ASKED_AGAIN: Metric = counter(
    "atomizer_electrons_asked_again_total",
    "Electrons that were sent once more, because their answers may be lost.",
);
static ANSWERS_DROPPED: Metric =
    counter("atomizer_answers_dropped_total", "Answers that came and nobody waited for.");
static RESIDENT_FAILURES: Metric =
    counter("atomizer_resident_failures_total", "Residents that failed and are started again.");
static EVENTS_LOST: Metric = counter(
    "atomizer_events_lost_total",
    "Events that were lost, by stream: of the node, to a watcher that was slow; for the log of all nodes, while that took nothing.",
);

/// All there are, in the order of the page on them.
static ALL: [&Metric; 29] = [
    &RECEIVED,
    &ADOPTED,
    &ENDED,
    &RETURNED,
    &ATTEMPTS,
    &RETRIES,
    &FAILURES,
    &UNCLAIMED,
    &SUSPECTED,
    &PARKED,
    &BLOCKING,
    &STUCK,
    &IN_FLIGHT,
    &WAITING,
    &WINDOW,
    &RUN,
    &QUEUE_WAIT,
    &PAYLOAD,
    &PARENTS,
    &SESSIONS,
    &REOPENED,
    &LOST,
    &OPEN_FAILED,
    &SUBSCRIPTIONS_LOST,
    &UNCONFIRMED,
    &ASKED_AGAIN,
    &ANSWERS_DROPPED,
    &RESIDENT_FAILURES,
    &EVENTS_LOST,
];

/// Says to the recorder what each metric means.
pub(crate) fn describe() {
    with_recorder(|recorder| {
        for &Metric { name, kind, unit, meaning } in ALL {
            let (name, unit) = (KeyName::from_const_str(name), Some(unit));
            let meaning = SharedString::const_str(meaning);
            match kind {
                Kind::Counter => recorder.describe_counter(name, unit, meaning),
                Kind::Gauge => recorder.describe_gauge(name, unit, meaning),
                Kind::Histogram => recorder.describe_histogram(name, unit, meaning),
            }
        }
    });
}

/// The labels of what is measured together.
#[derive(Debug)]
struct Labels(Vec<Label>);

impl Labels {
    fn none() -> Self {
        Self(Vec::new())
    }

    fn of_conductor(conductor: &ConductorId) -> Self {
        Self::none().and("conductor", conductor.as_str())
    }

    fn of_atom(atom: &AtomId) -> Self {
        Self::none().and("atom", atom.as_str())
    }

    fn and(&self, name: &'static str, value: &str) -> Self {
        let mut labels = self.0.clone();
        labels.push(Label::new(name, value.to_owned()));
        Self(labels)
    }

    fn register<T>(
        &self,
        metric: &Metric,
        register: fn(&dyn Recorder, &Key, &Metadata<'_>) -> T,
    ) -> T {
        static METADATA: Metadata<'_> =
            Metadata::new("atomizer", Verbosity::INFO, Some("atomizer"));
        let key = Key::from_parts(metric.name, self.0.clone());
        with_recorder(|recorder| register(recorder, &key, &METADATA))
    }

    fn counter(&self, metric: &Metric) -> Counter {
        self.register(metric, |recorder, key, metadata| recorder.register_counter(key, metadata))
    }

    fn gauge(&self, metric: &Metric) -> Gauge {
        self.register(metric, |recorder, key, metadata| recorder.register_gauge(key, metadata))
    }

    fn histogram(&self, metric: &Metric) -> Histogram {
        self.register(metric, |recorder, key, metadata| recorder.register_histogram(key, metadata))
    }
}

/// What one owner adds to a gauge; taken back when it is dropped.
#[derive(Debug)]
pub(crate) struct Level {
    gauge: Gauge,
    now: usize,
}

impl Level {
    pub(crate) fn new(gauge: Gauge) -> Self {
        Self { gauge, now: 0 }
    }

    pub(crate) fn set(&mut self, now: usize) {
        match now.checked_sub(self.now) {
            Some(0) => return,
            Some(more) => self.gauge.increment(more as f64),
            None => self.gauge.decrement((self.now - now) as f64),
        }
        self.now = now;
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// What is measured of one atom behind one conductor.
#[derive(Debug)]
pub(crate) struct OfAtom {
    pub(crate) received: Counter,
    pub(crate) adopted: Counter,
    pub(crate) completed: Counter,
    pub(crate) failed: Counter,
    pub(crate) dead: Counter,
    pub(crate) unreadable: Counter,
    pub(crate) requeued: Counter,
    pub(crate) handed_on: Counter,
    pub(crate) not_settled: Counter,
    pub(crate) attempts: Counter,
    pub(crate) retries: Counter,
    pub(crate) unclaimed: Counter,
    pub(crate) suspected: Counter,
    pub(crate) parked: Counter,
    pub(crate) blocking: Counter,
    pub(crate) stuck: Counter,
    pub(crate) in_flight: Level,
    pub(crate) waiting: Level,
    pub(crate) succeeded_after: Histogram,
    pub(crate) failed_after: Histogram,
    pub(crate) queue_wait: Histogram,
    pub(crate) bytes_in: Histogram,
    pub(crate) bytes_out: Histogram,
    failures: Failures,
}

impl OfAtom {
    pub(crate) fn new(atom: &AtomId, conductor: &ConductorId) -> Self {
        let labels = &Labels::of_conductor(conductor).and("atom", atom.as_str());
        let ended = |end| labels.and("end", end).counter(&ENDED);
        let returned = |reason| labels.and("reason", reason).counter(&RETURNED);
        let run = |result| labels.and("result", result).histogram(&RUN);
        let payload = |direction| labels.and("direction", direction).histogram(&PAYLOAD);
        Self {
            received: labels.counter(&RECEIVED),
            adopted: labels.counter(&ADOPTED),
            completed: ended("completed"),
            failed: ended("failed"),
            dead: ended("dead"),
            unreadable: ended("unreadable"),
            requeued: returned("requeued"),
            handed_on: returned("handed_on"),
            not_settled: returned("not_settled"),
            attempts: labels.counter(&ATTEMPTS),
            retries: labels.counter(&RETRIES),
            unclaimed: labels.counter(&UNCLAIMED),
            suspected: labels.counter(&SUSPECTED),
            parked: labels.counter(&PARKED),
            blocking: labels.counter(&BLOCKING),
            stuck: labels.counter(&STUCK),
            in_flight: Level::new(labels.gauge(&IN_FLIGHT)),
            waiting: Level::new(labels.gauge(&WAITING)),
            succeeded_after: run("succeeded"),
            failed_after: run("failed"),
            queue_wait: labels.histogram(&QUEUE_WAIT),
            bytes_in: payload("in"),
            bytes_out: payload("out"),
            failures: Failures::new(labels),
        }
    }

    /// Counts a failure by its kind.
    pub(crate) fn failure(&self, kind: FailureKind) {
        self.failures.of(kind).increment(1);
    }
}

/// Failures by their kind; the names are those that events have.
#[derive(Debug)]
struct Failures {
    error: Counter,
    panic: Counter,
    timed_out: Counter,
    undecodable: Counter,
    unknown_atom: Counter,
    answer_too_large: Counter,
    expired: Counter,
    given_back: Counter,
    killer: Counter,
    other: Counter,
}

impl Failures {
    fn new(labels: &Labels) -> Self {
        let of = |kind| labels.and("kind", kind).counter(&FAILURES);
        Self {
            error: of("error"),
            panic: of("panic"),
            timed_out: of("timed_out"),
            undecodable: of("undecodable"),
            unknown_atom: of("unknown_atom"),
            answer_too_large: of("answer_too_large"),
            expired: of("expired"),
            given_back: of("given_back"),
            killer: of("killer"),
            other: of("other"),
        }
    }

    fn of(&self, kind: FailureKind) -> &Counter {
        match kind {
            FailureKind::Error => &self.error,
            FailureKind::Panic => &self.panic,
            FailureKind::TimedOut => &self.timed_out,
            FailureKind::Undecodable => &self.undecodable,
            FailureKind::UnknownAtom => &self.unknown_atom,
            FailureKind::AnswerTooLarge => &self.answer_too_large,
            FailureKind::Expired => &self.expired,
            FailureKind::GivenBack => &self.given_back,
            FailureKind::Killer => &self.killer,
            FailureKind::Other => &self.other,
        }
    }
}

/// What is measured of one conductor of a node.
#[derive(Debug)]
pub(crate) struct OfLink {
    pub(crate) sessions: Gauge,
    pub(crate) reopened: Counter,
    pub(crate) lost: Counter,
    pub(crate) open_failed: Counter,
    pub(crate) subscriptions_lost: Counter,
    pub(crate) asked_again: Counter,
    pub(crate) answers_dropped: Counter,
    unconfirmed: Gauge,
}

impl OfLink {
    pub(crate) fn new(conductor: &ConductorId) -> Self {
        let labels = Labels::of_conductor(conductor);
        Self {
            sessions: labels.gauge(&SESSIONS),
            reopened: labels.counter(&REOPENED),
            lost: labels.counter(&LOST),
            open_failed: labels.counter(&OPEN_FAILED),
            subscriptions_lost: labels.counter(&SUBSCRIPTIONS_LOST),
            asked_again: labels.counter(&ASKED_AGAIN),
            answers_dropped: labels.counter(&ANSWERS_DROPPED),
            unconfirmed: labels.gauge(&UNCONFIRMED),
        }
    }

    /// Counts messages that are being sent, until it is dropped.
    pub(crate) fn unconfirmed(&self, messages: usize) -> Level {
        let mut level = Level::new(self.unconfirmed.clone());
        level.set(messages);
        level
    }
}

/// The window of a subscription to an atom.
pub(crate) fn window(atom: &AtomId, conductor: &ConductorId) -> Level {
    Level::new(Labels::of_conductor(conductor).and("atom", atom.as_str()).gauge(&WINDOW))
}

/// Parents that wait on a node.
pub(crate) fn parents_waiting() -> Gauge {
    Labels::none().gauge(&PARENTS)
}

/// Failures of a resident.
pub(crate) fn resident_failures(resident: &AtomId) -> Counter {
    Labels::of_atom(resident).counter(&RESIDENT_FAILURES)
}

/// Events that watchers in this process missed.
pub(crate) fn events_missed() -> Counter {
    Labels::none().and("stream", "node").counter(&EVENTS_LOST)
}

/// Events that a conductor's log was not given.
pub(crate) fn events_not_kept(conductor: &ConductorId) -> Counter {
    Labels::of_conductor(conductor).and("stream", "log").counter(&EVENTS_LOST)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, fs, path::Path};

    use super::*;

    fn read(path: &str) -> String {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Returns each name of a metric in a text, without what Prometheus adds to histograms.
    fn names(text: &str) -> HashSet<&str> {
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let names = words.filter(|word| word.starts_with("atomizer_"));
        names
            .map(|name| {
                let suffixes = ["_bucket", "_sum", "_count"];
                suffixes.iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name)
            })
            .collect()
    }

    #[test]
    fn the_page_the_dashboard_and_the_alerts_name_metrics_that_there_are() {
        let all: HashSet<_> = ALL.iter().map(|metric| metric.name).collect();
        // The crate, which is no metric.
        let crates = HashSet::from(["atomizer_monitoring"]);
        for path in [
            "docs/metrics.md",
            "docker/grafana/dashboards/atomizer.json",
            "docker/prometheus/atomizer.rules.yml",
        ] {
            let text = read(path);
            let mut unknown = names(&text);
            unknown.retain(|name| !all.contains(name) && !crates.contains(name));
            assert!(unknown.is_empty(), "{path} names {unknown:?}");
        }
        let (page, dashboard) =
            (read("docs/metrics.md"), read("docker/grafana/dashboards/atomizer.json"));
        let shown = names(&dashboard);
        for Metric { name, kind, .. } in ALL {
            let kind = format!("{kind:?}").to_lowercase();
            assert!(
                page.contains(&format!("\n| `{name}` | {kind} |")),
                "{name} is not on the page"
            );
            assert!(shown.contains(name), "{name} is not on the dashboard");
        }
    }

    /// Prometheus' conventions: the unit is in the name, and only counters end in `_total`.
    #[test]
    fn names_say_what_they_measure() {
        assert_eq!(ALL.iter().map(|metric| metric.name).collect::<HashSet<_>>().len(), ALL.len());
        for Metric { name, kind, unit, meaning } in ALL {
            assert!(name.starts_with("atomizer_"), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
            assert_eq!(name.ends_with("_seconds"), *unit == Unit::Seconds, "{name}");
            assert_eq!(name.ends_with("_bytes"), *unit == Unit::Bytes, "{name}");
            assert_eq!(*kind == Kind::Histogram, *unit != Unit::Count, "{name}");
            assert!(meaning.ends_with('.'), "{name}: {meaning}");
        }
    }
}
