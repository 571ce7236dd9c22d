//! Mapping guest memory.

use std::{fs::File, os::fd::OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{FileOffset, GuestAddress, mmap::MmapRegionBuilder};

use super::GuestRegion;

/// Why memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// mmap(2) failed or the range is impossible.
    #[error("mapping {bytes} bytes of guest memory: {message}")]
    Map {
        /// Length.
        bytes: u64,
        /// Why.
        message: String,
    },
}

impl MemoryError {
    fn map(bytes: u64, message: impl std::fmt::Display) -> Self {
        Self::Map {
            bytes,
            message: message.to_string(),
        }
    }
}

/// Private anonymous memory: pages exist once the guest touches them.
///
/// # Errors
/// [`MemoryError`].
pub fn anonymous(start: u64, bytes: u64) -> Result<GuestRegion, MemoryError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    region(start, bytes, None, true, flags)
}

/// Shared memory behind a memfd of its own, for back ends in other processes.
///
/// # Errors
/// [`MemoryError`].
pub fn shared(start: u64, bytes: u64) -> Result<GuestRegion, MemoryError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create(c"guest-memory", flags).map_err(io("memfd_create"))?;
    rustix::fs::ftruncate(&fd, bytes).map_err(io("sizing the guest's memfd"))?;
    // A back end must not be able to pull pages away from under the VMM.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(io("sealing the guest's memfd"))?;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    region(
        start,
        bytes,
        Some(FileOffset::new(fd.into(), 0)),
        true,
        flags,
    )
}

/// `bytes` of `file` from `offset` on. `private`: stores stay in this process; otherwise they reach
/// the file if `writable`, and fault if not.
///
/// # Errors
/// [`MemoryError`].
pub fn map_file(
    start: u64,
    bytes: u64,
    file: OwnedFd,
    offset: u64,
    private: bool,
    writable: bool,
) -> Result<GuestRegion, MemoryError> {
    let kind = if private {
        libc::MAP_PRIVATE
    } else {
        libc::MAP_SHARED
    };
    let file = FileOffset::new(File::from(file), offset);
    region(
        start,
        bytes,
        Some(file),
        writable,
        kind | libc::MAP_NORESERVE,
    )
}

fn region(
    start: u64,
    bytes: u64,
    file: Option<FileOffset>,
    writable: bool,
    flags: i32,
) -> Result<GuestRegion, MemoryError> {
    let length = usize::try_from(bytes).map_err(|error| MemoryError::map(bytes, error))?;
    let mut protection = libc::PROT_READ;
    if writable {
        protection |= libc::PROT_WRITE;
    }
    let mut builder = MmapRegionBuilder::new(length)
        .with_mmap_prot(protection)
        .with_mmap_flags(flags);
    if let Some(file) = file {
        builder = builder.with_file_offset(file);
    }
    let mapping = builder
        .build()
        .map_err(|error| MemoryError::map(bytes, error))?;
    GuestRegion::new(mapping, GuestAddress(start))
        .ok_or_else(|| MemoryError::map(bytes, "guest address overflow"))
}

fn io(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> MemoryError {
    move |errno| MemoryError::Io {
        what,
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};

    use super::*;

    #[test]
    fn shared_memory_is_in_a_sealed_file() {
        let region = shared(0, 1 << 20).unwrap();
        region.write_obj(0x55u8, MemoryRegionAddress(4096)).unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(file.set_len(0).is_err());
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_at(file, &mut byte, 4096).unwrap();
        assert_eq!(byte, [0x55]);
    }

    #[test]
    fn private_file_memory_leaves_the_file_alone() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        let fd = OwnedFd::from(file.try_clone().unwrap());
        let region = map_file(0, 8192, fd, 0, true, true).unwrap();
        region.write_obj(1u8, MemoryRegionAddress(0)).unwrap();
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_at(&file, &mut byte, 0).unwrap();
        assert_eq!(byte, [7]);
    }
}
