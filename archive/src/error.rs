use std::{
    io,
    path::{Path, PathBuf},
};

/// Why a copy failed. What was copied before stays.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call on a path.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// "open", "create", …
        what: &'static str,
        /// Of the file.
        path: PathBuf,
        /// The kernel's.
        source: io::Error,
    },
    /// The stream broke off, or is none.
    #[error("the archive: {0}")]
    Stream(#[source] io::Error),
    /// The reader of the stream has gone.
    #[error("cannot write the archive: {0}")]
    Output(#[source] io::Error),
    /// An entry of the stream that must not be followed.
    #[error("the archive has the entry \"{}\": {why}", path.display())]
    Entry {
        /// Its name.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The destination is not what the source needs.
    #[error("{}: {why}", path.display())]
    Destination {
        /// As given.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
}

impl Error {
    pub(crate) fn file<E: Into<io::Error>>(
        what: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::File {
            what,
            path: path.as_ref().to_owned(),
            source: source.into(),
        }
    }

    pub(crate) fn entry(path: &Path, why: &'static str) -> Self {
        Self::Entry {
            path: path.to_owned(),
            why,
        }
    }

    pub(crate) fn destination(path: &Path, why: &'static str) -> Self {
        Self::Destination {
            path: path.to_owned(),
            why,
        }
    }
}
