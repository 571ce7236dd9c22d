//! The one error of the agent: a kind that the host acts on and a text for people.

use std::{fmt, io};

use serde::{Deserialize, Serialize};
use ttrpc::Code;

/// What the host can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// No such container, process, program or user.
    NotFound,
    /// It is there already.
    AlreadyExists,
    /// Not in this state.
    FailedPrecondition,
    /// The request makes no sense.
    InvalidArgument,
    /// A program that may not be executed.
    PermissionDenied,
    /// Not in time.
    DeadlineExceeded,
    /// What OCI defines and Caisson does not do.
    Unimplemented,
    /// Anything else.
    Internal,
}

/// Why something could not be done. Also travels from a container's init process to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For programs.
    pub kind: Kind,
    /// For people.
    pub message: String,
}

/// Shorthand of the whole crate.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure of `kind`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// A request that makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidArgument, message)
    }

    /// A system call or other inner failure.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for ttrpc::Error {
    fn from(failure: Failure) -> Self {
        let code = match failure.kind {
            Kind::NotFound => Code::NOT_FOUND,
            Kind::AlreadyExists => Code::ALREADY_EXISTS,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::PermissionDenied => Code::PERMISSION_DENIED,
            Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
            Kind::Unimplemented => Code::UNIMPLEMENTED,
            Kind::Internal => Code::INTERNAL,
        };
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, failure.message))
    }
}

/// Says what was being done when an error came.
pub trait During<T> {
    /// Turns the error into "cannot `what`: error".
    ///
    /// # Errors
    /// The error of `self`.
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure::internal(format!("cannot {}: {error}", what())))
    }
}

impl<T> During<T> for rustix::io::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure::internal(format!("cannot {}: {error}", what())))
    }
}
