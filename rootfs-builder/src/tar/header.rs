//! The 512-byte header block.

use super::Timestamp;
use super::sparse::Segment;

/// Everything in an archive is a multiple of this long, in bytes.
pub(super) const BLOCK: usize = 512;

/// A header block and its fields.
#[derive(Debug, Clone)]
pub(super) struct RawHeader([u8; BLOCK]);

/// The flavours that differ in where fields are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl RawHeader {
    pub(super) fn new(block: [u8; BLOCK]) -> Self {
        RawHeader(block)
    }

    fn format(&self) -> Format {
        match (&self.0[257..263], &self.0[263..265], &self.0[508..512]) {
            (b"ustar\0", _, b"tar\0") => Format::Star,
            (b"ustar\0", _, _) => Format::Ustar,
            (b"ustar ", b" \0", _) => Format::Gnu,
            _ => Format::V7,
        }
    }

    /// The sum of all bytes, its own field counting as spaces; some old writers summed signed bytes.
    pub(super) fn checksum_is_valid(&self) -> bool {
        let Ok(expected) = number(&self.0[148..156]) else {
            return false;
        };
        let counted = || {
            self.0
                .iter()
                .enumerate()
                .map(|(i, &byte)| if (148..156).contains(&i) { b' ' } else { byte })
        };
        let unsigned: i64 = counted().map(i64::from).sum();
        let signed: i64 = counted().map(|byte| i64::from(byte.cast_signed())).sum();
        expected == unsigned || expected == signed
    }

    /// The type flag.
    pub(super) fn kind(&self) -> u8 {
        self.0[156]
    }

    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = match self.format() {
            Format::Ustar => text(&self.0[345..500]),
            Format::Star => text(&self.0[345..476]),
            Format::V7 | Format::Gnu => b"",
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.0[157..257]).to_vec()
    }

    pub(super) fn mode(&self) -> Result<u32, String> {
        let mode = number(&self.0[100..108]).map_err(|reason| format!("mode: {reason}"))?;
        // Only the low bits mean anything; some writers add the file type.
        Ok((mode & 0o7777) as u32)
    }

    pub(super) fn uid(&self) -> Result<u32, String> {
        owner("uid", number(&self.0[108..116]))
    }

    pub(super) fn gid(&self) -> Result<u32, String> {
        owner("gid", number(&self.0[116..124]))
    }

    /// Length of the data behind the header, in bytes.
    pub(super) fn size(&self) -> Result<u64, String> {
        let size = number(&self.0[124..136]).map_err(|reason| format!("size: {reason}"))?;
        u64::try_from(size).map_err(|_| format!("size: {size} is negative"))
    }

    pub(super) fn mtime(&self) -> Result<Timestamp, String> {
        let seconds = number(&self.0[136..148]).map_err(|reason| format!("mtime: {reason}"))?;
        Ok(Timestamp {
            seconds,
            nanoseconds: 0,
        })
    }

    pub(super) fn device(&self) -> Result<(u32, u32), String> {
        let part = |name: &str, field: &[u8]| {
            let value = number(field).map_err(|reason| format!("{name}: {reason}"))?;
            u32::try_from(value).map_err(|_| format!("{name}: {value} is out of range"))
        };
        if self.format() == Format::V7 {
            return Err("a device without a device number".to_owned());
        }
        Ok((
            part("devmajor", &self.0[329..337])?,
            part("devminor", &self.0[337..345])?,
        ))
    }

    /// The first part of an old GNU sparse map.
    pub(super) fn sparse_segments(&self) -> Result<Vec<Segment>, String> {
        segments(&self.0[386..482])
    }

    /// Whether blocks with more of the sparse map follow the header.
    pub(super) fn sparse_is_extended(&self) -> bool {
        self.0[482] != 0
    }

    /// Logical length of an old GNU sparse file, in bytes.
    pub(super) fn sparse_size(&self) -> Result<u64, String> {
        let size = number(&self.0[483..495]).map_err(|reason| format!("realsize: {reason}"))?;
        u64::try_from(size).map_err(|_| format!("realsize: {size} is negative"))
    }
}

/// The segments in a part of an old GNU sparse map: pairs of 12-byte numbers, ended by an empty one.
pub(super) fn segments(area: &[u8]) -> Result<Vec<Segment>, String> {
    let mut segments = Vec::new();
    for pair in area.chunks_exact(24) {
        if pair[0] == 0 {
            break;
        }
        let value = |field: &[u8]| {
            let value = number(field).map_err(|reason| format!("sparse map: {reason}"))?;
            u64::try_from(value).map_err(|_| format!("sparse map: {value} is negative"))
        };
        segments.push(Segment {
            offset: value(&pair[..12])?,
            length: value(&pair[12..])?,
        });
    }
    Ok(segments)
}

/// Checks a user or group id.
pub(super) fn owner(name: &str, value: Result<i64, String>) -> Result<u32, String> {
    let value = value.map_err(|reason| format!("{name}: {reason}"))?;
    match u32::try_from(value) {
        // (uid_t)-1 means "no change" to chown and is no owner.
        Ok(id) if id != u32::MAX => Ok(id),
        _ => Err(format!("{name}: {value} is out of range")),
    }
}

/// A field's text up to its first NUL.
fn text(field: &[u8]) -> &[u8] {
    let end = field
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(field.len());
    &field[..end]
}

/// A number: octal digits between spaces or NULs, or big-endian two's complement marked by the first bit.
fn number(field: &[u8]) -> Result<i64, String> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => base256(field),
        _ => octal(field),
    }
}

fn base256(field: &[u8]) -> Result<i64, String> {
    // The first bit is the mark, the second the sign.
    let negative = field[0] & 0x40 != 0;
    let mut value: i128 = if negative { -1 } else { 0 };
    for (i, &byte) in field.iter().enumerate() {
        let byte = match (i, negative) {
            (0, false) => byte & 0x7f,
            _ => byte,
        };
        value = value << 8 | i128::from(byte);
        if i64::try_from(value).is_err() {
            return Err("number does not fit 64 bits".to_owned());
        }
    }
    Ok(value as i64)
}

fn octal(field: &[u8]) -> Result<i64, String> {
    let is_filler = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field
        .iter()
        .position(|byte| !is_filler(byte))
        .unwrap_or(field.len());
    let end = field
        .iter()
        .rposition(|byte| !is_filler(byte))
        .map_or(start, |last| last + 1);
    let mut value: i64 = 0;
    for &byte in &field[start..end] {
        match byte {
            // 12 digits are 36 bits: no overflow.
            b'0'..=b'7' => value = value << 3 | i64::from(byte - b'0'),
            _ => {
                return Err(format!(
                    "{:?} is not an octal number",
                    String::from_utf8_lossy(field)
                ));
            }
        }
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_all_notations() {
        assert_eq!(number(b"0000644\0"), Ok(0o644));
        assert_eq!(number(b"  644 \0\0"), Ok(0o644));
        assert_eq!(number(b"777777777777"), Ok(0o777_777_777_777));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Ok(0));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\x05\0\0\0\0"), Ok(5 << 32));
        assert_eq!(
            number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"),
            Ok(-2)
        );
        assert_eq!(
            number(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"),
            Ok(i64::MAX)
        );
    }

    #[test]
    fn malformed_numbers_are_refused() {
        assert!(number(b"0000648\0").is_err());
        assert!(number(b"-1").is_err());
        assert!(number(b"12 34").is_err());
        assert!(number(b"\x80\0\0\0\x80\0\0\0\0\0\0\0").is_err());
        assert!(number(b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff").is_err());
        assert!(number(b"\xc0\0\0\0\0\0\0\0\0\0\0\0").is_err());
    }

    #[test]
    fn owners_fit_32_bits() {
        assert_eq!(owner("uid", Ok(4_294_967_294)), Ok(4_294_967_294));
        assert!(owner("uid", Ok(4_294_967_295)).is_err());
        assert!(owner("uid", Ok(-1)).is_err());
    }
}
