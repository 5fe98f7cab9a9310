//! What is below the client: a connection that is hung up when nobody waits for it any more.
//!
//! Given up in the middle of its handshake, lapin waits for the broker's next word for ever, on a thread of its
//! own: each try at a broker that accepts and says nothing would leave a thread and a socket behind.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use async_rs::{
    Runtime, Tokio,
    traits::Reactor,
    util::{DummyIO, RuntimeParts},
};
use futures::{
    FutureExt, Stream,
    io::{AsyncRead, AsyncWrite, IoSlice, IoSliceMut},
};
use lapin::{AsyncTcpStream, Connection, ConnectionProperties, uri::AMQPUri};
use tokio::{net::lookup_host, sync::oneshot, time::timeout};

type Tcp = <Tokio as Reactor>::TcpStream;

/// Makes a connection, of which nothing is left when the future is dropped. Reaching the host may take `limit`.
pub(crate) async fn connect(
    uri: AMQPUri,
    properties: ConnectionProperties,
    limit: Duration,
) -> lapin::Result<Connection> {
    let (established, waited_for) = oneshot::channel();
    let waited_for = Mutex::new(Some(waited_for));
    let kit = RuntimeParts::new(Tokio::current(), Sockets(Tokio::current()));
    let dial = async move |uri: AMQPUri, _| {
        let waited_for = waited_for.lock().unwrap_or_else(PoisonError::into_inner).take();
        let stream = reach(&uri.authority.host, uri.authority.port, limit).await?;
        Ok(AsyncTcpStream::Plain(Socket { stream, waited_for }))
    };
    let connection = Connection::connector(uri, Runtime::new(kit), dial, properties).await?;
    // From now on whoever holds the connection closes it.
    established.send(()).ok();
    Ok(connection)
}

/// Connects to the first address of a host that answers; each may take its share of the time.
async fn reach(host: &str, port: u16, limit: Duration) -> io::Result<Tcp> {
    let no_answer = || io::Error::new(io::ErrorKind::TimedOut, "no answer");
    let found = timeout(limit, lookup_host((host, port))).await.map_err(|_| no_answer())??;
    let addresses: Vec<_> = found.collect();
    let share = limit / u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match timeout(share, Tokio::current().tcp_connect_addr(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_) => last = no_answer(),
        }
    }
    Err(last)
}

/// One TCP connection.
struct Socket {
    stream: Tcp,
    /// While the connection is being made: whether it is still waited for.
    waited_for: Option<oneshot::Receiver<()>>,
}

impl Socket {
    /// Fails when nobody waits for the connection any more.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(waited_for) = &mut self.waited_for else { return Ok(()) };
        match waited_for.poll_unpin(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(Ok(())) => {
                self.waited_for = None;
                Ok(())
            }
            Poll::Ready(Err(_)) => {
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, "given up"))
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, bytes)
    }

    fn poll_read_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read_vectored(cx, bytes)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

/// Tells lapin that its connections are [`Socket`]s; all else is tokio's.
#[derive(Clone)]
struct Sockets(Tokio);

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sockets")
    }
}

impl Reactor for Sockets {
    type TcpStream = Socket;
    type Sleep = <Tokio as Reactor>::Sleep;

    #[expect(refining_impl_trait, reason = "nobody sees it")]
    fn register<H: Send + 'static>(&self, _: H) -> io::Result<DummyIO> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Socket>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async { Ok(Socket { stream: connecting.await?, waited_for: None }) }
    }
}
