//! What an image has at a mount's target, copied into the tmpfs (`tmpcopyup`) or the new volume
//! that is mounted there.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, Timespec, Timestamps},
    io::{Errno, Result},
};

/// Copies everything beneath the directory `from` into the directory `to`, with owners, modes and
/// times; hard links become files of their own, sockets and extended attributes stay behind, as
/// under runc. No link is followed.
///
/// # Errors
/// The first that a system call has, such as that the tmpfs is full or that the directories are
/// deeper than there are descriptors.
pub fn copy_tree(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    // `from` may be a mere name (`O_PATH`).
    let from = rustix::fs::openat(from, ".", DIRECTORY, Mode::empty())?;
    for entry in Dir::read_from(&from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(from.as_fd(), to, name)?;
        }
    }
    Ok(())
}

/// [`copy_tree`] into a directory that has nothing in it, which also gets the owner and the mode of
/// `from`.
///
/// # Errors
/// As [`copy_tree`].
pub fn fill_if_empty(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    let directory = rustix::fs::openat(to, ".", DIRECTORY, Mode::empty())?;
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            return Ok(());
        }
    }
    copy_tree(from, to)?;
    let stat = rustix::fs::statat(from, c"", AtFlags::EMPTY_PATH)?;
    keep_attributes(to, c".", &stat)
}

const DIRECTORY: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

fn copy_entry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let private = Mode::RUSR | Mode::WUSR | Mode::XUSR;
    let kind = FileType::from_raw_mode(stat.st_mode);
    match kind {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, private)?;
            let inner = rustix::fs::openat(from, name, DIRECTORY, Mode::empty())?;
            let copy = rustix::fs::openat(to, name, DIRECTORY, Mode::empty())?;
            copy_tree(inner.as_fd(), copy.as_fd())?;
        }
        FileType::RegularFile => {
            let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut inner = File::from(rustix::fs::openat(from, name, flags, Mode::empty())?);
            let flags = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            let mut copy = File::from(rustix::fs::openat(to, name, flags, private)?);
            io::copy(&mut inner, &mut copy)
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(&target, to, name)?;
        }
        FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice => {
            rustix::fs::mknodat(to, name, kind, private, stat.st_rdev)?;
        }
        _ => return Ok(()),
    }
    keep_attributes(to, name, &stat)
}

fn keep_attributes(to: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<()> {
    let here = AtFlags::SYMLINK_NOFOLLOW;
    let (owner, group) = (
        rustix::fs::Uid::from_raw(stat.st_uid),
        rustix::fs::Gid::from_raw(stat.st_gid),
    );
    rustix::fs::chownat(to, name, Some(owner), Some(group), here)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        // After the owner, whose change takes the set-user-id bit away.
        let mode = Mode::from_raw_mode(stat.st_mode);
        rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
    }
    let time = |seconds, nanoseconds: i64| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    #[allow(clippy::cast_possible_wrap, reason = "below 1,000,000,000")]
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec as i64),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec as i64),
    };
    rustix::fs::utimensat(to, name, &times, here)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    };

    use super::*;

    #[test]
    fn a_tree_keeps_its_shape_modes_and_times() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = |name: &str| from.path().join(name);
        fs::create_dir_all(path("a/b")).unwrap();
        fs::write(path("a/b/file"), "text").unwrap();
        fs::set_permissions(path("a/b/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::set_permissions(path("a"), fs::Permissions::from_mode(0o1555)).unwrap();
        symlink("/etc/passwd", path("a-link")).unwrap();
        symlink("nowhere", path("dangling")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        let (source, target) = (
            File::open(from.path()).unwrap(),
            File::open(to.path()).unwrap(),
        );
        copy_tree(source.as_fd(), target.as_fd()).unwrap();
        for name in ["a", "a/b", "a/b/file", "a-link", "dangling", "pipe"] {
            let of = |root: &std::path::Path| fs::symlink_metadata(root.join(name)).unwrap();
            let (one, other) = (of(from.path()), of(to.path()));
            assert_eq!(one.mode(), other.mode(), "{name}");
            assert_eq!(
                (one.uid(), one.gid(), one.mtime_nsec()),
                (other.uid(), other.gid(), other.mtime_nsec()),
                "{name}"
            );
        }
        let text = fs::read_to_string(to.path().join("a/b/file")).unwrap();
        assert_eq!(text, "text");
        let link = fs::read_link(to.path().join("a-link")).unwrap();
        assert_eq!(link.to_str(), Some("/etc/passwd"));
        // A second time finds the names taken, and says so.
        assert_eq!(copy_tree(source.as_fd(), target.as_fd()), Err(Errno::EXIST));
    }
}
