//! Credentials in docker's configuration (`config.json`: `auths`, `credHelpers`, `credsStore`).

mod file;
mod helper;

use std::io;
use std::path::PathBuf;

pub use file::{DockerConfig, Kept};

/// What a registry knows a user by.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// User name and password.
    Password {
        /// The name.
        user: String,
        /// The password.
        password: String,
    },
    /// An OAuth 2 refresh token, which the registry's token service takes instead of a password.
    IdentityToken(String),
    /// A bearer token, which the registry takes as it is.
    RegistryToken(String),
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Secrets are for nobody's log.
        match self {
            Self::Password { user, .. } => write!(f, "Password({user})"),
            Self::IdentityToken(_) => write!(f, "IdentityToken"),
            Self::RegistryToken(_) => write!(f, "RegistryToken"),
        }
    }
}

/// Why credentials cannot be had or kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialError {
    /// The file cannot be read or written.
    #[error("cannot {action} docker's configuration {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file does not hold what it must.
    #[error("docker's configuration {} makes no sense: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        reason: String,
    },
    /// A helper cannot be run, or fails.
    #[error("the credential helper {program}: {reason}")]
    Helper {
        /// The program, `docker-credential-NAME`.
        program: String,
        /// What it said, or the system did.
        reason: String,
    },
}
