//! Waits to be told to stop.

use std::io;

/// Waits for SIGTERM or ctrl-c, from when it is first polled on.
///
/// Where there is no SIGTERM it waits for ctrl-c.
///
/// # Errors
/// When the system refuses to say.
///
/// # Cancel safety
/// Safe, except that a signal that comes before the next call is lost.
pub async fn stop() -> io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};

        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            interrupted = tokio::signal::ctrl_c() => interrupted,
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}
