//! One file for each verb.

pub(crate) mod call;
pub(crate) mod completions;
pub(crate) mod dead;
pub(crate) mod doctor;
pub(crate) mod events;
pub(crate) mod nodes;
pub(crate) mod queues;
pub(crate) mod send;
pub(crate) mod topology;
pub(crate) mod why;
