//! What stands in for TLS when it is not compiled in.

use std::io;

use atomizer::OpenError;

use crate::socket::{Tcp, Transport};

/// There is none of it.
#[derive(Clone, Debug)]
pub(crate) enum Tls {}

impl Tls {
    pub(crate) fn from_query(_: &[(String, String)]) -> Result<Self, String> {
        Err("TLS needs the feature `tls` of the crate `atomizer-rabbitmq`".to_owned())
    }

    #[expect(clippy::unused_async, reason = "as where there is TLS")]
    pub(crate) async fn ready(&self, _: &str) -> io::Result<Ready> {
        match *self {}
    }
}

/// Nor of this.
pub(crate) enum Ready {}

impl Ready {
    #[expect(clippy::unused_async, reason = "as where there is TLS")]
    pub(crate) async fn encrypt(self, _: Tcp) -> io::Result<Transport> {
        match self {}
    }
}

pub(crate) fn means(_: &io::Error) -> Option<fn(String) -> OpenError> {
    None
}
