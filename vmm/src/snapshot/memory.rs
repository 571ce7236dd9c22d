//! Guest memory in a file: regions one after the other, pages of zeros left out.

use std::{
    fs::File,
    ops::Range,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use rustix::{fs::SeekFrom, io::Errno};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::state::SnapshotError;
use crate::memory::{self, GuestMemory, GuestRegion};

const PAGE: usize = 4096;
/// Bytes handled at once.
const PIECE: usize = 256 << 10;

/// Writes `regions` of `memory` (as many as given, in order) to `file`, which is truncated first.
/// Of each region only the given ranges (offset and length) can hold data; the rest becomes a hole.
///
/// # Errors
/// [`SnapshotError::Io`].
pub fn save_memory(
    memory: &GuestMemory,
    used: &[Vec<(u64, u64)>],
    file: OwnedFd,
) -> Result<(), SnapshotError> {
    let file = File::from(file);
    let truncating = SnapshotError::io("truncating the memory file");
    file.set_len(0).map_err(truncating)?;
    let mut start = 0;
    let mut buffer = vec![0; PIECE];
    for (region, ranges) in memory.iter().zip(used) {
        for &(offset, bytes) in ranges {
            for data in data_ranges(region, offset..offset + bytes) {
                write_pages(region, data, &file, start, &mut buffer)?;
            }
        }
        start += region.len();
    }
    file.set_len(start)
        .map_err(SnapshotError::io("sizing the memory file"))
}

/// Maps `ranges` (guest address and length) from a file that [`save_memory`] wrote: nothing is
/// read until the guest touches it, and what the guest writes stays in this process.
///
/// # Errors
/// [`SnapshotError::Mismatch`] when the file has another length, [`SnapshotError::Io`].
pub fn map_memory(
    ranges: &[(u64, u64)],
    file: &OwnedFd,
) -> Result<Vec<GuestRegion>, SnapshotError> {
    check_length(ranges, file)?;
    let mut offset = 0;
    let mut regions = Vec::with_capacity(ranges.len());
    for &(start, bytes) in ranges {
        let file = file
            .try_clone()
            .map_err(SnapshotError::io("duplicating the memory file"))?;
        let region = memory::map_file(start, bytes, file, offset, true, true)
            .map_err(|error| SnapshotError::Mismatch(error.to_string()))?;
        regions.push(region);
        offset += bytes;
    }
    Ok(regions)
}

/// Copies the data of a file that [`save_memory`] wrote into `regions`, for memory that other
/// processes have to share.
///
/// # Errors
/// As [`map_memory`].
pub fn load_memory(regions: &[GuestRegion], file: &OwnedFd) -> Result<(), SnapshotError> {
    let ranges: Vec<_> = regions
        .iter()
        .map(|region| (region.start_addr().0, region.len()))
        .collect();
    check_length(&ranges, file)?;
    let mut start = 0;
    for region in regions {
        for data in extents(file, start..start + region.len()) {
            let mut source = File::from(
                file.try_clone()
                    .map_err(SnapshotError::io("duplicating the memory file"))?,
            );
            let mut at = data.start;
            while at < data.end {
                // At most PIECE.
                let count = (data.end - at).min(PIECE as u64) as usize;
                let slice = region
                    .get_slice(MemoryRegionAddress(at - start), count)
                    .map_err(out_of_range)?;
                read_into(&mut source, at, slice)?;
                at += count as u64;
            }
        }
        start += region.len();
    }
    Ok(())
}

fn read_into(
    source: &mut File,
    at: u64,
    slice: vm_memory::VolatileSlice<'_>,
) -> Result<(), SnapshotError> {
    let mut buffer = [0; 16 << 10];
    let mut done = 0;
    while done < slice.len() {
        let count = (slice.len() - done).min(buffer.len());
        source
            .read_exact_at(&mut buffer[..count], at + done as u64)
            .map_err(SnapshotError::io("reading the memory file"))?;
        slice
            .offset(done)
            .map_err(|error| SnapshotError::Mismatch(error.to_string()))?
            .copy_from(&buffer[..count]);
        done += count;
    }
    Ok(())
}

fn check_length(ranges: &[(u64, u64)], file: &OwnedFd) -> Result<(), SnapshotError> {
    let expected: u64 = ranges.iter().map(|(_, bytes)| bytes).sum();
    let stat = rustix::fs::fstat(file).map_err(SnapshotError::io("fstat of the memory file"))?;
    if u64::try_from(stat.st_size).ok() != Some(expected) {
        return Err(SnapshotError::Mismatch(format!(
            "the memory file has {} bytes, the saved microVM {expected}",
            stat.st_size
        )));
    }
    Ok(())
}

/// Where a region may hold data: of memory behind a file, where the file does.
fn data_ranges(region: &GuestRegion, range: Range<u64>) -> Vec<Range<u64>> {
    match region.file_offset() {
        // In a private mapping the file does not know of this process' pages.
        Some(backing) if region.flags() & libc::MAP_SHARED != 0 && backing.start() == 0 => {
            extents(backing.file(), range)
        }
        _ => vec![range],
    }
}

/// The parts of `range` that are no holes of `file`; all of it where holes cannot be found.
fn extents(file: impl AsFd, range: Range<u64>) -> Vec<Range<u64>> {
    let mut found = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let data = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // No data behind `at`.
            Err(Errno::NXIO) => break,
            Err(_) => at,
        };
        let hole = rustix::fs::seek(&file, SeekFrom::Hole(data)).unwrap_or(range.end);
        if data >= range.end || hole <= data {
            break;
        }
        found.push(data..hole.min(range.end));
        at = hole;
    }
    found
}

/// Writes the pages of `range` that are not all zeros to `file` from `start` on.
fn write_pages(
    region: &GuestRegion,
    range: Range<u64>,
    file: &File,
    start: u64,
    buffer: &mut [u8],
) -> Result<(), SnapshotError> {
    let mut at = range.start;
    while at < range.end {
        // At most PIECE.
        let count = (range.end - at).min(buffer.len() as u64) as usize;
        let slice = region
            .get_slice(MemoryRegionAddress(at), count)
            .map_err(out_of_range)?;
        let piece = &mut buffer[..count];
        slice.copy_to(piece);
        for run in nonzero_runs(piece) {
            file.write_all_at(&piece[run.clone()], start + at + run.start as u64)
                .map_err(SnapshotError::io("writing the memory file"))?;
        }
        at += count as u64;
    }
    Ok(())
}

/// Longest runs of pages that are not all zeros.
fn nonzero_runs(piece: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, page) in piece.chunks(PAGE).enumerate() {
        if is_zero(page) {
            continue;
        }
        let start = index * PAGE;
        let end = start + page.len();
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// Word by word: this looks at all of the guest's memory.
fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

fn out_of_range(error: vm_memory::GuestMemoryError) -> SnapshotError {
    SnapshotError::Mismatch(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const REGION: u64 = 8 << 20;
    const SECOND: u64 = 1 << 32;

    fn memory(make: fn(u64, u64) -> Result<GuestRegion, memory::MemoryError>) -> GuestMemory {
        GuestMemory::from_regions(vec![
            make(0, REGION).unwrap(),
            make(SECOND, REGION).unwrap(),
        ])
        .unwrap()
    }

    fn fill(memory: &GuestMemory) {
        for (address, value) in [(0, 1), (5000, 2), (REGION - 1, 3), (SECOND + 4096, 4)] {
            memory
                .write_obj(value as u8, GuestAddress(address))
                .unwrap();
        }
    }

    fn check(memory: &GuestMemory) {
        for (address, value) in [
            (0, 1),
            (1, 0),
            (5000, 2),
            (REGION - 1, 3),
            (SECOND, 0),
            (SECOND + 4096, 4),
        ] {
            let read: u8 = memory.read_obj(GuestAddress(address)).unwrap();
            assert_eq!(read, value, "at {address:#x}");
        }
    }

    fn saved(memory: &GuestMemory) -> OwnedFd {
        let file = tempfile::tempfile().unwrap();
        let used = [vec![(0, REGION)], vec![(0, REGION)]];
        save_memory(memory, &used, file.try_clone().unwrap().into()).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 2 * REGION);
        assert!(
            metadata.blocks() * 512 <= 64 << 10,
            "the file is not sparse"
        );
        file.into()
    }

    #[test]
    fn private_memory_comes_back_mapped() {
        let memory = memory(memory::anonymous);
        fill(&memory);
        let file = saved(&memory);
        let regions = map_memory(&[(0, REGION), (SECOND, REGION)], &file).unwrap();
        let restored = GuestMemory::from_regions(regions).unwrap();
        check(&restored);
        // A clone's stores do not reach the template, and can be saved in their turn.
        restored.write_obj(9u8, GuestAddress(0)).unwrap();
        let second = saved(&restored);
        let mut bytes = [0];
        File::from(second).read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [9]);
        File::from(file).read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [1]);
    }

    #[test]
    fn shared_memory_comes_back_copied() {
        let memory = memory(memory::shared);
        fill(&memory);
        let file = saved(&memory);
        let regions = [
            memory::shared(0, REGION).unwrap(),
            memory::shared(SECOND, REGION).unwrap(),
        ];
        load_memory(&regions, &file).unwrap();
        let restored = GuestMemory::from_regions(regions.into()).unwrap();
        check(&restored);
    }

    #[test]
    fn unused_ranges_are_left_out() {
        let memory = memory(memory::anonymous);
        fill(&memory);
        let file = tempfile::tempfile().unwrap();
        let used = [vec![(0, 4096)], vec![]];
        save_memory(&memory, &used, file.try_clone().unwrap().into()).unwrap();
        let mut byte = [1];
        file.read_exact_at(&mut byte, 5000).unwrap();
        assert_eq!(byte, [0]);
    }

    #[test]
    fn a_cut_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(REGION).unwrap();
        let ranges = [(0, REGION), (SECOND, REGION)];
        let error = map_memory(&ranges, &file.into()).err().unwrap();
        assert!(error.to_string().contains("memory file has 8388608 bytes"));
    }
}
