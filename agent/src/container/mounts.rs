//! Mounts of an OCI specification, made with the descriptor-based mount API, so
//! that no target is ever named by a path that the image could bend.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use caisson_protocol::{HUGE_PREFIX, POD_SHM, PUBLISHED_PREFIX, SHARE_PREFIX};
use oci_spec::runtime::Mount;
use rustix::{
    fs::{AtFlags, CWD, FileType, OFlags},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
    },
};

use super::{
    copy_up::{copy_tree, fill_if_empty},
    paths::{self, Missing},
};
use crate::{
    boot,
    failure::{During, Failure, Kind, Result},
};

/// Options of a mount, sorted by who takes them (mount(8), OCI runtime-spec "mounts").
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Set on the mount.
    pub set: u64,
    /// Cleared on it (of a bind mount, whose source may have them).
    pub clear: u64,
    /// Set on the whole tree (`rro` and its like).
    pub set_recursive: u64,
    /// `MS_SHARED` and its like, 0 = as it comes.
    pub propagation: u64,
    /// To the whole tree.
    pub propagation_recursive: bool,
    /// `bind` or `rbind`.
    pub bind: bool,
    /// `rbind`.
    pub bind_recursive: bool,
    /// Flags of the superblock ("ro", "sync", …).
    pub flags: Vec<String>,
    /// `key=value` for the file system.
    pub data: Vec<(String, String)>,
    /// Copy what the image has at the target into the tmpfs.
    pub tmpcopyup: bool,
    /// The same into the source of a bind mount while that is empty, as docker fills new volumes.
    pub fills: bool,
}

const ATTR_RDONLY: u64 = 0x1;
const ATTR_NOSUID: u64 = 0x2;
const ATTR_NODEV: u64 = 0x4;
const ATTR_NOEXEC: u64 = 0x8;
const ATTR_ATIME: u64 = 0x70;
const ATTR_NOATIME: u64 = 0x10;
const ATTR_STRICTATIME: u64 = 0x20;
const ATTR_NODIRATIME: u64 = 0x80;
const ATTR_NOSYMFOLLOW: u64 = 0x0020_0000;

impl Options {
    /// Sorts `options`.
    ///
    /// # Errors
    /// Options that Caisson does not support, so that none is ignored.
    pub fn parse(options: &[String]) -> Result<Self> {
        let mut sorted = Self::default();
        for option in options {
            sorted.add(option)?;
        }
        Ok(sorted)
    }

    fn add(&mut self, option: &str) -> Result<()> {
        match option {
            "defaults" | "rw" | "suid" | "dev" | "exec" | "diratime" | "symfollow" => {
                self.clear |= match option {
                    "rw" => ATTR_RDONLY,
                    "suid" => ATTR_NOSUID,
                    "dev" => ATTR_NODEV,
                    "exec" => ATTR_NOEXEC,
                    "diratime" => ATTR_NODIRATIME,
                    "symfollow" => ATTR_NOSYMFOLLOW,
                    _ => 0,
                };
                self.set &= !self.clear;
            }
            "ro" => self.set |= ATTR_RDONLY,
            "nosuid" => self.set |= ATTR_NOSUID,
            "nodev" => self.set |= ATTR_NODEV,
            "noexec" => self.set |= ATTR_NOEXEC,
            "nodiratime" => self.set |= ATTR_NODIRATIME,
            "nosymfollow" => self.set |= ATTR_NOSYMFOLLOW,
            "noatime" => self.set_atime(ATTR_NOATIME),
            "strictatime" => self.set_atime(ATTR_STRICTATIME),
            "relatime" | "atime" => self.set_atime(0),
            "rro" => self.set_recursive |= ATTR_RDONLY,
            "rnosuid" => self.set_recursive |= ATTR_NOSUID,
            "rnodev" => self.set_recursive |= ATTR_NODEV,
            "rnoexec" => self.set_recursive |= ATTR_NOEXEC,
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.bind_recursive) = (true, true),
            "tmpcopyup" => self.tmpcopyup = true,
            "x-caisson.copyup" => self.fills = true,
            "sync" | "async" | "dirsync" | "lazytime" | "nolazytime" => {
                self.flags.push(option.to_owned());
            }
            "shared" | "rshared" => self.propagate(libc::MS_SHARED, option),
            "slave" | "rslave" => self.propagate(libc::MS_SLAVE, option),
            "private" | "rprivate" => self.propagate(libc::MS_PRIVATE, option),
            "unbindable" | "runbindable" => self.propagate(libc::MS_UNBINDABLE, option),
            "remount" | "idmap" | "ridmap" => {
                return Err(Failure::new(
                    Kind::Unimplemented,
                    format!("mount option \"{option}\" is not supported"),
                ));
            }
            _ => match option.split_once('=') {
                Some((key, value)) => self.data.push((key.to_owned(), value.to_owned())),
                None => self.flags.push(option.to_owned()),
            },
        }
        Ok(())
    }

    fn set_atime(&mut self, value: u64) {
        self.set = self.set & !ATTR_ATIME | value;
        self.clear |= ATTR_ATIME;
    }

    fn propagate(&mut self, kind: u64, option: &str) {
        self.propagation = kind;
        self.propagation_recursive = option.starts_with('r');
    }
}

/// A new mount of `kind`, attached nowhere yet.
///
/// # Errors
/// What the file system refuses, with its own words when it has some.
pub fn new_mount(
    kind: &str,
    source: Option<&str>,
    flags: &[&str],
    data: &[(&str, &str)],
    attributes: u64,
) -> Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
        .during(|| format!("use the file system {kind}"))?;
    let explain = |what: String| {
        let log = file_system_log(&context);
        move || {
            if log.is_empty() {
                what
            } else {
                format!("{what} ({log})")
            }
        }
    };
    if let Some(source) = source {
        fsconfig_set_string(&context, "source", source)
            .map_err(|error| (error, "source".to_owned()))
            .or_else(|(error, _)| {
                Err(error).during(explain(format!("mount {kind} from {source}")))
            })?;
    }
    for flag in flags {
        if let Err(error) = fsconfig_set_flag(&context, *flag) {
            return Err(error).during(explain(format!("mount {kind} with \"{flag}\"")));
        }
    }
    for (key, value) in data {
        if let Err(error) = fsconfig_set_string(&context, *key, *value) {
            return Err(error).during(explain(format!("mount {kind} with \"{key}={value}\"")));
        }
    }
    if let Err(error) = fsconfig_create(&context) {
        return Err(error).during(explain(format!(
            "mount {kind} from {}",
            source.unwrap_or("nothing")
        )));
    }
    fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::from_bits_retain(u32::try_from(attributes).unwrap_or(0)),
    )
    .during(|| format!("mount {kind}"))
}

/// What the file system said about its failure (fsopen(2), "message retrieval").
fn file_system_log(context: &OwnedFd) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 512];
    while let Ok(length @ 1..) = rustix::io::read(context, &mut buffer) {
        text.extend_from_slice(
            buffer[..length]
                .strip_prefix(b"e ")
                .unwrap_or(&buffer[..length]),
        );
        text.push(b' ');
    }
    String::from_utf8_lossy(&text).trim().to_owned()
}

/// A detached copy of the mounts at `source`.
///
/// # Errors
/// Those of open_tree(2).
pub fn clone_tree(source: BorrowedFd<'_>, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(source, "", flags)
}

/// Puts a detached mount on `target`.
///
/// # Errors
/// Those of move_mount(2).
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> rustix::io::Result<()> {
    move_mount(
        mount,
        "",
        target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

/// mount_setattr(2) on the mount that `fd` is the root of.
///
/// # Errors
/// Those of the system call.
pub fn set_attributes(
    fd: BorrowedFd<'_>,
    set: u64,
    clear: u64,
    propagation: u64,
    recursive: bool,
) -> rustix::io::Result<()> {
    // SAFETY: an all-zero mount_attr asks for nothing.
    let mut attributes: libc::mount_attr = unsafe { std::mem::zeroed() };
    attributes.attr_set = set;
    attributes.attr_clr = clear;
    attributes.propagation = propagation;
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated constant, the structure lives through the call and
    // its size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    let errno = std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO);
    Err(rustix::io::Errno::from_raw_os_error(errno))
}

/// Makes one mount of the specification beneath `root`.
///
/// # Errors
/// An unsupported option, a missing source, whatever the kernel refuses.
pub fn apply(root: BorrowedFd<'_>, mount: &Mount) -> Result<()> {
    let target = mount.destination();
    let options = Options::parse(mount.options().as_deref().unwrap_or_default())?;
    let kind = mount.typ().as_deref().unwrap_or("");
    let on_target = |error: Failure| {
        Failure::new(
            error.kind,
            format!("mount on {}: {}", target.display(), error.message),
        )
    };
    if options.bind || kind == "bind" {
        bind(root, mount, &options).map_err(on_target)
    } else {
        fresh(root, mount, kind, &options).map_err(on_target)
    }
}

fn fresh(root: BorrowedFd<'_>, mount: &Mount, kind: &str, options: &Options) -> Result<()> {
    // cgroup v1 does not exist in the guest; "cgroup" means the one hierarchy.
    let kind = if kind == "cgroup" { "cgroup2" } else { kind };
    let allowed = [
        "proc",
        "sysfs",
        "tmpfs",
        "devpts",
        "mqueue",
        "cgroup2",
        "overlay",
        "debugfs",
        "tracefs",
        "securityfs",
        "bpf",
        "ramfs",
        "hugetlbfs",
    ];
    if !allowed.contains(&kind) {
        return Err(Failure::new(
            Kind::Unimplemented,
            format!("file system type \"{kind}\" is not supported"),
        ));
    }
    let target = paths::open_or_create(root, mount.destination(), Missing::Directory)?;
    let source = mount
        .source()
        .as_ref()
        .and_then(|source| source.to_str())
        .unwrap_or(kind);
    let flags: Vec<&str> = options
        .flags
        .iter()
        .map(String::as_str)
        // Every instance of devpts is new, and the cgroup hierarchy has its options already.
        .filter(|flag| *flag != "newinstance")
        .collect();
    let data: Vec<(&str, &str)> = options
        .data
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect();
    let made = new_mount(
        kind,
        Some(source),
        &flags,
        &data,
        options.set & !ATTR_RDONLY,
    )?;
    if options.tmpcopyup {
        if kind != "tmpfs" {
            return Err(Failure::invalid(format!(
                "\"tmpcopyup\" is an option of tmpfs, not of {kind}"
            )));
        }
        copy_tree(target.as_fd(), made.as_fd())
            .during(|| "copy what the image has there".to_owned())?;
    }
    attach(made.as_fd(), target.as_fd()).during(|| "attach it".to_owned())?;
    finish(made.as_fd(), options)
}

fn bind(root: BorrowedFd<'_>, mount: &Mount, options: &Options) -> Result<()> {
    if let Some(unknown) = options.flags.first() {
        return Err(Failure::invalid(format!(
            "\"{unknown}\" is no option of a bind mount"
        )));
    }
    if let Some((key, _)) = options.data.first() {
        return Err(Failure::invalid(format!(
            "\"{key}=\" is no option of a bind mount"
        )));
    }
    let source = mount
        .source()
        .as_ref()
        .ok_or_else(|| Failure::invalid("a bind mount needs a source"))?;
    let source_fd = open_source(source)?;
    let stat = rustix::fs::fstat(&source_fd).during(|| format!("look at {}", source.display()))?;
    let missing = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        Missing::Directory
    } else {
        Missing::File
    };
    let target = paths::open_or_create(root, mount.destination(), missing)?;
    if options.fills && missing == Missing::Directory {
        fill_if_empty(target.as_fd(), source_fd.as_fd())
            .during(|| "copy what the image has there".to_owned())?;
    }
    let tree = clone_tree(source_fd.as_fd(), options.bind_recursive)
        .during(|| format!("bind {}", source.display()))?;
    attach(tree.as_fd(), target.as_fd()).during(|| "attach it".to_owned())?;
    finish(tree.as_fd(), options)
}

/// The source of a bind mount: an entry of the pod's share, a directory of one of its hugetlbfs, a
/// published volume, or the pod's shared memory ([`boot::SHM_DIR`]). Every other path names something
/// of the host that is not here.
fn open_source(source: &Path) -> Result<OwnedFd> {
    let text = source.to_string_lossy();
    if let Some(entry) = text.strip_prefix(SHARE_PREFIX) {
        return open_share(entry);
    }
    if let Some(directory) = text.strip_prefix(HUGE_PREFIX) {
        return open_beneath(boot::HUGE_DIR, directory);
    }
    if let Some(number) = text.strip_prefix(PUBLISHED_PREFIX) {
        return open_beneath(boot::PUBLISHED_DIR, number);
    }
    if source == Path::new(POD_SHM) {
        return rustix::fs::open(
            boot::SHM_DIR,
            OFlags::PATH | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .during(|| format!("open {}", source.display()));
    }
    Err(Failure::new(
        Kind::NotFound,
        format!(
            "bind source {} is not shared with the guest",
            source.display()
        ),
    ))
}

/// Opens an entry of the pod's share.
///
/// # Errors
/// No such entry.
pub fn open_share(entry: &str) -> Result<OwnedFd> {
    open_beneath(boot::SHARE_DIR, entry)
}

fn open_beneath(directory: &str, entry: &str) -> Result<OwnedFd> {
    let opened = rustix::fs::openat(
        CWD,
        directory,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .during(|| format!("open {directory}"))?;
    paths::open(opened.as_fd(), Path::new(entry), OFlags::PATH)
        .during(|| format!("find {directory}/{entry}"))
}

fn finish(made: BorrowedFd<'_>, options: &Options) -> Result<()> {
    if options.set | options.clear != 0 {
        set_attributes(made, options.set, options.clear, 0, false)
            .during(|| "set the mount's options".to_owned())?;
    }
    if options.set_recursive != 0 {
        set_attributes(made, options.set_recursive, 0, 0, true)
            .during(|| "set the options of the mounts below".to_owned())?;
    }
    if options.propagation != 0 {
        set_attributes(
            made,
            0,
            0,
            options.propagation,
            options.propagation_recursive,
        )
        .during(|| "set the mount's propagation".to_owned())?;
    }
    Ok(())
}

/// Hides `path` beneath `root` (OCI "maskedPaths"); what is not there needs no hiding.
///
/// # Errors
/// Those of the mount.
pub fn mask(root: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let Ok(target) = paths::open(root, path, OFlags::PATH) else {
        return Ok(());
    };
    let stat = rustix::fs::fstat(&target).during(|| format!("look at {}", path.display()))?;
    let cover = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        new_mount(
            "tmpfs",
            Some("tmpfs"),
            &["ro"],
            &[("size", "0"), ("mode", "755")],
            ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC,
        )?
    } else {
        let null = rustix::fs::open(
            "/dev/null",
            OFlags::PATH | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .during(|| "open /dev/null".to_owned())?;
        clone_tree(null.as_fd(), false).during(|| "bind /dev/null".to_owned())?
    };
    attach(cover.as_fd(), target.as_fd()).during(|| format!("mask {}", path.display()))
}

/// Makes `path` beneath `root` read-only with all below (OCI "readonlyPaths").
///
/// # Errors
/// Those of the mount.
pub fn make_read_only(root: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let Ok(target) = paths::open(root, path, OFlags::PATH) else {
        return Ok(());
    };
    let tree = clone_tree(target.as_fd(), true).during(|| format!("bind {}", path.display()))?;
    set_attributes(tree.as_fd(), ATTR_RDONLY, 0, 0, true)
        .and_then(|()| attach(tree.as_fd(), target.as_fd()))
        .during(|| format!("make {} read-only", path.display()))
}

/// Makes the mount whose root is `fd` read-only, nothing below it.
///
/// # Errors
/// Those of mount_setattr(2).
pub fn remount_read_only(fd: BorrowedFd<'_>) -> rustix::io::Result<()> {
    set_attributes(fd, ATTR_RDONLY, 0, 0, false)
}

/// Whether `fd` is on a file system that a mount made; used to tell a spec's own /dev.
pub fn same_mount(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    let id = |fd| {
        rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, rustix::fs::StatxFlags::MNT_ID)
            .map(|stat| stat.stx_mnt_id)
            .ok()
    };
    id(a) == id(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Options {
        Options::parse(&options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn docker_defaults() {
        let options = parse(&["nosuid", "strictatime", "mode=755", "size=65536k"]);
        assert_eq!(options.set, ATTR_NOSUID | ATTR_STRICTATIME);
        assert_eq!(options.clear, ATTR_ATIME);
        assert_eq!(options.data[1], ("size".to_owned(), "65536k".to_owned()));
    }

    #[test]
    fn later_options_win() {
        assert_eq!(parse(&["ro", "rw"]).set, 0);
        let options = parse(&["rbind", "ro", "rprivate"]);
        assert!(options.bind && options.bind_recursive && options.propagation_recursive);
        assert_eq!(options.propagation, libc::MS_PRIVATE);
    }

    #[test]
    fn nothing_is_ignored() {
        assert!(Options::parse(&["idmap".to_owned()]).is_err());
        assert_eq!(parse(&["newinstance"]).flags, ["newinstance"]);
    }
}
