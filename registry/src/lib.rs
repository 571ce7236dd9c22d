//! Pulling images from OCI registries (distribution specification 1.1) into the image store, and the
//! credentials for them in docker's configuration.
//!
//! The crate is between the network, which is trusted with nothing, and the store, which verifies
//! everything again when it loads: here every answer is bounded in size and time, and a blob is whole
//! only when its length and digest are those that the manifest promises.
//!
//! - [`Client::pull`]: a reference, by way of mirrors, to an image of the store.
//! - [`Client::log_in`]: whether a registry takes credentials.
//! - [`DockerConfig`]: `~/.docker/config.json` and the credential helpers that it names.
#![forbid(unsafe_code)]

mod auth;
mod blob;
mod certificates;
mod credentials;
mod error;
mod place;
mod pull;
mod session;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

pub use credentials::{Credential, CredentialError, DockerConfig, Kept};
pub use error::{Error, Result};
pub use pull::{LayerState, Progress, Pulled};

/// How one registry is reached otherwise than by HTTPS under its own name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// Tried before it, in this order: `http://` or `https://`, host and port.
    pub mirrors: Vec<String>,
    /// Its certificate is not verified, and plain HTTP will do.
    pub insecure: bool,
}

/// What a [`Client`] needs to know of its host.
#[derive(Debug, Clone)]
pub struct Options {
    /// By host and port, as they stand in a reference; `docker.io` for Docker Hub.
    pub registries: BTreeMap<String, Access>,
    /// Directories with a directory for each host and port, in which `*.crt` are certificates of
    /// authorities, and `*.cert` with `*.key` certificates of ours.
    pub certificates: Vec<PathBuf>,
    /// docker's configuration.
    pub credentials: PathBuf,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest wait for the next bytes of a transfer.
    pub idle_timeout: Duration,
    /// Longest time for a manifest, a configuration or a token, from the request to the last byte.
    pub answer_timeout: Duration,
    /// Wait before a second try; doubled before each one after.
    pub backoff: Duration,
}

impl Options {
    /// Where docker and podman look for certificates of registries.
    pub const CERTIFICATES: [&str; 2] = ["/etc/docker/certs.d", "/etc/containers/certs.d"];

    /// The defaults of a host, with docker's configuration at `credentials`.
    pub fn new(credentials: PathBuf) -> Self {
        Self {
            registries: BTreeMap::new(),
            certificates: Self::CERTIFICATES.iter().map(PathBuf::from).collect(),
            credentials,
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30),
            answer_timeout: Duration::from_secs(60),
            backoff: Duration::from_millis(250),
        }
    }
}

/// A client of registries. Each call has an event loop of its own, in the caller's thread.
#[derive(Debug)]
pub struct Client {
    options: Options,
}

impl Client {
    /// A client with these options.
    pub fn new(options: Options) -> Self {
        Self { options }
    }

    fn event_loop(&self) -> Result<tokio::runtime::Runtime> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| Error::Io {
                action: "start the event loop",
                path: PathBuf::from("/"),
                source,
            })
    }
}

/// Docker Hub's name in references.
const DOCKER_HUB: &str = "docker.io";

/// What docker's configuration calls the registry with this name in references.
pub fn server_name(registry: &str) -> &str {
    match registry {
        DOCKER_HUB | "index.docker.io" | "registry-1.docker.io" => "https://index.docker.io/v1/",
        other => other,
    }
}
