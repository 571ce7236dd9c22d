//! One request of a driver: a checked descriptor chain, and cursors over its bytes.

use std::collections::TryReserveError;

use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::memory::GuestMemory;

/// A piece of guest memory that lies wholly in one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub address: GuestAddress,
    /// Bytes, at least 1.
    pub length: u32,
}

/// The right to complete one request, exactly once: [`super::ActiveQueue::complete`] consumes it.
///
/// It carries the chain's storage back to the queue, so that a request costs no allocation.
#[derive(Debug)]
pub struct Head {
    pub(super) index: u16,
    pub(super) segments: Vec<Segment>,
}

impl Head {
    /// Index of the chain's first descriptor: unique among the requests in flight of one queue,
    /// below the queue's size.
    pub fn index(&self) -> u16 {
        self.index
    }
}

/// One request: readable segments, then writable ones, all checked to lie in guest memory.
#[derive(Debug)]
pub struct Chain {
    pub(super) head: Head,
    /// Number of readable segments.
    pub(super) readable: usize,
    pub(super) readable_bytes: u64,
    pub(super) writable_bytes: u64,
}

impl Chain {
    /// As [`Head::index`].
    pub fn index(&self) -> u16 {
        self.head.index
    }

    /// Gives up the segments for the right to complete.
    pub fn into_head(self) -> Head {
        self.head
    }

    /// What the device may read.
    pub fn readable(&self) -> &[Segment] {
        &self.head.segments[..self.readable]
    }

    /// What the device may write.
    pub fn writable(&self) -> &[Segment] {
        &self.head.segments[self.readable..]
    }

    /// Bytes the device may read.
    pub fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    /// Bytes the device may write.
    pub fn writable_bytes(&self) -> u64 {
        self.writable_bytes
    }

    /// A cursor at the start of the readable part.
    pub fn reader<'a>(&'a self, memory: &'a GuestMemory) -> Reader<'a> {
        Reader(Cursor {
            memory,
            segments: self.readable(),
            offset: 0,
            remaining: self.readable_bytes,
        })
    }

    /// A cursor at the start of the writable part.
    pub fn writer<'a>(&'a self, memory: &'a GuestMemory) -> Writer<'a> {
        Writer {
            cursor: Cursor {
                memory,
                segments: self.writable(),
                offset: 0,
                remaining: self.writable_bytes,
            },
            written: 0,
        }
    }
}

/// A request does not hold what its kind requires.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// Fewer bytes than needed.
    #[error("{wanted} bytes wanted, {left} left")]
    TooShort {
        /// Bytes needed.
        wanted: u64,
        /// Bytes there are.
        left: u64,
    },
    /// Guest memory could not be reached.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// No memory for a list of slices.
    #[error("out of memory: {0}")]
    Allocation(#[from] TryReserveError),
}

#[derive(Clone, Copy)]
struct Cursor<'a> {
    memory: &'a GuestMemory,
    segments: &'a [Segment],
    /// Bytes of the first segment already consumed.
    offset: u32,
    remaining: u64,
}

impl<'a> Cursor<'a> {
    fn need(&self, wanted: u64) -> Result<(), ChainError> {
        if wanted > self.remaining {
            return Err(ChainError::TooShort {
                wanted,
                left: self.remaining,
            });
        }
        Ok(())
    }

    /// The next contiguous piece of at most `limit` bytes.
    fn next(&mut self, limit: u64) -> Result<Option<VolatileSlice<'a>>, ChainError> {
        let Some((first, rest)) = self.segments.split_first() else {
            return Ok(None);
        };
        if limit == 0 {
            return Ok(None);
        }
        let left = first.length - self.offset;
        // Not more than a u32, which `left` is.
        let count = u64::from(left).min(limit) as u32;
        let address = GuestAddress(first.address.0 + u64::from(self.offset));
        let slice = self.memory.get_slice(address, count as usize)?;
        self.remaining -= u64::from(count);
        if count == left {
            self.segments = rest;
            self.offset = 0;
        } else {
            self.offset += count;
        }
        Ok(Some(slice))
    }

    fn skip(&mut self, count: u64) -> Result<(), ChainError> {
        self.need(count)?;
        let mut left = count;
        while left > 0
            && let Some(slice) = self.next(left)?
        {
            left -= slice.len() as u64;
        }
        Ok(())
    }

    fn split_off(&mut self, count: u64) -> Result<Self, ChainError> {
        self.need(count)?;
        let mut front = *self;
        front.remaining = count;
        self.skip(count)?;
        Ok(front)
    }

    fn slices(
        &mut self,
        count: u64,
        slices: &mut Vec<VolatileSlice<'a>>,
    ) -> Result<(), ChainError> {
        self.need(count)?;
        let mut left = count;
        while left > 0
            && let Some(slice) = self.next(left)?
        {
            slices.try_reserve(1)?;
            left -= slice.len() as u64;
            slices.push(slice);
        }
        Ok(())
    }
}

/// Reads the readable part of a [`Chain`] from front to back.
#[derive(Clone)]
pub struct Reader<'a>(Cursor<'a>);

impl<'a> Reader<'a> {
    /// Bytes not yet consumed.
    pub fn remaining(&self) -> u64 {
        self.0.remaining
    }

    /// Fills `buffer`.
    ///
    /// # Errors
    /// [`ChainError::TooShort`]; nothing is consumed then.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<(), ChainError> {
        self.0.need(buffer.len() as u64)?;
        let mut rest = buffer;
        while !rest.is_empty()
            && let Some(slice) = self.0.next(rest.len() as u64)?
        {
            let count = slice.copy_to(rest);
            rest = &mut rest[count..];
        }
        Ok(())
    }

    /// Reads a plain object.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub fn read_object<T: ByteValued + Default>(&mut self) -> Result<T, ChainError> {
        let mut object = T::default();
        self.read(object.as_mut_slice())?;
        Ok(object)
    }

    /// Consumes `count` bytes unread.
    ///
    /// # Errors
    /// [`ChainError::TooShort`].
    pub fn skip(&mut self, count: u64) -> Result<(), ChainError> {
        self.0.skip(count)
    }

    /// A cursor over the next `count` bytes only; `self` goes on behind them.
    ///
    /// # Errors
    /// [`ChainError::TooShort`].
    pub fn split_off(&mut self, count: u64) -> Result<Self, ChainError> {
        Ok(Self(self.0.split_off(count)?))
    }

    /// Appends slices over the next `count` bytes and consumes them: for reading guest memory
    /// without a copy. They stay valid as long as the memory (hold a clone of it when pointers
    /// outlive this borrow), and the guest may change their bytes at any time.
    ///
    /// # Errors
    /// [`ChainError::TooShort`].
    pub fn slices(
        &mut self,
        count: u64,
        slices: &mut Vec<VolatileSlice<'a>>,
    ) -> Result<(), ChainError> {
        self.0.slices(count, slices)
    }
}

/// Fills the writable part of a [`Chain`] from front to back.
#[derive(Clone)]
pub struct Writer<'a> {
    cursor: Cursor<'a>,
    written: u32,
}

impl<'a> Writer<'a> {
    /// Bytes not yet filled.
    pub fn remaining(&self) -> u64 {
        self.cursor.remaining
    }

    /// Bytes filled or skipped so far, as [`super::ActiveQueue::complete`] wants them.
    pub fn written(&self) -> u32 {
        self.written
    }

    /// Stores all of `bytes`.
    ///
    /// # Errors
    /// [`ChainError::TooShort`]; nothing is written then.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ChainError> {
        self.cursor.need(bytes.len() as u64)?;
        let mut rest = bytes;
        while !rest.is_empty()
            && let Some(slice) = self.cursor.next(rest.len() as u64)?
        {
            let (front, back) = rest.split_at(slice.len());
            slice.copy_from(front);
            rest = back;
        }
        self.advance(bytes.len() as u64);
        Ok(())
    }

    /// Stores a plain object.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn write_object<T: ByteValued>(&mut self, object: T) -> Result<(), ChainError> {
        self.write(object.as_slice())
    }

    /// Leaves `count` bytes as they are (something else fills them), and counts them as written.
    ///
    /// # Errors
    /// [`ChainError::TooShort`].
    pub fn skip(&mut self, count: u64) -> Result<(), ChainError> {
        self.cursor.skip(count)?;
        self.advance(count);
        Ok(())
    }

    /// A cursor over the next `count` bytes only, with a count of its own; `self` goes on behind
    /// them and counts them as written.
    ///
    /// # Errors
    /// [`ChainError::TooShort`].
    pub fn split_off(&mut self, count: u64) -> Result<Self, ChainError> {
        let cursor = self.cursor.split_off(count)?;
        self.advance(count);
        Ok(Self { cursor, written: 0 })
    }

    /// As [`Reader::slices`], for filling guest memory without a copy; counted as written.
    ///
    /// # Errors
    /// [`ChainError::TooShort`].
    pub fn slices(
        &mut self,
        count: u64,
        slices: &mut Vec<VolatileSlice<'a>>,
    ) -> Result<(), ChainError> {
        self.cursor.slices(count, slices)?;
        self.advance(count);
        Ok(())
    }

    fn advance(&mut self, count: u64) {
        // A chain is at most MAX_CHAIN_BYTES long, so this never saturates.
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.written = self.written.saturating_add(count);
    }
}
