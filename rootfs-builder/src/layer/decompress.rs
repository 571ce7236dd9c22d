//! Decompression of layers and archives, told by their first bytes as all runtimes do.

use std::io::{self, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

/// Bytes read from a compressed stream at once.
const BUFFER: usize = 128 << 10;

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// RFC 1952, possibly of several members (as pigz and eStargz write).
    Gzip,
    /// RFC 8878, possibly of several frames.
    Zstd,
}

impl Compression {
    /// Tells the compression from the first 6 bytes of a stream.
    ///
    /// # Errors
    /// A known compression that no image specification allows is named in the error.
    pub fn of(start: &[u8]) -> io::Result<Compression> {
        let unsupported = |name: &str| {
            let reason = format!("it is compressed by {name}, only gzip and zstd are supported");
            Err(io::Error::new(io::ErrorKind::Unsupported, reason))
        };
        if start.starts_with(&[0x1f, 0x8b]) {
            Ok(Compression::Gzip)
        } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || is_zstd_skippable(start) {
            Ok(Compression::Zstd)
        } else if start.starts_with(b"\xfd7zXZ\0") {
            unsupported("xz")
        } else if start.starts_with(b"BZh") {
            unsupported("bzip2")
        } else {
            Ok(Compression::None)
        }
    }
}

/// A skippable frame, which zstd:chunked may begin with (RFC 8878, section 3.1.2).
fn is_zstd_skippable(start: &[u8]) -> bool {
    matches!(start, [low, 0x2a, 0x4d, 0x18, ..] if low & 0xf0 == 0x50)
}

/// A reader of decompressed bytes.
pub struct Decoder<'a>(Box<dyn Read + 'a>);

impl<'a> Decoder<'a> {
    /// Looks at the start of `reader` and puts the right decoder before it.
    ///
    /// Memory is bounded: gzip's window is 32 KiB, and zstd windows above 128 MiB are refused.
    ///
    /// # Errors
    /// Those of reading, and an unsupported compression.
    pub fn detect(mut reader: impl Read + 'a) -> io::Result<Self> {
        let mut start = [0; 6];
        let known = read_start(&mut reader, &mut start)?;
        let compression = Compression::of(&start[..known])?;
        let whole = io::Cursor::new(start).take(known as u64).chain(reader);
        Ok(Decoder(match compression {
            Compression::None => Box::new(whole),
            Compression::Gzip => {
                Box::new(MultiGzDecoder::new(BufReader::with_capacity(BUFFER, whole)))
            }
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(
                    BufReader::with_capacity(BUFFER, whole),
                )?;
                decoder.window_log_max(27)?;
                Box::new(decoder)
            }
        }))
    }
}

impl Read for Decoder<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

/// Reads until `start` is full or the stream ends.
fn read_start(reader: &mut impl Read, start: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < start.len() {
        match reader.read(&mut start[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn decode(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Decoder::detect(bytes)?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn every_compression_round_trips() {
        let plain = b"caisson".repeat(1000);
        assert_eq!(decode(&plain).unwrap(), plain);
        assert_eq!(decode(&gzip(&plain)).unwrap(), plain);
        assert_eq!(
            decode(&zstd::encode_all(&plain[..], 3).unwrap()).unwrap(),
            plain
        );
        assert_eq!(decode(b"").unwrap(), b"");
        assert_eq!(decode(b"x").unwrap(), b"x");
    }

    #[test]
    fn several_members_are_one_stream() {
        let two = [gzip(b"one"), gzip(b"two")].concat();
        assert_eq!(decode(&two).unwrap(), b"onetwo");
        let mut frames = vec![0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
        frames.extend(zstd::encode_all(&b"one"[..], 3).unwrap());
        frames.extend(zstd::encode_all(&b"two"[..], 3).unwrap());
        assert_eq!(decode(&frames).unwrap(), b"onetwo");
    }

    #[test]
    fn truncated_and_damaged_streams_are_errors() {
        let plain: Vec<u8> = (0..40_000u32)
            .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
            .collect();
        for mut packed in [gzip(&plain), zstd::encode_all(&plain[..], 3).unwrap()] {
            assert!(decode(&packed[..packed.len() - 9]).is_err());
            assert!(decode(&packed[..packed.len() / 2]).is_err());
            let last = packed.len() - 6;
            packed.truncate(last);
            assert!(decode(&packed).is_err());
        }
        assert!(decode(&[gzip(b"one"), b"rubbish".to_vec()].concat()).is_err());
    }

    #[test]
    fn other_compressions_are_named() {
        assert!(
            decode(b"\xfd7zXZ\0\0\0")
                .unwrap_err()
                .to_string()
                .contains("xz")
        );
        assert!(
            decode(b"BZh91AY")
                .unwrap_err()
                .to_string()
                .contains("bzip2")
        );
    }
}
