//! Atoms that are ready to be used.
//!
//! [`MonteCarlo`] estimates π by tossing points. It is a spawner: one electron asks for the estimate, and it
//! asks [`Toss`] for as many batches as that takes, on whichever nodes have the atom.
//!
//! ```
//! use atomizer::prelude::*;
//! use atomizer_atoms::{MonteCarlo, Request, Toss};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let atomizer = Atomizer::builder()
//!     .conductor(Memory::new())
//!     .atom(MonteCarlo::default())
//!     .atom(Toss)
//!     .start()
//!     .await?;
//! let estimate = atomizer.call::<MonteCarlo>(Request::new(1_000_000, 10_000, 1)?).await?;
//! assert!(estimate.error.abs() < 0.01);
//! assert_eq!(estimate.electrons, 100);
//! atomizer.drain().await?;
//! # Ok(())
//! # }
//! ```

//!
//! [`WordCount`] counts the words of a folder of text files: it maps [`CountWords`] over pieces of them, and reduces
//! what comes back to the most frequent.

mod montecarlo;
mod wordcount;

pub use montecarlo::{
    Batch, Estimate, Hits, InvalidRequest, MonteCarlo, Progress, Request, Toss, toss,
};
pub use wordcount::{Corpus, CountWords, Counted, Piece, WordCount, Words};
