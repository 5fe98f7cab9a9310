//! A group: children of different atoms under one rule of completion.

use std::{any::Any, fmt, marker::PhantomData, time::Duration};

use futures::stream;

use super::{
    ChildError, FanOutError, Lenient, Partial, WINDOW_DEFAULT,
    children::{Asking, Children, Question},
    completion::{Rules, gather},
    put, strictly,
};
use crate::{Atom, AtomId, Context, Payload, Policy, erased};

/// Children of different atoms that are asked together. Made by [`Context::group`].
///
/// The first failure ends it, unless [`tolerate`](Self::tolerate), [`enough`](Self::enough) or
/// [`within`](Self::within) says otherwise.
///
/// ```
/// # use atomizer::prelude::*;
/// # struct Price;
/// # impl Atom for Price {
/// #     const ID: &'static str = "price";
/// #     type Input = String;
/// #     type Output = f64;
/// #     async fn process(&self, _cx: &Context, _: String) -> Result<f64> { Ok(2.5) }
/// # }
/// # struct Stock;
/// # impl Atom for Stock {
/// #     const ID: &'static str = "stock";
/// #     type Input = String;
/// #     type Output = u32;
/// #     async fn process(&self, _cx: &Context, _: String) -> Result<u32> { Ok(4) }
/// # }
/// # async fn value(cx: &Context, article: String) -> Result<f64> {
/// let mut group = cx.group();
/// let price = group.call::<Price>(article.clone());
/// let stock = group.call::<Stock>(article);
/// let mut answers = group.join().await?;
/// let (Some(price), Some(stock)) = (answers.take(price), answers.take(stock)) else {
///     unreachable!("all have succeeded")
/// };
/// Ok(price * f64::from(stock))
/// # }
/// ```
#[must_use = "nothing is asked until the group is joined"]
pub struct Group<'cx> {
    cx: &'cx Context,
    questions: Vec<Question>,
    decoders: Vec<Decode>,
    policy: Option<Policy>,
}

/// An output of a type that its member knows.
type Output = Box<dyn Any + Send>;
type Decode = fn(&Payload) -> Result<Output, serde_json::Error>;

/// One child of a [`Group`], to take its output from the [`Answers`] by.
#[derive(Debug)]
pub struct Member<T> {
    index: usize,
    output: PhantomData<fn() -> T>,
}

impl<T> Member<T> {
    /// Returns which member it is, counted from 0, as a [`ChildError`] names it.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }
}

/// The outputs of a [`Group`].
pub struct Answers(Vec<Option<Output>>);

impl Answers {
    /// Takes what a member put out: none when it failed or was given up.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "what is taken is gone, and its member with it"
    )]
    pub fn take<T: 'static>(&mut self, member: Member<T>) -> Option<T> {
        let output = self.0.get_mut(member.index)?.take()?;
        output.downcast().ok().map(|output| *output)
    }
}

impl fmt::Debug for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outputs = self.0.iter().filter(|output| output.is_some()).count();
        f.debug_struct("Answers").field("outputs", &outputs).finish_non_exhaustive()
    }
}

impl<'cx> Group<'cx> {
    pub(crate) fn new(cx: &'cx Context) -> Self {
        Self { cx, questions: Vec::new(), decoders: Vec::new(), policy: None }
    }

    /// Adds a child.
    #[expect(clippy::needless_pass_by_value, reason = "callers write `call::<Double>(21)`")]
    pub fn call<A: Atom>(&mut self, input: A::Input) -> Member<A::Output> {
        self.add(AtomId::of::<A>(), erased::encode(&input), |payload| {
            Ok(Box::new(erased::decode::<A::Output>(payload)?))
        })
    }

    /// Adds a child of an atom that this program need not know, by id and with bytes.
    pub fn call_raw(&mut self, atom: AtomId, payload: Payload) -> Member<Payload> {
        self.add(atom, Ok(payload), |payload| Ok(Box::new(payload.clone())))
    }

    fn add<T>(
        &mut self,
        atom: AtomId,
        payload: Result<Payload, serde_json::Error>,
        decode: Decode,
    ) -> Member<T> {
        let index = self.questions.len();
        self.questions.push(Question { atom, payload });
        self.decoders.push(decode);
        Member { index, output: PhantomData }
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

    /// Sets how long to wait in all, from when the group is joined, and takes what has come by then. Any number may
    /// fail.
    pub fn within(self, time: Duration) -> Lenient<Self> {
        Lenient::new(self).within(time)
    }

    /// Asks all, and waits for their outputs.
    ///
    /// # Errors
    /// The first child that failed; the answers of all others are given up.
    ///
    /// # Cancel safety
    /// Dropping it gives up the children that are left.
    pub async fn join(self) -> Result<Answers, ChildError> {
        strictly(self.gather(Rules::STRICT).await)
    }

    async fn gather(self, rules: Rules) -> Result<Partial<Answers>, FanOutError> {
        let Self { cx, questions, decoders, policy } = self;
        let asking = Asking { window: WINDOW_DEFAULT.get(), policy, until: rules.until() };
        let children = Children::new(cx, stream::iter(questions), asking);
        let decode = |index: usize, payload: &Payload| decoders[index](payload);
        let gathered = gather(children, rules, Vec::new(), decode, put::<Option<Output>, Output>);
        let Partial { value, failures, given_up, end } = gathered.await?;
        Ok(Partial { value: Answers(value), failures, given_up, end })
    }
}

impl Lenient<Group<'_>> {
    /// Asks all, and waits until that is complete.
    ///
    /// # Errors
    /// [`FanOutError`] when too many children failed; the answers of all others are given up.
    ///
    /// # Cancel safety
    /// Dropping it gives up the children that are left.
    pub async fn join(self) -> Result<Partial<Answers>, FanOutError> {
        self.of.gather(self.rules).await
    }
}

impl fmt::Debug for Group<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let atoms: Vec<_> = self.questions.iter().map(|question| &question.atom).collect();
        f.debug_struct("Group").field("atoms", &atoms).finish_non_exhaustive()
    }
}
