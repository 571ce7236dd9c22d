//! An empty root directory.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        UnmountFlags,
    },
};

use super::{JailError, failed};

const ADVICE: &str = "a mount must be possible here: see whether an outer seccomp filter or \
                      security module forbids it";

/// Makes an empty, read-only tmpfs the root and detaches what was there. The process must have a
/// mount namespace of its own.
pub fn become_empty() -> Result<(), JailError> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(failed("private mounts", ADVICE))?;
    let root = empty_tmpfs().map_err(failed("an empty tmpfs", ADVICE))?;
    enter(&root).map_err(failed("changing to the empty root", ADVICE))
}

fn empty_tmpfs() -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("size", "4k"), ("nr_inodes", "1"), ("mode", "0555")] {
        rustix::mount::fsconfig_set_string(context.as_fd(), key, value)?;
    }
    rustix::mount::fsconfig_create(context.as_fd())?;
    rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}

fn enter(root: &OwnedFd) -> rustix::io::Result<()> {
    let here = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(root, "", CWD, "/", here)?;
    rustix::process::fchdir(root)?;
    match rustix::process::pivot_root(".", ".") {
        // Both are "." now: the old root lies on top of the new one (pivot_root(2), NOTES).
        Ok(()) => rustix::mount::unmount(".", UnmountFlags::DETACH)?,
        // An initial ramfs cannot be pivoted away from. What it takes to get out of a chroot
        // (CAP_SYS_CHROOT, or a descriptor of a directory outside) is given up.
        Err(Errno::INVAL) => rustix::process::chroot(".")?,
        Err(error) => return Err(error),
    }
    rustix::process::chdir("/")
}
