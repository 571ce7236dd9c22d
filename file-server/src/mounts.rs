//! Shares: mounts in the server's mount namespace, made by the parent.
//!
//! A thread changes into the namespace, works, and ends: nothing else in the
//! process is touched. The server's root is mounted read-only; mount points
//! are made through a writable clone of that mount which exists only meanwhile.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags},
    thread::{LinkNameSpaceType, UnshareFlags},
};

use crate::Error;

/// What of a share cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadOnly {
    /// What can be written on the host can be written.
    #[default]
    Nothing,
    /// The share's own mount, but not what is mounted below (`ro` of mount(8)).
    Mount,
    /// All of it (`rro`).
    Tree,
}

/// How a directory or file is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Share {
    /// With what is mounted below (`rbind`); otherwise what those mounts cover is seen.
    pub recursive: bool,
    /// What cannot be written, enforced by the mounts.
    pub read_only: ReadOnly,
    /// The guest may make set-user-id files and set file capabilities, which take effect on the
    /// host. For container roots; not for directories that host users can reach.
    pub set_id: bool,
}

/// A detached copy of what is mounted at `source`, and below if `recursive`.
pub(crate) fn clone_tree(source: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let below = if recursive {
        // It is of the AT_* family, but open_tree takes it too.
        OpenTreeFlags::from_bits_retain(libc::AT_RECURSIVE as u32)
    } else {
        OpenTreeFlags::empty()
    };
    let tree = rustix::mount::open_tree(
        CWD,
        source,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | below,
    )?;
    match kind(&tree)? {
        FileType::Directory | FileType::RegularFile => Ok(tree),
        other => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "a {other:?} of the host means nothing in a virtual machine; only directories and regular files can be shared"
            ),
        )),
    }
}

/// Mounts `tree` as `/<index>` in the mount namespace.
pub(crate) fn attach(
    namespace: BorrowedFd<'_>,
    index: u32,
    tree: &OwnedFd,
    share: Share,
) -> Result<(), Error> {
    restrict(tree.as_fd(), share)?;
    if share.read_only == ReadOnly::Mount {
        set_attributes(tree.as_fd(), libc::MOUNT_ATTR_RDONLY, 0, false)
            .map_err(Error::io("attributes of the share"))?;
    }
    let directory = kind(tree).map_err(Error::io("stat of the share"))? == FileType::Directory;
    within(namespace, || {
        let root = writable_root()?;
        let name = index.to_string();
        let made = if directory {
            rustix::fs::mkdirat(&root, &name, Mode::from_raw_mode(0o755))
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&root, &name, flags, Mode::from_raw_mode(0o644)).map(drop)
        };
        made.map_err(|error| match error {
            Errno::EXIST => Error::Exists(index),
            other => Error::io("mount point of the share")(other),
        })?;
        let moved = rustix::mount::move_mount(
            tree,
            "",
            CWD,
            format!("/{name}"),
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        );
        moved.map_err(|error| {
            // The first failure is the one to tell.
            let _ = remove_mount_point(&root, &name);
            Error::io("mount of the share")(error)
        })
    })
}

/// What counts for all mounts of a share.
fn restrict(tree: BorrowedFd<'_>, share: Share) -> Result<(), Error> {
    let mut attributes = libc::MOUNT_ATTR_NODEV;
    if share.read_only == ReadOnly::Tree {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    if !share.set_id {
        attributes |= libc::MOUNT_ATTR_NOSUID;
    }
    set_attributes(tree, attributes, 0, true).map_err(Error::io("attributes of the share"))
}

/// A mount below a share, by a descriptor of its root.
#[derive(Debug)]
pub struct MountBelow(OwnedFd);

/// A detached copy of the one mount whose root `mount` is.
pub(crate) fn clone_mount(mount: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(rustix::mount::open_tree(mount, "", flags)?)
}

/// Mounts `tree` on `path` below `/<index>` in the mount namespace. The guest may have put links
/// there: none is followed.
pub(crate) fn attach_below(
    namespace: BorrowedFd<'_>,
    index: u32,
    path: &Path,
    tree: OwnedFd,
    share: Share,
) -> Result<MountBelow, Error> {
    restrict(tree.as_fd(), share)?;
    within(namespace, || {
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let root = rustix::fs::open(format!("/{index}"), flags, Mode::empty())
            .map_err(|_| Error::Missing(index))?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let point = rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve)
            .map_err(Error::io("mount point below the share"))?;
        rustix::mount::move_mount(
            &tree,
            "",
            &point,
            "",
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
        )
        .map_err(Error::io("mount below the share"))
    })?;
    Ok(MountBelow(tree))
}

/// Unmounts it, wherever the guest has moved the directory that it is on.
pub(crate) fn detach_below(namespace: BorrowedFd<'_>, mount: &MountBelow) -> Result<(), Error> {
    within(namespace, || {
        rustix::process::fchdir(&mount.0).map_err(Error::io("entering a mount"))?;
        match rustix::mount::unmount(".", UnmountFlags::DETACH) {
            // It went with the one that it was on.
            Err(Errno::INVAL) => Ok(()),
            other => other.map_err(Error::io("unmount below the share")),
        }
    })
}

/// Unmounts `/<index>` in the mount namespace.
pub(crate) fn detach(namespace: BorrowedFd<'_>, index: u32) -> Result<(), Error> {
    within(namespace, || {
        let name = index.to_string();
        rustix::mount::unmount(
            format!("/{name}"),
            UnmountFlags::DETACH | UnmountFlags::NOFOLLOW,
        )
        .map_err(|error| match error {
            Errno::NOENT | Errno::INVAL => Error::Missing(index),
            other => Error::io("unmount of the share")(other),
        })?;
        remove_mount_point(&writable_root()?, &name).map_err(Error::io("mount point of the share"))
    })
}

/// Runs `work` on a thread in the mount namespace.
fn within(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<(), Error> + Send,
) -> Result<(), Error> {
    let enter = || {
        // SAFETY: FS unshares root and working directory, not descriptors; that is what the
        // function's contract is about.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
            .map_err(Error::io("unshare of the working directory"))?;
        rustix::thread::move_into_link_name_space(namespace, Some(LinkNameSpaceType::Mount))
            .map_err(Error::io("entering the server's mount namespace"))?;
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("share".into())
            .stack_size(128 << 10)
            .spawn_scoped(scope, enter)
            .map_err(Error::io("thread"))?;
        thread.join().unwrap_or_else(|_| {
            Err(Error::io("thread")(io::Error::other(
                "the mounting thread failed",
            )))
        })
    })
}

/// A writable clone of the server's root mount, without the shares.
fn writable_root() -> Result<OwnedFd, Error> {
    let root = rustix::mount::open_tree(
        CWD,
        "/",
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .map_err(Error::io("clone of the server's root"))?;
    set_attributes(root.as_fd(), 0, libc::MOUNT_ATTR_RDONLY, false)
        .map_err(Error::io("attributes of the server's root"))?;
    Ok(root)
}

fn remove_mount_point(root: &OwnedFd, name: &str) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(root, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOTDIR) => rustix::fs::unlinkat(root, name, AtFlags::empty()),
        other => other,
    }
}

fn kind(fd: &OwnedFd) -> rustix::io::Result<FileType> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode))
}

/// mount_setattr(2) on a mount: sets and clears attributes, and stops propagation.
fn set_attributes(
    mount: BorrowedFd<'_>,
    set: u64,
    clear: u64,
    recursive: bool,
) -> rustix::io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: clear,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the descriptor is open, the path is a terminated string, and the structure lives
    // over the call and has the size that is told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}
