//! What a disk's bytes come from: one raw file, or a layout of files and memory.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, OFlags, SeekFrom};

use super::partitions;

/// Bytes in a sector; the unit of virtio-blk whatever the block size (virtio 1.2, 5.2.6).
pub const SECTOR: u64 = 512;

/// Where an extent's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// In the file of this number, from its beginning.
    File {
        /// Index among the disk's files.
        index: u16,
    },
    /// In the disk's memory.
    Memory {
        /// First byte.
        offset: u32,
    },
}

/// A stretch of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte on the disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Where they are.
    pub source: Source,
}

/// A part of a request that lies in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// Bytes of a file.
    File {
        /// Index among the disk's files.
        index: u16,
        /// First byte in the file.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Bytes of the disk's memory.
    Memory {
        /// First byte.
        offset: usize,
        /// Bytes.
        length: u64,
    },
    /// Nothing is there.
    Zeros {
        /// Bytes.
        length: u64,
    },
}

impl Piece {
    /// Bytes.
    pub const fn length(&self) -> u64 {
        match *self {
            Self::File { length, .. } | Self::Memory { length, .. } | Self::Zeros { length } => {
                length
            }
        }
    }
}

/// Why descriptors make no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Neither a regular file nor a block device.
    #[error("disk file {index} is {kind:?}: only regular files and block devices can be disks")]
    Kind {
        /// Index among the disk's files.
        index: usize,
        /// What it is.
        kind: FileType,
    },
    /// The descriptor does not allow what the disk needs.
    #[error("disk file {index} is {problem}; open it {wanted}")]
    Mode {
        /// Index among the disk's files.
        index: usize,
        /// What is wrong.
        problem: &'static str,
        /// What to do.
        wanted: &'static str,
    },
    /// A disk consists of whole sectors.
    #[error(
        "disk file {index} is {length} bytes long: a disk of one file needs a multiple of 512, a partition at least 1"
    )]
    Length {
        /// Index among the disk's files.
        index: usize,
        /// Its length in bytes.
        length: u64,
    },
    /// No partition table can hold these files.
    #[error("{count} files of {bytes} bytes make no partitioned disk: 1 to {max} files and 2^63 bytes are possible", max = partitions::MAX_PARTITIONS)]
    Layout {
        /// Number of files.
        count: usize,
        /// Sum of their lengths.
        bytes: u128,
    },
    /// Partitions are layers, and layers are never written.
    #[error("a disk of partitions is read-only: set read_only")]
    WritablePartitions,
    /// A system call on the file failed.
    #[error("{call} of disk file {index}: {error}")]
    Io {
        /// Index among the disk's files.
        index: usize,
        /// Which call.
        call: &'static str,
        /// What it said.
        error: rustix::io::Errno,
    },
}

/// The contents of a virtio-blk device.
#[derive(Debug)]
pub struct Disk {
    files: Vec<File>,
    memory: Vec<u8>,
    extents: Vec<Extent>,
    length: u64,
    block_device: bool,
}

impl Disk {
    /// A disk of one raw file or block device.
    pub fn from_file(file: OwnedFd, read_only: bool) -> Result<Self, DiskError> {
        let (length, block_device) = inspect(&file, 0, read_only)?;
        if length == 0 || !length.is_multiple_of(SECTOR) {
            return Err(DiskError::Length { index: 0, length });
        }
        let extents = vec![Extent {
            start: 0,
            length,
            source: Source::File { index: 0 },
        }];
        Ok(Self {
            files: vec![file.into()],
            memory: Vec::new(),
            extents,
            length,
            block_device,
        })
    }

    /// A read-only disk with each file as a partition. `identity` makes its GUIDs.
    pub fn from_partitions(files: Vec<OwnedFd>, identity: &str) -> Result<Self, DiskError> {
        let mut lengths = Vec::with_capacity(files.len());
        for (index, file) in files.iter().enumerate() {
            let (length, _) = inspect(file, index, true)?;
            if length == 0 {
                return Err(DiskError::Length { index, length });
            }
            lengths.push(length);
        }
        let layout = partitions::lay_out(&lengths, identity).ok_or_else(|| DiskError::Layout {
            count: lengths.len(),
            bytes: lengths.iter().map(|length| u128::from(*length)).sum(),
        })?;
        Ok(Self {
            files: files.into_iter().map(File::from).collect(),
            memory: layout.memory,
            extents: layout.extents,
            length: layout.length,
            block_device: false,
        })
    }

    /// Length in sectors.
    pub const fn sectors(&self) -> u64 {
        self.length / SECTOR
    }

    /// The one file of a writable disk is a block device.
    pub const fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// The file of this number; pieces only name files that exist.
    pub fn file(&self, index: u16) -> &File {
        &self.files[usize::from(index)]
    }

    /// Bytes of the disk's own memory; pieces only name what is there.
    pub fn memory(&self, offset: usize, length: u64) -> &[u8] {
        &self.memory[offset..offset + length as usize]
    }

    /// Byte range of sectors, if they lie on the disk.
    pub fn range(&self, sector: u64, bytes: u64) -> Option<(u64, u64)> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(bytes)?;
        (end <= self.length).then_some((start, bytes))
    }

    /// The places a byte range consists of, in order. The range must come from [`Disk::range`].
    pub fn pieces(&self, start: u64, length: u64) -> Pieces<'_> {
        let next = self
            .extents
            .partition_point(|extent| extent.start + extent.length <= start);
        Pieces {
            extents: &self.extents[next..],
            position: start,
            left: length,
        }
    }
}

/// Iterator over the [`Piece`]s of a range.
pub struct Pieces<'a> {
    extents: &'a [Extent],
    position: u64,
    left: u64,
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.left == 0 {
            return None;
        }
        let piece = match self.extents.first() {
            Some(extent) if extent.start <= self.position => {
                let skip = self.position - extent.start;
                let length = self.left.min(extent.length - skip);
                if length == extent.length - skip {
                    self.extents = &self.extents[1..];
                }
                match extent.source {
                    Source::File { index } => Piece::File {
                        index,
                        offset: skip,
                        length,
                    },
                    Source::Memory { offset } => Piece::Memory {
                        offset: offset as usize + skip as usize,
                        length,
                    },
                }
            }
            Some(extent) => Piece::Zeros {
                length: self.left.min(extent.start - self.position),
            },
            None => Piece::Zeros { length: self.left },
        };
        self.position += piece.length();
        self.left -= piece.length();
        Some(piece)
    }
}

/// Length in bytes, and whether it is a block device.
fn inspect(file: &OwnedFd, index: usize, read_only: bool) -> Result<(u64, bool), DiskError> {
    let io = |call| move |error| DiskError::Io { index, call, error };
    let stat = rustix::fs::fstat(file).map_err(io("fstat"))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
        return Err(DiskError::Kind { index, kind });
    }
    let flags = rustix::fs::fcntl_getfl(file.as_fd()).map_err(io("fcntl(F_GETFL)"))?;
    let access = flags & OFlags::RWMODE;
    let mode = |problem, wanted| {
        Err(DiskError::Mode {
            index,
            problem,
            wanted,
        })
    };
    if flags.contains(OFlags::PATH) {
        return mode("an O_PATH descriptor", "for reading");
    }
    if flags.contains(OFlags::DIRECT) {
        return mode(
            "open with O_DIRECT, which needs buffers the guest need not have",
            "without O_DIRECT",
        );
    }
    if access == OFlags::WRONLY {
        return mode("open for writing only", "for reading");
    }
    if !read_only && access != OFlags::RDWR {
        return mode(
            "open for reading only",
            "for reading and writing, or set read_only",
        );
    }
    if !read_only && flags.contains(OFlags::APPEND) {
        return mode(
            "open with O_APPEND, which ignores where a write belongs",
            "without O_APPEND",
        );
    }
    // The position is used by nobody: all reads and writes name their offset.
    let length = rustix::fs::seek(file, SeekFrom::End(0)).map_err(io("lseek"))?;
    Ok((length, kind == FileType::BlockDevice))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    fn sized(length: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(length).unwrap();
        file
    }

    fn read_only(file: &tempfile::NamedTempFile) -> OwnedFd {
        File::open(file.path()).unwrap().into()
    }

    #[test]
    fn refuses_what_is_no_disk() {
        let file = sized(4096);
        let short = sized(700);
        let open =
            |options: &mut OpenOptions| -> OwnedFd { options.open(file.path()).unwrap().into() };
        let directory = || -> OwnedFd { File::open("/").unwrap().into() };
        assert!(matches!(
            Disk::from_file(directory(), true),
            Err(DiskError::Kind { .. })
        ));
        assert!(matches!(
            Disk::from_file(read_only(&file), false),
            Err(DiskError::Mode { .. })
        ));
        let write_only = open(OpenOptions::new().write(true));
        assert!(matches!(
            Disk::from_file(write_only, false),
            Err(DiskError::Mode { .. })
        ));
        let append = open(OpenOptions::new().read(true).append(true));
        assert!(matches!(
            Disk::from_file(append, false),
            Err(DiskError::Mode { .. })
        ));
        assert!(matches!(
            Disk::from_file(read_only(&short), true),
            Err(DiskError::Length { length: 700, .. })
        ));
        assert!(matches!(
            Disk::from_file(read_only(&sized(0)), true),
            Err(DiskError::Length { .. })
        ));
        assert!(matches!(
            Disk::from_partitions(vec![], "x"),
            Err(DiskError::Layout { .. })
        ));
        let empty = vec![read_only(&file), read_only(&sized(0))];
        assert!(matches!(
            Disk::from_partitions(empty, "x"),
            Err(DiskError::Length { index: 1, .. })
        ));
    }

    #[test]
    fn ranges_beyond_the_end_or_the_number_space_are_none() {
        let disk = Disk::from_file(read_only(&sized(4096)), true).unwrap();
        assert_eq!(disk.range(0, 4096), Some((0, 4096)));
        assert_eq!(disk.range(8, 0), Some((4096, 0)));
        assert_eq!(disk.range(7, 1024), None);
        assert_eq!(disk.range(u64::MAX, 512), None);
        assert_eq!(disk.range(u64::MAX / SECTOR, 512), None);
        assert_eq!(disk.range(0, u64::MAX), None);
    }

    #[test]
    fn pieces_cover_any_range_exactly() {
        let disk = Disk::from_partitions(
            vec![read_only(&sized(700)), read_only(&sized(3 << 20))],
            "x",
        )
        .unwrap();
        let all = disk.sectors() * SECTOR;
        for (start, length) in [
            (0, all),
            (512, 512),
            (1 << 20, 1024),
            ((1 << 20) + 512, 4096),
            (all - 512, 512),
        ] {
            let pieces: Vec<_> = disk.pieces(start, length).collect();
            assert_eq!(
                pieces.iter().map(Piece::length).sum::<u64>(),
                length,
                "{pieces:?}"
            );
            assert!(pieces.iter().all(|piece| piece.length() > 0));
        }
        let first: Vec<_> = disk.pieces(1 << 20, 1024).collect();
        assert_eq!(
            first,
            [
                Piece::File {
                    index: 0,
                    offset: 0,
                    length: 700
                },
                Piece::Zeros { length: 324 }
            ]
        );
    }
}
