//! A TCP proxy that breaks the link on command.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// More connections at once are a leak in the test, and are closed at once.
const LINKS_MAX: usize = 256;

/// How long connecting to the target may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// Bytes moved at a time.
const CHUNK_BYTES: usize = 16 * 1024;

/// A TCP proxy on 127.0.0.1, gone with all its connections when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    common: Arc<Common>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Common {
    target: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    refusing: bool,
    stalled: bool,
    next_link: u64,
    /// Both ends of each link, for closing them.
    links: HashMap<u64, [TcpStream; 2]>,
}

impl Proxy {
    /// Starts a proxy to `target`, on a port of its own.
    ///
    /// # Errors
    ///
    /// When there is no free port.
    pub fn start(target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let common = Arc::new(Common { target, state: Mutex::default(), changed: Condvar::new() });
        let acceptor = thread::spawn({
            let common = Arc::clone(&common);
            move || accept(&listener, &common)
        });
        Ok(Self { address, common, acceptor: Some(acceptor) })
    }

    /// Returns where to connect instead of the target.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns how many connections go through it at this moment.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.common.state().links.len()
    }

    /// Closes all current connections, with whatever is under way in them; new ones are accepted.
    pub fn cut(&self) {
        self.common.cut(&mut self.common.state());
    }

    /// While true, new connections are closed at once; current ones live on.
    pub fn refuse(&self, refuse: bool) {
        self.common.state().refusing = refuse;
    }

    /// While true, nothing is forwarded either way, though all connections stay open.
    ///
    /// A half-open link: only a heartbeat or a deadline tells. What was sent meanwhile arrives
    /// when it ends.
    pub fn stall(&self, stall: bool) {
        self.common.state().stalled = stall;
        self.common.changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        {
            let mut state = self.common.state();
            state.closed = true;
            self.common.cut(&mut state);
        }
        // Wakes the acceptor, which then sees that it is closed.
        drop(TcpStream::connect_timeout(&self.address, CONNECT_MAX));
        if let Some(acceptor) = self.acceptor.take() {
            drop(acceptor.join());
        }
    }
}

impl Common {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self, state: &mut State) {
        for ends in state.links.drain().flat_map(|(_, ends)| ends) {
            close(&ends);
        }
        self.changed.notify_all();
    }

    /// Takes the link in, unless it comes too late.
    fn register(&self, ends: [TcpStream; 2]) -> Option<u64> {
        let mut state = self.state();
        if state.closed || state.refusing || state.links.len() >= LINKS_MAX {
            return None;
        }
        let link = state.next_link;
        state.next_link += 1;
        state.links.insert(link, ends);
        Some(link)
    }

    /// Waits while the proxy is stalled; returns whether the link still exists.
    fn may_forward(&self, link: u64) -> bool {
        let stalled = |state: &mut State| state.stalled && state.links.contains_key(&link);
        let state =
            self.changed.wait_while(self.state(), stalled).unwrap_or_else(PoisonError::into_inner);
        state.links.contains_key(&link)
    }
}

fn accept(listener: &TcpListener, common: &Arc<Common>) {
    let mut links: Vec<JoinHandle<()>> = Vec::new();
    for client in listener.incoming() {
        if common.state().closed {
            break;
        }
        links.retain(|link| !link.is_finished());
        // Too many connections, or a client that is already gone, are the client's business.
        let Ok(client) = client else { continue };
        if common.state().refusing {
            close(&client);
            continue;
        }
        let common = Arc::clone(common);
        links.push(thread::spawn(move || {
            // A broken link has no one to report to but its two ends, which see it closed.
            drop(serve(client, &common));
        }));
    }
    for link in links {
        drop(link.join());
    }
}

/// Joins the client to the target, and returns when both directions have ended.
fn serve(client: TcpStream, common: &Arc<Common>) -> io::Result<()> {
    let server = TcpStream::connect_timeout(&common.target, CONNECT_MAX)?;
    for stream in [&client, &server] {
        // The proxy is to be seen by its faults, not by its delays.
        stream.set_nodelay(true)?;
    }
    let upwards = [client.try_clone()?, server.try_clone()?];
    let downwards = [server.try_clone()?, client.try_clone()?];
    let Some(link) = common.register([client, server]) else {
        return Ok(());
    };
    let other = thread::spawn({
        let common = Arc::clone(common);
        move || pump(downwards, link, &common)
    });
    pump(upwards, link, common);
    drop(other.join());
    common.state().links.remove(&link);
    Ok(())
}

/// Moves bytes one way, until the end of the stream or of the link.
fn pump([mut from, mut to]: [TcpStream; 2], link: u64, common: &Common) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let read = from.read(&mut chunk);
        if !common.may_forward(link) {
            // Both ends are closed already.
            return;
        }
        match read {
            // Half closed: the other direction may still have something to say.
            Ok(0) => return drop(to.shutdown(Shutdown::Write)),
            Ok(length) if to.write_all(&chunk[..length]).is_ok() => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => {
                close(&from);
                return close(&to);
            }
        }
    }
}

fn close(stream: &TcpStream) {
    // Fails only where it is closed already.
    drop(stream.shutdown(Shutdown::Both));
}
