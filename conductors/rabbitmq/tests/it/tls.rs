//! TLS: who is trusted, and who is let in. `cargo nextest run -p atomizer-rabbitmq --features tls`

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use atomizer::{Conductor, NodeId, OpenError};
use atomizer_test_support::{Vhost, shared};

use crate::support::{Double, blocking, rabbit, serve, soon};

/// Certificates of two authorities, and a listener on the shared broker; gone when dropped.
struct Secure {
    vhost: Vhost,
    folder: PathBuf,
    port: u16,
}

impl Secure {
    /// `options` are Erlang's, of the listener.
    fn start(options: &str) -> Self {
        let vhost = shared().expect("a broker").vhost().unwrap();
        let folder = std::env::temp_dir().join(vhost.name());
        fs::create_dir(&folder).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        for authority in ["ca", "other"] {
            certify(&folder, authority, None, &["basicConstraints=critical,CA:TRUE"]);
        }
        let host = "subjectAltName=DNS:localhost,IP:127.0.0.1";
        certify(&folder, "broker", Some("ca"), &["basicConstraints=CA:FALSE", host]);
        certify(&folder, "client", Some("ca"), &["basicConstraints=CA:FALSE"]);
        certify(&folder, "stranger", Some("other"), &["basicConstraints=CA:FALSE"]);
        let secure = Self { vhost, folder, port };
        let file = |name: &str| secure.file(name);
        // The tests have a broker already; only its listener is theirs.
        secure.eval(&format!(
            "rabbit_networking:ensure_ssl(), rabbit_networking:start_ssl_listener({{\"127.0.0.1\", \
             {port}}}, [{{cacertfile, \"{}\"}}, {{certfile, \"{}\"}}, {{keyfile, \"{}\"}}{options}], 2).",
            file("ca.pem"),
            file("broker.pem"),
            file("broker.key"),
        ));
        secure
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).to_str().unwrap().to_owned()
    }

    fn eval(&self, program: &str) -> String {
        self.vhost.node().ctl(&["eval", program]).unwrap()
    }

    fn url(&self, host: &str, query: &str) -> String {
        let Self { vhost, port, .. } = self;
        format!("amqps://guest:guest@{host}:{port}/{}?{query}", vhost.name())
    }

    /// The query with the right authority and this certificate.
    fn showing(&self, name: &str) -> String {
        let (ca, certificate, key) = ("ca.pem", format!("{name}.pem"), format!("{name}.key"));
        let [ca, certificate, key] = [ca, &certificate, &key].map(|name| self.file(name));
        format!("cacertfile={ca}&certfile={certificate}&keyfile={key}")
    }
}

impl Drop for Secure {
    fn drop(&mut self) {
        let address = format!("{{\"127.0.0.1\", {}}}", self.port);
        let stop = format!("rabbit_networking:stop_tcp_listener({address}).");
        drop(self.vhost.node().ctl(&["eval", &stop]));
        drop(fs::remove_dir_all(&self.folder));
    }
}

/// Makes `<name>.pem` and `<name>.key`.
fn certify(folder: &Path, name: &str, by: Option<&str>, extensions: &[&str]) {
    let mut command = Command::new("openssl");
    command.current_dir(folder).args("req -x509 -newkey ec -nodes -days 2".split(' '));
    command.args(["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", &format!("/CN={name}")]);
    command.args(["-keyout", &format!("{name}.key"), "-out", &format!("{name}.pem")]);
    for extension in extensions {
        command.args(["-addext", extension]);
    }
    if let Some(by) = by {
        command.args(["-CA", &format!("{by}.pem"), "-CAkey", &format!("{by}.key")]);
    }
    let made = command.output().expect("openssl is installed (apt-get install openssl)");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

async fn error(url: &str) -> OpenError {
    let opened = soon(rabbit(url).open(&NodeId::unique("node").unwrap())).await;
    let error = opened.expect_err("it is not to be trusted");
    assert!(!error.to_string().contains("guest"), "{error}");
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_of_the_right_authority_is_trusted_and_no_other() {
    let secure = blocking(|| Secure::start("")).await;
    let right = format!("cacertfile={}", secure.file("ca.pem"));
    for host in ["localhost", "127.0.0.1"] {
        let atomizer = serve(&secure.url(host, &right)).await;
        assert_eq!(soon(atomizer.call::<Double>(4).into_future()).await.unwrap(), 8);
        atomizer.drain().await.unwrap();
    }

    let wrong = format!("cacertfile={}", secure.file("other.pem"));
    let unnamed = format!("{right}&server_name_indication=elsewhere");
    let missing = format!("cacertfile={}", secure.file("none.pem"));
    let empty = format!("cacertfile={}", secure.file("broker.key"));
    for (query, reason) in [
        (&wrong, "UnknownIssuer"),
        (&unnamed, "elsewhere"),
        (&missing, "none.pem: No such file"),
        (&empty, "broker.key: there is no certificate in it"),
        // The system's authorities do not know this one.
        (&String::new(), "UnknownIssuer"),
    ] {
        let error = error(&secure.url("localhost", query)).await;
        let OpenError::Misconfigured(text) = &error else { panic!("{query}: {error:?}") };
        assert!(text.contains(reason), "{text}");
    }

    // Nobody speaks TLS there.
    let plain = secure.vhost.node().address();
    let error = error(&format!("amqps://guest:guest@{plain}/?{right}")).await;
    assert!(matches!(error, OpenError::Misconfigured(_)), "{error:?}");
    blocking(move || drop(secure)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_shown_where_one_is_required() {
    let options = ", {verify, verify_peer}, {fail_if_no_peer_cert, true}";
    let secure = blocking(move || Secure::start(options)).await;
    let atomizer = serve(&secure.url("localhost", &secure.showing("client"))).await;
    assert_eq!(soon(atomizer.call::<Double>(4).into_future()).await.unwrap(), 8);
    atomizer.drain().await.unwrap();

    let none = format!("cacertfile={}", secure.file("ca.pem"));
    for query in [none, secure.showing("stranger")] {
        let error = error(&secure.url("localhost", &query)).await;
        let OpenError::Refused(text) = &error else { panic!("{query}: {error:?}") };
        assert!(text.contains("alert"), "{text}");
    }
    blocking(move || drop(secure)).await;
}
