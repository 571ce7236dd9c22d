//! Namespaces of the process' own.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    thread::UnshareFlags,
};

use super::{JailError, failed};

/// The host's `/proc`, which the process needs once after its root is gone.
pub fn open_proc() -> Result<OwnedFd, JailError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open("/proc", flags, Mode::empty())
        .map_err(failed("opening /proc", "mount proc there"))
}

/// Leaves the mount, network, IPC and UTS namespaces of the host for empty ones.
pub fn leave_shared() -> Result<(), JailError> {
    for (namespace, step) in [
        (UnshareFlags::NEWNS, "a mount namespace"),
        (UnshareFlags::NEWNET, "a network namespace"),
        (UnshareFlags::NEWIPC, "an IPC namespace"),
        (UnshareFlags::NEWUTS, "a UTS namespace"),
    ] {
        // SAFETY: descriptors are not unshared; that is what the function's contract is about.
        unsafe { rustix::thread::unshare_unsafe(namespace) }.map_err(failed(
            step,
            "the parent needs CAP_SYS_ADMIN, and user.max_*_namespaces must allow one more",
        ))?;
    }
    Ok(())
}

/// Enters a user namespace in which only the process' own user and group exist.
///
/// Its first process has all capabilities in it, so drop them afterwards.
pub fn enter_user_namespace(proc: &OwnedFd) -> rustix::io::Result<()> {
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    // SAFETY: as in `leave_shared`.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }?;
    // A change of user made the process undumpable, which gives its files in /proc to root.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)?;
    write(proc, "self/setgroups", "deny")?;
    write(proc, "self/uid_map", &format!("{uid} {uid} 1"))?;
    write(proc, "self/gid_map", &format!("{gid} {gid} 1"))
}

fn write(proc: &OwnedFd, path: &str, text: &str) -> rustix::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(proc.as_fd(), path, flags, Mode::empty())?;
    match rustix::io::write(&file, text.as_bytes())? {
        written if written == text.len() => Ok(()),
        _ => Err(Errno::IO),
    }
}
