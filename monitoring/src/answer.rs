//! What is answered to whom.

use std::{
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
};

use atomizer::{Health, Readiness};
use hyper::{
    Method, Response, StatusCode,
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue},
};
use metrics_exporter_prometheus::PrometheusHandle;

/// Prometheus' text format, version 0.0.4.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

/// What there is to show.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    pub(crate) recorder: PrometheusHandle,
    pub(crate) nodes: Arc<Mutex<Vec<Health>>>,
}

impl Shown {
    /// Answers a request; what a HEAD has too much of is left out by the server.
    pub(crate) fn answer(&self, method: &Method, path: &str) -> Response<String> {
        let is_known = matches!(path, "/metrics" | "/healthz" | "/readyz");
        let (status, text) = match path {
            _ if is_known && method != Method::GET && method != Method::HEAD => {
                (StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n".to_owned())
            }
            "/metrics" => (StatusCode::OK, self.recorder.render()),
            "/healthz" => self.health(),
            "/readyz" => self.readiness(),
            _ => (StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n".to_owned()),
        };
        let is_exposition = status == StatusCode::OK && path == "/metrics";
        let content_type = if is_exposition { EXPOSITION } else { TEXT };
        let mut response = Response::new(text);
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        response
    }

    /// Well while no node has ended: one that cannot reach its broker yet is no reason to begin anew.
    fn health(&self) -> (StatusCode, String) {
        let nodes = self.nodes();
        let well = nodes.iter().all(Health::is_alive);
        (status(well), list(&nodes, "alive: no node has started\n"))
    }

    fn readiness(&self) -> (StatusCode, String) {
        let nodes = self.nodes();
        let ready = nodes.iter().all(|node| node.readiness().is_ready());
        (status(ready && !nodes.is_empty()), list(&nodes, "no node has started\n"))
    }

    fn nodes(&self) -> Vec<Health> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn status(good: bool) -> StatusCode {
    if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// A line for each node.
fn list(nodes: &[Health], none: &str) -> String {
    if nodes.is_empty() {
        return none.to_owned();
    }
    let mut text = String::new();
    for node in nodes {
        let readiness = match node.readiness() {
            // The report may name what is nobody else's business; it is in the log.
            Readiness::Failed(_) => "failed".to_owned(),
            readiness => readiness.to_string(),
        };
        // Writing to a string does not fail.
        writeln!(text, "{}: {readiness}", node.node()).ok();
    }
    text
}
