//! The parent's side of a pod's file server.
//!
//! `caisson-fs` is a process of its own that serves host directories and
//! files to one guest by vhost-user-fs (virtio 1.2 section 5.11). It is jailed
//! (see its `jail` module) and weak: it cannot mount anything. What it serves
//! is the root of its own mount namespace, an empty read-only tmpfs; the
//! parent enters that namespace and mounts each share there as `/<index>`.
//!
//! ```no_run
//! # use std::{path::Path, time::Duration};
//! # fn main() -> Result<(), caisson_fs::Error> {
//! use caisson_fs::{FileServer, ReadOnly, Share};
//! let (server, vhost_user) = FileServer::spawn(
//!     Path::new("/usr/libexec/caisson/caisson-fs"),
//!     std::process::Stdio::null(),
//!     Duration::from_secs(5),
//! )?;
//! // `vhost_user` goes to the VMM as the socket of its Fs device.
//! server.share(0, Path::new("/srv/data"), Share { read_only: ReadOnly::Tree, ..Share::default() })?;
//! # drop(vhost_user);
//! # Ok(())
//! # }
//! ```

mod mounts;
mod process;

pub use mounts::{MountBelow, ReadOnly, Share};
pub use process::FileServer;

use std::{io, path::PathBuf, time::Duration};

/// How long the guest may use names and attributes it has read without asking again.
pub const VALIDITY: Duration = Duration::from_secs(1);

/// Why a file server could not be started or could not share.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program could not be run.
    #[error("cannot start the file server {program}: {source}", program = program.display())]
    Spawn {
        /// What was run.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It ran, but did not get ready.
    #[error("the file server did not get ready: {0}")]
    NotReady(String),
    /// The source of a share cannot be used.
    #[error("cannot share {path}: {source}", path = path.display())]
    Source {
        /// The host path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A share of this index is there already.
    #[error("share {0} exists already")]
    Exists(u32),
    /// There is no share of this index.
    #[error("there is no share {0}")]
    Missing(u32),
    /// A system call failed.
    #[error("file server: {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: [`Error::Io`] naming what was tried.
    fn io<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            what,
            source: source.into(),
        }
    }
}
