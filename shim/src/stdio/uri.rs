//! How containerd names a stream: a bare path of a FIFO, or a URI (containerd: pkg/cio, `LogURI`).

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

use crate::error::Error;

/// A named stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A FIFO that is there.
    Fifo(PathBuf),
    /// A file to be appended to.
    File(PathBuf),
    /// A program that reads the output.
    Binary {
        /// Its file.
        program: PathBuf,
        /// Keys and values of the URI's query, in turn.
        arguments: Vec<OsString>,
        /// It must say that it is ready, not only close its descriptor (`binary-v2`).
        must_answer: bool,
    },
}

impl Target {
    /// None for an empty name.
    ///
    /// # Errors
    /// A scheme that is not supported, a path that is not absolute, a malformed escape.
    pub fn parse(name: &str) -> Result<Option<Self>, Error> {
        if name.is_empty() {
            return Ok(None);
        }
        let Some((scheme, rest)) = name.split_once("://") else {
            return Ok(Some(Self::Fifo(name.into())));
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let malformed = |what: &str| Error::Invalid(format!("the stream {name} has {what}"));
        let path = PathBuf::from(
            unescape(path, false).ok_or_else(|| malformed("a malformed escape in its path"))?,
        );
        if !path.is_absolute() {
            return Err(malformed("no absolute path"));
        }
        Ok(Some(match scheme {
            "fifo" => Self::Fifo(path),
            "file" => Self::File(path),
            "binary" | "binary-v2" => Self::Binary {
                program: path,
                arguments: arguments(query)
                    .ok_or_else(|| malformed("a malformed escape in its query"))?,
                must_answer: scheme == "binary-v2",
            },
            _ => {
                return Err(Error::Unsupported(format!(
                    "standard streams by {scheme}:// are not supported ({name})"
                )));
            }
        }))
    }
}

/// The first value of each key, as containerd passes them on.
fn arguments(query: &str) -> Option<Vec<OsString>> {
    let mut seen = Vec::new();
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let key = unescape(key, true)?;
        if seen.contains(&key) {
            continue;
        }
        seen.push(key.clone());
        arguments.push(key);
        arguments.push(unescape(value, true)?);
    }
    Some(arguments)
}

/// RFC 3986, 2.1; in a query "+" is a blank.
fn unescape(text: &str, query: bool) -> Option<OsString> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
                u8::try_from(high * 16 + low)
                    .ok()
                    .filter(|byte| *byte != 0)?
            }
            b'+' if query => b' ',
            byte => byte,
        });
    }
    Some(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(Target::parse("").unwrap(), None);
        let fifo = Target::parse("/run/x?y%20").unwrap();
        assert_eq!(fifo, Some(Target::Fifo("/run/x?y%20".into())));
        let fifo = Target::parse("fifo:///run/x%20y").unwrap();
        assert_eq!(fifo, Some(Target::Fifo("/run/x y".into())));
        let file = Target::parse("file:///var/log/a.log?x=1").unwrap();
        assert_eq!(file, Some(Target::File("/var/log/a.log".into())));
        assert_eq!(
            Target::parse("binary:///bin/logger?id=a%26b&flag&id=second&text=x+y").unwrap(),
            Some(Target::Binary {
                program: "/bin/logger".into(),
                arguments: ["id", "a&b", "flag", "", "text", "x y"]
                    .map(Into::into)
                    .into(),
                must_answer: false,
            })
        );
        let second = Target::parse("binary-v2:///bin/logger").unwrap();
        assert!(matches!(
            second,
            Some(Target::Binary {
                must_answer: true,
                ..
            })
        ));
    }

    #[test]
    fn mistakes() {
        assert!(matches!(
            Target::parse("npipe:////./pipe/x"),
            Err(Error::Unsupported(_))
        ));
        for name in [
            "file://relative",
            "binary://",
            "file:///a%2",
            "file:///a%00",
            "binary:///b?x=%zz",
        ] {
            assert!(
                matches!(Target::parse(name), Err(Error::Invalid(_))),
                "{name}"
            );
        }
    }
}
