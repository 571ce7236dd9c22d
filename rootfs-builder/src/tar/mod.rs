//! A streaming tar reader for hostile input.
//!
//! Formats: v7, POSIX ustar and pax (POSIX.1-2017, `pax`, "ustar Interchange Format" and "pax Extended Header"),
//! GNU (tar manual, "Basic Tar Format") with long names, base-256 numbers and sparse files, the PAX sparse formats
//! 0.0, 0.1 and 1.0 (tar manual, "Storing Sparse Files"), and star's `SCHILY.xattr.` attributes. Where archives can
//! be read in two ways we read them as Go's `archive/tar` does, because what builds and scans images is written in Go.
//!
//! The widely used `tar` crate (0.4.46) was considered: it reads GNU long names of any length into memory,
//! and does not know the PAX sparse formats.
//!
//! Memory is bounded by [`Bounds`], whatever the archive says.

mod header;
mod pax;
mod sparse;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use crate::limits::Limits;
use header::{BLOCK, RawHeader};
use pax::Pax;
pub use sparse::Segment;

/// What a reader may hold in memory.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes of one extended header or GNU long name.
    pub extended_header_bytes: usize,
    /// Segments of one sparse file.
    pub sparse_segments: usize,
}

impl From<&Limits> for Bounds {
    fn from(limits: &Limits) -> Self {
        Bounds {
            extended_header_bytes: limits.extended_header_bytes,
            sparse_segments: limits.sparse_segments,
        }
    }
}

/// Why an archive cannot be read. Offsets are bytes from its start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TarError {
    /// Reading failed.
    #[error("cannot read: {0}")]
    Io(#[from] io::Error),
    /// The stream ends within an entry.
    #[error("the tar archive is cut off at offset {offset}")]
    Truncated {
        /// Where the stream ended.
        offset: u64,
    },
    /// A block that must be a header has no valid checksum.
    #[error("not a tar header at offset {offset}: wrong checksum")]
    Checksum {
        /// Where the block is.
        offset: u64,
    },
    /// A header's field is malformed.
    #[error("tar header at offset {offset}: {reason}")]
    Header {
        /// Where the header is.
        offset: u64,
        /// Which field, and what is wrong with it.
        reason: String,
    },
    /// An entry of a type that an image layer cannot have.
    #[error("tar entry {path:?} at offset {offset} has the unsupported type {kind:?}")]
    UnknownType {
        /// Where its header is.
        offset: u64,
        /// The type flag.
        kind: char,
        /// The entry's path.
        path: String,
    },
    /// One of [`Bounds`] is exceeded.
    #[error("tar header at offset {offset}: {what} exceeds the limit of {limit}")]
    Limit {
        /// Where the header is.
        offset: u64,
        /// What was counted.
        what: &'static str,
        /// The largest value allowed.
        limit: usize,
    },
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A further name of an entry that came before.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// A point in time since 1970-01-01 00:00 UTC.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timestamp {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// Nanoseconds on top, below 1,000,000,000.
    pub nanoseconds: u32,
}

/// One entry, with everything that extended headers say of it applied.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// The path as it stands in the archive: not checked in any way, but without a NUL.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission, setuid, setgid and sticky bits (`& 0o7777`).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Logical length of a regular file in bytes, 0 for anything else.
    pub size: u64,
    /// Target of a hard or symbolic link.
    pub link: Vec<u8>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes: full name and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the data of a sparse file belongs: ordered, disjoint, within `size`, not empty segments.
    /// [`Reader::read`] gives their data one after the other. `None` when the file is stored whole.
    pub sparse: Option<Vec<Segment>>,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("path", &String::from_utf8_lossy(&self.path))
            .field("kind", &self.kind)
            .field("mode", &format_args!("{:o}", self.mode))
            .field("owner", &(self.uid, self.gid))
            .field("mtime", &self.mtime)
            .field("size", &self.size)
            .field("link", &String::from_utf8_lossy(&self.link))
            .field("device", &self.device)
            .field("xattrs", &self.xattrs.len())
            .field("sparse", &self.sparse.as_ref().map(Vec::len))
            .finish()
    }
}

/// A stream that can pass over bytes.
pub trait Input: Read {
    /// Passes over `count` bytes; a stream that is shorter may be found out only when it is read again.
    ///
    /// # Errors
    /// Those of reading or seeking.
    fn skip(&mut self, count: u64) -> io::Result<()>;
}

/// An [`Input`] that reads what it passes over.
#[derive(Debug)]
pub struct Streamed<R>(pub R);

impl<R: Read> Read for Streamed<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl<R: Read> Input for Streamed<R> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let skipped = io::copy(&mut self.0.by_ref().take(count), &mut io::sink())?;
        if skipped < count {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }
}

/// An [`Input`] that seeks over what it passes over.
#[derive(Debug)]
pub struct Seekable<'a>(&'a File);

impl<'a> Seekable<'a> {
    /// Reads `file` from its current position.
    pub fn new(file: &'a File) -> Self {
        Seekable(file)
    }
}

impl Read for Seekable<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        (&mut &*self.0).read(buf)
    }
}

impl Input for Seekable<'_> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let offset = i64::try_from(count).map_err(|_| io::ErrorKind::InvalidInput)?;
        (&mut &*self.0).seek(SeekFrom::Current(offset)).map(drop)
    }
}

/// Reads the entries of an archive in order.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    bounds: Bounds,
    /// Bytes of the archive consumed.
    position: u64,
    /// Bytes of the current entry's stored data not yet consumed.
    data_left: u64,
    /// Bytes from the end of that data to the next header.
    padding: u64,
    done: bool,
}

impl<R: Input> Reader<R> {
    /// Starts at the input's current position, which counts as offset 0.
    pub fn new(input: R, bounds: Bounds) -> Self {
        Reader {
            input,
            bounds,
            position: 0,
            data_left: 0,
            padding: 0,
            done: false,
        }
    }

    /// Bytes of the archive consumed so far. Right after [`Reader::next_entry`]: where the entry's data begins.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The input, behind the last byte that was read.
    pub fn into_inner(self) -> R {
        self.input
    }

    /// Passes over what is left of the current entry and reads the next one; `None` at the archive's end.
    ///
    /// # Errors
    /// Any [`TarError`]; reading on after one is not useful.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut pax = Pax::default();
        let mut long_name = None;
        let mut long_link = None;
        loop {
            let Some(header) = self.next_header()? else {
                return Ok(None);
            };
            match header.kind() {
                b'x' => {
                    pax = Pax::parse(&self.read_extension(&header)?)
                        .map_err(|reason| self.malformed(reason))?
                }
                // Global headers carry comments in practice; what they would change is ignored, as Go does.
                b'g' => drop(self.read_extension(&header)?),
                b'L' => long_name = Some(until_nul(self.read_extension(&header)?)),
                b'K' => long_link = Some(until_nul(self.read_extension(&header)?)),
                _ => return self.entry(&header, pax, long_name, long_link).map(Some),
            }
        }
    }

    /// Reads stored data of the current entry; 0 bytes at its end.
    ///
    /// # Errors
    /// Those of reading; an archive that ends here is `UnexpectedEof`.
    pub fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let length = buf
            .len()
            .min(usize::try_from(self.data_left).unwrap_or(usize::MAX));
        if length == 0 {
            return Ok(0);
        }
        let n = self.input.read(&mut buf[..length])?;
        if n == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the tar archive is cut off",
            ));
        }
        self.data_left -= n as u64;
        self.position += n as u64;
        Ok(n)
    }

    fn malformed(&self, reason: String) -> TarError {
        TarError::Header {
            offset: self.position,
            reason,
        }
    }

    fn limit(&self, what: &'static str, limit: usize) -> TarError {
        TarError::Limit {
            offset: self.position,
            what,
            limit,
        }
    }

    /// The next header block, `None` at the end mark or at the end of the stream.
    fn next_header(&mut self) -> Result<Option<RawHeader>, TarError> {
        if self.done {
            return Ok(None);
        }
        let rest = self.data_left.saturating_add(self.padding);
        if rest > 0 {
            self.skip(rest)?;
        }
        (self.data_left, self.padding) = (0, 0);
        let Some(block) = self.read_block()? else {
            self.done = true;
            return Ok(None);
        };
        if block.iter().all(|&byte| byte == 0) {
            // The end mark is two blocks of zeros, of which the second may be missing.
            self.done = true;
            return match self.read_block()? {
                Some(second) if second.iter().any(|&byte| byte != 0) => {
                    Err(self.malformed("a block of zeros is followed by something else".to_owned()))
                }
                _ => Ok(None),
            };
        }
        let header = RawHeader::new(block);
        if !header.checksum_is_valid() {
            return Err(TarError::Checksum {
                offset: self.position - BLOCK as u64,
            });
        }
        Ok(Some(header))
    }

    /// Announces `size` bytes of data behind the header just read.
    fn set_data(&mut self, size: u64) {
        self.data_left = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    /// A whole block, `None` when the stream ends right before it.
    fn read_block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut done = 0;
        while done < BLOCK {
            match self.input.read(&mut block[done..]) {
                Ok(0) if done == 0 => return Ok(None),
                Ok(0) => {
                    return Err(TarError::Truncated {
                        offset: self.position,
                    });
                }
                Ok(n) => {
                    done += n;
                    self.position += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(block))
    }

    fn skip(&mut self, count: u64) -> Result<(), TarError> {
        self.input.skip(count).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => TarError::Truncated {
                offset: self.position,
            },
            _ => error.into(),
        })?;
        self.position = self.position.saturating_add(count);
        Ok(())
    }

    /// Reads a block of the current entry's data (its last one may be cut short by padding).
    fn read_data_block(&mut self) -> Result<[u8; BLOCK], TarError> {
        let block = self.read_block()?.ok_or(TarError::Truncated {
            offset: self.position,
        })?;
        self.data_left = self.data_left.saturating_sub(BLOCK as u64);
        Ok(block)
    }

    /// The content of an extended header or long name.
    fn read_extension(&mut self, header: &RawHeader) -> Result<Vec<u8>, TarError> {
        let size = header.size().map_err(|reason| self.malformed(reason))?;
        let limit = self.bounds.extended_header_bytes;
        let length = usize::try_from(size)
            .ok()
            .filter(|&length| length <= limit)
            .ok_or_else(|| self.limit("length of an extended header in bytes", limit))?;
        self.set_data(size);
        let mut content = vec![0; length];
        let mut done = 0;
        while done < length {
            match self.read(&mut content[done..]) {
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(TarError::Truncated {
                        offset: self.position,
                    });
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(content)
    }

    fn entry(
        &mut self,
        header: &RawHeader,
        pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, TarError> {
        let offset = self.position - BLOCK as u64;
        let at = |reason| TarError::Header { offset, reason };
        let path = long_name.or(pax.path).unwrap_or_else(|| header.path());
        let link = long_link.or(pax.link).unwrap_or_else(|| header.link());
        let kind = entry_kind(header, &path).ok_or_else(|| TarError::UnknownType {
            offset,
            kind: char::from(header.kind()),
            path: String::from_utf8_lossy(&path).chars().take(300).collect(),
        })?;
        // Whatever the size field of anything but a file says, no data follows.
        let stored = match (kind, pax.size) {
            (EntryKind::File, Some(size)) => size,
            (EntryKind::File, None) => header.size().map_err(at)?,
            _ => 0,
        };
        self.set_data(stored);
        let device = match kind {
            EntryKind::CharDevice | EntryKind::BlockDevice => header.device().map_err(at)?,
            _ => (0, 0),
        };
        let mut entry = Entry {
            path,
            kind,
            mode: header.mode().map_err(at)?,
            uid: pax.uid.map_or_else(|| header.uid(), Ok).map_err(at)?,
            gid: pax.gid.map_or_else(|| header.gid(), Ok).map_err(at)?,
            mtime: pax.mtime.map_or_else(|| header.mtime(), Ok).map_err(at)?,
            size: stored,
            link,
            device,
            xattrs: pax.xattrs,
            sparse: None,
        };
        if kind == EntryKind::File {
            self.apply_sparse(header, pax.sparse, &mut entry)?;
        }
        if entry.path.contains(&0) || entry.link.contains(&0) {
            return Err(at("a path has a NUL byte".to_owned()));
        }
        Ok(entry)
    }
}

/// The kind of an entry by its type flag; the flag of v7 files is used for directories too.
fn entry_kind(header: &RawHeader, path: &[u8]) -> Option<EntryKind> {
    match header.kind() {
        0 if path.ends_with(b"/") => Some(EntryKind::Directory),
        0 | b'0' | b'7' | b'S' => Some(EntryKind::File),
        b'1' => Some(EntryKind::HardLink),
        b'2' => Some(EntryKind::Symlink),
        b'3' => Some(EntryKind::CharDevice),
        b'4' => Some(EntryKind::BlockDevice),
        b'5' => Some(EntryKind::Directory),
        b'6' => Some(EntryKind::Fifo),
        _ => None,
    }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|&byte| byte == 0) {
        bytes.truncate(end);
    }
    bytes
}
