//! Paths inside a container's root, resolved without leaving it.
//!
//! The image is the attacker: any component may be a symbolic link to anywhere.
//! openat2(2) with `RESOLVE_IN_ROOT` follows links as the container would see
//! them and refuses magic links.

use std::{
    ffi::OsStr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2},
    io::Errno,
};

use crate::failure::{Failure, Result};

const CONFINED: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

/// What to make when a path's last component is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// A directory, mode 0755.
    Directory,
    /// An empty file, mode 0644.
    File,
}

/// Opens `path` beneath `root`.
///
/// # Errors
/// Those of openat2(2).
pub fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let relative = if relative.as_os_str().is_empty() {
        Path::new(".")
    } else {
        relative
    };
    openat2(
        root,
        relative,
        flags | OFlags::CLOEXEC,
        Mode::empty(),
        CONFINED,
    )
}

/// An `O_PATH` descriptor of `path` beneath `root`; what is missing of it is made.
///
/// # Errors
/// A component that is no directory, a dangling link, a read-only file system.
pub fn open_or_create(root: BorrowedFd<'_>, path: &Path, missing: Missing) -> Result<OwnedFd> {
    let fail = |error: Errno| {
        Failure::internal(format!(
            "cannot make {} in the container's root: {error}",
            path.display()
        ))
    };
    match open(root, path, OFlags::PATH) {
        Err(Errno::NOENT) => {}
        result => return result.map_err(fail),
    }
    let mut done = PathBuf::from("/");
    let mut at = open(root, &done, OFlags::PATH | OFlags::DIRECTORY).map_err(fail)?;
    let names: Vec<&OsStr> = path
        .components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    for (index, name) in names.iter().enumerate() {
        done.push(name);
        let last = index + 1 == names.len();
        at = match open(root, &done, OFlags::PATH) {
            Ok(found) => found,
            Err(Errno::NOENT) => {
                if last && missing == Missing::File {
                    make_file(at.as_fd(), name).map_err(fail)?;
                } else {
                    mkdirat(&at, *name, Mode::from_raw_mode(0o755)).map_err(fail)?;
                }
                open(root, &done, OFlags::PATH).map_err(fail)?
            }
            Err(error) => return Err(fail(error)),
        };
    }
    Ok(at)
}

fn make_file(directory: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<()> {
    rustix::fs::openat(
        directory,
        name,
        OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o644),
    )
    .map(drop)
}

/// Text of a file beneath `root`, at most `limit` bytes of it; empty when there is none.
pub fn read_text(root: BorrowedFd<'_>, path: &Path, limit: u64) -> String {
    use std::io::Read;
    let mut text = Vec::new();
    // A FIFO of that name must not hang the agent.
    if let Ok(fd) = open(root, path, OFlags::RDONLY | OFlags::NONBLOCK)
        && rustix::fs::fstat(&fd).is_ok_and(|stat| {
            rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile
        })
    {
        let _ = std::fs::File::from(fd).take(limit).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Path under /proc by which a descriptor can be named to interfaces that take only paths.
pub fn proc_path(fd: BorrowedFd<'_>) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn links_stay_inside() {
        let directory = std::env::temp_dir().join(format!("caisson-paths-{}", std::process::id()));
        fs::create_dir_all(directory.join("etc")).unwrap();
        symlink("/etc", directory.join("escape")).unwrap();
        symlink("../../../../..", directory.join("up")).unwrap();
        let root = fs::File::open(&directory).unwrap();
        let made = open_or_create(root.as_fd(), Path::new("/escape/x/y"), Missing::File).unwrap();
        drop(made);
        assert!(directory.join("etc/x/y").is_file());
        open_or_create(root.as_fd(), Path::new("/up/here"), Missing::Directory).unwrap();
        assert!(directory.join("here").is_dir());
        assert!(open_or_create(root.as_fd(), Path::new("/etc/x/y/z"), Missing::File).is_err());
        fs::remove_dir_all(directory).unwrap();
    }
}
