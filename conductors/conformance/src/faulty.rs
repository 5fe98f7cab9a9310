//! A conductor that misbehaves on demand, around any that does not.

mod fault;
mod faults;
mod life;
mod session;

use std::sync::Arc;

use async_trait::async_trait;
use atomizer::{Conductor, ConductorId, EventLog, NodeId, OpenError, Session, SessionError};

use self::session::FaultySession;
pub use self::{
    fault::{Fault, Op},
    faults::Faults,
};

/// Wraps a conductor, and misbehaves when it is told to, in every way a conductor can.
///
/// It shows what a node, or an atom on it, makes of a conductor that fails, hangs or panics. Until its
/// [`Faults`] say otherwise nothing can be told from the conductor it wraps. Clones share their faults.
///
/// ```
/// use atomizer::prelude::*;
/// use atomizer_conformance::{Fault, Faulty, Op};
///
/// struct Greet;
///
/// impl Atom for Greet {
///     const ID: &'static str = "greet";
///     type Input = String;
///     type Output = String;
///
///     async fn process(&self, _cx: &Context, name: String) -> Result<String> {
///         Ok(format!("Hello, {name}!"))
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let faulty = Faulty::new(Memory::new());
/// let faults = faulty.faults();
/// faults.next(Op::Open, Fault::Error);
/// // The first attempt to connect fails, the second does not.
/// let atomizer = Atomizer::builder().conductor(faulty).atom(Greet).start().await?;
/// assert_eq!((faults.count(Op::Open), faults.calls(Op::Open)), (1, 2));
///
/// faults.end_sessions("somebody pulled the plug");
/// assert_eq!(atomizer.call::<Greet>("world".into()).await?, "Hello, world!");
/// atomizer.drain().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Faulty {
    inner: Arc<dyn Conductor>,
    faults: Faults,
}

impl Faulty {
    /// Wraps a conductor. A shared one, an `Arc<dyn Conductor>`, is wrapped by `Faulty::from`.
    #[must_use]
    pub fn new(inner: impl Conductor) -> Self {
        Self::from(Arc::new(inner) as Arc<dyn Conductor>)
    }

    /// Returns what tells it how to misbehave. It is of use after the conductor was given to a node, too.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.faults.clone()
    }
}

impl From<Arc<dyn Conductor>> for Faulty {
    fn from(inner: Arc<dyn Conductor>) -> Self {
        Self { inner, faults: Faults::default() }
    }
}

impl From<Box<dyn Conductor>> for Faulty {
    fn from(inner: Box<dyn Conductor>) -> Self {
        Self::from(Arc::from(inner))
    }
}

#[async_trait]
impl Conductor for Faulty {
    fn id(&self) -> &ConductorId {
        self.inner.id()
    }

    async fn open(&self, node: &NodeId) -> Result<Arc<dyn Session>, OpenError> {
        let fault = self.faults.before(Op::Open).await;
        match fault {
            Some(Fault::Error) => return Err(OpenError::Unreachable(ON_PURPOSE.to_owned())),
            Some(Fault::Refuse) => return Err(OpenError::Refused(ON_PURPOSE.to_owned())),
            _ => {}
        }
        let inner = self.inner.open(node).await?;
        if self.faults.after(Op::Open, fault).await {
            return Err(OpenError::Unreachable(ON_PURPOSE.to_owned()));
        }
        let session = FaultySession::new(inner, self.faults.clone());
        if fault == Some(Fault::EndSession) {
            session.life().end(&lost());
        }
        Ok(Arc::new(session))
    }

    fn event_log(&self) -> Option<Arc<dyn EventLog>> {
        self.inner.event_log()
    }
}

/// The reason of every error made here.
const ON_PURPOSE: &str = "on purpose";

fn lost() -> SessionError {
    SessionError::lost(ON_PURPOSE)
}
