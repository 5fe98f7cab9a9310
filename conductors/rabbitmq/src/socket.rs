//! What is below the client: a connection that is hung up when nobody waits for it any more, and on which is
//! heard what the broker says of itself, for lapin keeps that to itself.
//!
//! Given up in the middle of its handshake, lapin waits for the broker's next word for ever, on a thread of its
//! own: each try at a broker that accepts and says nothing would leave a thread and a socket behind.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use async_rs::{
    Runtime, Tokio,
    traits::Reactor,
    util::{DummyIO, RuntimeParts},
};
use futures::{
    FutureExt, Stream, TryFutureExt,
    io::{AsyncRead, AsyncWrite, IoSlice, IoSliceMut},
};
use lapin::{
    AsyncTcpStream, Connection, ConnectionProperties,
    uri::{AMQPAuthority, AMQPUri},
};
use tokio::{net::lookup_host, sync::oneshot, time::timeout};

use crate::{
    server::Server,
    tls::{Ready, Tls},
};

pub(crate) type Tcp = <Tokio as Reactor>::TcpStream;

/// What carries the bytes: TCP, or TLS on it.
pub(crate) type Transport = Box<dyn ReadWrite>;

pub(crate) trait ReadWrite: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ReadWrite for T {}

/// Why there is no connection.
pub(crate) enum ConnectError {
    Client(lapin::Error),
    /// Of the broker's own words follows that it will not do.
    Server(String),
}

/// Makes a connection, of which nothing is left when the future is dropped. Connecting to all addresses of
/// the host together takes no longer than `limit`, nor does encrypting; all else is for the caller to limit.
pub(crate) async fn connect(
    uri: AMQPUri,
    tls: Option<Tls>,
    properties: ConnectionProperties,
    limit: Duration,
) -> Result<(Connection, Server), ConnectError> {
    // Before lapin begins: it dials on a thread of its own, and may lose an error that is there at once.
    let reached = reach(&uri.authority, tls, limit).await;
    let reached = reached.map_err(|error| ConnectError::Client(error.into()))?;
    let (established, waited_for) = oneshot::channel();
    let (hear, heard) = oneshot::channel();
    let handshake = Handshake { waited_for, greeting: Vec::new(), hear: Some(hear) };
    let reached = Mutex::new(Some((reached, handshake)));
    let kit = RuntimeParts::new(Tokio::current(), Sockets(Tokio::current()));
    let dial = async move |_, _| {
        let reached = reached.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ((tcp, tls), handshake) =
            reached.ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionAborted))?;
        // By lapin, which reads at once: a broker that takes no certificate, or wants one, says so when all seems well
        // (TLS 1.3), and whoever writes to it first loses what it said.
        let stream: Transport = match tls {
            None => Box::new(tcp),
            Some(tls) => timeout(limit, tls.encrypt(tcp)).await.map_err(|_| no_answer())??,
        };
        Ok(AsyncTcpStream::Plain(Socket { stream, handshake: Some(handshake) }))
    };
    let connecting = Connection::connector(uri, Runtime::new(kit), dial, properties);
    let checking = async {
        let server = heard.await.unwrap_or_default();
        server.check().map_err(ConnectError::Server)?;
        Ok(server)
    };
    let connecting = connecting.map_err(ConnectError::Client);
    let (connection, server) = tokio::try_join!(connecting, checking)?;
    // From now on whoever holds the connection closes it.
    established.send(()).ok();
    Ok((connection, server))
}

/// Reaches the broker, and reads what encrypting the way there needs.
async fn reach(
    to: &AMQPAuthority,
    tls: Option<Tls>,
    limit: Duration,
) -> io::Result<(Tcp, Option<Ready>)> {
    let ready = match tls {
        None => None,
        Some(tls) => Some(tls.ready(&to.host).await?),
    };
    Ok((connect_any(&to.host, to.port, limit).await?, ready))
}

/// Connects to the first address of a host that answers; each may take its share of the time.
async fn connect_any(host: &str, port: u16, limit: Duration) -> io::Result<Tcp> {
    let addresses: Vec<_> = lookup_host((host, port)).await?.collect();
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

fn no_answer() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no answer")
}

/// One connection, as lapin sees it.
struct Socket {
    stream: Transport,
    /// While the connection is being made.
    handshake: Option<Handshake>,
}

struct Handshake {
    /// Whether anyone still waits for the connection.
    waited_for: oneshot::Receiver<()>,
    /// What the broker has said, until it is understood.
    greeting: Vec<u8>,
    hear: Option<oneshot::Sender<Server>>,
}

impl Handshake {
    fn read(&mut self, bytes: &[u8]) {
        if self.hear.is_none() {
            return;
        }
        self.greeting.extend_from_slice(bytes);
        if let Some(server) = Server::read(&self.greeting) {
            self.greeting = Vec::new();
            self.hear.take().map(|hear| hear.send(server));
        }
    }
}

impl Socket {
    /// Fails when nobody waits for the connection any more.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(handshake) = &mut self.handshake else { return Ok(()) };
        match handshake.waited_for.poll_unpin(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(Ok(())) => {
                self.handshake = None;
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
        let Self { stream, handshake } = &mut *self;
        let read = ready!(Pin::new(stream).poll_read(cx, bytes))?;
        if let Some(handshake) = handshake {
            handshake.read(&bytes[..read]);
        }
        Poll::Ready(Ok(read))
    }

    fn poll_read_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.handshake.is_some() {
            // To be heard along with the rest.
            let first = bytes.iter_mut().find(|bytes| !bytes.is_empty());
            return self.poll_read(cx, first.map_or(&mut [], |bytes| &mut **bytes));
        }
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
        async { Ok(Socket { stream: Box::new(connecting.await?), handshake: None }) }
    }
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt, stream};
    use tokio::net::TcpSocket;

    use super::*;

    /// The client would lose about one refusal in a few thousand on its way from its thread.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_refused_connection_is_told_each_time() {
        // It has the port, and does not listen.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let nobody = socket.local_addr().unwrap();
        let refused = async |_| {
            let uri = format!("amqp://{nobody}").parse().unwrap();
            let limit = Duration::from_secs(60);
            match connect(uri, None, ConnectionProperties::default(), limit).await {
                Err(ConnectError::Client(error)) => error.to_string(),
                _ => panic!("nobody listens there"),
            }
        };
        let tries = stream::iter(0..10_000).map(refused).buffer_unordered(8);
        let told = timeout(Duration::from_secs(50), tries.collect::<Vec<_>>()).await.unwrap();
        assert!(told.iter().all(|error| error.contains("refused")), "{told:?}");
    }
}
