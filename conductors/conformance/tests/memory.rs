//! The in-memory conductor keeps the contract.

use std::time::Duration;

use atomizer::{Conductor, Memory};
use atomizer_conformance::{World, conformance_tests, event_log_tests};

struct InMemory(Memory);

impl Default for InMemory {
    fn default() -> Self {
        Self(Memory::new().keep_events(1024 * 1024, Duration::from_secs(3600)))
    }
}

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
event_log_tests!(async { InMemory::default() });
