//! TLS: which certificates are trusted, and which one is shown.

use std::{
    fmt::Display,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use atomizer::OpenError;
use futures_rustls::{
    TlsConnector,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    rustls::{self, ClientConfig, RootCertStore, crypto::ring},
};
use tokio::task::spawn_blocking;

use crate::socket::{Tcp, Transport};

/// How a connection is encrypted. The files are read anew for each, so that what is renewed is used.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tls {
    authorities: Option<PathBuf>,
    /// The certificate that is shown, and its key.
    own: Option<(PathBuf, PathBuf)>,
    server_name: Option<String>,
}

impl Tls {
    /// Reads the parameters that the RabbitMQ URI specification has for it. An error says why not.
    pub(crate) fn from_query(parameters: &[(String, String)]) -> Result<Self, String> {
        let (mut tls, mut certificate, mut key) = (Self::default(), None, None);
        for (name, value) in parameters {
            match name.as_str() {
                "cacertfile" => tls.authorities = Some(value.into()),
                "certfile" => certificate = Some(value.into()),
                "keyfile" => key = Some(value.into()),
                "server_name_indication" => tls.server_name = Some(value.clone()),
                "verify" if value == "verify_peer" => {}
                "verify" => return Err("the broker's certificate is always verified".to_owned()),
                "password" | "depth" => return Err(format!("{name} is not supported")),
                _ => {}
            }
        }
        tls.own = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => return Err("certfile and keyfile need each other".to_owned()),
        };
        Ok(tls)
    }

    /// Reads what encrypting a connection to `host` needs; its certificate must be for that name.
    pub(crate) async fn ready(&self, host: &str) -> io::Result<Ready> {
        let name = self.server_name.as_deref().unwrap_or(host).to_owned();
        let name = ServerName::try_from(name)
            .map_err(|_| misconfigured("no certificate can be for the name of the broker"))?;
        let tls = self.clone();
        // The system's certificates are many files.
        let config = spawn_blocking(move || tls.config()).await.map_err(io::Error::other)??;
        Ok(Ready { connector: TlsConnector::from(Arc::new(config)), name })
    }

    fn config(&self) -> io::Result<ClientConfig> {
        let mut trusted = RootCertStore::empty();
        match &self.authorities {
            Some(path) => {
                for certificate in certificates(path)? {
                    trusted.add(certificate).map_err(misconfigured)?;
                }
            }
            None => {
                let found = rustls_native_certs::load_native_certs();
                trusted.add_parsable_certificates(found.certs);
                if trusted.is_empty() {
                    return Err(misconfigured(
                        "the system has no certificates of authorities; name some in cacertfile",
                    ));
                }
            }
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(misconfigured)?
            .with_root_certificates(trusted);
        match &self.own {
            None => Ok(config.with_no_client_auth()),
            Some((certificate, key)) => {
                let chain = certificates(certificate)?;
                // What the parser has to say may quote the key.
                let read = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|_| {
                    unreadable(key, &"there is no private key in it that can be read")
                })?;
                config.with_client_auth_cert(chain, read).map_err(|error| unreadable(key, &error))
            }
        }
    }
}

/// All that encrypting a connection needs.
pub(crate) struct Ready {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl Ready {
    pub(crate) async fn encrypt(self, tcp: Tcp) -> io::Result<Transport> {
        Ok(Box::new(self.connector.connect(self.name, tcp).await?))
    }
}

fn certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => {
            Err(misconfigured(format!("{}: there is no certificate in it", path.display())))
        }
        Ok(certificates) => Ok(certificates),
        // What the parser has to say may quote a key that is in there, too.
        Err(_) => Err(unreadable(path, &"there is something in it that is no certificate")),
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    fs::read(path).map_err(|error| unreadable(path, &error))
}

fn unreadable(path: &Path, error: &dyn Display) -> io::Error {
    misconfigured(format!("{}: {error}", path.display()))
}

fn misconfigured(reason: impl Display) -> io::Error {
    let reason = reason.to_string();
    io::Error::other(Unusable(reason))
}

/// What was configured cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unusable(String);

/// Says what an error means when it is one of TLS: waiting does not help with those.
pub(crate) fn means(error: &io::Error) -> Option<fn(String) -> OpenError> {
    let error = error.get_ref()?;
    if let Some(rustls::Error::AlertReceived(_)) = error.downcast_ref() {
        return Some(OpenError::Refused);
    }
    let ours = error.is::<rustls::Error>() || error.is::<Unusable>();
    ours.then_some(OpenError::Misconfigured)
}
