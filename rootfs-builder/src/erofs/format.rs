//! The structures on disk, all little-endian (`fs/erofs/erofs_fs.h`, Linux 6.12).

use crate::tar::Timestamp;

/// Length of a block in bytes.
pub(super) const BLOCK: u64 = 4096;
/// Where the superblock is, in bytes.
pub(super) const SUPER_OFFSET: u64 = 1024;
/// Unit of inode numbers: `nid` is the inode's offset from the start of the metadata area in units of 32 bytes.
pub(super) const SLOT: u64 = 32;
/// Length of an extended inode in bytes.
pub(super) const INODE: u64 = 64;
/// Length of a directory entry without its name, in bytes.
pub(super) const DIRENT: usize = 12;
/// A chunk that is not stored and reads as zeros.
pub(super) const NULL_ADDRESS: u32 = u32::MAX;

const MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_SB_CHKSUM: u32 = 1;
const COMPAT_MTIME: u32 = 2;
const INCOMPAT_CHUNKED_FILE: u32 = 4;
/// Low bit of `i_format`: an extended inode.
const INODE_EXTENDED: u16 = 1;

/// How an inode's data is found; the values of `i_format >> 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    FlatPlain = 0,
    FlatInline = 2,
    ChunkBased = 4,
}

/// Values of a directory entry's `file_type` (`FT_*` in `include/linux/fs_types.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileType {
    Regular = 1,
    Directory = 2,
    CharDevice = 3,
    BlockDevice = 4,
    Fifo = 5,
    Symlink = 7,
}

impl FileType {
    /// The file type bits of `st_mode`.
    pub(super) fn mode(self) -> u32 {
        match self {
            FileType::Regular => 0o100_000,
            FileType::Directory => 0o040_000,
            FileType::CharDevice => 0o020_000,
            FileType::BlockDevice => 0o060_000,
            FileType::Fifo => 0o010_000,
            FileType::Symlink => 0o120_000,
        }
    }
}

/// An extended inode.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) layout: Layout,
    /// Length of the extended attributes behind the inode in bytes: 0, or at least 12 and a multiple of 4.
    pub(super) xattr_bytes: u64,
    pub(super) mode: u32,
    pub(super) size: u64,
    /// First data block, device number or chunk format, by type and layout.
    pub(super) union: u32,
    pub(super) number: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timestamp,
    pub(super) links: u32,
}

impl Inode {
    pub(super) fn encode(&self) -> [u8; INODE as usize] {
        let format = (self.layout as u16) << 1 | INODE_EXTENDED;
        // The header of 12 bytes counts as one, every further 4 bytes as another one.
        let xattr_count = self
            .xattr_bytes
            .checked_sub(12)
            .map_or(0, |entries| entries / 4 + 1);
        let mut out = Fields::default();
        out.put(&format.to_le_bytes());
        out.put(&(xattr_count as u16).to_le_bytes());
        out.put(&(self.mode as u16).to_le_bytes());
        out.put(&[0; 2]);
        out.put(&self.size.to_le_bytes());
        out.put(&self.union.to_le_bytes());
        out.put(&self.number.to_le_bytes());
        out.put(&self.uid.to_le_bytes());
        out.put(&self.gid.to_le_bytes());
        out.put(&self.mtime.seconds.to_le_bytes());
        out.put(&self.mtime.nanoseconds.to_le_bytes());
        out.put(&self.links.to_le_bytes());
        out.finish()
    }
}

/// A device number as `new_encode_dev` (`include/linux/kdev_t.h`) packs it; `None` when it does not fit its
/// 12 and 20 bits.
pub(super) fn device_number(major: u32, minor: u32) -> Option<u32> {
    if major >= 1 << 12 || minor >= 1 << 20 {
        return None;
    }
    Some(minor & 0xff | major << 8 | (minor & !0xff) << 12)
}

/// What the superblock says.
#[derive(Debug)]
pub(super) struct SuperBlock {
    pub(super) root: u16,
    pub(super) inodes: u64,
    pub(super) blocks: u32,
    pub(super) metadata_block: u32,
    pub(super) uuid: [u8; 16],
    pub(super) has_chunks: bool,
}

impl SuperBlock {
    /// The superblock and the rest of its block, checksummed: 3072 bytes for offset 1024.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Fields::<128>::default();
        out.put(&MAGIC.to_le_bytes());
        out.put(&[0; 4]); // checksum, below
        out.put(&(COMPAT_SB_CHKSUM | COMPAT_MTIME).to_le_bytes());
        out.put(&[BLOCK.trailing_zeros() as u8, 0]);
        out.put(&self.root.to_le_bytes());
        out.put(&self.inodes.to_le_bytes());
        out.put(&[0; 8 + 4]); // build time: not ours to tell, and the image has to be reproducible
        out.put(&self.blocks.to_le_bytes());
        out.put(&self.metadata_block.to_le_bytes());
        out.put(&[0; 4]); // no shared extended attributes
        out.put(&self.uuid);
        out.put(&[0; 16]); // volume name
        out.put(
            &(if self.has_chunks {
                INCOMPAT_CHUNKED_FILE
            } else {
                0
            })
            .to_le_bytes(),
        );
        let mut bytes = out.finish().to_vec();
        bytes.resize((BLOCK - SUPER_OFFSET) as usize, 0);
        let checksum = crc32c(&bytes);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The superblock that [`SuperBlock::encode`] gave, `None` for anything else.
    pub(super) fn decode(bytes: &[u8]) -> Option<SuperBlock> {
        let u32_at = |offset: usize| {
            Some(u32::from_le_bytes(
                bytes.get(offset..offset + 4)?.try_into().ok()?,
            ))
        };
        let superblock = SuperBlock {
            root: u16::from_le_bytes(bytes.get(14..16)?.try_into().ok()?),
            inodes: u64::from_le_bytes(bytes.get(16..24)?.try_into().ok()?),
            blocks: u32_at(36)?,
            metadata_block: u32_at(40)?,
            uuid: bytes.get(48..64)?.try_into().ok()?,
            has_chunks: u32_at(80)? == INCOMPAT_CHUNKED_FILE,
        };
        (superblock.encode() == bytes).then_some(superblock)
    }
}

/// CRC-32C as the kernel's `crc32c(~0, …)`: without the final inversion of the usual definition.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            if crc & 1 != 0 {
                crc >> 1 ^ 0x82f6_3b78
            } else {
                crc >> 1
            }
        })
    })
}

/// Puts fields one after the other into a structure of `N` bytes; the rest is zeros.
struct Fields<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Default for Fields<N> {
    fn default() -> Self {
        Fields {
            bytes: [0; N],
            length: 0,
        }
    }
}

impl<const N: usize> Fields<N> {
    fn put(&mut self, field: &[u8]) {
        self.bytes[self.length..self.length + field.len()].copy_from_slice(field);
        self.length += field.len();
    }

    fn finish(self) -> [u8; N] {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_crc32c() {
        // The check value of CRC-32C, inverted back.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn device_numbers_are_packed_as_linux_does() {
        assert_eq!(device_number(0, 0), Some(0));
        assert_eq!(device_number(8, 1), Some(0x801));
        assert_eq!(device_number(0xabc, 0x12345), Some(0x123a_bc45));
        assert_eq!(device_number(1 << 12, 0), None);
        assert_eq!(device_number(0, 1 << 20), None);
    }
}
