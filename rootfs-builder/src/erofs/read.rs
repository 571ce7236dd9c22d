//! Reads directories and attributes back from images that [`ContentWriter`](super::ContentWriter) has written.
//!
//! Not a reader of EROFS at large: only the layouts that the writer uses. Everything is checked all the same, as disks
//! fail: an image that makes no sense is an [`io::ErrorKind::InvalidData`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::format::{BLOCK, DIRENT, INODE, Layout, SLOT, SUPER_OFFSET, SuperBlock};
use super::tree::{Attributes, Xattrs};
use crate::tar::Timestamp;

/// An image opened for reading.
#[derive(Debug)]
pub struct Image<'a> {
    file: &'a File,
    metadata_start: u64,
    length: u64,
    root: u64,
}

/// A directory of an [`Image`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    /// Its attributes.
    pub attributes: Attributes,
    /// Where its entries begin in the image, in bytes.
    start: u64,
    /// Length of its entries in bytes.
    size: u64,
}

/// What a name in a directory means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectoryEntry {
    /// A directory, to be opened by [`Image::directory`] with this number.
    Directory(u64),
    /// Anything else.
    Other,
}

impl<'a> Image<'a> {
    /// Reads the superblock.
    ///
    /// # Errors
    /// Those of reading; `InvalidData` when there is no superblock of ours.
    pub fn open(file: &'a File) -> io::Result<Image<'a>> {
        let mut bytes = vec![0; (BLOCK - SUPER_OFFSET) as usize];
        file.read_exact_at(&mut bytes, SUPER_OFFSET)?;
        let superblock =
            SuperBlock::decode(&bytes).ok_or_else(|| invalid("it has no valid superblock"))?;
        Ok(Image {
            file,
            metadata_start: u64::from(superblock.metadata_block) * BLOCK,
            length: u64::from(superblock.blocks) * BLOCK,
            root: u64::from(superblock.root),
        })
    }

    /// Length of the file system in bytes; the file may be longer.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The root directory.
    ///
    /// # Errors
    /// Those of [`Image::directory`].
    pub fn root(&self) -> io::Result<Directory> {
        self.directory(self.root)
    }

    /// Opens a directory by its number.
    ///
    /// # Errors
    /// Those of reading; `InvalidData` when there is no directory of that number.
    pub fn directory(&self, number: u64) -> io::Result<Directory> {
        let position = number
            .checked_mul(SLOT)
            .and_then(|offset| offset.checked_add(self.metadata_start))
            .filter(|position| *position < self.length)
            .ok_or_else(|| invalid("an inode lies outside of it"))?;
        let mut inode = [0; INODE as usize];
        self.file.read_exact_at(&mut inode, position)?;
        let format = u16_at(&inode, 0);
        let mode = u32::from(u16_at(&inode, 4));
        let size = u64_at(&inode, 8);
        let xattr_bytes = match u16_at(&inode, 2) {
            0 => 0,
            count => 12 + 4 * (u64::from(count) - 1),
        };
        let behind = position + INODE + xattr_bytes;
        let start = match format {
            _ if mode & 0o170_000 != 0o040_000 => {
                return Err(invalid("a directory entry leads to another kind of file"));
            }
            format if format == (Layout::FlatInline as u16) << 1 | 1 => behind,
            format if format == (Layout::FlatPlain as u16) << 1 | 1 => {
                u64::from(u32_at(&inode, 16)) * BLOCK
            }
            _ => return Err(invalid("a directory has an unknown layout")),
        };
        if start.checked_add(size).is_none_or(|end| end > self.length) {
            return Err(invalid("a directory lies outside of it"));
        }
        let mut xattrs = vec![0; xattr_bytes as usize];
        self.file.read_exact_at(&mut xattrs, position + INODE)?;
        let attributes = Attributes {
            mode: mode & 0o7777,
            uid: u32_at(&inode, 24),
            gid: u32_at(&inode, 28),
            mtime: Timestamp {
                seconds: u64_at(&inode, 32).cast_signed(),
                nanoseconds: u32_at(&inode, 40),
            },
            xattrs: Xattrs::decode(&xattrs)
                .ok_or_else(|| invalid("extended attributes are malformed"))?,
        };
        Ok(Directory {
            attributes,
            start,
            size,
        })
    }

    /// Calls `found` with every name of a directory but `.` and `..`, and what it means.
    ///
    /// # Errors
    /// Those of reading; `InvalidData` when the directory is malformed.
    pub fn entries(
        &self,
        directory: &Directory,
        found: &mut dyn FnMut(&[u8], DirectoryEntry),
    ) -> io::Result<()> {
        let mut block = [0; BLOCK as usize];
        let mut done = 0;
        while done < directory.size {
            let length = (directory.size - done).min(BLOCK);
            let bytes = &mut block[..length as usize];
            self.file.read_exact_at(bytes, directory.start + done)?;
            block_entries(bytes, found).ok_or_else(|| invalid("a directory is malformed"))?;
            done += length;
        }
        Ok(())
    }
}

/// The entries of one block of a directory.
fn block_entries(block: &[u8], found: &mut dyn FnMut(&[u8], DirectoryEntry)) -> Option<()> {
    /// `FT_DIR`.
    const DIRECTORY: u8 = 2;
    let first_name = usize::from(u16::from_le_bytes([*block.get(8)?, *block.get(9)?]));
    let count = first_name / DIRENT;
    if count == 0 || !first_name.is_multiple_of(DIRENT) || first_name > block.len() {
        return None;
    }
    for i in 0..count {
        let entry = &block[i * DIRENT..(i + 1) * DIRENT];
        let start = usize::from(u16_at(entry, 8));
        let end = if i + 1 < count {
            usize::from(u16_at(&block[(i + 1) * DIRENT..], 8))
        } else {
            block.len()
        };
        let name = block.get(start..end)?;
        let name = &name[..name
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(name.len())];
        match (name, entry[10]) {
            (b"." | b"..", _) => {}
            (_, DIRECTORY) => found(name, DirectoryEntry::Directory(u64_at(entry, 0))),
            _ => found(name, DirectoryEntry::Other),
        }
    }
    Some(())
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from(u16_at(bytes, offset)) | u32::from(u16_at(bytes, offset + 2)) << 16
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}
