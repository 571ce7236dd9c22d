//! `caisson cp`: files between the host and a container as a tar stream. The same code runs at both
//! ends, the command line on the host and the agent in the container's mount namespace, so that
//! both follow the rules of `docker cp` for what a destination means.
//!
//! [`pack()`] writes a stream, [`unpack()`] reads one, [`Request`] is what the command line asks the
//! agent to do of the two.

#![forbid(unsafe_code)]

mod error;
mod pack;
#[cfg(test)]
mod tests;
mod unpack;

use std::path::PathBuf;

pub use error::Error;
pub use pack::pack;
use serde::{Deserialize, Serialize};
pub use unpack::{Attributes, Destination, unpack};

/// Member of an OCI `process` object that asks the agent for an archive instead of a program.
pub const MEMBER: &str = "x-caisson.archive";

/// Name of the stream's root when it is the contents of a directory, and not the directory itself.
pub const CONTENTS: &str = ".";

/// What the agent does in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Writes `source` to standard output.
    Pack {
        /// Absolute path in the container.
        source: PathBuf,
        /// Copy what a symbolic link at the path leads to, not the link.
        follow: bool,
    },
    /// Takes a stream from standard input.
    Unpack {
        /// Where it goes.
        destination: Destination,
        /// What files get besides their data.
        attributes: Attributes,
    },
}
