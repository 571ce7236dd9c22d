//! Why a benchmark could not be taken.

use std::{io, path::PathBuf, time::Duration};

/// What failed, with which program or file.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The arguments make no sense.
    #[error("{0}")]
    Usage(String),
    /// Something the measure needs is not there.
    #[error("{what} is missing: {path}; {remedy}")]
    Missing {
        /// "kernel", "guest image".
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, to which file or program.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program under test did not do its part.
    #[error("{program}: {problem}; its last output: {output}")]
    Program {
        /// Its name.
        program: String,
        /// What it did or did not do.
        problem: String,
        /// The end of its console or stderr.
        output: String,
    },
    /// The awaited event did not come.
    #[error("{program}: no answer within {limit:?}; its last output: {output}")]
    Deadline {
        /// Its name.
        program: String,
        /// How long we waited.
        limit: Duration,
        /// The end of its console or stderr.
        output: String,
    },
    /// The VMM's control socket broke.
    #[error("caisson-vmm: {0}")]
    Control(#[from] caisson_vmm_api::ChannelError),
}

impl BenchError {
    /// Wraps an I/O error with what was being done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
