//! Why something could not be done with a sandbox.

use std::{io, path::PathBuf};

use crate::{config::ConfigError, record::RecordError, vmm::Gone};

/// Kinds of the agent's refusals that callers act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentErrorKind {
    /// No such container, process, program or user.
    NotFound,
    /// It is there already.
    AlreadyExists,
    /// Not in this state.
    FailedPrecondition,
    /// The request makes no sense to the guest.
    InvalidArgument,
    /// A program that may not be executed.
    PermissionDenied,
    /// OCI defines it, Caisson does not do it.
    Unimplemented,
    /// Anything else.
    Other,
}

/// Why something could not be done with a sandbox.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The record of created resources.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Not supported, and not ignored either.
    #[error("{0}")]
    Unsupported(String),
    /// KVM's device cannot be used.
    #[error("cannot open {}: {source}; `caisson check` tells what this host lacks", path.display())]
    Kvm {
        /// The device.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file that a microVM needs.
    #[error("the {what} {} cannot be used: {reason}", path.display())]
    Asset {
        /// "guest kernel", "guest image", "VMM", …
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A system call on the host.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried, with path or id.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The VMM refused.
    #[error("the VMM refused to {what}: {reason}")]
    Vmm {
        /// What was asked.
        what: &'static str,
        /// Its words.
        reason: String,
    },
    /// The microVM has ended.
    #[error("{0}")]
    Gone(Gone),
    /// The guest did not answer in time.
    #[error("the guest's agent did not {what} within {seconds} s")]
    Late {
        /// What was awaited.
        what: String,
        /// How long.
        seconds: u64,
    },
    /// The agent refused.
    #[error("{message}")]
    Agent {
        /// For programs.
        kind: AgentErrorKind,
        /// Its words.
        message: String,
    },
    /// The file server.
    #[error(transparent)]
    FileServer(#[from] caisson_fs::Error),
}

impl Error {
    /// For `map_err`: what was tried when a system call failed.
    pub(crate) fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            what: what.into(),
            source: source.into(),
        }
    }
}
