//! Write an `async fn`, run it anywhere, and never lose an electron.
//!
//! An [`Atom`] is a job: typed input in, typed output out. An [`Electron`] is one message that asks for it. A
//! [`Conductor`] carries electrons: [`Memory`] within a process, `atomizer-rabbitmq` between machines. A
//! node, made with [`Atomizer::builder`], takes the electrons of the atoms it has, runs each under
//! supervision, and answers who asked.
//!
//! ```
//! use atomizer::prelude::*;
//!
//! struct Greet;
//!
//! impl Atom for Greet {
//!     const ID: &'static str = "greet";
//!     type Input = String;
//!     type Output = String;
//!
//!     async fn process(&self, _cx: &Context, name: String) -> Result<String> {
//!         Ok(format!("Hello, {name}!"))
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let atomizer = Atomizer::builder().conductor(Memory::new()).atom(Greet).start().await?;
//! assert_eq!(atomizer.call::<Greet>("world".into()).await?, "Hello, world!");
//! atomizer.drain().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is promised
//!
//! An electron leaves its queue only after its outcome is safe: its answer confirmed, or a dead letter. So it
//! is delivered *at least once*, and an atom should do no harm when it runs twice. A call resolves exactly
//! once: the first answer counts. A panic, an error, a payload that cannot be decoded or a time limit costs
//! that electron only, and whoever asked is answered with the [`Failure`].

mod admission;
mod ask;
mod atom;
mod builder;
mod cancel;
mod claim;
mod clock;
mod conductor;
mod context;
mod dead_letter;
mod electron;
mod erased;
mod error;
mod event;
mod event_log;
mod fan_out;
mod health;
mod home;
mod id;
mod inbox;
mod inline;
mod instance;
mod intake;
mod life;
mod link;
mod memory;
mod metrics;
mod monitor;
mod node;
mod pack;
mod policy;
mod presence;
mod properties;
mod publish;
mod resident;
mod results;
mod run;
mod runtime;
mod settle;
mod spawn;
pub mod wire;
mod worker;

pub use ask::{Call, CallError};
pub use atom::{Atom, Kind, Options, RawAtom, Resident};
pub use builder::{Builder, StartError};
pub use cancel::Cancel;
pub use conductor::{
    Address, Census, Conductor, Delivery, Envelope, Epoch, Limits, OpenError, Outcome, Release,
    SendError, Session, SessionError, SettleError, Source, Subscription, Ticket,
};
pub use context::Context;
pub use dead_letter::{BrokerDeath, Cause, CauseKey, DeadLetter, LetterId, Reason};
pub use electron::{ContentType, Electron, Extra, Message, Parent, Payload, Unreadable};
pub use error::{AtomError, Result};
pub use event::{Event, EventKind, EventStream, Missed, Severity};
pub use event_log::{EventLog, EventReader, EventWriter, InvalidPosition, Position, Read};
pub use fan_out::{Answers, ChildError, End, FanOut, FanOutError, Group, Lenient, Member, Partial};
pub use health::{Health, Readiness};
pub use id::{AtomId, ConductorId, ElectronId, InvalidId, NodeId, ReplyTo, ResultsId};
pub use memory::Memory;
pub use monitor::{
    Bookmark, ClusterEvents, Filter, InvalidBookmark, Monitor, MonitorError, NodeState, NodeStatus,
    Nodes, Seen, Story, Whereabouts,
};
pub use pack::Pack;
pub use policy::{Backoff, Policy};
pub use presence::{Presence, Serving};
pub use properties::{Failure, FailureKind, Properties};
pub use results::Results;
pub use runtime::{Atomizer, NodeError};
pub use spawn::Spawning;

/// What nearly every program needs.
pub mod prelude {
    pub use crate::{
        Atom, AtomError, Atomizer, Backoff, CallError, Context, Kind, Memory, Options, Policy,
        Resident, Result,
    };
}
