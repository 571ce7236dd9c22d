//! PAX extended headers.

use super::Timestamp;
use super::header::owner;
use super::sparse::{PaxSparse, Segment};

/// star's key for an extended attribute, followed by its full name.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// What an extended header says of the entry that follows it. Absent means: as in the entry's own header.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Timestamp>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: PaxSparse,
}

impl Pax {
    /// Parses the records of a header: `"<length> <key>=<value>\n"`, the length counting the whole record.
    pub(super) fn parse(mut content: &[u8]) -> Result<Pax, String> {
        let mut pax = Pax::default();
        while !content.is_empty() {
            let (key, value, rest) = record(content).ok_or("malformed extended header record")?;
            content = rest;
            pax.apply(key, value)?;
        }
        Ok(pax)
    }

    fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
            return self.add_xattr(name, value);
        }
        // These two come in pairs, so they are in order and may repeat.
        match key {
            b"GNU.sparse.offset" => return self.sparse.push_offset(decimal(key, value)?),
            b"GNU.sparse.numbytes" => return self.sparse.push_length(decimal(key, value)?),
            _ => {}
        }
        // An empty value takes back what an earlier header said.
        let given = !value.is_empty();
        let number = || {
            if given {
                decimal(key, value).map(Some)
            } else {
                Ok(None)
            }
        };
        match key {
            b"path" => self.path = given.then(|| value.to_vec()),
            b"linkpath" => self.link = given.then(|| value.to_vec()),
            b"size" => self.size = number()?,
            b"uid" => self.uid = number()?.map(|id| owner_id("uid", id)).transpose()?,
            b"gid" => self.gid = number()?.map(|id| owner_id("gid", id)).transpose()?,
            b"mtime" => self.mtime = if given { Some(timestamp(value)?) } else { None },
            b"GNU.sparse.major" => self.sparse.major = number()?,
            b"GNU.sparse.minor" => self.sparse.minor = number()?,
            b"GNU.sparse.name" => self.sparse.name = given.then(|| value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size = number()?,
            b"GNU.sparse.numblocks" => self.sparse.count = number()?,
            b"GNU.sparse.map" => self.sparse.segments = sparse_map(value)?,
            // Access times, comments, names of users and groups: nothing that an image keeps.
            _ => {}
        }
        Ok(())
    }

    fn add_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), String> {
        if name.is_empty() || name.contains(&0) {
            return Err("an extended attribute has no valid name".to_owned());
        }
        match self.xattrs.iter_mut().find(|(other, _)| other == name) {
            Some((_, old)) => *old = value.to_vec(),
            None => self.xattrs.push((name.to_vec(), value.to_vec())),
        }
        Ok(())
    }
}

/// Splits the first record off: key, value, rest.
fn record(content: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = content.iter().take(20).position(|&byte| byte == b' ')?;
    let length = usize::try_from(digits(&content[..space])?).ok()?;
    if length <= space + 1 || length > content.len() {
        return None;
    }
    let (record, rest) = content.split_at(length);
    let body = record[space + 1..].strip_suffix(b"\n")?;
    // A value may hold anything, NUL and newline included; a key has no equals sign.
    let equals = body
        .iter()
        .position(|&byte| byte == b'=')
        .filter(|&position| position > 0)?;
    Some((&body[..equals], &body[equals + 1..], rest))
}

/// A decimal number of digits only.
pub(super) fn digits(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, &byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        value.checked_mul(10)?.checked_add(digit)
    })
}

fn decimal(key: &[u8], value: &[u8]) -> Result<u64, String> {
    // Lengths and offsets must also fit the signed ones of the system's interfaces.
    digits(value)
        .filter(|&number| i64::try_from(number).is_ok())
        .ok_or_else(|| {
            let (key, value) = (String::from_utf8_lossy(key), String::from_utf8_lossy(value));
            format!(
                "extended header {key}: {:?} is not a number",
                value.chars().take(40).collect::<String>()
            )
        })
}

fn owner_id(name: &str, id: u64) -> Result<u32, String> {
    owner(name, i64::try_from(id).map_err(|error| error.to_string()))
}

/// Seconds with an optional fraction, possibly negative; digits beyond nanoseconds are cut off.
fn timestamp(value: &[u8]) -> Result<Timestamp, String> {
    let malformed = || {
        format!(
            "extended header mtime: {:?} is not a time",
            String::from_utf8_lossy(&value[..value.len().min(40)])
        )
    };
    let (negative, text) = match value.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, value),
    };
    let dot = text.iter().position(|&byte| byte == b'.');
    let (whole, fraction) = dot.map_or((text, &b""[..]), |dot| (&text[..dot], &text[dot + 1..]));
    let whole = digits(whole)
        .and_then(|whole| i64::try_from(whole).ok())
        .ok_or_else(malformed)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(malformed());
    }
    let nanoseconds = (0..9).fold(0, |value, i| {
        value * 10 + fraction.get(i).map_or(0, |digit| u32::from(digit - b'0'))
    });
    Ok(match (negative, nanoseconds) {
        (false, _) => Timestamp {
            seconds: whole,
            nanoseconds,
        },
        (true, 0) => Timestamp {
            seconds: -whole,
            nanoseconds: 0,
        },
        (true, _) => Timestamp {
            seconds: -whole - 1,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
    })
}

/// The map of PAX sparse format 0.1: offsets and lengths, all separated by commas.
fn sparse_map(value: &[u8]) -> Result<Vec<Segment>, String> {
    let malformed = || "malformed GNU.sparse.map".to_owned();
    if value.is_empty() {
        return Ok(Vec::new());
    }
    let numbers: Vec<u64> = value
        .split(|&byte| byte == b',')
        .map(digits)
        .collect::<Option<_>>()
        .ok_or_else(malformed)?;
    if !numbers.len().is_multiple_of(2) {
        return Err(malformed());
    }
    Ok(numbers
        .chunks_exact(2)
        .map(|pair| Segment {
            offset: pair[0],
            length: pair[1],
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_length_delimited() {
        let pax =
            Pax::parse(b"13 path=a b\n\n31 SCHILY.xattr.user.x=\0\n=bin\0\n12 uid=1000\n").unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a b\n"[..]));
        assert_eq!(
            pax.xattrs,
            vec![(b"user.x".to_vec(), b"\0\n=bin\0".to_vec())]
        );
        assert_eq!(pax.uid, Some(1000));
    }

    #[test]
    fn malformed_records_are_refused() {
        for bytes in [
            &b"x"[..],
            b"12",
            b"0 path=a\n",
            b"5 a=b",
            b"100 path=a\n",
            b"11 path=abX",
            b"6 =ab\n",
            b"7 abcd\n",
            b"99999999999999999999999 a=b\n",
            b"18446744073709551616 path=a\n",
            b"-5 a=b\n",
            b"12 size=1x3\n",
            b"12 size=-12\n",
            b"24 size=9999999999999999\n9",
            b"17 mtime=1.2.3.4\n",
            b"18 SCHILY.xattr.=\n",
            b"29 GNU.sparse.map=1,2,3,4,5,\n",
        ] {
            assert!(
                Pax::parse(bytes).is_err(),
                "{:?}",
                String::from_utf8_lossy(bytes)
            );
        }
    }

    #[test]
    fn times_have_nanoseconds_and_signs() {
        let at = |seconds, nanoseconds| {
            Ok(Timestamp {
                seconds,
                nanoseconds,
            })
        };
        assert_eq!(
            timestamp(b"1700000000.123456789"),
            at(1_700_000_000, 123_456_789)
        );
        assert_eq!(timestamp(b"5.5"), at(5, 500_000_000));
        assert_eq!(timestamp(b"5.1234567899"), at(5, 123_456_789));
        assert_eq!(timestamp(b"-1.25"), at(-2, 750_000_000));
        assert_eq!(timestamp(b"-3"), at(-3, 0));
        assert!(timestamp(b"").is_err() && timestamp(b"-").is_err() && timestamp(b"1e9").is_err());
    }
}
