//! `-v`, `--mount` and `--tmpfs`: what is mounted into a container.

use std::path::{Path, PathBuf};

use crate::{error::Error, options};

/// A directory or file that is shared with a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Where it is.
    pub source: Source,
    /// In the container, absolute.
    pub target: String,
    /// No writing.
    pub read_only: bool,
    /// A new volume gets what the image has at the target.
    pub copies: bool,
    /// What the host mounts and unmounts below later is seen (`rslave`).
    pub follows: bool,
}

/// Where a share comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A path of the host, absolute.
    Host {
        /// The path.
        path: String,
        /// It is not made when it is not there.
        must_exist: bool,
    },
    /// A volume; made when it is not there.
    Volume(String),
    /// A volume of the container's own.
    Anonymous,
}

/// A file system in memory: target and mount options.
pub type Tmpfs = (String, Vec<String>);

/// What a `--mount` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mount {
    /// `type=bind`, `type=volume`.
    Share(Share),
    /// `type=tmpfs`.
    Tmpfs(Tmpfs),
}

/// Propagation of mounts from the host.
const FROM_HOST: [&str; 2] = ["slave", "rslave"];

/// No propagation.
const PRIVATE: [&str; 2] = ["private", "rprivate"];

fn usage<T>(text: String) -> Result<T, Error> {
    Err(Error::Usage(text))
}

fn check_target(flag: &str, target: &str) -> Result<(), Error> {
    if target.starts_with('/') && Path::new(target) != Path::new("/") {
        Ok(())
    } else {
        usage(format!(
            "{flag}: \"{target}\" must be an absolute path in the container, not /"
        ))
    }
}

/// `[HOST-PATH|VOLUME:]TARGET[:OPTIONS]` of -v.
///
/// # Errors
/// Relative paths, malformed names, unknown options.
pub fn volume(text: &str) -> Result<Share, Error> {
    let flag = format!("-v {text}");
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts.as_slice() {
        [target] => (None, *target, ""),
        [source, target] => (Some(*source), *target, ""),
        [source, target, options] => (Some(*source), *target, *options),
        _ => {
            return usage(format!(
                "{flag}: expected PATH:TARGET, VOLUME:TARGET or TARGET, and :OPTIONS"
            ));
        }
    };
    check_target(&flag, target)?;
    let source = match source {
        None => Source::Anonymous,
        Some(source) => source_of(&flag, source)?,
    };
    let named = !matches!(source, Source::Host { .. });
    let (mut read_only, mut copies, mut follows) = (false, named, false);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => read_only = true,
            "rw" => read_only = false,
            "nocopy" if named => copies = false,
            _ if !named && FROM_HOST.contains(&option) => follows = true,
            _ if !named && PRIVATE.contains(&option) => follows = false,
            other => {
                return usage(format!(
                    "{flag}: the option \"{other}\" is not supported; there are ro, rw, nocopy for volumes, and \
                     rslave and rprivate for paths (what a guest mounts is never seen on the host)"
                ));
            }
        }
    }
    Ok(Share {
        source,
        target: target.to_owned(),
        read_only,
        copies,
        follows,
    })
}

/// A path, by its beginning, or the name of a volume.
fn source_of(flag: &str, text: &str) -> Result<Source, Error> {
    let path = if text.starts_with('/') {
        text.to_owned()
    } else if text == "." || text.starts_with("./") || text.starts_with("../") {
        match std::path::absolute(text) {
            Ok(path) => path.to_string_lossy().into_owned(),
            Err(error) => return usage(format!("{flag}: {error}")),
        }
    } else {
        check_name(text)
            .or_else(|error| usage(format!("{flag}: {error}; a path begins with / or ./")))?;
        return Ok(Source::Volume(text.to_owned()));
    };
    Ok(Source::Host {
        path,
        must_exist: false,
    })
}

/// Docker's rule for names of volumes.
///
/// # Errors
/// It is none.
pub fn check_name(name: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    let begins = name
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if begins && name.len() >= 2 && name.len() <= 255 && name.bytes().all(allowed) {
        Ok(())
    } else {
        usage(format!(
            "\"{name}\" is no name of a volume: letters, digits, _ . and -, the first a letter or digit, two at least"
        ))
    }
}

/// `DIR[:OPTIONS]` of --tmpfs.
///
/// # Errors
/// A relative path.
pub fn tmpfs(text: &str) -> Result<Tmpfs, Error> {
    let (target, options) = text.split_once(':').unwrap_or((text, ""));
    check_target(&format!("--tmpfs {text}"), target)?;
    let given = options.split(',').filter(|option| !option.is_empty());
    Ok((target.to_owned(), tmpfs_options(given.map(str::to_owned))))
}

/// Docker's defaults, which given ones override.
fn tmpfs_options(given: impl Iterator<Item = String>) -> Vec<String> {
    let defaults = ["noexec", "nosuid", "nodev"].map(str::to_owned);
    defaults.into_iter().chain(given).collect()
}

/// `type=bind|volume|tmpfs,source=…,target=…,…` of --mount.
///
/// # Errors
/// Keys that are unknown or belong to another type, missing ones, values that make no sense.
pub fn mount(text: &str) -> Result<Mount, Error> {
    let flag = format!("--mount {text}");
    let mut kind = "volume";
    let (mut source, mut target) = (None, None);
    let (mut read_only, mut copies, mut follows) = (false, true, false);
    let mut tmpfs = Vec::new();
    for field in text.split(',') {
        let (key, value) = field.split_once('=').unwrap_or((field, ""));
        match key {
            "type" => kind = value,
            "source" | "src" => source = Some(value),
            "target" | "dst" | "destination" => target = Some(value),
            "readonly" | "ro" => read_only = truth(&flag, key, value)?,
            "volume-nocopy" => copies = !truth(&flag, key, value)?,
            "bind-propagation" if FROM_HOST.contains(&value) => follows = true,
            "bind-propagation" if PRIVATE.contains(&value) => follows = false,
            "bind-propagation" => {
                return usage(format!(
                    "{flag}: the propagation \"{value}\" is not supported; there are rslave and rprivate \
                     (what a guest mounts is never seen on the host)"
                ));
            }
            "tmpfs-size" => {
                let bytes = options::size(&format!("{flag}: tmpfs-size"), value)?;
                tmpfs.push(format!("size={bytes}"));
            }
            "tmpfs-mode" => {
                if u32::from_str_radix(value, 8).map_or(true, |mode| mode > 0o7777) {
                    return usage(format!("{flag}: \"{value}\" is no mode, such as 1777"));
                }
                tmpfs.push(format!("mode={value}"));
            }
            _ => {
                return usage(format!(
                    "{flag}: the key \"{key}\" is not supported; there are type, source, target, readonly, \
                     volume-nocopy, bind-propagation, tmpfs-size and tmpfs-mode"
                ));
            }
        }
    }
    let Some(target) = target else {
        return usage(format!("{flag}: target is missing"));
    };
    check_target(&flag, target)?;
    if kind != "bind" && follows {
        return usage(format!("{flag}: bind-propagation is a key of type=bind"));
    }
    if kind != "tmpfs" && !tmpfs.is_empty() {
        return usage(format!("{flag}: tmpfs-… are keys of type=tmpfs"));
    }
    let source = match (kind, source) {
        ("tmpfs", None) => {
            if read_only {
                tmpfs.push("ro".to_owned());
            }
            return Ok(Mount::Tmpfs((
                target.to_owned(),
                tmpfs_options(tmpfs.into_iter()),
            )));
        }
        ("tmpfs", Some(_)) => return usage(format!("{flag}: a tmpfs has no source")),
        ("bind", Some(path)) if path.starts_with('/') => Source::Host {
            path: path.to_owned(),
            must_exist: true,
        },
        ("bind", _) => return usage(format!("{flag}: source must be an absolute path")),
        ("volume", Some(name)) if !name.is_empty() => {
            check_name(name)?;
            Source::Volume(name.to_owned())
        }
        ("volume", _) => Source::Anonymous,
        (other, _) => {
            return usage(format!(
                "{flag}: the type \"{other}\" is not supported; there are bind, volume and tmpfs"
            ));
        }
    };
    Ok(Mount::Share(Share {
        copies: copies && kind == "volume",
        source,
        target: target.to_owned(),
        read_only,
        follows,
    }))
}

fn truth(flag: &str, key: &str, value: &str) -> Result<bool, Error> {
    match value {
        "" | "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        other => usage(format!("{flag}: {key}={other} is neither true nor false")),
    }
}

impl Source {
    /// The host's path that must be there.
    ///
    /// # Errors
    /// It is not.
    pub fn check(&self) -> Result<(), Error> {
        match self {
            Self::Host {
                path,
                must_exist: true,
            } if !PathBuf::from(path).exists() => usage(format!(
                "--mount: the source path does not exist: {path}; make it first, or use -v, which does"
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(path: &str, must_exist: bool) -> Source {
        Source::Host {
            path: path.to_owned(),
            must_exist,
        }
    }

    #[test]
    fn volumes() {
        let one = volume("/a:/b:ro").unwrap();
        assert_eq!(
            (one.source, one.target.as_str(), one.read_only, one.copies),
            (host("/a", false), "/b", true, false)
        );
        let Source::Host { path, .. } = volume("./x:/b").unwrap().source else {
            panic!("a path");
        };
        assert!(path.starts_with('/') && path.ends_with("/x"));
        let named = volume("data:/b").unwrap();
        assert_eq!(named.source, Source::Volume("data".to_owned()));
        assert!(named.copies && !volume("data:/b:nocopy").unwrap().copies);
        assert_eq!(volume("/b").unwrap().source, Source::Anonymous);
        assert!(volume("/a:/b:ro,rslave").unwrap().follows);
        assert!(!volume("/a:/b:rslave,private").unwrap().follows);
        for wrong in [
            "/a:/b:rshared",
            "data:/b:rslave",
            "a:b",
            "/a:b",
            "/a:/b:z",
            "/a:/",
            "/",
            "/a:/b:ro:x",
            "x:/b",
            "-a:/b",
            "a/b:/c",
            "/a:/b:nocopy",
        ] {
            assert!(volume(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn mounts() {
        let share = |text: &str| match mount(text).unwrap() {
            Mount::Share(share) => share,
            other => panic!("{other:?}"),
        };
        let bind = share("type=bind,src=/a,dst=/b,ro");
        assert_eq!((bind.source, bind.read_only), (host("/a", true), true));
        assert!(share("type=bind,src=/a,dst=/b,bind-propagation=slave").follows);
        let named = share("source=data,target=/b,readonly=false,volume-nocopy");
        assert_eq!(named.source, Source::Volume("data".to_owned()));
        assert!(!named.read_only && !named.copies);
        assert_eq!(share("target=/b").source, Source::Anonymous);
        assert_eq!(
            mount("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=700").unwrap(),
            Mount::Tmpfs((
                "/t".to_owned(),
                ["noexec", "nosuid", "nodev", "size=1048576", "mode=700"]
                    .map(str::to_owned)
                    .to_vec()
            ))
        );
        for wrong in [
            "type=bind,target=/b",
            "type=bind,source=a,target=/b",
            "type=npipe,target=/b",
            "source=data",
            "target=/b,consistency=cached",
            "target=/b,ro=perhaps",
            "type=tmpfs,target=/b,source=x",
            "target=/b,tmpfs-size=1m",
            "type=tmpfs,target=/b,tmpfs-mode=999",
            "type=bind,source=/a,target=/b,bind-propagation=rshared",
            "source=data,target=/b,bind-propagation=rslave",
        ] {
            assert!(mount(wrong).is_err(), "{wrong}");
        }
    }
}
