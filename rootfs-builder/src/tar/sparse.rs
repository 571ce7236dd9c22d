//! Sparse files: the map of where stored data belongs.

use super::header::{RawHeader, segments};
use super::pax::digits;
use super::{Entry, Input, Reader, TarError};

/// A run of data in a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it belongs in the file, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

/// What a PAX header says about a sparse file.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    pub(super) major: Option<u64>,
    pub(super) minor: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) count: Option<u64>,
    pub(super) segments: Vec<Segment>,
    /// The offset of a segment whose length is still to come.
    offset: Option<u64>,
}

impl PaxSparse {
    pub(super) fn push_offset(&mut self, offset: u64) -> Result<(), String> {
        match self.offset.replace(offset) {
            None => Ok(()),
            Some(_) => Err("GNU.sparse.offset without GNU.sparse.numbytes".to_owned()),
        }
    }

    pub(super) fn push_length(&mut self, length: u64) -> Result<(), String> {
        let offset = self
            .offset
            .take()
            .ok_or("GNU.sparse.numbytes without GNU.sparse.offset")?;
        self.segments.push(Segment { offset, length });
        Ok(())
    }
}

impl<R: Input> Reader<R> {
    /// Finds out whether a file is sparse and, if so, reads its map and sets its logical size.
    pub(super) fn apply_sparse(
        &mut self,
        header: &RawHeader,
        pax: PaxSparse,
        entry: &mut Entry,
    ) -> Result<(), TarError> {
        let (size, segments) = if header.kind() == b'S' {
            let size = header
                .sparse_size()
                .map_err(|reason| self.malformed(reason))?;
            (size, self.read_old_map(header)?)
        } else {
            let version = (pax.major, pax.minor);
            // Formats 0.0 and 0.1 need not say which they are: they are told by their map.
            let segments = match version {
                (Some(1), Some(0)) => self.read_map()?,
                (Some(0), Some(0 | 1)) => pax.segments,
                (None, None) if pax.count.is_some() || !pax.segments.is_empty() => pax.segments,
                (None, None) => return Ok(()),
                _ => return Err(self.malformed(format!("unknown sparse format {version:?}"))),
            };
            if pax.offset.is_some()
                || pax
                    .count
                    .is_some_and(|count| count != segments.len() as u64)
            {
                return Err(
                    self.malformed("the sparse map has another length than announced".to_owned())
                );
            }
            let size = pax
                .size
                .ok_or_else(|| self.malformed("a sparse file without its real size".to_owned()))?;
            if let Some(name) = pax.name {
                entry.path = name;
            }
            (size, segments)
        };
        if segments.len() > self.bounds.sparse_segments {
            return Err(self.too_many());
        }
        let segments = check(segments, size, self.data_left)
            .map_err(|reason| self.malformed(reason.to_owned()))?;
        entry.size = size;
        entry.sparse = Some(segments);
        Ok(())
    }

    fn too_many(&self) -> TarError {
        self.limit(
            "number of segments of a sparse file",
            self.bounds.sparse_segments,
        )
    }

    /// The old GNU format: four segments in the header, the others in blocks behind it, which its size leaves out.
    fn read_old_map(&mut self, header: &RawHeader) -> Result<Vec<Segment>, TarError> {
        let mut map = header
            .sparse_segments()
            .map_err(|reason| self.malformed(reason))?;
        let mut more = header.sparse_is_extended();
        while more {
            let Some(block) = self.read_block()? else {
                return Err(TarError::Truncated {
                    offset: self.position,
                });
            };
            map.extend(segments(&block[..504]).map_err(|reason| self.malformed(reason))?);
            if map.len() > self.bounds.sparse_segments {
                return Err(self.too_many());
            }
            more = block[504] != 0;
        }
        Ok(map)
    }

    /// PAX format 1.0: lines of decimal numbers at the start of the data (a count, then offsets and lengths), padded
    /// to a whole block.
    fn read_map(&mut self) -> Result<Vec<Segment>, TarError> {
        let mut lines = Lines {
            block: [0; 512],
            position: 512,
        };
        let count = lines.next(self)?;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count > self.bounds.sparse_segments {
            return Err(self.too_many());
        }
        let mut map = Vec::new();
        for _ in 0..count {
            map.push(Segment {
                offset: lines.next(self)?,
                length: lines.next(self)?,
            });
        }
        Ok(map)
    }
}

/// The lines of a sparse map in blocks of data.
struct Lines {
    block: [u8; 512],
    position: usize,
}

impl Lines {
    fn next<R: Input>(&mut self, reader: &mut Reader<R>) -> Result<u64, TarError> {
        let mut line = Vec::new();
        loop {
            if self.position == self.block.len() {
                if reader.data_left < self.block.len() as u64 {
                    return Err(
                        reader.malformed("the sparse map is longer than the data".to_owned())
                    );
                }
                self.block = reader.read_data_block()?;
                self.position = 0;
            }
            let byte = self.block[self.position];
            self.position += 1;
            if byte == b'\n' {
                break;
            }
            line.push(byte);
            // 64 bits have 20 digits.
            if line.len() > 20 {
                return Err(reader.malformed("malformed sparse map".to_owned()));
            }
        }
        digits(&line).ok_or_else(|| reader.malformed("malformed sparse map".to_owned()))
    }
}

/// Checks that a map is ordered, disjoint, within the file and of as many bytes as are stored; drops empty segments.
fn check(mut segments: Vec<Segment>, size: u64, stored: u64) -> Result<Vec<Segment>, &'static str> {
    if i64::try_from(size).is_err() {
        return Err("the size of a sparse file does not fit 63 bits");
    }
    let mut end = 0u64;
    let mut total = 0u64;
    for segment in &segments {
        let segment_end = segment
            .offset
            .checked_add(segment.length)
            .filter(|&end| end <= size);
        let Some(segment_end) = segment_end else {
            return Err("a sparse segment lies beyond the end of its file");
        };
        if segment.offset < end {
            return Err("the segments of a sparse file overlap or are out of order");
        }
        end = segment_end;
        // Disjoint segments within the file: no overflow.
        total += segment.length;
    }
    if total != stored {
        return Err("the sparse map does not account for the data that is stored");
    }
    segments.retain(|segment| segment.length > 0);
    Ok(segments)
}
