//! Buffers of a request as system calls take them.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::Segment;
use crate::memory::GuestMemory;

/// Appends iovecs over `count` bytes of `segments`, behind the first `skip`; as many as there are if fewer. They
/// point into guest memory, so they are good for as long as `memory` stays mapped, and only for the kernel: the
/// guest may change the bytes at any time.
///
/// # Errors
/// [`GuestMemoryError`] when a segment does not lie in memory, which a [`super::Chain`]'s segments do.
pub fn append_iovecs(
    memory: &GuestMemory,
    segments: &[Segment],
    mut skip: u64,
    mut count: u64,
    iovecs: &mut Vec<libc::iovec>,
) -> Result<(), GuestMemoryError> {
    for segment in segments {
        let length = u64::from(segment.length);
        if skip >= length {
            skip -= length;
            continue;
        }
        if count == 0 {
            break;
        }
        let take = count.min(length - skip);
        let address = GuestAddress(segment.address.0 + skip);
        let slice = memory.get_slice(address, take as usize)?;
        iovecs.push(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: take as usize,
        });
        skip = 0;
        count -= take;
    }
    Ok(())
}
