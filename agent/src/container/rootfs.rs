//! A container's root file system and everything mounted in it.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use oci_spec::runtime::Spec;
use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount},
};

use super::{
    devices, exec, hooks,
    init::Sync,
    mounts::{self, attach, clone_tree, new_mount},
    paths::{self, Missing},
    request::{ContainerRequest, Layer, Rootfs, Upper},
    terminal,
};
use crate::{
    boot,
    failure::{During, Failure, Result},
};

/// Where roots are put together; every container sees only its own, being in a mount
/// namespace of its own.
const STAGE: &str = "/mnt";

/// Makes the root, mounts what the specification wants and enters it.
///
/// # Errors
/// The first step that fails, by name.
pub fn enter(sync: &Sync, request: &ContainerRequest) -> Result<exec::Program> {
    let spec = &request.spec;
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .during(|| "make the mounts private".to_owned())?;
    let root = assemble(&request.rootfs)?;
    let root = root.as_fd();
    for mount in spec.mounts().iter().flatten() {
        // The container's shared memory is the pod's when its specification has one.
        mounts::apply(root, mount)?;
    }
    let dev = devices::populate(root, spec)?;
    if request.pod_files {
        bind_pod_files(root, spec)?;
    }
    let terminal = request
        .terminal
        .map(|size| {
            let devpts = paths::open(
                root,
                Path::new("/dev/pts"),
                OFlags::PATH | OFlags::DIRECTORY,
            )
            .during(|| "open the container's /dev/pts".to_owned())?;
            let slave = terminal::open(sync, size, Some(&devpts))?;
            devices::bind_console(&dev, slave.as_fd())?;
            Ok(slave)
        })
        .transpose()?;
    set_names(spec)?;
    set_sysctls(spec)?;
    let about = hooks::About::new(&request.id, spec);
    let stage = hooks::Stage::CreateContainer;
    hooks::run(&hooks::of(spec, stage), stage, &about)?;
    restrict(root, spec)?;
    pivot(root)?;
    if spec
        .root()
        .as_ref()
        .and_then(|root| root.readonly())
        .unwrap_or(false)
    {
        let new_root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .during(|| "open the root".to_owned())?;
        mounts::remount_read_only(new_root.as_fd())
            .during(|| "make the root read-only".to_owned())?;
    }
    let process = spec
        .process()
        .clone()
        .ok_or_else(|| Failure::invalid("the specification has no process"))?;
    Ok(exec::Program {
        process,
        user: request.user.clone(),
        seccomp: spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.seccomp().clone()),
        terminal,
        start_hooks: hooks::of(spec, hooks::Stage::StartContainer),
        about,
    })
}

/// Layers and upper become one mount on [`STAGE`]`/root`; an `O_PATH` descriptor of its root.
fn assemble(rootfs: &Rootfs) -> Result<OwnedFd> {
    let stage = new_mount("tmpfs", Some("caisson"), &[], &[("mode", "0700")], 0)?;
    mount_at(&stage, STAGE)?;
    let made = match &rootfs.upper {
        Upper::Share(entry) => {
            let source = mounts::open_share(entry)?;
            clone_tree(source.as_fd(), true).during(|| format!("use the shared root {entry}"))?
        }
        Upper::Disk { device, read_only } => {
            let flags: &[&str] = if *read_only { &["ro"] } else { &[] };
            new_mount("ext4", Some(device), flags, &[], 0)?
        }
        Upper::ReadOnly if rootfs.layers.len() == 1 => layer_mount(&rootfs.layers[0])?,
        upper => overlay(rootfs, upper)?,
    };
    mount_at(&made, &make_directory("root")?)?;
    let root = format!("{STAGE}/root");
    rustix::fs::open(
        &root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .during(|| format!("open {root}"))
}

fn overlay(rootfs: &Rootfs, upper: &Upper) -> Result<OwnedFd> {
    if rootfs.layers.is_empty() {
        return Err(Failure::invalid(
            "a root file system without layers needs a shared directory",
        ));
    }
    let mut lowers = Vec::new();
    for (index, layer) in rootfs.layers.iter().enumerate() {
        let path = make_directory(&format!("l{index}"))?;
        mount_at(&layer_mount(layer)?, &path)?;
        lowers.push(path);
    }
    let mut data: Vec<(&str, &str)> = lowers
        .iter()
        .rev()
        .map(|lower| ("lowerdir+", lower.as_str()))
        .collect();
    let written = match upper {
        Upper::Tmpfs(bytes) => Some(new_mount(
            "tmpfs",
            Some("upper"),
            &[],
            &[("size", &bytes.to_string()), ("mode", "0755")],
            0,
        )?),
        Upper::Ext4(device) => Some(new_mount("ext4", Some(device), &[], &[], 0)?),
        Upper::ReadOnly | Upper::Share(_) | Upper::Disk { .. } => None,
    };
    let (upper_dir, work_dir) = (format!("{STAGE}/w/upper"), format!("{STAGE}/w/work"));
    if let Some(written) = written {
        mount_at(&written, &make_directory("w")?)?;
        for directory in [&upper_dir, &work_dir] {
            match rustix::fs::mkdir(directory, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error).during(|| format!("create {directory}")),
            }
        }
        copy_root_attributes(&format!("{STAGE}/l{}", rootfs.layers.len() - 1), &upper_dir)?;
        data.push(("upperdir", &upper_dir));
        data.push(("workdir", &work_dir));
    }
    new_mount("overlay", Some("overlay"), &[], &data, 0)
}

/// The root's own owner and mode are those of the uppermost layer's.
fn copy_root_attributes(from: &str, to: &str) -> Result<()> {
    let stat = rustix::fs::stat(from).during(|| format!("look at {from}"))?;
    rustix::fs::chown(
        to,
        Some(rustix::fs::Uid::from_raw(stat.st_uid)),
        Some(rustix::fs::Gid::from_raw(stat.st_gid)),
    )
    .and_then(|()| rustix::fs::chmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777)))
    .during(|| format!("copy the attributes of {from}"))
}

fn layer_mount(layer: &Layer) -> Result<OwnedFd> {
    match layer {
        Layer::Erofs(device) => new_mount("erofs", Some(device), &["ro"], &[], 1),
        Layer::Share(entry) => {
            let source = mounts::open_share(entry)?;
            clone_tree(source.as_fd(), true).during(|| format!("use the shared layer {entry}"))
        }
    }
}

fn make_directory(name: &str) -> Result<String> {
    let path = format!("{STAGE}/{name}");
    rustix::fs::mkdir(&path, Mode::from_raw_mode(0o700)).during(|| format!("create {path}"))?;
    Ok(path)
}

fn mount_at(mount: &OwnedFd, path: &str) -> Result<()> {
    let target = rustix::fs::openat(
        CWD,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .during(|| format!("open {path}"))?;
    attach(mount.as_fd(), target.as_fd()).during(|| format!("mount on {path}"))
}

/// hosts, hostname and resolv.conf of the pod, unless the specification brings its own.
fn bind_pod_files(root: BorrowedFd<'_>, spec: &Spec) -> Result<()> {
    for name in ["hosts", "hostname", "resolv.conf"] {
        let target = Path::new("/etc").join(name);
        if spec
            .mounts()
            .iter()
            .flatten()
            .any(|mount| mount.destination() == &target)
        {
            continue;
        }
        let source = format!("{}/{name}", boot::POD_FILES_DIR);
        let Ok(source) = rustix::fs::open(&source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        else {
            continue; // The pod was not configured with any.
        };
        let target = paths::open_or_create(root, &target, Missing::File)?;
        clone_tree(source.as_fd(), false)
            .and_then(|tree| attach(tree.as_fd(), target.as_fd()))
            .during(|| format!("bind /etc/{name}"))?;
    }
    Ok(())
}

fn set_names(spec: &Spec) -> Result<()> {
    if let Some(hostname) = spec.hostname() {
        rustix::system::sethostname(hostname.as_bytes())
            .during(|| format!("set the hostname {hostname}"))?;
    }
    if let Some(domain) = spec.domainname() {
        rustix::system::setdomainname(domain.as_bytes())
            .during(|| format!("set the domain name {domain}"))?;
    }
    Ok(())
}

/// Only those that a namespace keeps apart: the rest belongs to the pod (`ConfigureSandbox`).
fn set_sysctls(spec: &Spec) -> Result<()> {
    let Some(sysctls) = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.sysctl().as_ref())
    else {
        return Ok(());
    };
    for (name, value) in sysctls {
        crate::sandbox::set_sysctl(name, value)?;
    }
    Ok(())
}

fn restrict(root: BorrowedFd<'_>, spec: &Spec) -> Result<()> {
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    for path in linux.readonly_paths().iter().flatten() {
        mounts::make_read_only(root, Path::new(path))?;
    }
    for path in linux.masked_paths().iter().flatten() {
        mounts::mask(root, Path::new(path))?;
    }
    Ok(())
}

/// The new root becomes `/`; everything of the guest goes out of sight.
fn pivot(root: BorrowedFd<'_>) -> Result<()> {
    rustix::process::fchdir(root)
        .and_then(|()| rustix::process::pivot_root(".", "."))
        // The old root now lies over the new one.
        .and_then(|()| unmount(".", UnmountFlags::DETACH))
        .and_then(|()| rustix::process::chdir("/"))
        .during(|| "enter the container's root".to_owned())
}

/// True when `path` names something below `/proc/sys` in the notation of sysctl(8).
pub fn is_sysctl_name(name: &str) -> bool {
    !name.is_empty()
        && name
            .as_bytes()
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-/*:".contains(byte))
        && !name.split(['.', '/']).any(str::is_empty)
        && Path::new(name).as_os_str().as_bytes().len() < 256
}
