//! Putting an uncompressed ELF kernel (vmlinux) into guest memory (System V ABI, chapters 4 and 5;
//! x86-64 supplement).
//!
//! Where guest memory is private, whole pages of the file are mapped over it instead of copied:
//! the host's page cache is then the only copy of what the guest does not change.

use std::{fs::File, os::unix::fs::FileExt};

use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::boot::BootError;
use crate::memory::GuestMemory;

const PAGE: u64 = 4096;
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// Linux has five.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// Class, byte order and version of the identification: 64 bits, little-endian, 1.
const IDENTIFICATION: [u8; 7] = [0x7f, b'E', b'L', b'F', 2, 1, 1];
const MACHINE_X86_64: u16 = 62;
const LOAD: u32 = 1;

/// A segment to load.
#[derive(Debug, Clone, Copy)]
struct Segment {
    /// In the file.
    offset: u64,
    /// Guest-physical.
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

/// Loads `kernel` and returns its entry.
///
/// # Errors
/// [`BootError::Kernel`] when it is no such image or does not fit between `lowest` and the end of
/// memory.
pub(super) fn load(memory: &GuestMemory, kernel: &File, lowest: u64) -> Result<u64, BootError> {
    let file_bytes = kernel.metadata().map_err(unreadable)?.len();
    let (entry, segments) = read_headers(kernel)?;
    if segments.is_empty() {
        return Err(bad("it has nothing to load"));
    }
    for segment in segments {
        segment.check(file_bytes, lowest)?;
        segment.load(memory, kernel)?;
    }
    Ok(entry)
}

fn read_headers(kernel: &File) -> Result<(u64, Vec<Segment>), BootError> {
    let mut header = [0; HEADER_BYTES];
    kernel.read_exact_at(&mut header, 0).map_err(unreadable)?;
    if header[..7] != IDENTIFICATION || u16_at(&header, 18) != MACHINE_X86_64 {
        return Err(bad("its ELF header is missing or another machine's"));
    }
    let (table, size, count) = (
        u64_at(&header, 32),
        u16_at(&header, 54),
        u16_at(&header, 56),
    );
    if usize::from(size) != PROGRAM_HEADER_BYTES || count > MAX_PROGRAM_HEADERS {
        return Err(bad("its program headers are of an unknown form"));
    }
    let mut headers = vec![0; usize::from(size) * usize::from(count)];
    kernel
        .read_exact_at(&mut headers, table)
        .map_err(unreadable)?;
    let segments = headers
        .chunks_exact(PROGRAM_HEADER_BYTES)
        .filter(|header| u32_at(header, 0) == LOAD)
        .map(|header| Segment {
            offset: u64_at(header, 8),
            address: u64_at(header, 24),
            file_bytes: u64_at(header, 32),
            memory_bytes: u64_at(header, 40),
        })
        .collect();
    Ok((u64_at(&header, 24), segments))
}

impl Segment {
    fn check(&self, file_bytes: u64, lowest: u64) -> Result<(), BootError> {
        let file_end = self.offset.checked_add(self.file_bytes);
        if file_end.is_none_or(|end| end > file_bytes) || self.memory_bytes < self.file_bytes {
            return Err(bad("a segment reaches beyond the end of the file"));
        }
        if self.address < lowest || self.address.checked_add(self.memory_bytes).is_none() {
            return Err(bad("a segment lies where no kernel can"));
        }
        Ok(())
    }

    /// Memory is fresh, so what the file does not fill is zero already.
    fn load(&self, memory: &GuestMemory, kernel: &File) -> Result<(), BootError> {
        let length = usize::try_from(self.memory_bytes).map_err(|error| bad(&error.to_string()))?;
        if length > 0
            && memory
                .get_slice(GuestAddress(self.address), length)
                .is_err()
        {
            return Err(bad(&format!(
                "a segment of {length} bytes at {:#x} does not fit the guest's memory",
                self.address
            )));
        }
        let mapped = self.map(memory, kernel)?;
        self.copy(memory, kernel, mapped)
    }

    /// Maps the whole pages from the start on, if they can be. Returns how many bytes.
    fn map(&self, memory: &GuestMemory, kernel: &File) -> Result<u64, BootError> {
        let length = self.file_bytes / PAGE * PAGE;
        let aligned = self.offset.is_multiple_of(PAGE) && self.address.is_multiple_of(PAGE);
        let region = memory.find_region(GuestAddress(self.address));
        let private = region.is_some_and(|region| {
            region.file_offset().is_none() && region.flags() & libc::MAP_PRIVATE != 0
        });
        if length == 0 || !aligned || !private {
            return Ok(0);
        }
        // Within the segment, whose length is a usize.
        let slice = memory.get_slice(GuestAddress(self.address), length as usize)?;
        // SAFETY: the range lies wholly in one anonymous private mapping of this process, which
        // only guest memory uses and whose users expect its bytes to change at any time; page
        // borders are respected at both ends.
        unsafe {
            rustix::mm::mmap(
                slice.ptr_guard_mut().as_ptr().cast(),
                slice.len(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                kernel,
                self.offset,
            )
        }
        .map_err(|errno| unreadable(errno.into()))?;
        Ok(length)
    }

    /// Copies what is not mapped.
    fn copy(&self, memory: &GuestMemory, kernel: &File, mapped: u64) -> Result<(), BootError> {
        let mut buffer = vec![0; 64 << 10];
        let mut done = mapped;
        while done < self.file_bytes {
            // At most the buffer's length.
            let count = (self.file_bytes - done).min(buffer.len() as u64) as usize;
            let piece = &mut buffer[..count];
            kernel
                .read_exact_at(piece, self.offset + done)
                .map_err(unreadable)?;
            memory.write_slice(piece, GuestAddress(self.address + done))?;
            done += count as u64;
        }
        Ok(())
    }
}

fn bad(why: &str) -> BootError {
    BootError::Kernel(why.to_owned())
}

fn unreadable(error: std::io::Error) -> BootError {
    BootError::Kernel(format!("reading it: {error}"))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory;

    const MEMORY: u64 = 64 << 20;
    const LOWEST: u64 = 0x10_0000;

    fn image(segments: &[Segment], data: &[(u64, &[u8])]) -> File {
        let mut bytes = vec![0; 64 << 10];
        bytes[..7].copy_from_slice(&IDENTIFICATION);
        bytes[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
        bytes[24..32].copy_from_slice(&0x100_0123u64.to_le_bytes());
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&(segments.len() as u16).to_le_bytes());
        for (index, segment) in segments.iter().enumerate() {
            let at = 64 + 56 * index;
            bytes[at..at + 4].copy_from_slice(&LOAD.to_le_bytes());
            for (place, value) in [
                (8, segment.offset),
                (24, segment.address),
                (32, segment.file_bytes),
                (40, segment.memory_bytes),
            ] {
                bytes[at + place..at + place + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        for (offset, content) in data {
            let at = *offset as usize;
            bytes[at..at + content.len()].copy_from_slice(content);
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    fn segment(offset: u64, address: u64, file_bytes: u64, memory_bytes: u64) -> Segment {
        Segment {
            offset,
            address,
            file_bytes,
            memory_bytes,
        }
    }

    fn guest(shared: bool) -> GuestMemory {
        let region = if shared {
            memory::shared(0, MEMORY)
        } else {
            memory::anonymous(0, MEMORY)
        };
        GuestMemory::from_regions(vec![region.unwrap()]).unwrap()
    }

    #[test]
    fn segments_are_mapped_or_copied_alike() {
        for shared in [false, true] {
            let memory = guest(shared);
            let segments = [
                segment(0x1000, 0x100_0000, 0x2010, 0x9000),
                segment(0x4100, 0x200_0100, 0x20, 0x20),
            ];
            let tail = [7; 0x20];
            let data: [(u64, &[u8]); 3] = [(0x1000, b"start"), (0x3000, b"end"), (0x4100, &tail)];
            let file = image(&segments, &data);
            assert_eq!(load(&memory, &file, LOWEST).unwrap(), 0x100_0123);
            let read = |address| memory.read_obj::<u32>(GuestAddress(address)).unwrap();
            assert_eq!(read(0x100_0000), u32::from_le_bytes(*b"star"));
            assert_eq!(read(0x100_2000), u32::from_le_bytes(*b"end\0"));
            assert_eq!(read(0x200_0100), 0x0707_0707);
            // Beyond the file's part: zeros, not what follows in the file.
            assert_eq!(read(0x100_3100), 0);
            // The guest's stores stay its own.
            memory.write_obj(0u32, GuestAddress(0x100_0000)).unwrap();
            let mut bytes = [0; 5];
            file.read_exact_at(&mut bytes, 0x1000).unwrap();
            assert_eq!(&bytes, b"start");
        }
    }

    #[test]
    fn impossible_segments_are_refused() {
        for (bad, why) in [
            (segment(0, 0x1000, 16, 16), "where no kernel can"),
            (segment(0x1_0000, 0x100_0000, 1, 1), "end of the file"),
            (segment(u64::MAX, 0x100_0000, 16, 16), "end of the file"),
            (segment(0, 0x100_0000, 16, 8), "end of the file"),
            (segment(0, u64::MAX - 8, 16, 16), "where no kernel can"),
            (segment(0, MEMORY - 8, 16, 16), "does not fit"),
            (segment(0, 0x100_0000, 16, 1 << 40), "does not fit"),
        ] {
            let error = load(&guest(false), &image(&[bad], &[]), LOWEST).unwrap_err();
            assert!(error.to_string().contains(why), "{bad:?}: {error}");
        }
        let error = load(&guest(false), &image(&[], &[]), LOWEST).unwrap_err();
        assert!(error.to_string().contains("nothing to load"));
    }
}
