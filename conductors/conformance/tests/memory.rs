//! The in-memory conductor keeps the contract.

use atomizer::{Conductor, Memory};
use atomizer_conformance::{World, conformance_tests};

#[derive(Default)]
struct InMemory(Memory);

#[async_trait::async_trait]
impl World for InMemory {
    fn conductor(&self) -> Box<dyn Conductor> {
        Box::new(self.0.clone())
    }

    async fn cut(&self) {
        self.0.cut();
    }
}

conformance_tests!(async { InMemory::default() });
