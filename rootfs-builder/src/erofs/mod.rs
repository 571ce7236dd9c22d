//! Writes EROFS images: read-only file systems that Linux mounts without unpacking anything.
//!
//! Only what we need of the format (`fs/erofs/erofs_fs.h` and `Documentation/filesystems/erofs.rst` in Linux 6.12):
//! uncompressed, blocks of 4096 bytes, extended (64-byte) inodes, inline extended attributes, and three data layouts:
//! - *flat inline*: small files, symbolic links and directories lie behind their inode;
//! - *flat plain*: everything longer is whole blocks, page-aligned, so that a guest can map it by DAX
//!   (Linux allows DAX for this layout and the next, not for inline data);
//! - *chunk-based*: files with holes; a chunk of zeros takes no block.
//!
//! The image is deterministic: the same calls give the same bytes. Data is streamed to its final place as it comes;
//! what stays in memory is a [`Tree`] of names and attributes, and the inodes are written behind the data:
//!
//! ```text
//! | superblock | data of files, as it came | directories, long links | inodes, root first |
//! ```
//!
//! Considered and not used: the crate `erofs-rs` 0.3 only reads (it is the oracle of our tests). `composefs` 0.9 writes
//! images of which the file data lies elsewhere, by digest, or in memory, and no sparse files. `mkfs.erofs` of Debian 12
//! (1.5) reads only directories, so that a root process would have to unpack hostile archives first.

mod content;
mod format;
mod read;
#[cfg(test)]
mod tests;
mod tree;
mod write;

pub use content::{Content, ContentWriter};
pub use read::{Directory, DirectoryEntry, Image};
pub use tree::{Attributes, Kind, NodeId, Tree, XattrError, Xattrs};
pub use write::Uuid;

use std::io;

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErofsError {
    /// The data of a file could not be read.
    #[error("cannot read: {0}")]
    Read(#[source] io::Error),
    /// The image could not be written.
    #[error("cannot write the image: {0}")]
    Write(#[source] io::Error),
    /// Block numbers have 32 bits.
    #[error("the image would be longer than 16 TiB")]
    TooLarge,
}
