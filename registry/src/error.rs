//! What goes wrong between us and a registry, in words a user can act on.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use caisson_rootfs_builder::Digest;

use crate::credentials::CredentialError;

/// The result of an operation with a registry.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation with a registry failed. Nothing of an image is in the store then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The registry wants credentials, or others than it was given.
    #[error(
        "{registry} denies access to {what}{}: it does not exist there, or needs `caisson login {registry}`",
        parenthesis(reason)
    )]
    Unauthorized {
        /// The registry or mirror.
        registry: String,
        /// Repository, reference or digest.
        what: String,
        /// The registry's words; may be empty.
        reason: String,
    },
    /// A registry does not take the credentials.
    #[error("{registry} refuses the user name or password{}", parenthesis(reason))]
    BadCredentials {
        /// The registry.
        registry: String,
        /// Its words; may be empty.
        reason: String,
    },
    /// The registry does not have it.
    #[error("{registry} has no {what}{}", parenthesis(reason))]
    NotFound {
        /// The registry or mirror.
        registry: String,
        /// Reference or digest.
        what: String,
        /// The registry's words; may be empty.
        reason: String,
    },
    /// The registry has had enough of us.
    #[error(
        "{registry} limits the rate of requests{}: try again{}, or `caisson login {registry}` for a higher limit",
        parenthesis(reason),
        after.map_or_else(|| " later".to_owned(), |after| format!(" in {} seconds", after.as_secs()))
    )]
    RateLimited {
        /// The registry or mirror.
        registry: String,
        /// The registry's words; may be empty.
        reason: String,
        /// How long it wants us to wait.
        after: Option<Duration>,
    },
    /// Another answer than the specification has for the request.
    #[error("{registry} answers {status} for {what}{}", parenthesis(reason))]
    Status {
        /// The registry or mirror.
        registry: String,
        /// Reference or digest.
        what: String,
        /// The status code.
        status: u16,
        /// The registry's words; may be empty.
        reason: String,
    },
    /// No connection.
    #[error("cannot reach {registry}: {reason}")]
    Connect {
        /// The registry, mirror or the place it leads to.
        registry: String,
        /// The system's words.
        reason: String,
    },
    /// The other side cannot be trusted.
    #[error(
        "cannot trust {registry}: {reason}. If its certificate is signed by an authority of your own, \
         put that one's into /etc/docker/certs.d/{registry}/ca.crt"
    )]
    Tls {
        /// The registry or mirror.
        registry: String,
        /// What is wrong with its certificate.
        reason: String,
    },
    /// A file with certificates cannot be used.
    #[error("cannot use the certificates in {}: {reason}", path.display())]
    Certificates {
        /// File or directory.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// It takes too long.
    #[error("{registry} does not answer for {what} within {} seconds", timeout.as_secs())]
    Timeout {
        /// The registry or mirror.
        registry: String,
        /// Reference or digest.
        what: String,
        /// How long we have waited.
        timeout: Duration,
    },
    /// It leads elsewhere too often, or from HTTPS to HTTP.
    #[error("{registry} redirects for {what} too often, or from https to http")]
    Redirect {
        /// The registry or mirror.
        registry: String,
        /// Reference or digest.
        what: String,
    },
    /// The connection broke, again and again.
    #[error("the transfer of {what} from {registry} broke: {reason}")]
    Broken {
        /// The registry or mirror.
        registry: String,
        /// Reference or digest.
        what: String,
        /// The last reason.
        reason: String,
    },
    /// More bytes than this can have.
    #[error("{what} of {registry} has {found} bytes, at most {limit} are allowed")]
    TooLarge {
        /// The registry or mirror.
        registry: String,
        /// "manifest …", "configuration …".
        what: String,
        /// How many it has, or are promised.
        found: u64,
        /// How many it may have.
        limit: u64,
    },
    /// Another length than promised.
    #[error("{registry} sends {found} bytes for {digest}, its manifest says {expected}")]
    Size {
        /// The registry or mirror.
        registry: String,
        /// The blob.
        digest: Digest,
        /// In the manifest.
        expected: u64,
        /// In the answer.
        found: u64,
    },
    /// Another content than asked for.
    #[error("{registry} sends {actual} for {expected}: it is damaged or somebody tampers with it")]
    Digest {
        /// The registry or mirror.
        registry: String,
        /// What was asked for.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// An answer that makes no sense.
    #[error("{registry} answers without sense for {what}: {reason}")]
    Protocol {
        /// The registry or mirror.
        registry: String,
        /// What was asked for.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// The registry and its mirrors, all of them.
    #[error("{last} (before that: {})", join(mirrors))]
    Everywhere {
        /// What the registry itself said.
        last: Box<Error>,
        /// What its mirrors said.
        mirrors: Vec<Error>,
    },
    /// docker's configuration or a credential helper.
    #[error(transparent)]
    Credentials(#[from] CredentialError),
    /// The store, or an image that cannot be in it.
    #[error(transparent)]
    Store(#[from] caisson_rootfs_builder::Error),
    /// The host.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

fn parenthesis(reason: &str) -> String {
    if reason.is_empty() {
        String::new()
    } else {
        format!(" ({reason})")
    }
}

fn join(errors: &[Error]) -> String {
    let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
    errors.join("; ")
}

impl Error {
    /// Sorts what the HTTP library says. `what` was asked of `registry`.
    pub(crate) fn http(
        registry: &str,
        what: &str,
        timeout: Duration,
        error: &reqwest::Error,
    ) -> Self {
        let (registry, what) = (registry.to_owned(), what.to_owned());
        if error.is_redirect() {
            return Error::Redirect { registry, what };
        }
        if error.is_timeout() {
            return Error::Timeout {
                registry,
                what,
                timeout,
            };
        }
        let reason = root_cause(error);
        if is_distrust(error) {
            Error::Tls { registry, reason }
        } else if error.is_connect() {
            Error::Connect { registry, reason }
        } else {
            Error::Broken {
                registry,
                what,
                reason,
            }
        }
    }

    /// Whether the same request may succeed in a moment.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Error::Broken { .. } | Error::Timeout { .. } | Error::Connect { .. } => true,
            Error::Status { status, .. } => (500..600).contains(status),
            _ => false,
        }
    }

    /// Whether another place may have what this one has not.
    pub(crate) fn is_of_place(&self) -> bool {
        !matches!(
            self,
            Error::Store(
                caisson_rootfs_builder::Error::Io { .. }
                    | caisson_rootfs_builder::Error::NoSpace { .. }
                    | caisson_rootfs_builder::Error::Busy { .. }
            ) | Error::Io { .. }
        )
    }
}

/// What is behind an error. An `io::Error` shows the one in it only when asked for that.
fn behind<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> Option<&'a (dyn std::error::Error + 'static)> {
    let inner = error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::get_ref);
    match inner {
        Some(inner) => Some(inner),
        None => error.source(),
    }
}

/// The innermost error's words.
pub(crate) fn root_cause(error: &reqwest::Error) -> String {
    let mut innermost: &(dyn std::error::Error + 'static) = error;
    while let Some(next) = behind(innermost) {
        innermost = next;
    }
    innermost.to_string()
}

/// The error of the TLS library in a chain.
fn tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    let mut next = error.source();
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = behind(error);
    }
    None
}

fn is_distrust(error: &reqwest::Error) -> bool {
    matches!(
        tls_error(error),
        Some(
            rustls::Error::InvalidCertificate(_)
                | rustls::Error::NoCertificatesPresented
                | rustls::Error::InvalidCertRevocationList(_)
                | rustls::Error::AlertReceived(_)
        )
    )
}
