//! Image references, normalised as docker does: `busybox` is `docker.io/library/busybox:latest`.
//!
//! The grammar is that of the distribution specification ("Pulling manifests") with docker's short
//! forms: a first component that has a dot, a colon or capital letters, or is `localhost`, is a
//! registry; without one the registry is `docker.io`, whose single-component names live under `library/`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";
/// Longest registry and repository together, in bytes (the distribution specification).
const MAX_NAME: usize = 255;
/// Longest tag, in bytes (the distribution specification).
const MAX_TAG: usize = 128;

/// A normalised image reference; at least one of tag and digest is present.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// The text is not an image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid image reference {reference:?}: {reason}")]
pub struct InvalidReference {
    /// What was given (cut to a readable length).
    pub reference: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Reference {
    /// The registry's host and port, such as `docker.io` or `localhost:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository within the registry, such as `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if any. A reference without a digest always has one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The manifest digest, if the reference names one.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The same repository by a digest alone.
    #[must_use]
    pub fn by_digest(&self, digest: Digest) -> Reference {
        Reference {
            registry: self.registry.clone(),
            repository: self.repository.clone(),
            tag: None,
            digest: Some(digest),
        }
    }

    /// Registry and repository without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// Whether both are of the same registry and repository.
    pub fn same_repository(&self, other: &Reference) -> bool {
        self.registry == other.registry && self.repository == other.repository
    }

    /// The repository as docker shows it: `docker.io/` and `library/` left out.
    pub fn familiar_name(&self) -> String {
        if self.registry != DEFAULT_REGISTRY {
            return self.name();
        }
        match self.repository.strip_prefix("library/") {
            Some(rest) if !rest.contains('/') => rest.to_owned(),
            _ => self.repository.clone(),
        }
    }

    /// The whole reference as docker shows it, such as `busybox:latest`.
    pub fn familiar(&self) -> String {
        let mut text = self.familiar_name();
        self.push_suffix(&mut text);
        text
    }

    fn push_suffix(&self, text: &mut String) {
        if let Some(tag) = &self.tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(&digest.to_string());
        }
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        parse(text).map_err(|reason| InvalidReference {
            reference: text.chars().take(300).collect(),
            reason,
        })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            let digest = digest
                .parse()
                .map_err(|_| "the digest is not sha256:<64 hexadecimal digits>")?;
            (rest, Some(digest))
        }
        None => (text, None),
    };
    // A colon before the last slash belongs to the registry's port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if let Some(tag) = tag
        && !is_tag(tag)
    {
        return Err("a tag is 1 to 128 of A-Z a-z 0-9 _ . - and does not start with . or -");
    }
    if name.is_empty() {
        return Err("the name is empty");
    }
    let (registry, path) = split_registry(name);
    if !is_registry(registry) {
        return Err("the registry is not a host name with an optional port");
    }
    if !path.split('/').all(is_path_component) {
        return Err(
            "a repository is lower-case letters, digits and single separators (. _ __ -) between slashes",
        );
    }
    let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_owned()
    };
    if registry.len() + 1 + repository.len() > MAX_NAME {
        return Err("the name is longer than 255 bytes");
    }
    let tag = match (tag, &digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, Some(_)) => None,
        (None, None) => Some(DEFAULT_TAG.to_owned()),
    };
    Ok(Reference {
        registry: registry.to_owned(),
        repository,
        tag,
        digest,
    })
}

/// Splits the registry from the path; docker's rule for telling `foo/bar` from `foo.io/bar`.
fn split_registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.bytes().any(|byte| byte.is_ascii_uppercase()) =>
        {
            (
                if first == "index.docker.io" {
                    DEFAULT_REGISTRY
                } else {
                    first
                },
                rest,
            )
        }
        _ => (DEFAULT_REGISTRY, name),
    }
}

fn is_registry(registry: &str) -> bool {
    // An IPv6 address is in brackets.
    if let Some((address, port)) = registry
        .strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
    {
        return address.parse::<std::net::Ipv6Addr>().is_ok()
            && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
    }
    let (host, port) = match registry.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (registry, None),
    };
    port.is_none_or(is_port)
        && host.split('.').all(|label| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

fn is_port(port: &str) -> bool {
    !port.is_empty() && port.len() <= 5 && port.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether `tag` is a tag by the distribution specification.
pub(crate) fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = tag.as_bytes();
    bytes.len() <= MAX_TAG
        && bytes.first().is_some_and(|&byte| word(byte))
        && bytes
            .iter()
            .all(|&byte| word(byte) || byte == b'.' || byte == b'-')
}

/// Alphanumeric runs joined by one `.`, one or two `_`, or any number of `-`.
fn is_path_component(component: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !alphanumeric(first) || !alphanumeric(last) {
        return false;
    }
    bytes.split(|&byte| alphanumeric(byte)).all(|separator| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|&byte| byte == b'-')
    })
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.name();
        self.push_suffix(&mut text);
        f.write_str(&text)
    }
}

impl TryFrom<String> for Reference {
    type Error = InvalidReference;

    fn try_from(text: String) -> Result<Self, InvalidReference> {
        text.parse()
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> String {
        reference.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_normalised_as_docker_does() {
        for (given, full, familiar) in [
            (
                "busybox",
                "docker.io/library/busybox:latest",
                "busybox:latest",
            ),
            (
                "busybox:1.36",
                "docker.io/library/busybox:1.36",
                "busybox:1.36",
            ),
            (
                "docker.io/busybox",
                "docker.io/library/busybox:latest",
                "busybox:latest",
            ),
            (
                "index.docker.io/library/busybox",
                "docker.io/library/busybox:latest",
                "busybox:latest",
            ),
            (
                "someone/app",
                "docker.io/someone/app:latest",
                "someone/app:latest",
            ),
            (
                "localhost/app",
                "localhost/app:latest",
                "localhost/app:latest",
            ),
            (
                "localhost:5000/a/b:v1",
                "localhost:5000/a/b:v1",
                "localhost:5000/a/b:v1",
            ),
            ("quay.io/a/b", "quay.io/a/b:latest", "quay.io/a/b:latest"),
            ("[::1]:5000/a", "[::1]:5000/a:latest", "[::1]:5000/a:latest"),
            (
                "a/b/c__d.e-f---g",
                "docker.io/a/b/c__d.e-f---g:latest",
                "a/b/c__d.e-f---g:latest",
            ),
        ] {
            let reference: Reference = given.parse().unwrap();
            assert_eq!(reference.to_string(), full);
            assert_eq!(reference.familiar(), familiar);
            assert_eq!(full.parse::<Reference>().unwrap(), reference);
        }
    }

    #[test]
    fn a_digest_stands_without_a_tag() {
        let reference: Reference = format!("busybox@sha256:{HEX}").parse().unwrap();
        assert_eq!(reference.tag(), None);
        assert_eq!(
            reference.to_string(),
            format!("docker.io/library/busybox@sha256:{HEX}")
        );
        let both: Reference = format!("busybox:1@sha256:{HEX}").parse().unwrap();
        assert_eq!(both.tag(), Some("1"));
        assert!(both.digest().is_some());
    }

    #[test]
    fn malformed_references_are_refused() {
        for text in [
            "",
            ":",
            "/",
            ":tag",
            "a:",
            "a:-x",
            "a:.x",
            "Busybox",
            "a//b",
            "/a",
            "a/",
            "../a",
            "a/../b",
            "a b",
            "a:b/c:d/e",
            "a..b",
            "a___b",
            "-a",
            "a-",
            "a@sha256:12",
            "a@",
            "exa mple.com/a",
            "host:port/a",
            "-x.y/a",
            "a\0b",
            "a:t\n",
            "\u{e9}t\u{e9}",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?} was accepted");
        }
        assert!("a".repeat(300).parse::<Reference>().is_err());
        assert!(
            format!("a:{}", "t".repeat(129))
                .parse::<Reference>()
                .is_err()
        );
    }
}
