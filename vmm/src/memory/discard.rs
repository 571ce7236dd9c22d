//! Giving pages of guest memory back to the host.

use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::GuestMemory;

/// Why pages could not be given back.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// Not wholly in guest memory.
    #[error("guest memory: {0}")]
    Range(#[from] GuestMemoryError),
    /// madvise(2) failed.
    #[error("madvise: {0}")]
    Advise(#[from] rustix::io::Errno),
}

/// Gives the pages of `length` bytes at `address` back to the host. The guest then reads zeros
/// there or, in a microVM restored from a file, what the file holds.
///
/// `address` and `length` are multiples of the page size (4 KiB).
///
/// # Errors
/// [`DiscardError`]. Pages before the one that failed are given back.
pub fn discard(memory: &GuestMemory, address: u64, length: u64) -> Result<(), DiscardError> {
    let mut start = GuestAddress(address);
    let mut left = length;
    while left > 0 {
        let region = memory
            .find_region(start)
            .ok_or(GuestMemoryError::InvalidGuestAddress(start))?;
        let room = vm_memory::GuestMemoryRegion::last_addr(region).0 - start.0;
        let count = left.min(room.saturating_add(1));
        // DONTNEED only unmaps the pages of a shared file; REMOVE also frees them in the file.
        let advice = if region.flags() & libc::MAP_SHARED != 0 {
            Advice::LinuxRemove
        } else {
            Advice::LinuxDontNeed
        };
        // Not longer than the region, which is mapped: fits.
        let slice = memory.get_slice(start, count as usize)?;
        let pointer = slice.ptr_guard_mut();
        // SAFETY: the range is mapped guest memory, to which nothing holds references: it is only
        // reached through volatile accesses, for which any contents will do.
        unsafe { madvise(pointer.as_ptr().cast(), slice.len(), advice) }?;
        left -= count;
        start = GuestAddress(start.0.saturating_add(count));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::super::{anonymous, shared};
    use super::*;

    fn discards(memory: &GuestMemory, start: u64) {
        for page in 0..4 {
            memory
                .write_obj(0x5au8, GuestAddress(start + 4096 * page))
                .unwrap();
        }
        discard(memory, start + 4096, 8192).unwrap();
        let bytes: Vec<u8> = (0..4)
            .map(|page| memory.read_obj(GuestAddress(start + 4096 * page)).unwrap())
            .collect();
        assert_eq!(bytes, [0x5a, 0, 0, 0x5a]);
    }

    #[test]
    fn pages_of_private_memory_are_zero_afterwards() {
        let memory = GuestMemory::from_regions(vec![anonymous(0, 1 << 20).unwrap()]).unwrap();
        discards(&memory, 0);
    }

    #[test]
    fn pages_of_shared_memory_leave_the_file() {
        let region = shared(1 << 20, 1 << 20).unwrap();
        let memory = GuestMemory::from_regions(vec![region]).unwrap();
        discards(&memory, 1 << 20);
        let start = GuestAddress(1 << 20);
        let file = memory.find_region(start).unwrap().file_offset().unwrap();
        let blocks = || rustix::fs::fstat(file.file()).unwrap().st_blocks;
        // Reading has brought empty pages back.
        assert_eq!(blocks() * 512, 4 * 4096);
        discard(&memory, start.0, 4 * 4096).unwrap();
        assert_eq!(blocks(), 0);
    }

    #[test]
    fn regions_are_crossed_and_holes_refused() {
        let regions = vec![anonymous(0, 8192).unwrap(), anonymous(8192, 8192).unwrap()];
        let memory = GuestMemory::from_regions(regions).unwrap();
        discards(&memory, 0);
        assert!(discard(&memory, 8192, 12288).is_err());
        assert!(discard(&memory, u64::MAX - 4095, 4096).is_err());
    }
}
