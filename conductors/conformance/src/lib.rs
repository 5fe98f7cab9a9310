//! The contract of conductors, as tests that anyone can run against their own.
//!
//! Describe a world in which your conductor works, and let the macro make one test of each rule:
//!
//! ```
//! use atomizer::{Conductor, Memory};
//! use atomizer_conformance::{World, conformance_tests};
//!
//! #[derive(Default)]
//! struct InMemory(Memory);
//!
//! #[async_trait::async_trait]
//! impl World for InMemory {
//!     fn conductor(&self) -> Box<dyn Conductor> {
//!         Box::new(self.0.clone())
//!     }
//!     async fn cut(&self) {
//!         self.0.cut();
//!     }
//! }
//!
//! conformance_tests!(async { InMemory::default() });
//! # fn main() {}
//! ```
//!
//! The prose of the contract is in the docs of [`atomizer::Conductor`] and of the traits beside it.
//!
//! [`Faulty`] is for the other side of the seam: it wraps a conductor and breaks the contract on demand, to
//! show what a node, or an atom on it, makes of that.

pub mod contract;
pub mod event_log;
mod faulty;
mod node;

use async_trait::async_trait;
use atomizer::Conductor;

pub use faulty::{Fault, Faults, Faulty, Op};

/// What a conductor under test needs around it. Each test gets a world of its own, with nothing in it.
#[async_trait]
pub trait World: Send + Sync {
    /// Describes a conductor of this world. All of them reach the same queues.
    fn conductor(&self) -> Box<dyn Conductor>;

    /// Ends every open session by a fault, as a network that fails would; new ones can be opened.
    async fn cut(&self);
}

/// Makes a `#[tokio::test]` of each rule of the contract, over the worlds that the expression, a future,
/// makes.
///
/// The crate that calls it needs `tokio` with the features `macros` and `rt-multi-thread`.
#[macro_export]
macro_rules! conformance_tests {
    ($world:expr) => {
        $crate::conformance_tests! { $world;
            what_is_sent_arrives_as_it_was
            an_electron_waits_for_its_first_subscriber
            what_is_settled_does_not_come_again
            a_dropped_ticket_releases
            a_release_leaves_the_electron_as_it_was
            the_window_bounds_what_is_out
            an_answer_reaches_who_asked
            an_answer_that_nobody_can_receive_gives_the_ticket_back
            an_unroutable_send_is_an_error
            the_largest_payload_gets_through
            a_payload_over_the_limit_is_refused
            an_answer_over_the_limit_gives_the_ticket_back
            a_ticket_is_good_for_its_session_only
            a_lost_session_loses_nothing
            a_closed_session_gives_everything_back
            a_session_can_be_closed_during_everything
            answers_wait_for_a_node_that_comes_back
            subscribers_share
            a_stopped_subscription_keeps_its_tickets
            a_dropped_subscription_keeps_its_tickets
            a_dropped_settlement_is_carried_out
            results_stand_in_the_order_of_the_batch
            a_dead_letter_is_taken
            many_electrons_come_once_each
            a_parked_electron_can_be_settled
            a_parked_electron_is_given_back_changed
            a_lost_session_loses_nothing_that_is_parked
            a_closed_session_gives_back_what_is_parked
            what_is_parked_does_not_count_against_the_window
            parking_over_the_limit_gives_the_ticket_back
            parking_is_for_tickets_of_the_session
            a_dropped_parking_gives_the_electron_back
            what_is_taken_does_not_come_again
            the_census_counts
            a_delayed_electron_does_not_come_before_its_time
            a_result_address_keeps_outcomes_until_they_are_read
            what_is_for_all_nodes_reaches_each_that_takes_electrons
        }
    };
    ($world:expr; $($rule:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                $crate::contract::$rule(&$world.await).await;
            }
        )*
    };
}
