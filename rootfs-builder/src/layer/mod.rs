//! OCI layers: a tar of changes becomes an EROFS image that overlayfs can stack.
//!
//! The rules are those of the image specification (`layer.md`), as containerd applies them to one layer on its own:
//!
//! - Paths are relative to the layer's root, with or without a leading `/` or `./`; `..` is refused.
//! - A path whose parent is a symbolic link *of the same layer* goes where that link leads, within the layer's own tree:
//!   an absolute target starts at its root, `..` stops there. Links of lower layers are unknown here and not followed.
//! - Parents that the archive does not have are made, owned by root, mode 0755, with the time 0. In an overlay they would
//!   hide the attributes that a lower layer gave to such a directory, so they are listed behind the file system
//!   ([`implied_directories`]), for the store to put that right.
//! - Of several entries of one path the last wins; a directory over a directory only changes its attributes.
//! - `.wh.NAME` becomes the whiteout of overlayfs, a character device 0:0, and `.wh..wh..opq` the attribute
//!   `trusted.overlay.opaque` (kernel, `Documentation/filesystems/overlayfs.rst`). A whiteout hides what is in lower
//!   layers: an entry of the same name in the same layer stays, and a directory then is opaque. Other `.wh..wh.` names
//!   are private to AUFS and left out.
//! - Targets of symbolic links are stored as they are and never followed on the host: dangling or absolute ones are fine.
//! - Extended attributes of kinds that Linux does not know (`com.apple.…`) and those that would speak to overlayfs itself
//!   (`trusted.overlay.…`) are left out.

mod apply;
pub mod decompress;
mod implied;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};

use crate::digest::Digest;
use crate::erofs::{ContentWriter, ErofsError, Uuid};
use crate::limits::Limits;
use crate::tar::{self, Streamed, TarError};
use apply::Applier;
pub(crate) use apply::{OPAQUE_XATTR, implied_directory};
pub use implied::implied_directories;

/// Why a layer cannot be converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The layer cannot be read or decompressed.
    #[error("cannot read or decompress: {0}")]
    Read(#[source] io::Error),
    /// The image cannot be written.
    #[error("cannot write the image: {0}")]
    Write(#[source] io::Error),
    /// The layer has more bytes than its reader allows.
    #[error("it has more data than allowed")]
    TooLong,
    /// The archive is malformed.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry is not one that a layer can have.
    #[error("entry {path:?}: {reason}")]
    Entry {
        /// Its path in the archive, cut to a readable length.
        path: String,
        /// What is wrong with it.
        reason: EntryError,
    },
    /// One of the [`Limits`] is exceeded.
    #[error("{what} exceeds the limit of {limit}")]
    Limit {
        /// What was counted.
        what: &'static str,
        /// The largest value allowed.
        limit: u64,
    },
    /// The image would be longer than EROFS allows.
    #[error("the layer is larger than an EROFS image can be (16 TiB)")]
    ImageTooLarge,
}

/// What is wrong with an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    /// `..` in a path could lead out of the image.
    #[error("its path has \"..\"")]
    DotDot,
    /// Linux allows names of 255 bytes.
    #[error("a name in its path is longer than 255 bytes")]
    NameTooLong,
    /// The path is that of the root, or empty, and the entry is no directory.
    #[error("the root of a layer can only be a directory")]
    NotRoot,
    /// A parent in the path is neither a directory nor a link to one.
    #[error("{parent:?} in its path is not a directory")]
    ParentNotDirectory {
        /// The parent's name.
        parent: String,
    },
    /// Following the links in the path takes too long.
    #[error("too many symbolic links in its path")]
    LinkLoop,
    /// The target of a hard link does not come before it in the same layer.
    #[error("hard link to {target:?}, which is not an earlier entry of the layer")]
    HardLinkMissing {
        /// The target.
        target: String,
    },
    /// Directories cannot have several names.
    #[error("hard link to {target:?}, which is a directory")]
    HardLinkToDirectory {
        /// The target.
        target: String,
    },
    /// The target of a symbolic link is empty or longer than 4095 bytes.
    #[error("the target of a symbolic link has {length} bytes, 1 to 4095 are possible")]
    SymlinkTarget {
        /// Length of the target in bytes.
        length: usize,
    },
    /// Linux has 12 bits for the major and 20 bits for the minor number.
    #[error("device number {major}:{minor} is out of range")]
    DeviceNumber {
        /// The major number.
        major: u32,
        /// The minor number.
        minor: u32,
    },
    /// A whiteout that names nothing that could be hidden.
    #[error("not a valid whiteout")]
    Whiteout,
    /// overlayfs has no way to make the whole root opaque.
    #[error("a layer that hides everything below it is not supported")]
    OpaqueRoot,
    /// The extended attributes are too long.
    #[error("extended attribute {name:?}: it is longer than can be stored")]
    Xattr {
        /// The attribute's name.
        name: String,
    },
}

impl From<ErofsError> for LayerError {
    fn from(error: ErofsError) -> Self {
        match error {
            ErofsError::Read(source) => LayerError::Read(source),
            ErofsError::Write(source) => LayerError::Write(source),
            ErofsError::TooLarge => LayerError::ImageTooLarge,
        }
    }
}

/// Converts an uncompressed layer tar to an EROFS image, and reads `tar` to its very end.
///
/// `image` and `spool` are empty files, the latter for passing use; neither is synced. `identity` (the diff id) only makes
/// the file system's UUID. Memory is bounded by `limits`; file data is never held.
///
/// # Errors
/// Any [`LayerError`]; `image` holds rubbish then.
pub fn convert(
    tar: impl Read,
    image: &File,
    spool: File,
    identity: &Digest,
    limits: &Limits,
) -> Result<(), LayerError> {
    let mut reader = tar::Reader::new(Streamed(tar), tar::Bounds::from(limits));
    let mut applier = Applier::new(ContentWriter::new(image, spool), limits);
    while let Some(entry) = reader.next_entry()? {
        applier.apply(entry, &mut reader)?;
    }
    // What follows the end mark is padding, but the digest is of all of it.
    io::copy(&mut reader.into_inner(), &mut io::sink()).map_err(LayerError::Read)?;
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&identity.bytes()[..16]);
    applier.finish(Uuid::Given(uuid))
}
