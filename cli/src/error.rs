//! What goes wrong, with docker's exit codes.

use std::{io, path::PathBuf};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line makes no sense.
    #[error("{0}")]
    Usage(String),
    /// No such container.
    #[error("No such container: {0}")]
    NoSuchContainer(String),
    /// What is known of a container cannot be read.
    #[error(
        "container {id} is damaged ({source}); `caisson rm -f {id}` removes what is left of it"
    )]
    DamagedContainer {
        /// Whose.
        id: String,
        /// Why.
        source: Box<Error>,
    },
    /// No such volume.
    #[error("no such volume: {0}")]
    NoSuchVolume(String),
    /// What is known of a volume cannot be read.
    #[error(
        "volume {name} is damaged ({source}); `caisson volume rm -f {name}` removes it with its files"
    )]
    DamagedVolume {
        /// Its name.
        name: String,
        /// Why.
        source: Box<Error>,
    },
    /// No such network.
    #[error("no such network: {0}; there are those of `caisson network ls`")]
    NoSuchNetwork(String),
    /// netavark has failed.
    #[error("the container's network ({verb}): netavark: {message}")]
    Netavark {
        /// What it was to do.
        verb: &'static str,
        /// Its words.
        message: String,
    },
    /// A prefix of several ids.
    #[error("container id {0} is ambiguous: give more of it")]
    Ambiguous(String),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// A file.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Another system call.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The image store.
    #[error(transparent)]
    Images(#[from] caisson_rootfs_builder::Error),
    /// A registry.
    #[error(transparent)]
    Registry(#[from] Box<caisson_registry::Error>),
    /// docker's configuration or a credential helper.
    #[error(transparent)]
    Credentials(#[from] caisson_registry::CredentialError),
    /// An image that is neither here nor to be had.
    #[error("no such image: {name}; and it cannot be pulled: {source}")]
    NoImage {
        /// As given.
        name: String,
        /// Why not.
        source: Box<caisson_registry::Error>,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] caisson_sandbox::ConfigError),
    /// What the caller lacks for doing without root.
    #[error(transparent)]
    Rootless(#[from] crate::rootless::RootlessError),
    /// A hook of the host.
    #[error(transparent)]
    Hook(#[from] caisson_sandbox::hooks::HookError),
    /// The shim, in its own words.
    #[error("{message}")]
    Shim {
        /// The shim's code.
        code: ShimCode,
        /// Its words.
        message: String,
    },
    /// Exit with a code and these words.
    #[error("{message}")]
    Exit {
        /// The code.
        code: u8,
        /// The words.
        message: String,
    },
}

/// Codes of the shim that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShimCode {
    /// No such task or process, or it has ended.
    NotFound,
    /// A program that may not be executed.
    PermissionDenied,
    /// The shim is not there any more.
    Gone,
    /// Anything else.
    Other,
}

impl From<caisson_registry::Error> for Error {
    fn from(error: caisson_registry::Error) -> Self {
        match error {
            caisson_registry::Error::Store(error) => Self::Images(error),
            error => Self::Registry(Box::new(error)),
        }
    }
}

impl Error {
    /// For `map_err`: a failed system call on a file.
    pub fn file<E: Into<io::Error>>(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::File {
            what,
            path: path.into(),
            source: source.into(),
        }
    }

    /// For `map_err`: a failed system call.
    pub fn io<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            what,
            source: source.into(),
        }
    }

    /// Exit code of `run`, and of `exec` once the container is found: 127 and 126 for programs
    /// that are not there or cannot be run, else 125.
    pub fn run_code(&self) -> u8 {
        match self {
            Self::Exit { code, .. } => *code,
            // The guest says NOT_FOUND of users too, which are not commands.
            Self::Shim {
                code: ShimCode::NotFound,
                message,
            } if message.contains("exec") => 127,
            Self::Shim {
                code: ShimCode::PermissionDenied,
                ..
            } => 126,
            _ => 125,
        }
    }

    /// Exit code of the other verbs.
    pub fn code(&self) -> u8 {
        match self {
            Self::Usage(_) => 125,
            Self::Exit { code, .. } => *code,
            _ => 1,
        }
    }
}
