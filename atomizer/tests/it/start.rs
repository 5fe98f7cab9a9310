//! What a node refuses to start with.

use atomizer::{StartError, prelude::*};

use crate::atoms::Obedient;

#[tokio::test]
async fn a_node_without_a_conductor_does_not_start() {
    let error = Atomizer::builder().atom(Obedient).start().await.unwrap_err();
    assert!(matches!(error, StartError::NoConductor), "{error}");
}

#[tokio::test]
async fn an_atom_registered_twice_is_refused() {
    let builder = Atomizer::builder().conductor(Memory::new()).atom(Obedient).atom(Obedient);
    let error = builder.start().await.unwrap_err();
    assert_eq!(error.to_string(), "atom obedient is registered twice");
}

#[tokio::test]
async fn a_name_that_cannot_be_part_of_an_id_is_refused() {
    let builder = Atomizer::builder().conductor(Memory::new()).name("a b");
    let error = builder.start().await.unwrap_err().to_string();
    assert!(error.contains("is not a valid node id"), "{error}");
}
