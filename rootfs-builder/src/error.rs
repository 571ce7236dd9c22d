//! What can go wrong in the image store, in words a user can act on.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::{Digest, InvalidDigest};
use crate::layer::LayerError;
use crate::reference::{InvalidReference, Reference};

/// The result of a store operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a store operation failed. After any error the store is as it was before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: "read", "create", "rename".
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file system of the store is full, or a quota is reached.
    #[error("no space left on the file system of {}: free some space or remove images with `caisson rmi`", path.display())]
    NoSpace {
        /// The file that could not be written.
        path: PathBuf,
    },
    /// Another process has held the store's lock for too long.
    #[error("image store {} is locked by another process: try again later", path.display())]
    Busy {
        /// The lock file.
        path: PathBuf,
    },
    /// The store was written by a version of Caisson that this one does not know.
    #[error("image store {} has format {found:?}, this version reads {wanted:?}", path.display())]
    StoreVersion {
        /// The store's root.
        path: PathBuf,
        /// What its `version` file says.
        found: String,
        /// What this version writes.
        wanted: &'static str,
    },
    /// A file of the store does not hold what it must.
    #[error("image store file {} is damaged ({reason}): remove the image and load it again", path.display())]
    Corrupt {
        /// The damaged file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// No image has this name or id.
    #[error("no such image: {name}")]
    NotFound {
        /// What was asked for.
        name: String,
    },
    /// More than one image's id starts with the given digits.
    #[error("image id prefix {prefix} is ambiguous: it matches {}", join(matches))]
    AmbiguousId {
        /// The prefix given.
        prefix: String,
        /// The images it matches.
        matches: Vec<Digest>,
    },
    /// The image was given by id and has several names, so that removing it needs force.
    #[error("image {} has several names ({}): remove them one by one or use force", id.short(), join_familiar(references))]
    SeveralReferences {
        /// The image.
        id: Digest,
        /// Its names.
        references: Vec<Reference>,
    },
    /// The layers of the image were not kept as they came.
    #[error("image {} was loaded by a version of Caisson that did not keep its layers, so it cannot be saved: pull or load it again", id.short())]
    NotKept {
        /// The image.
        id: Digest,
    },
    /// What is saved cannot be written.
    #[error("cannot write the archive: {source}")]
    Output {
        /// The system's answer.
        source: io::Error,
    },
    /// A container uses the image.
    #[error("image {} is in use by container {}", id.short(), containers.join(", "))]
    InUse {
        /// The image.
        id: Digest,
        /// The containers that hold a lease on it.
        containers: Vec<String>,
    },
    /// The name is not an image reference.
    #[error(transparent)]
    InvalidReference(#[from] InvalidReference),
    /// A reference with a digest where only a name with a tag can be stored.
    #[error("{reference} has a digest: an image can only be given a name with a tag")]
    DigestReference {
        /// The reference given.
        reference: Box<Reference>,
    },
    /// The text cannot be a container's id.
    #[error(
        "invalid container id {id:?}: 1 to 128 of A-Z a-z 0-9 _ . - starting with a letter or digit"
    )]
    InvalidContainerId {
        /// The text given.
        id: String,
    },
    /// The container already holds a lease on another image.
    #[error("container {container} already uses image {}", image.short())]
    LeaseExists {
        /// The container.
        container: String,
        /// The image its lease names.
        image: Digest,
    },

    /// The source is none of the kinds of image that can be loaded.
    #[error("{} is not an OCI image layout, OCI archive or docker archive: {reason}", source_name.display())]
    NotAnImage {
        /// The source.
        source_name: PathBuf,
        /// What was found instead.
        reason: String,
    },
    /// The source is of a known kind but contradicts itself or its specification.
    #[error("invalid image in {}: {reason}", source_name.display())]
    InvalidImage {
        /// The source.
        source_name: PathBuf,
        /// What is wrong and where.
        reason: String,
    },
    /// A digest in the source is not one that can be verified.
    #[error(transparent)]
    InvalidDigest(#[from] InvalidDigest),
    /// A name was given for a source that holds several images.
    #[error("{} holds {count} images, so they cannot all be named {reference}", source_name.display())]
    AmbiguousSource {
        /// The source.
        source_name: PathBuf,
        /// The name given.
        reference: Box<Reference>,
        /// How many images it holds.
        count: usize,
    },
    /// A blob that the source refers to is not in it.
    #[error("{what} {name} is missing")]
    MissingBlob {
        /// "manifest", "configuration", "layer"…
        what: &'static str,
        /// Its digest or file name.
        name: String,
    },
    /// A blob's content is not what its name says.
    #[error(
        "{what} has digest {actual}, expected {expected}: the image is damaged or was tampered with"
    )]
    DigestMismatch {
        /// Which blob.
        what: String,
        /// The digest by which it was referred to.
        expected: Digest,
        /// The digest of what was read.
        actual: Digest,
    },
    /// A blob's length is not what its descriptor says.
    #[error(
        "{what} has {actual} bytes, expected {expected}: the image is damaged or was tampered with"
    )]
    SizeMismatch {
        /// Which blob.
        what: String,
        /// The size in the descriptor, in bytes.
        expected: u64,
        /// The size found, in bytes.
        actual: u64,
    },
    /// A descriptor has a media type that this version cannot use.
    #[error("{what} has the unsupported media type {media_type:?}")]
    UnknownMediaType {
        /// Which descriptor.
        what: String,
        /// Its media type.
        media_type: String,
    },
    /// A layer that the image does not carry but wants fetched from elsewhere.
    #[error("layer {digest} is a foreign (non-distributable) layer: such images are not supported")]
    ForeignLayer {
        /// The layer's digest.
        digest: String,
    },
    /// The image is for other machines.
    #[error("the image is for {}, this host runs {wanted}", if found.is_empty() { "no platform at all".to_owned() } else { found.join(", ") })]
    WrongPlatform {
        /// The host's platform, such as `linux/amd64`.
        wanted: String,
        /// The platforms that the image has.
        found: Vec<String>,
    },
    /// The image is larger than it may be.
    #[error("{what} exceeds the limit of {limit}")]
    Limit {
        /// What was counted.
        what: String,
        /// The largest value allowed, in the unit of `what`.
        limit: u64,
    },
    /// A layer could not be converted.
    #[error("layer {layer}: {source}")]
    Layer {
        /// The layer's diff id.
        layer: Digest,
        /// What is wrong with it.
        source: LayerError,
    },
}

impl Error {
    /// Wraps an I/O error; "disk full" and "quota exceeded" get an error of their own.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        if is_no_space(&source) {
            Error::NoSpace {
                path: path.to_owned(),
            }
        } else {
            Error::Io {
                action,
                path: path.to_owned(),
                source,
            }
        }
    }

    /// A closure for `map_err` over [`Error::io`].
    pub(crate) fn on(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Error::io(action, path, source)
    }
}

/// Whether the disk or a quota is full.
pub(crate) fn is_no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

fn join(digests: &[Digest]) -> String {
    digests
        .iter()
        .map(Digest::short)
        .collect::<Vec<_>>()
        .join(", ")
}

fn join_familiar(references: &[Reference]) -> String {
    references
        .iter()
        .map(Reference::familiar)
        .collect::<Vec<_>>()
        .join(", ")
}
