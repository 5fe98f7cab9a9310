//! Fan-out: many children of one atom, a window of them in flight, and what comes of them.

mod children;
mod completion;
mod group;

use std::{fmt, marker::PhantomData, num::NonZeroUsize, time::Duration};

use futures::{Stream, StreamExt};

use crate::{Atom, AtomId, CallError, Context, Payload, Policy, erased};
use children::{Asking, Children, Question};
use completion::{Rules, gather, output};

pub use completion::{ChildError, End, FanOutError, Lenient, Partial};
pub use group::{Answers, Group, Member};

/// A fan-out that has not begun: choose what to make of the outputs.
///
/// Inputs are taken from the iterator or the stream as there is room in the window, so a million children do not
/// need a million entries. An atom that asks itself holds, while it waits, its place in the node's window for that
/// atom: its limit of concurrency and at most 64 more. Each child counts once, however often it is delivered or
/// answered. Dropping the fan-out gives up the children that are left: on whichever node they are, they are stopped or
/// never begun.
///
/// Where [very many](crate::Builder::waiting_max) parents wait already, the next child runs in the slot of this one, and
/// the one after it when that is over.
///
/// The first failure ends it, unless [`tolerate`](Self::tolerate), [`enough`](Self::enough) or
/// [`within`](Self::within) says otherwise.
#[must_use = "a fan-out does nothing until its outputs are asked for"]
pub struct FanOut<'cx, A, S> {
    cx: &'cx Context,
    inputs: S,
    window: NonZeroUsize,
    policy: Option<Policy>,
    atom: PhantomData<fn() -> A>,
}

/// How many children are in flight unless told otherwise.
const WINDOW_DEFAULT: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");

impl<'cx, A, S> FanOut<'cx, A, S>
where
    A: Atom,
    S: Stream<Item = A::Input> + Send,
{
    /// How many children are in flight unless told otherwise.
    pub const WINDOW_DEFAULT: NonZeroUsize = WINDOW_DEFAULT;

    pub(crate) fn new(cx: &'cx Context, inputs: S) -> Self {
        Self { cx, inputs, window: WINDOW_DEFAULT, policy: None, atom: PhantomData }
    }

    /// Sets how many children may be in flight.
    pub fn window(mut self, children: NonZeroUsize) -> Self {
        self.window = children;
        self
    }

    /// Sets what follows the failure of a child, instead of what its atom or its node says.
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = Some(policy);
        self
    }

    /// Sets how many children may fail. One more, and the rest is given up.
    pub fn tolerate(self, failures: usize) -> Lenient<Self> {
        Lenient::new(self).tolerate(failures)
    }

    /// Sets how many outputs are enough. With the last of them the rest is given up. Any number may fail.
    pub fn enough(self, outputs: usize) -> Lenient<Self> {
        Lenient::new(self).enough(outputs)
    }

    /// Sets how long to wait in all, from when the outputs are asked for, and takes what has come by then. Any number
    /// may fail.
    pub fn within(self, time: Duration) -> Lenient<Self> {
        Lenient::new(self).within(time)
    }

    /// Folds the outputs in the order in which they arrive.
    ///
    /// # Errors
    /// The first child that failed; the answers of all others are given up.
    ///
    /// # Cancel safety
    /// Dropping it gives up the children that are left.
    pub async fn fold<T, F>(self, initial: T, mut fold: F) -> Result<T, ChildError>
    where
        T: Send,
        F: FnMut(T, A::Output) -> T + Send,
    {
        strictly(
            self.gather(Rules::STRICT, initial, |folded, _, output| fold(folded, output)).await,
        )
    }

    /// Collects the outputs in the order of the inputs.
    ///
    /// # Errors
    /// The first child that failed; the answers of all others are given up.
    ///
    /// # Cancel safety
    /// Dropping it gives up the children that are left.
    pub async fn collect(self) -> Result<Vec<A::Output>, ChildError> {
        let gathering = self.gather(Rules::STRICT, Vec::new(), put::<Option<A::Output>, A::Output>);
        Ok(strictly(gathering.await)?.into_iter().flatten().collect())
    }

    /// Streams what comes of each child as it arrives, with the index of its input.
    ///
    /// # Cancel safety
    /// Dropping the stream gives up the children that are left.
    pub fn stream(self) -> impl Stream<Item = (usize, Result<A::Output, CallError>)> + Send + 'cx
    where
        S: 'cx,
    {
        futures::stream::unfold(self.children(Rules::STRICT), async |mut children| {
            let (index, came) = children.next().await?;
            Some(((index, output(came, erased::decode)), children))
        })
    }

    fn children(
        self,
        rules: Rules,
    ) -> Children<'cx, impl Stream<Item = Question> + Send + use<A, S>> {
        let Self { cx, inputs, window, policy, .. } = self;
        let atom = AtomId::of::<A>();
        let questions = inputs
            .map(move |input| Question { atom: atom.clone(), payload: erased::encode(&input) });
        Children::new(cx, questions, Asking { window: window.get(), policy, until: rules.until() })
    }

    async fn gather<T: Send>(
        self,
        rules: Rules,
        initial: T,
        fold: impl FnMut(T, usize, A::Output) -> T + Send,
    ) -> Result<Partial<T>, FanOutError> {
        let decode = |_, payload: &Payload| erased::decode(payload);
        gather(self.children(rules), rules, initial, decode, fold).await
    }
}

impl<A, S> Lenient<FanOut<'_, A, S>>
where
    A: Atom,
    S: Stream<Item = A::Input> + Send,
{
    /// Folds the outputs in the order in which they arrive.
    ///
    /// # Errors
    /// [`FanOutError`] when too many children failed; the answers of all others are given up.
    ///
    /// # Cancel safety
    /// Dropping it gives up the children that are left.
    pub async fn fold<T, F>(self, initial: T, mut fold: F) -> Result<Partial<T>, FanOutError>
    where
        T: Send,
        F: FnMut(T, A::Output) -> T + Send,
    {
        let Self { of, rules } = self;
        of.gather(rules, initial, |folded, _, output| fold(folded, output)).await
    }

    /// Collects the outputs with the indices of their inputs, in the order of these.
    ///
    /// # Errors
    /// [`FanOutError`] when too many children failed; the answers of all others are given up.
    ///
    /// # Cancel safety
    /// Dropping it gives up the children that are left.
    pub async fn collect(self) -> Result<Partial<Vec<(usize, A::Output)>>, FanOutError> {
        let Self { of, rules } = self;
        let push = |mut outputs: Vec<_>, index, output| {
            outputs.push((index, output));
            outputs
        };
        let mut partial = of.gather(rules, Vec::new(), push).await?;
        partial.value.sort_unstable_by_key(|(index, _)| *index);
        Ok(partial)
    }
}

/// The first failure, when that ends it.
fn strictly<T>(gathered: Result<Partial<T>, FanOutError>) -> Result<T, ChildError> {
    gathered.map(|partial| partial.value).map_err(|error| match error {
        FanOutError::TooManyFailures { mut failures, .. }
        | FanOutError::TooFewOutputs { mut failures, .. } => {
            failures.pop().expect("without rules only a failure ends it")
        }
    })
}

/// Puts an output at its place.
fn put<P: From<O> + Default, O>(mut outputs: Vec<P>, index: usize, output: O) -> Vec<P> {
    if outputs.len() <= index {
        outputs.resize_with(index + 1, P::default);
    }
    outputs[index] = output.into();
    outputs
}

impl<A, S> fmt::Debug for FanOut<'_, A, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FanOut").field("window", &self.window).finish_non_exhaustive()
    }
}
