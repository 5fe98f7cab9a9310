//! A small HTTP/1.1 server: one request a connection, few at once, and none for long.

use std::{
    convert::Infallible,
    io,
    net::{self, SocketAddr},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime,
    sync::{Semaphore, oneshot},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use crate::answer::Shown;

/// How many connections are served at once. The next wait in the backlog of the system, for no longer than one may take.
const CONNECTIONS_MAX: usize = 64;
/// How long one request may take, from the first byte of it to the last of its answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a request's head may be.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// How long to wait when the system gives no connection, as when there are too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often what was recorded one by one is put together; until then each takes up memory.
const UPKEEP: Duration = Duration::from_secs(1);

/// Binds to an address.
pub(crate) fn bind(address: SocketAddr) -> io::Result<net::TcpListener> {
    let listener = net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A thread that serves until this is dropped.
#[derive(Debug)]
pub(crate) struct Listener {
    address: SocketAddr,
    /// The thread ends when this is dropped.
    stop: Option<oneshot::Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    pub(crate) fn start(listener: net::TcpListener, shown: Shown) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let listener = {
            let _inside = runtime.enter();
            TcpListener::from_std(listener)?
        };
        let thread =
            thread::Builder::new().name("atomizer-monitor".to_owned()).spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        never = serve(listener, Arc::new(shown)) => match never {},
                        // An error says that it is to stop: nothing is ever sent.
                        _ = stopped => {}
                    }
                });
            })?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It waits for nothing. An error says that it panicked, which was told by then.
            drop(thread.join());
        }
    }
}

async fn serve(listener: TcpListener, shown: Arc<Shown>) -> Infallible {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    let mut upkeep = interval(UPKEEP);
    upkeep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            accepted = accept(&listener, &places) => match accepted {
                Ok((stream, place)) => {
                    let shown = Arc::clone(&shown);
                    connections.spawn(async move {
                        // An error says that it took too long: the connection is closed.
                        drop(timeout(REQUEST_TIMEOUT, answer(stream, &shown)).await);
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "failed to accept a connection to the metrics");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "failed to answer for the metrics");
                }
            }
            _ = upkeep.tick() => shown.recorder.run_upkeep(),
        }
    }
}

/// Waits for a connection that there is a place for.
///
/// Cancel safe.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

async fn answer(stream: TcpStream, shown: &Shown) {
    let service = service_fn(|request: Request<Incoming>| async move {
        Ok::<_, Infallible>(shown.answer(request.method(), request.uri().path()))
    });
    let served = http1::Builder::new()
        // So the time that a connection has is that of one request.
        .keep_alive(false)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a request for the metrics went wrong");
    }
}
