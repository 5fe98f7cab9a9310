//! The only reader of the environment in this crate.

use std::path::PathBuf;

/// Returns the variable's text, or `None` where it is unset, empty or not text.
#[expect(
    clippy::disallowed_methods,
    reason = "tests are told of their broker by the environment, and it is read here only"
)]
pub(crate) fn text(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|text| !text.is_empty())
}

/// Returns the folders of `PATH`, in order.
pub(crate) fn path_folders() -> Vec<PathBuf> {
    text("PATH").map_or_else(Vec::new, |path| std::env::split_paths(&path).collect())
}
