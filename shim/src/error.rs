//! Errors, and the gRPC codes that containerd acts on.

use std::{io, path::PathBuf};

use caisson_sandbox::{AgentErrorKind, Error as SandboxError, RecordError, hooks::HookError};
use containerd_shim_protos::ttrpc::{self, Code};

/// Why the shim could not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line.
    #[error("{0}")]
    Usage(String),
    /// A file of the bundle.
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
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// No such task or process.
    #[error("{0}")]
    NotFound(String),
    /// There is one.
    #[error("{0}")]
    AlreadyExists(String),
    /// Not in this state.
    #[error("{0}")]
    FailedPrecondition(String),
    /// Not supported.
    #[error("{0}")]
    Unsupported(String),
    /// The server is about to end.
    #[error("the shim is stopping")]
    Stopping,
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A hook of the host.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// ttrpc.
    #[error("cannot serve: {0}")]
    Ttrpc(#[from] ttrpc::Error),
}

impl Error {
    /// For `map_err`: a failed system call.
    pub fn io<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            what,
            source: source.into(),
        }
    }

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

    fn code(&self) -> Code {
        match self {
            Self::Usage(_) | Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Stopping => Code::UNAVAILABLE,
            Self::Hook(HookError::Malformed { .. }) => Code::INVALID_ARGUMENT,
            Self::Hook(_) | Self::File { .. } | Self::Io { .. } | Self::Ttrpc(_) => Code::UNKNOWN,
            Self::Sandbox(error) => match error {
                SandboxError::Invalid(_) => Code::INVALID_ARGUMENT,
                SandboxError::Unsupported(_) => Code::UNIMPLEMENTED,
                SandboxError::Record(RecordError::Exists(_)) => Code::ALREADY_EXISTS,
                SandboxError::Gone(_) => Code::UNAVAILABLE,
                SandboxError::Late { .. } => Code::DEADLINE_EXCEEDED,
                SandboxError::Kvm { .. } | SandboxError::Asset { .. } => Code::FAILED_PRECONDITION,
                SandboxError::Agent { kind, .. } => match kind {
                    AgentErrorKind::NotFound => Code::NOT_FOUND,
                    AgentErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
                    AgentErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
                    AgentErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
                    AgentErrorKind::PermissionDenied => Code::PERMISSION_DENIED,
                    AgentErrorKind::Unimplemented => Code::UNIMPLEMENTED,
                    AgentErrorKind::Other => Code::UNKNOWN,
                },
                _ => Code::UNKNOWN,
            },
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}
