//! /dev of a container: the nodes every container has and those of its specification.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::{LinuxDeviceType, Spec};
use rustix::{
    fs::{FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, makedev, mknodat, symlinkat},
    io::Errno,
};

use super::{
    mounts::{attach, clone_tree, same_mount},
    paths::{self, Missing},
};
use crate::failure::{During, Failure, Result};

/// Nodes that the OCI runtime specification promises ("Default Devices").
const DEFAULT: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// Fills /dev when a mount of the specification made it; a bound /dev is left alone.
/// Returns an `O_PATH` descriptor of it.
///
/// # Errors
/// A node that cannot be made.
pub fn populate(root: BorrowedFd<'_>, spec: &Spec) -> Result<OwnedFd> {
    let dev = paths::open_or_create(root, Path::new("/dev"), Missing::Directory)?;
    let bound = spec.mounts().iter().flatten().any(|mount| {
        mount.destination() == Path::new("/dev") && mount.typ().as_deref() == Some("bind")
    });
    if bound {
        return Ok(dev);
    }
    if same_mount(root, dev.as_fd()) {
        log::warn!(
            "the container's specification mounts nothing on /dev: its nodes go into the root file system"
        );
    }
    for (name, major, minor) in DEFAULT {
        node(
            &dev,
            Path::new(name),
            FileType::CharacterDevice,
            (major, minor),
            0o666,
            (0, 0),
        )?;
    }
    for (to, name) in LINKS {
        match symlinkat(to, &dev, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).during(|| format!("link /dev/{name}")),
        }
    }
    let devices = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.devices().as_ref());
    for device in devices.into_iter().flatten() {
        let kind = match device.typ() {
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
            LinuxDeviceType::P => FileType::Fifo,
            LinuxDeviceType::A => {
                return Err(Failure::invalid("a device node cannot be of type \"a\""));
            }
        };
        let number = |value: i64| {
            u32::try_from(value)
                .map_err(|_| Failure::invalid(format!("{value} is no device number")))
        };
        let path = device.path();
        let parent = paths::open_or_create(
            root,
            path.parent().unwrap_or(Path::new("/")),
            Missing::Directory,
        )?;
        let name = path.file_name().ok_or_else(|| {
            Failure::invalid(format!("{} is no path of a device", path.display()))
        })?;
        node(
            &parent,
            Path::new(name),
            kind,
            (number(device.major())?, number(device.minor())?),
            device.file_mode().unwrap_or(0o666) & 0o777,
            (device.uid().unwrap_or(0), device.gid().unwrap_or(0)),
        )?;
    }
    Ok(dev)
}

fn node(
    directory: &OwnedFd,
    name: &Path,
    kind: FileType,
    (major, minor): (u32, u32),
    mode: u32,
    (uid, gid): (u32, u32),
) -> Result<()> {
    let during = || format!("make the device node {}", name.display());
    match mknodat(
        directory,
        name,
        kind,
        Mode::from_raw_mode(mode),
        makedev(major, minor),
    ) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        Err(error) => return Err(error).during(during),
    }
    chownat(
        directory,
        name,
        Some(Uid::from_raw(uid)),
        Some(Gid::from_raw(gid)),
        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
    )
    .during(during)?;
    // mknod(2) has taken the agent's umask off, which is 022 as the kernel gave it. Nothing runs yet
    // that could have put a link in the node's place.
    chmodat(
        directory,
        name,
        Mode::from_raw_mode(mode),
        rustix::fs::AtFlags::empty(),
    )
    .during(during)
}

/// /dev/console is the container's terminal.
///
/// # Errors
/// Those of the mount.
pub fn bind_console(dev: &OwnedFd, slave: BorrowedFd<'_>) -> Result<()> {
    let target = paths::open_or_create(dev.as_fd(), Path::new("console"), Missing::File)?;
    // An O_PATH descriptor of the slave: open_tree takes no other.
    let source = rustix::fs::open(
        paths::proc_path(slave),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .during(|| "find the terminal".to_owned())?;
    clone_tree(source.as_fd(), false)
        .and_then(|tree| attach(tree.as_fd(), target.as_fd()))
        .during(|| "bind the terminal to /dev/console".to_owned())
}
