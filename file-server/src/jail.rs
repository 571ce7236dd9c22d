//! The server's jail, entered before anything from outside is read.
//!
//! In this order: no descriptors but the given ones; own mount, network, IPC,
//! UTS and cgroup namespaces (the parent gave it a pid namespace); an empty
//! read-only tmpfs as root; limits; the capabilities that serving files as
//! root takes and no others; no new privileges. A seccomp filter follows
//! (`filter`). The server can mount nothing: shares appear in its mount
//! namespace because the parent mounts them there.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        UnmountFlags,
    },
    process::{Resource, Rlimit},
    thread::{CapabilitySet, CapabilitySets, UnshareFlags},
};

/// What serving files takes: owners and modes as the guest sets them (CHOWN, FOWNER, FSETID),
/// access as the guest's root has it (DAC_OVERRIDE), other users' credentials for what they do
/// (SETUID, SETGID), file capabilities where a share allows them (SETFCAP). Not MKNOD: device
/// nodes are refused.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP);

/// Highest capability number that is dropped; the kernel says which there are.
const MAX_CAPABILITY: u32 = 63;
/// Open files wanted: the server holds one for each inode the guest knows.
const OPEN_FILES: u64 = 1 << 20;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("jail: {step}: {source}; the file server needs root with CAP_SYS_ADMIN")]
pub struct Error {
    step: &'static str,
    source: io::Error,
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error {
        step,
        source: source.into(),
    }
}

/// What the jailed process has.
pub struct Jail {
    /// `/proc/self/fd`, which it could not open any more.
    pub self_descriptors: std::fs::File,
    /// RLIMIT_NOFILE as it is now.
    pub open_files: u64,
}

/// Jails the process, which must have one thread only.
pub fn enter(listener: &OwnedFd, lifeline: &UnixStream) -> Result<Jail, Error> {
    close_others([listener.as_raw_fd(), lifeline.as_raw_fd()]).map_err(step("close_range"))?;
    let namespaces = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: descriptors are not unshared; that is what the function's contract is about.
    unsafe { rustix::thread::unshare_unsafe(namespaces) }.map_err(step("unshare"))?;
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(step("private mounts"))?;
    let self_descriptors = self_descriptors().map_err(step("/proc/self/fd"))?;
    let open_files = limits().map_err(step("limits"))?;
    change_root().map_err(step("empty root"))?;
    rustix::thread::set_thread_groups(&[]).map_err(step("setgroups"))?;
    drop_capabilities().map_err(step("capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    Ok(Jail {
        self_descriptors: self_descriptors.into(),
        open_files,
    })
}

/// Closes everything but standard input, output, error and `keep`.
fn close_others(mut keep: [i32; 2]) -> io::Result<()> {
    keep.sort_unstable();
    let [low, high] = keep.map(|fd| fd as libc::c_uint);
    for (first, last) in [
        (3, low - 1),
        (low + 1, high - 1),
        (high + 1, libc::c_uint::MAX),
    ] {
        // SAFETY: the process has opened nothing by itself yet, so no owner of these exists.
        if first <= last && unsafe { libc::close_range(first, last, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// `/proc/self/fd` of a proc of the own pid namespace that shows nothing but processes.
fn self_descriptors() -> rustix::io::Result<OwnedFd> {
    let proc = mount_detached(
        "proc",
        &[("subset", "pid")],
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(&proc, "self/fd", flags, Mode::empty())
}

/// Makes an empty read-only tmpfs the root. Its mount points are made by the parent.
fn change_root() -> rustix::io::Result<()> {
    let root = mount_detached(
        "tmpfs",
        &[("size", "1m"), ("nr_inodes", "65536"), ("mode", "0755")],
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?;
    rustix::mount::move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    rustix::process::fchdir(&root)?;
    match rustix::process::pivot_root(".", ".") {
        // Both are "." now: the old root is on top of the new one.
        Ok(()) => rustix::mount::unmount(".", UnmountFlags::DETACH)?,
        // An initial ramfs cannot be pivoted away from. The new root lies over it then, and what
        // it takes to get back (CAP_SYS_CHROOT, a descriptor outside) is given up.
        Err(Errno::INVAL) => rustix::process::chroot(".")?,
        Err(error) => return Err(error),
    }
    rustix::process::chdir("/")
}

fn mount_detached(
    kind: &str,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(context.as_fd(), *key, *value)?;
    }
    rustix::mount::fsconfig_create(context.as_fd())?;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// No core files; as many open files as the host allows up to [`OPEN_FILES`].
fn limits() -> io::Result<u64> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    rustix::process::setrlimit(Resource::Core, none)?;
    let now = rustix::process::getrlimit(Resource::Nofile);
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .map_or(OPEN_FILES, |most: u64| most.min(OPEN_FILES));
    let both = |limit| Rlimit {
        current: Some(limit),
        maximum: Some(limit),
    };
    // Raising the hard limit takes CAP_SYS_RESOURCE, which a container may lack.
    if rustix::process::setrlimit(Resource::Nofile, both(most)).is_ok() {
        return Ok(most);
    }
    let hard = now.maximum.unwrap_or(most).min(most);
    rustix::process::setrlimit(Resource::Nofile, both(hard))?;
    Ok(hard)
}

/// Keeps [`CAPABILITIES`] only, as far as the process has them.
fn drop_capabilities() -> rustix::io::Result<()> {
    for number in 0..=MAX_CAPABILITY {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if CAPABILITIES.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The first number the kernel does not know.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let held = rustix::thread::capabilities(None)?.permitted & CAPABILITIES;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: held,
            permitted: held,
            inheritable: CapabilitySet::empty(),
        },
    )
}
