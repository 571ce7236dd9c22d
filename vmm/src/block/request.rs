//! What the driver asks for (virtio 1.2, 5.2.6).

use rustix::io::Errno;
use vm_memory::{ByteValued, GuestAddress};

use super::disk::{Disk, SECTOR};
use crate::{
    memory::GuestMemory,
    virtio::{Chain, ChainError},
};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;
const F_UNMAP: u32 = 1;

/// Most segments of a request, VIRTIO_BLK_F_SEG_MAX.
pub const MAX_SEGMENTS: u32 = 126;
/// Most bytes of a segment, VIRTIO_BLK_F_SIZE_MAX.
pub const MAX_SEGMENT_BYTES: u32 = 1 << 20;
/// Most sectors of a discard: 2 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Most sectors of a write of zeros, which may have to be written: 64 MiB.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 17;
/// Length of the answer to `VIRTIO_BLK_T_GET_ID`.
pub const ID_BYTES: usize = 20;

const MAX_DATA_BYTES: u64 = MAX_SEGMENTS as u64 * MAX_SEGMENT_BYTES as u64;

/// The last byte of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR.
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported = 2,
}

impl From<Errno> for Status {
    fn from(errno: Errno) -> Self {
        if errno == Errno::OPNOTSUPP {
            Self::Unsupported
        } else {
            Self::IoError
        }
    }
}

/// A request that makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Fill the writable part but its last byte.
    Read {
        /// First byte on the disk.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// Store the readable part behind the header.
    Write {
        /// First byte on the disk.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// Make all completed writes last.
    Flush,
    /// Give up contents and space.
    Discard {
        /// First byte on the disk.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// Make a range read as zeros.
    WriteZeroes {
        /// First byte on the disk.
        start: u64,
        /// Bytes.
        length: u64,
        /// Space may be given up.
        unmap: bool,
    },
    /// Tell the serial.
    GetId,
}

impl Request {
    /// Bytes that count against a rate limit.
    pub const fn cost(&self) -> u64 {
        match *self {
            Self::Read { length, .. } | Self::Write { length, .. } => length,
            _ => 0,
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

// SAFETY: plain integers without padding (4 + 4 + 8 bytes).
unsafe impl ByteValued for Header {}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

// SAFETY: plain integers without padding (8 + 4 + 4 bytes).
unsafe impl ByteValued for Range {}

/// Where the status byte goes: the last writable byte. None if nothing is writable.
pub fn status_address(chain: &Chain) -> Option<GuestAddress> {
    // Segments are at least a byte long and lie wholly in guest memory.
    chain
        .writable()
        .last()
        .map(|segment| GuestAddress(segment.address.0 + u64::from(segment.length) - 1))
}

/// Reads and checks a request that has a status byte.
///
/// # Errors
/// The status to answer with.
pub fn parse(
    chain: &Chain,
    memory: &GuestMemory,
    disk: &Disk,
    read_only: bool,
) -> Result<Request, Status> {
    let mut reader = chain.reader(memory);
    let header: Header = reader.read_object().map_err(broken)?;
    let (kind, sector) = (u32::from_le(header.kind), u64::from_le(header.sector));
    match kind {
        T_IN => {
            let (start, length) = data(disk, sector, chain.writable_bytes() - 1)?;
            Ok(Request::Read { start, length })
        }
        T_OUT | T_DISCARD | T_WRITE_ZEROES if read_only => Err(Status::IoError),
        T_OUT => {
            let (start, length) = data(disk, sector, chain.readable_bytes() - HEADER_BYTES)?;
            Ok(Request::Write { start, length })
        }
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID => Ok(Request::GetId),
        T_DISCARD | T_WRITE_ZEROES => {
            // One range is what the configuration space allows.
            if reader.remaining() != RANGE_BYTES {
                return Err(Status::IoError);
            }
            let range: Range = reader.read_object().map_err(broken)?;
            ranged(disk, kind, range)
        }
        _ => Err(Status::Unsupported),
    }
}

/// Data has whole sectors, all of them on the disk.
fn data(disk: &Disk, sector: u64, bytes: u64) -> Result<(u64, u64), Status> {
    if !bytes.is_multiple_of(SECTOR) || bytes > MAX_DATA_BYTES {
        return Err(Status::IoError);
    }
    disk.range(sector, bytes).ok_or(Status::IoError)
}

/// Discard and write zeroes: unknown flags, and unmap with discard, are unsupported (5.2.6.2).
fn ranged(disk: &Disk, kind: u32, range: Range) -> Result<Request, Status> {
    let (sectors, flags) = (u32::from_le(range.sectors), u32::from_le(range.flags));
    let (known, limit) = match kind {
        T_DISCARD => (0, MAX_DISCARD_SECTORS),
        _ => (F_UNMAP, MAX_WRITE_ZEROES_SECTORS),
    };
    if flags & !known != 0 {
        return Err(Status::Unsupported);
    }
    if sectors > limit {
        return Err(Status::IoError);
    }
    let bytes = u64::from(sectors) * SECTOR;
    let (start, length) = disk
        .range(u64::from_le(range.sector), bytes)
        .ok_or(Status::IoError)?;
    Ok(match kind {
        T_DISCARD => Request::Discard { start, length },
        _ => Request::WriteZeroes {
            start,
            length,
            unmap: flags & F_UNMAP != 0,
        },
    })
}

fn broken(error: ChainError) -> Status {
    log::debug!("block: {error}");
    Status::IoError
}
