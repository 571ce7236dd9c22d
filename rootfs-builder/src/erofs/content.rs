//! Streams the data of files into the image.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use super::ErofsError;
use super::format::{BLOCK, NULL_ADDRESS};
use crate::tar::Segment;

/// Files up to this long, in bytes, are kept behind their inode. Longer ones get whole blocks: that costs half a block
/// on average and makes them mappable by DAX.
const INLINE_MAX: u64 = 2048;
/// Files up to this long, in bytes, have one chunk: they are a hole or have none.
const ONE_CHUNK: u64 = 1 << 20;
/// Shortest chunk of longer files: shorter holes than this are left to the sparseness of the image file itself.
const MIN_CHUNK: u64 = 64 << 10;
/// Most chunks of one file: their table takes 4 bytes each.
const MAX_CHUNKS: u64 = 16 << 10;
/// Bytes moved at once.
const BUFFER: usize = 256 << 10;

/// Where the data of a file is.
#[derive(Debug, PartialEq, Eq)]
pub struct Content(pub(super) Place);

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    Empty,
    /// In the spool, to be put behind the inode.
    Spooled {
        offset: u64,
        size: u64,
    },
    /// In consecutive blocks.
    Flat {
        block: u32,
        size: u64,
    },
    /// In chunks of `BLOCK << bits` bytes, each of consecutive blocks or [`NULL_ADDRESS`].
    Chunked {
        size: u64,
        bits: u32,
        blocks: Box<[u32]>,
    },
}

impl Content {
    /// Bytes that this takes in memory beside itself.
    pub fn table_bytes(&self) -> usize {
        match &self.0 {
            Place::Chunked { blocks, .. } => size_of_val::<[u32]>(blocks),
            _ => 0,
        }
    }
}

/// Writes data into an image; [`ContentWriter::finish`] adds everything else.
#[derive(Debug)]
pub struct ContentWriter<'a> {
    pub(super) image: &'a File,
    /// Small files, until their inode is written.
    pub(super) spool: File,
    spooled: u64,
    /// The first block that is free.
    pub(super) next_block: u64,
    buffer: Vec<u8>,
}

impl<'a> ContentWriter<'a> {
    /// Starts an image in an empty file; `spool` is an empty file for passing use.
    pub fn new(image: &'a File, spool: File) -> Self {
        ContentWriter {
            image,
            spool,
            spooled: 0,
            next_block: 1,
            buffer: vec![0; BUFFER],
        }
    }

    /// The file that the image is written to.
    pub fn image(&self) -> &'a File {
        self.image
    }

    /// Writes a whole file of `size` bytes.
    ///
    /// # Errors
    /// [`ErofsError::Read`] when `data` fails or is shorter, else those of writing.
    pub fn file(&mut self, size: u64, data: &mut dyn Read) -> Result<Content, ErofsError> {
        self.sparse_file(
            size,
            &[Segment {
                offset: 0,
                length: size,
            }],
            data,
        )
    }

    /// Writes a file of `size` bytes of which only `segments` are not holes: ordered, disjoint and within `size`.
    /// `data` gives their bytes one after the other.
    ///
    /// # Errors
    /// As [`ContentWriter::file`].
    pub fn sparse_file(
        &mut self,
        size: u64,
        segments: &[Segment],
        data: &mut dyn Read,
    ) -> Result<Content, ErofsError> {
        if size == 0 {
            return Ok(Content(Place::Empty));
        }
        if size <= INLINE_MAX {
            return self.spool(size, segments, data);
        }
        let mut chunks = Chunks::new(self.image, size, self.next_block);
        let mut buffer = std::mem::take(&mut self.buffer);
        let written = write_segments(&mut chunks, segments, data, &mut buffer);
        self.buffer = buffer;
        written?;
        chunks.zeros(size - chunks.position)?;
        self.next_block = chunks.next_block;
        Ok(chunks.finish())
    }

    fn spool(
        &mut self,
        size: u64,
        segments: &[Segment],
        data: &mut dyn Read,
    ) -> Result<Content, ErofsError> {
        let mut content = [0; INLINE_MAX as usize];
        for segment in segments {
            // Both are within `size`, which is within the array.
            let (start, end) = (
                segment.offset as usize,
                (segment.offset + segment.length) as usize,
            );
            data.read_exact(&mut content[start..end])
                .map_err(ErofsError::Read)?;
        }
        let offset = self.spooled;
        self.spool
            .write_all_at(&content[..size as usize], offset)
            .map_err(ErofsError::Write)?;
        self.spooled += size;
        Ok(Content(Place::Spooled { offset, size }))
    }
}

fn write_segments(
    chunks: &mut Chunks<'_>,
    segments: &[Segment],
    data: &mut dyn Read,
    buffer: &mut [u8],
) -> Result<(), ErofsError> {
    for segment in segments {
        chunks.zeros(segment.offset - chunks.position)?;
        let mut left = segment.length;
        while left > 0 {
            // To the end of a block, so that whole blocks of zeros are seen.
            let room = BUFFER as u64 - chunks.position % BLOCK;
            let length = room.min(left) as usize;
            data.read_exact(&mut buffer[..length])
                .map_err(ErofsError::Read)?;
            chunks.data(&buffer[..length])?;
            left -= length as u64;
        }
    }
    Ok(())
}

/// A file on its way into the image, chunk by chunk.
struct Chunks<'a> {
    image: &'a File,
    size: u64,
    /// Length of a chunk in bytes, a power of two.
    chunk: u64,
    /// Bytes of the file done.
    position: u64,
    /// The block at which the current chunk begins if it gets any data, and the next one else.
    next_block: u64,
    /// Whether the current chunk has data.
    has_data: bool,
    blocks: Vec<u32>,
}

impl<'a> Chunks<'a> {
    fn new(image: &'a File, size: u64, next_block: u64) -> Self {
        let chunk = match size {
            0..=ONE_CHUNK => ONE_CHUNK,
            _ => size.div_ceil(MAX_CHUNKS).next_power_of_two().max(MIN_CHUNK),
        };
        Chunks {
            image,
            size,
            chunk,
            position: 0,
            next_block,
            has_data: false,
            blocks: Vec::new(),
        }
    }

    /// Adds zeros.
    fn zeros(&mut self, mut count: u64) -> Result<(), ErofsError> {
        while count > 0 {
            let step = count.min(self.left_in_chunk());
            self.advance(step)?;
            count -= step;
        }
        Ok(())
    }

    /// Adds data; blocks of zeros in it are not written.
    fn data(&mut self, mut data: &[u8]) -> Result<(), ErofsError> {
        while !data.is_empty() {
            let step = (data.len() as u64).min(self.left_in_chunk());
            let (now, later) = data.split_at(step as usize);
            self.write(now)?;
            self.advance(step)?;
            data = later;
        }
        Ok(())
    }

    fn left_in_chunk(&self) -> u64 {
        (self.chunk - self.position % self.chunk).min(self.size - self.position)
    }

    /// Writes what is not zero of data within the current chunk.
    fn write(&mut self, data: &[u8]) -> Result<(), ErofsError> {
        let start = self.next_block * BLOCK + self.position % self.chunk;
        let first_block = (BLOCK - start % BLOCK) as usize;
        // Runs of blocks that are all zeros or all not.
        let mut run = 0;
        let mut at = 0;
        while at < data.len() {
            let end = if at == 0 {
                first_block
            } else {
                at + BLOCK as usize
            }
            .min(data.len());
            if is_zero(&data[at..end]) {
                self.write_at(&data[run..at], start + run as u64)?;
                run = end;
            }
            at = end;
        }
        self.write_at(&data[run..], start + run as u64)
    }

    fn write_at(&mut self, data: &[u8], offset: u64) -> Result<(), ErofsError> {
        if data.is_empty() {
            return Ok(());
        }
        // Before it is tried: file systems have limits of their own near this one.
        if offset + data.len() as u64 > u64::from(NULL_ADDRESS) * BLOCK {
            return Err(ErofsError::TooLarge);
        }
        self.has_data = true;
        self.image
            .write_all_at(data, offset)
            .map_err(ErofsError::Write)
    }

    /// Moves on within the current chunk, and closes it at its end.
    fn advance(&mut self, count: u64) -> Result<(), ErofsError> {
        self.position += count;
        if self.position.is_multiple_of(self.chunk) || self.position == self.size {
            let length = (self.position - 1) % self.chunk + 1;
            let block = self.next_block;
            let after = block + length.div_ceil(BLOCK);
            if after >= u64::from(NULL_ADDRESS) {
                return Err(ErofsError::TooLarge);
            }
            if self.has_data {
                self.blocks.push(block as u32);
                self.next_block = after;
            } else {
                self.blocks.push(NULL_ADDRESS);
            }
            self.has_data = false;
        }
        Ok(())
    }

    fn finish(self) -> Content {
        let has_holes = self.blocks.contains(&NULL_ADDRESS);
        Content(match self.blocks.first() {
            // Without holes the chunks follow each other.
            Some(&block) if !has_holes => Place::Flat {
                block,
                size: self.size,
            },
            _ => Place::Chunked {
                size: self.size,
                bits: (self.chunk / BLOCK).trailing_zeros(),
                blocks: self.blocks.into_boxed_slice(),
            },
        })
    }
}

/// Whether all bytes are zero; looks at eight at a time.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().all(|word| u64::from_ne_bytes(*word) == 0) && rest.iter().all(|&byte| byte == 0)
}

/// Reads at an offset as `Read` does.
pub(super) struct At<'a> {
    pub(super) file: &'a File,
    pub(super) offset: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}
