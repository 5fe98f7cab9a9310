//! Publishes: pipelined, confirmed, bounded.

use std::{
    collections::HashMap,
    mem,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use atomizer::{
    Address, Envelope, Limits, Message, SendError,
    wire::{METADATA_BYTES_MAX, Wire, header},
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use lapin::{
    BasicProperties, Channel, Confirmation, ErrorKind, options::BasicPublishOptions,
    protocol::AMQPSoftError, types::ShortString,
};
use serde_json::Value;
use slab::Slab;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{
    aside::{Aside, Destination, Found, named},
    clock,
    connect::plain,
    convert::{self, Writing},
    declare::refusal,
    delay::Ladder,
    life::Life,
    returns::{Answered, Key, Returns},
    session::Options,
    topology::{Route, Topology},
};

/// Without `mandatory`, what cannot be routed is confirmed and gone.
const MANDATORY: BasicPublishOptions = BasicPublishOptions { mandatory: true, immediate: false };
/// From how many unconfirmed messages on no further batch is taken.
const UNCONFIRMED_MAX: usize = 1024;
/// How long a confirm may take before the session is given up, unless the broker says that it is blocked.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);
/// How long no confirm may come for a destination that something waits for, before what goes there is published
/// aside. When none comes at all, the broker may read no more from the channel: the next session is tried.
const SILENT_MAX: Duration = Duration::from_secs(4);
/// For how long of it at the least something has waited.
const LATE_AFTER: Duration = Duration::from_secs(1);
/// How often is looked at how long they have taken. A timer for each would cost more than it tells.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long the reason may take that a channel is closed.
const REASON_TIMEOUT: Duration = Duration::from_secs(1);

/// How much of the reason is kept why a dead letter could not be read, when it does not fit.
const UNREADABLE_BYTES_MAX: usize = 1024;

type Results = Vec<Result<(), SendError>>;

/// What there is to say of a publish beyond its address.
#[derive(Clone, Debug)]
pub(crate) enum Via {
    /// It goes where its address says.
    Address,
    /// It goes to the lease queue first, with this mark, by which it is known when it comes from there.
    Lease { exchange: ShortString, mark: ShortString },
    /// It was parked, and goes where its address says: it was delivered before.
    Back,
}

/// How many messages the broker may decline in a row before the next session is tried, on another node if there
/// is one: for ten seconds and more after the leader of a queue was killed, a node may decline everything that is
/// for it (seen with 3.10.8).
const DECLINED_MAX: u32 = 20;
/// How long a session that has never had a message taken waits for a confirm before the next is tried. A channel
/// that was opened before a new leader was known holds on to the old one: it answers a message in 7 s, by declining
/// it, and so on for ever (seen with 3.10.8, the old leader being cut off). One that is opened afterwards is well.
const FIRST_CONFIRM_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a session is kept at the least when the last was given up for one of these: twice as long each time. A
/// queue that is full declines too, a slow disk confirms late, and no other session would do better.
const KEPT_MIN: Duration = Duration::from_secs(2);
const KEPT_MAX: Duration = Duration::from_secs(30);

/// When a session was last given up because the broker took nothing, and how long to keep what followed; shared by
/// all sessions of a conductor.
#[derive(Clone, Debug, Default)]
pub(crate) struct Moves(Arc<Mutex<Option<(Instant, Duration)>>>);

impl Moves {
    /// True when the session may be given up: it was kept long enough.
    fn may(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let keep = match *last {
            Some((moved, keep)) if moved.elapsed() < keep => return false,
            // One that fared well for longer met a fault of its own.
            Some((moved, keep)) if moved.elapsed() < 4 * keep => (2 * keep).min(KEPT_MAX),
            _ => KEPT_MIN,
        };
        *last = Some((Instant::now(), keep));
        true
    }
}

/// How a session fares with what it publishes.
#[derive(Debug)]
struct Declines {
    in_a_row: u32,
    moves: Moves,
}

impl Declines {
    fn new(moves: Moves) -> Self {
        Self { in_a_row: 0, moves }
    }

    fn taken(&mut self) {
        self.in_a_row = 0;
    }

    /// Notes that the broker declined one. True when the session is to be given up for it.
    fn declined(&mut self) -> bool {
        self.in_a_row += 1;
        self.in_a_row >= DECLINED_MAX && self.moves.may()
    }
}

/// A handle to the task that owns the publishing channel.
#[derive(Clone, Debug)]
pub(crate) struct Publisher {
    commands: mpsc::Sender<Command>,
    topology: Topology,
    ladder: Arc<Ladder>,
    limits: Limits,
}

struct Command {
    batch: Vec<Result<Publication, SendError>>,
    done: oneshot::Sender<Results>,
}

struct Publication {
    message: Outgoing,
    destination: Destination,
    to: Address,
    way: Way,
}

/// How it gets where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Direct,
    Delayed,
    /// By the lease queue.
    Parked,
}

impl Way {
    /// What an operator is told of a destination that something went to on this way: what all of it has in common.
    fn name(self, to: &Address) -> String {
        match (self, to) {
            (Self::Delayed, _) => "what is delayed".to_owned(),
            (Self::Parked, _) => "what is parked".to_owned(),
            (Self::Direct, Address::DeadLetter(_)) => "dead letters".to_owned(),
            (Self::Direct, to) => to.to_string(),
        }
    }
}

/// One `basic.publish`.
struct Outgoing {
    route: Route,
    properties: BasicProperties,
    body: Bytes,
}

impl Publisher {
    /// Returns the handle, and the task, which ends with the last handle or the session.
    pub(crate) fn new(
        channel: Channel,
        aside: Aside,
        topology: Topology,
        ladder: Ladder,
        options: &Options,
        life: Life,
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (commands, wanted) = mpsc::channel(UNCONFIRMED_MAX);
        let line = Line { channel, aside, life: life.clone() };
        let publishing = publish_all(line, wanted, EndWhenDropped(life), options.moves.clone());
        let limits = options.limits;
        (Self { commands, topology, ladder: Arc::new(ladder), limits }, publishing)
    }

    /// Publishes, and waits until each is confirmed or not.
    ///
    /// Once handed over, the batch is published even when this future is dropped.
    pub(crate) async fn publish(&self, envelopes: &[Envelope], via: &Via) -> Results {
        let mut batch = Vec::with_capacity(envelopes.len());
        for envelope in envelopes {
            let route = self.route(envelope).await;
            batch.push(route.and_then(|route| self.prepare(envelope, route, via)));
        }
        let (done, results) = oneshot::channel();
        let lost =
            || vec![Err(SendError::Unknown("the session ended".to_owned())); envelopes.len()];
        if self.commands.send(Command { batch, done }).await.is_err() {
            return lost();
        }
        results.await.unwrap_or_else(|_| lost())
    }

    fn prepare(
        &self,
        envelope: &Envelope,
        mut route: Route,
        via: &Via,
    ) -> Result<Publication, SendError> {
        let to = envelope.to.clone();
        let way = match via {
            Via::Lease { .. } => Way::Parked,
            _ if envelope.delay.is_zero() => Way::Direct,
            _ => Way::Delayed,
        };
        let mut writing = match (via, &to, &envelope.message) {
            (Via::Address, Address::Atom(atom), Message::Electron(_)) if way == Way::Direct => {
                Writing::for_queue_of(atom)
            }
            (Via::Address, ..) => Writing::default(),
            (Via::Lease { exchange, mark }, ..) => {
                route.exchange = exchange.clone();
                Writing::marked(mark.clone())
            }
            (Via::Back, ..) => Writing::marked(convert::PARKED.into()),
        };
        let body = if let Address::DeadLetter(_) = to {
            // What came from the broker goes back to it: our own limits must not keep it here for ever.
            let mut wire = Wire::from(&envelope.message);
            trim(&mut wire);
            wire.write(&mut writing);
            wire.body
        } else {
            let body = envelope.message.write(&mut writing);
            check(body.len(), self.limits.payload_bytes_max)?;
            body
        };
        let mut properties = writing.finish(METADATA_BYTES_MAX)?;
        if let Address::Atom(_) = to {
            properties = properties.with_timestamp(clock::seconds_at(envelope.delay));
        }
        let destination = match way {
            Way::Direct => Destination::key(&route),
            // One queue, whatever the key is.
            Way::Parked | Way::Delayed => Destination::exchange(route.exchange.as_str()),
        };
        let message = Outgoing { route, properties, body };
        Ok(Publication { message, destination, to, way })
    }

    async fn route(&self, Envelope { to, delay, .. }: &Envelope) -> Result<Route, SendError> {
        match to {
            _ if delay.is_zero() => self.topology.route(to),
            Address::Atom(atom) => {
                // Boxed: it is large, and every publish would have to have room for it.
                Box::pin(self.ladder.make()).await.map_err(not_sent)?;
                Ok(self.topology.delayed(atom, *delay))
            }
            other => Err(SendError::Refused(format!("no delay can be kept for {other}"))),
        }
    }
}

/// What is not known of a declaration is known of the message: it was not sent.
fn not_sent(error: SendError) -> SendError {
    match error {
        SendError::Unknown(reason) => SendError::NotTaken(reason),
        error => error,
    }
}

fn check(bytes: usize, bytes_max: usize) -> Result<(), SendError> {
    if bytes > bytes_max { Err(SendError::TooLarge { bytes, bytes_max }) } else { Ok(()) }
}

/// Leaves out headers until the rest fits: first those of others, then the longest, which is the history for the most
/// part. They may quote what was longer than they should be in the first place.
fn trim(wire: &mut Wire) {
    if wire.metadata_bytes() <= METADATA_BYTES_MAX {
        return;
    }
    tracing::warn!(id = ?wire.id, "headers of a dead letter do not fit; some are left out");
    wire.headers.retain(|name, _| name.starts_with(header::PREFIX));
    if let Some(Value::String(reason)) = wire.headers.get_mut(header::UNREADABLE) {
        reason.truncate(reason.floor_char_boundary(UNREADABLE_BYTES_MAX));
    }
    while wire.metadata_bytes() > METADATA_BYTES_MAX {
        let bytes =
            |value: &Value| value.as_str().map_or_else(|| value.to_string().len(), str::len);
        let longest = wire.headers.iter().max_by_key(|(name, value)| name.len() + bytes(value));
        let Some(longest) = longest.map(|(name, _)| name.clone()) else { return };
        wire.headers.remove(&longest);
    }
}

/// Ends the session when publishing ends, by a panic too: a node that cannot publish must not look alive.
struct EndWhenDropped(Life);

impl Drop for EndWhenDropped {
    fn drop(&mut self) {
        self.0.end("publishing ended".to_owned());
    }
}

/// Whether the broker speaks of the exchange of a publish. An error ends the channel, and with it all that is under
/// way, without saying which of them was at fault.
fn is_meant_by(exchange: &str, error: &lapin::Error) -> bool {
    plain(error).contains(&format!("'{}'", named(exchange)))
}

/// What the broker says of one message.
enum Verdict {
    Taken,
    Declined,
    /// The channel does not confirm.
    None,
}

impl Verdict {
    /// Tells the verdict from the returned message that came with it, whosesoever that is.
    fn of(confirmation: Confirmation) -> (Self, Option<Key>) {
        let (verdict, carried) = match confirmation {
            Confirmation::Ack(carried) => (Self::Taken, carried),
            Confirmation::Nack(carried) => (Self::Declined, carried),
            Confirmation::NotRequested => (Self::None, None),
        };
        (verdict, carried.map(|message| Key::returned(&message)))
    }
}

/// What the broker answered.
struct Answer {
    /// Who waits for it.
    wait: usize,
    answer: Result<Verdict, SendError>,
}

/// The results of a batch so far.
struct Batch {
    results: Results,
    unanswered: usize,
    done: oneshot::Sender<Results>,
}

/// Where messages are published.
struct Line {
    channel: Channel,
    aside: Aside,
    life: Life,
}

/// A message that is not confirmed yet, and where the result goes.
struct Wait {
    /// How long, not counted while the broker is blocked.
    waited: Duration,
    destination: Destination,
    aside: bool,
    to: Address,
    way: Way,
    batch: usize,
    at: usize,
}

/// A destination for which something is late.
struct Silent {
    /// For how long nothing was confirmed for it.
    lasts: Duration,
    name: String,
}

/// What is on its way to the broker.
struct UnderWay<'a, F> {
    line: &'a Line,
    /// [`publish`], whose future has no name.
    publish: fn(&'a Line, Outgoing, usize) -> F,
    moves: Moves,
    declines: Declines,
    /// Whether the broker has ever taken a message here.
    proven: bool,
    publishes: FuturesUnordered<F>,
    /// What is published over channels of its own, and whether it was returned.
    asides: FuturesUnordered<BoxFuture<'a, (Answer, bool)>>,
    /// For how long nothing was confirmed on the channel.
    silent: Duration,
    silent_there: HashMap<Destination, Silent>,
    waits: Slab<Wait>,
    batches: Slab<Batch>,
    returns: Returns<Answer>,
}

/// Keeps as many publishes under way as there are: a client that awaits each in turn spends its time waiting.
async fn publish_all(
    line: Line,
    mut wanted: mpsc::Receiver<Command>,
    _end_when_dropped: EndWhenDropped,
    moves: Moves,
) {
    let mut under_way = UnderWay {
        line: &line,
        publish,
        declines: Declines::new(moves.clone()),
        moves,
        proven: false,
        publishes: FuturesUnordered::new(),
        asides: FuturesUnordered::new(),
        silent: Duration::ZERO,
        silent_there: HashMap::new(),
        waits: Slab::new(),
        batches: Slab::new(),
        returns: Returns::default(),
    };
    let mut ended = pin!(line.life.ended());
    let mut looks = interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            _ = looks.tick(), if !under_way.waits.is_empty() => under_way.look(),
            // Before the end: when the session ends, those that are answered are told what the broker said.
            Some(answered) = under_way.publishes.next() => under_way.answered(answered),
            Some((answer, returned)) = under_way.asides.next() => under_way.told(answer, returned),
            command = wanted.recv(), if under_way.publishes.len() < UNCONFIRMED_MAX => match command {
                Some(command) => under_way.begin(command),
                None => break,
            },
            // What is under way may never be answered: dropping it says that it is unknown.
            _ = &mut ended => return,
        }
    }
    loop {
        tokio::select! {
            Some(answered) = under_way.publishes.next() => under_way.answered(answered),
            Some((answer, returned)) = under_way.asides.next() => under_way.told(answer, returned),
            else => return,
        }
    }
}

impl<F: Future<Output = Answered<Answer>>> UnderWay<'_, F> {
    fn begin(&mut self, Command { batch, done }: Command) {
        let unanswered = batch.iter().filter(|prepared| prepared.is_ok()).count();
        let results = Vec::with_capacity(batch.len());
        let number = self.batches.insert(Batch { results, unanswered, done });
        for (at, prepared) in batch.into_iter().enumerate() {
            let result = prepared.map(|publication| {
                let Publication { message, destination, to, way } = publication;
                let found = self.line.aside.suspects.find(&message.route);
                let suspected = found.map(|found| (found, destination, way.name(&to)));
                let wait = self.waits.insert(Wait {
                    waited: Duration::ZERO,
                    destination,
                    aside: suspected.is_some(),
                    to,
                    way,
                    batch: number,
                    at,
                });
                match suspected {
                    None => self.publishes.push((self.publish)(self.line, message, wait)),
                    Some(suspected) => {
                        let publishing = publish_aside(self.line, message, wait, suspected);
                        self.asides.push(Box::pin(publishing));
                    }
                }
            });
            self.batches[number].results.push(result);
        }
        self.finish(number);
    }

    /// Finds out what is published aside from now on, and gives up the session when a confirm takes too long.
    fn look(&mut self) {
        let Line { life, aside, .. } = self.line;
        if life.is_blocked() {
            return;
        }
        let mut longest = Duration::ZERO;
        let there = self.silent_there.values_mut().map(|silent| &mut silent.lasts);
        for lasts in there.chain([&mut self.silent]) {
            *lasts += LOOK_EVERY;
        }
        for (_, wait) in &mut self.waits {
            wait.waited += LOOK_EVERY;
            longest = longest.max(wait.waited);
            let is_late = !wait.aside && wait.waited >= LATE_AFTER;
            if is_late {
                let silent = || Silent { lasts: LATE_AFTER, name: wait.way.name(&wait.to) };
                self.silent_there.entry(wait.destination).or_insert_with(silent);
            }
        }
        let hopeless = !self.proven && longest >= FIRST_CONFIRM_TIMEOUT;
        let mut stopped = false;
        for (destination, silent) in &self.silent_there {
            let is_stuck = silent.lasts >= SILENT_MAX;
            stopped |= is_stuck && self.silent >= SILENT_MAX;
            if is_stuck || hopeless {
                aside.suspects.add(*destination, &silent.name);
            }
        }
        if longest >= CONFIRM_TIMEOUT || ((hopeless || stopped) && self.moves.may()) {
            life.end(format!("no confirm within {longest:?}"));
        }
    }

    /// Takes in all that is answered by now, and only then decides: what was returned is told by any of them.
    fn answered(&mut self, first: Answered<Answer>) {
        // Nothing that is told adds to them meanwhile: what it added would be gone.
        let mut returns = mem::take(&mut self.returns);
        returns.add(first);
        while let Some(Some(next)) = self.publishes.next().now_or_never() {
            returns.add(next);
        }
        returns.judge(|answer, returned| {
            if answer.answer.is_ok() {
                self.is_confirmed(answer.wait);
            }
            self.told(answer, returned);
        });
        self.returns = returns;
    }

    fn is_confirmed(&mut self, wait: usize) {
        self.silent = Duration::ZERO;
        if self.silent_there.is_empty() {
            return;
        }
        let destination = self.waits[wait].destination;
        if self.silent_there.remove(&destination).is_some() {
            self.line.aside.suspects.remove(destination);
        }
    }

    fn told(&mut self, Answer { wait, answer }: Answer, returned: bool) {
        let wait = self.waits.remove(wait);
        let (number, at) = (wait.batch, wait.at);
        let result = answer.and_then(|verdict| self.decide(wait, &verdict, returned));
        let batch = &mut self.batches[number];
        batch.results[at] = result;
        batch.unanswered -= 1;
        self.finish(number);
    }

    fn decide(
        &mut self,
        Wait { waited, to, way, .. }: Wait,
        verdict: &Verdict,
        returned: bool,
    ) -> Result<(), SendError> {
        if returned {
            // The next session declares again what is missing.
            if let Address::DeadLetter(_) = to {
                self.line.life.end("the queue of dead letters is gone".to_owned());
            } else if way == Way::Delayed {
                let reason = "a queue for delays is gone".to_owned();
                self.line.life.end(reason.clone());
                return Err(SendError::NotTaken(reason));
            }
            return Err(SendError::Unroutable(to.to_string()));
        }
        match verdict {
            Verdict::Taken => {
                self.proven = true;
                self.declines.taken();
                Ok(())
            }
            Verdict::Declined => {
                if waited >= FIRST_CONFIRM_TIMEOUT && self.moves.may() {
                    let reason = format!("the broker declined a message after {waited:?}");
                    self.line.life.end(reason);
                }
                if self.declines.declined() {
                    let reason = format!("the broker declined {DECLINED_MAX} messages in a row");
                    self.line.life.end(reason);
                }
                Err(SendError::NotTaken("the broker declined".to_owned()))
            }
            Verdict::None => Err(SendError::Unknown("the channel does not confirm".to_owned())),
        }
    }

    /// Hands over the results of a batch when they are complete.
    fn finish(&mut self, number: usize) {
        if self.batches[number].unanswered == 0 {
            let batch = self.batches.remove(number);
            // An error says that nobody waits for the results any more.
            drop(batch.done.send(batch.results));
        }
    }
}

fn publish(
    line: &Line,
    message: Outgoing,
    wait: usize,
) -> impl Future<Output = Answered<Answer>> + Send {
    let Outgoing { route: Route { exchange, key }, properties, body } = message;
    let returned_as = Key::new(exchange.as_str(), key.as_str(), &properties);
    let name = exchange.clone();
    // What an `async fn` takes it keeps beside what is made of it: there is one of these for each message under way.
    async move {
        let publishing = line.channel.basic_publish(exchange, key, MANDATORY, &body, properties);
        let confirming = publishing.await;
        let confirmed = match confirming {
            Ok(confirming) => confirming.await.map(Verdict::of),
            Err(error) => Err(error),
        };
        let (answer, carried) = match confirmed {
            Ok((verdict, carried)) => (Ok(verdict), carried),
            Err(error) => (Err(Box::pin(line.failed(name.as_str(), &error)).await), None),
        };
        Answered { key: returned_as, carried, what: Answer { wait, answer } }
    }
}

async fn publish_aside(
    line: &Line,
    message: Outgoing,
    wait: usize,
    (found, way, name): (Found, Destination, String),
) -> (Answer, bool) {
    let exchange = message.route.exchange.clone();
    let publish = async |channel: &Channel| message.publish(channel).await;
    let answer = match line.aside.publish(found, way, &name, publish).await {
        Ok(answer) => answer.map(Verdict::of),
        Err(error) => Err(line.failed(exchange.as_str(), &error).await),
    };
    match answer {
        // There was nothing else on its channel.
        Ok((verdict, carried)) => (Answer { wait, answer: Ok(verdict) }, carried.is_some()),
        Err(error) => (Answer { wait, answer: Err(error) }, false),
    }
}

impl Outgoing {
    async fn publish(self, channel: &Channel) -> lapin::Result<Confirmation> {
        let Self { route: Route { exchange, key }, properties, body } = self;
        channel.basic_publish(exchange, key, MANDATORY, &body, properties).await?.await
    }
}

impl Line {
    /// Ends the session: whatever went wrong, its channel is of no more use.
    async fn failed(&self, exchange: &str, error: &lapin::Error) -> SendError {
        let Self { life, aside, .. } = self;
        // What closed the channel says more than that it is closed: another publish has been told.
        if let ErrorKind::InvalidChannelState(..) = error.kind() {
            drop(timeout(REASON_TIMEOUT, life.ended()).await);
        }
        life.end(format!("publishing failed: {}", plain(error)));
        match refusal(error) {
            Some(AMQPSoftError::ACCESSREFUSED) if is_meant_by(exchange, error) => {
                aside.suspects.add(Destination::exchange(exchange), named(exchange));
                SendError::Refused(plain(error))
            }
            _ => SendError::Unknown(plain(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::time::advance;

    use super::*;

    fn letter(headers: &[(&str, Value)]) -> Wire {
        let mut wire = Wire::default();
        wire.id = Some("an id".to_owned());
        for (name, value) in headers {
            wire.headers.insert((*name).to_owned(), value.clone());
        }
        trim(&mut wire);
        assert!(wire.metadata_bytes() <= METADATA_BYTES_MAX);
        wire
    }

    #[test]
    fn headers_of_a_dead_letter_are_left_out_until_it_fits() {
        let long = json!("x".repeat(METADATA_BYTES_MAX));
        let small = [(header::ATOM, json!("double")), ("traceparent", json!("00"))];
        assert_eq!(letter(&small).headers.len(), 2, "all of it fits");
        let kept = |headers: &[(&str, Value)]| {
            let all = [&small, headers].concat();
            letter(&all).headers.into_keys().collect::<Vec<_>>()
        };
        assert_eq!(kept(&[("x", long.clone())]), [header::ATOM]);
        assert_eq!(kept(&[(header::HISTORY, long.clone())]), [header::ATOM]);
        // What others put under our names, text or not.
        let many = [("atomizer-x", long.clone()), (header::SENDER, json!(vec![1; 15_000]))];
        assert_eq!(kept(&many), [header::ATOM]);
        let unreadable = [(header::UNREADABLE, json!("ä".repeat(METADATA_BYTES_MAX)))];
        assert_eq!(kept(&unreadable), [header::ATOM, header::UNREADABLE]);
        assert_eq!(letter(&unreadable).headers[header::UNREADABLE], json!("ä".repeat(512)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_is_given_up_when_many_are_declined_in_a_row_but_not_one_after_the_other() {
        let moves = Moves::default();
        let in_a_row = |declines: &mut Declines, count: u32| {
            (0..count).filter(|_| declines.declined()).count()
        };
        let mut first = Declines::new(moves.clone());
        for _ in 0..10 {
            assert_eq!(in_a_row(&mut first, DECLINED_MAX - 1), 0);
            first.taken();
        }
        assert_eq!(in_a_row(&mut first, DECLINED_MAX), 1);
        let mut second = Declines::new(moves);
        assert_eq!(
            in_a_row(&mut second, 1000),
            0,
            "a queue that is full is full for every session"
        );
        advance(KEPT_MIN).await;
        assert_eq!(in_a_row(&mut second, 1), 1);
        let mut given_up = 0;
        for _ in 0..600 {
            advance(Duration::from_secs(1)).await;
            given_up += in_a_row(&mut second, 1);
        }
        assert!((20..=24).contains(&given_up), "each is kept longer, up to a bound: {given_up}");
        advance(4 * KEPT_MAX).await;
        assert_eq!(in_a_row(&mut second, 1), 1);
        advance(KEPT_MIN).await;
        assert_eq!(in_a_row(&mut second, 1), 1, "that is forgotten after a while");
    }
}
