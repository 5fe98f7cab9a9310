//! How the value that runs an electron comes about.

use std::sync::{Arc, Mutex, PoisonError};

/// Makes a value of an atom.
pub(crate) type Make<A> = Box<dyn Fn() -> A + Send + Sync>;

/// The values of one atom on a node.
pub(crate) enum Instances<A> {
    /// One value for all electrons, as it was registered.
    Shared(Arc<A>),
    /// One value for all electrons, made afresh after a panic.
    Renewed { make: Make<A>, now: Mutex<Arc<A>> },
    /// A value for each electron.
    PerElectron(Make<A>),
}

impl<A> Instances<A> {
    pub(crate) fn renewed(make: Make<A>) -> Self {
        let now = Mutex::new(Arc::new(make()));
        Self::Renewed { make, now }
    }

    /// Returns the value that runs the next electron.
    pub(crate) fn get(&self) -> Arc<A> {
        match self {
            Self::Shared(atom) => Arc::clone(atom),
            Self::Renewed { now, .. } => {
                Arc::clone(&now.lock().unwrap_or_else(PoisonError::into_inner))
            }
            Self::PerElectron(make) => Arc::new(make()),
        }
    }

    /// Makes the shared value afresh when this one, which panicked, is still it. Returns whether it did.
    ///
    /// Making it may panic as well; then the broken one stays until the next panic.
    pub(crate) fn renew(&self, broken: &Arc<A>) -> bool {
        let Self::Renewed { make, now } = self else { return false };
        let is_now = |now: &Mutex<Arc<A>>| {
            Arc::ptr_eq(&now.lock().unwrap_or_else(PoisonError::into_inner), broken)
        };
        if !is_now(now) {
            return false;
        }
        // Made outside of the lock: it is the user's code.
        let fresh = Arc::new(make());
        *now.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
        true
    }
}
