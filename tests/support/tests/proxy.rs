//! The proxy, before a server that echoes.

use std::error::Error;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use atomizer_test_support::Proxy;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const PATIENCE: Duration = Duration::from_secs(10);

/// Starts a server that echoes on every connection.
fn echo() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
        }
    });
    Ok(address)
}

fn connect(proxy: &Proxy) -> Result<TcpStream> {
    let stream = TcpStream::connect(proxy.address())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn round_trip(mut stream: &TcpStream) -> Result {
    stream.write_all(b"ping")?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"ping");
    Ok(())
}

/// Whether the other side has closed the connection, in order or not.
fn is_closed(mut stream: &TcpStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(length) => length == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn bytes_pass_and_so_does_the_end_of_a_stream() -> Result {
    let proxy = Proxy::start(echo()?)?;
    let mut stream = connect(&proxy)?;
    round_trip(&stream)?;
    assert_eq!(proxy.connections(), 1);
    stream.write_all(b"last words")?;
    stream.shutdown(Shutdown::Write)?;
    let mut rest = String::new();
    stream.read_to_string(&mut rest)?;
    assert_eq!(rest, "last words");
    Ok(())
}

#[test]
fn a_cut_closes_what_is_open_and_nothing_later() -> Result {
    let proxy = Proxy::start(echo()?)?;
    let before = [connect(&proxy)?, connect(&proxy)?];
    for stream in &before {
        round_trip(stream)?;
    }
    proxy.cut();
    assert!(before.iter().all(is_closed));
    round_trip(&connect(&proxy)?)
}

#[test]
fn refusing_closes_new_connections_only() -> Result {
    let proxy = Proxy::start(echo()?)?;
    let before = connect(&proxy)?;
    round_trip(&before)?;
    proxy.refuse(true);
    assert!(is_closed(&connect(&proxy)?));
    round_trip(&before)?;
    proxy.refuse(false);
    round_trip(&connect(&proxy)?)
}

#[test]
fn a_stalled_link_is_open_and_silent_until_it_goes_on() -> Result {
    let proxy = Proxy::start(echo()?)?;
    let mut stream = connect(&proxy)?;
    round_trip(&stream)?;
    proxy.stall(true);
    stream.write_all(b"late")?;
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    let silence = stream.read(&mut [0]).map_err(|error| error.kind());
    assert!(matches!(silence, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)));
    stream.set_read_timeout(Some(PATIENCE))?;
    proxy.stall(false);
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"late");

    // A stalled link can be cut, and a stalled proxy dropped.
    proxy.stall(true);
    stream.write_all(b"lost")?;
    proxy.cut();
    assert!(is_closed(&stream));
    let stream = connect(&proxy)?;
    drop(proxy);
    assert!(is_closed(&stream));
    Ok(())
}

#[test]
fn a_target_that_is_not_there_looks_closed() -> Result {
    let free = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let proxy = Proxy::start(free)?;
    assert!(is_closed(&connect(&proxy)?));
    Ok(())
}
