//! The listener: what it answers, and what clients that do no good cost others.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use atomizer_monitoring::{Monitoring, ServeError};

use crate::client::{exchange, get, request, serve};

#[test]
fn metrics_are_served_as_prometheus_reads_them() {
    let monitoring = serve();
    let address = monitoring.address();
    assert!(address.ip().is_loopback() && address.port() != 0, "{address}");
    let answer = get(address, "/metrics");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    assert_eq!(answer.headers["connection"], "close");
    assert_eq!(get(address, "/metrics?name[]=up").status, 200);
}

#[test]
fn only_three_paths_and_two_methods_are_answered() {
    let monitoring = serve();
    let address = monitoring.address();
    for path in ["/", "/metric", "/metrics/", "//metrics", "/healthz/x", "/../readyz"] {
        assert_eq!(get(address, path).status, 404, "{path}");
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "BREW"] {
        let answer = request(address, method, "/metrics");
        assert_eq!(answer.status, 405, "{method}");
        assert_eq!(answer.headers["allow"], "GET, HEAD");
    }
    let head = request(address, "HEAD", "/healthz");
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    let length = get(address, "/healthz").headers["content-length"].clone();
    assert_eq!(head.headers["content-length"], length);
}

#[test]
fn what_is_no_request_is_refused() {
    let monitoring = serve();
    let address = monitoring.address();
    assert!(exchange(address, "what?\r\n\r\n").starts_with("HTTP/1.1 400 "));
    let long = format!("GET /{} HTTP/1.1\r\nHost: here\r\n\r\n", "x".repeat(20_000));
    let answer = exchange(address, &long);
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    assert_eq!(get(address, "/healthz").status, 200);
}

#[test]
fn clients_that_are_slow_hold_up_no_other_and_are_cut_off() {
    let monitoring = serve();
    let address = monitoring.address();
    // Fewer than there are places.
    let began = Instant::now();
    let mut slow: Vec<_> = (0..40).map(|_| TcpStream::connect(address).unwrap()).collect();
    for stream in &mut slow {
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: ").unwrap();
    }
    assert_eq!(get(address, "/healthz").status, 200);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
    for mut stream in slow {
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        // An error says that it was reset, which will do as well.
        let read = stream.read(&mut [0; 1]).unwrap_or(0);
        assert_eq!(read, 0, "it is closed without an answer");
    }
}

#[test]
fn clients_that_take_all_places_hold_up_others_for_a_few_seconds_only() {
    let monitoring = serve();
    let address = monitoring.address();
    let slow: Vec<_> = (0..100).map(|_| TcpStream::connect(address).unwrap()).collect();
    // Behind two rounds of those that are cut off.
    assert_eq!(get(address, "/healthz").status, 200);
    drop(slow);
}

#[test]
fn an_address_that_is_taken_is_told_and_another_may_be_tried() {
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let error = Monitoring::serve(taken.local_addr().unwrap()).unwrap_err();
    assert!(error.is_address_in_use(), "{error:?}");
    let monitoring = serve();
    let second = Monitoring::serve(([127, 0, 0, 1], 0).into()).unwrap_err();
    assert!(matches!(second, ServeError::Recorded), "{second:?}");
    let address = monitoring.address();
    drop(monitoring);
    assert!(TcpStream::connect(address).is_err(), "nobody listens any more");
}
