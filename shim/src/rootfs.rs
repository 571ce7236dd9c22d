//! Root file systems as containerd names them: mounts of a snapshotter.
//!
//! EROFS images and ext4 disks (blockfile, device mapper) travel to the guest as disks. Everything else is mounted at `<bundle>/rootfs`, as
//! other runtimes do, and shared as a directory. A file in the bundle tells how many mounts there
//! are before they are made, so that a shim that comes after one that died can undo them.

use std::{
    ffi::CString,
    fs, io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use caisson_sandbox::{Config, RootfsSource, Upper};
use containerd_shim_protos::api::Mount;
use oci_spec::runtime::Spec;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount, mount_bind,
    mount_bind_recursive, mount_remount, move_mount, unmount,
};

use crate::error::Error;

/// Name of the file that counts mounts, in the bundle.
const COUNT: &str = "rootfs.mounts";

/// mount(2) takes a page of options, the terminating zero included.
const MAX_OPTIONS: usize = 4095;

/// Makes a container's root file system from what containerd gives. Blocks.
///
/// # Errors
/// A mount that is not supported or fails; nothing is mounted then.
pub fn prepare(
    config: &Config,
    bundle: &Path,
    spec: &Spec,
    mounts: &[Mount],
) -> Result<RootfsSource, Error> {
    if !mounts.is_empty() && mounts.iter().all(|mount| mount.type_ == "erofs") {
        return Ok(RootfsSource::Layers {
            erofs: mounts
                .iter()
                .map(|mount| mount.source.clone().into())
                .collect(),
            upper: Upper::Disk(config.upper_disk_mib),
        });
    }
    if let [mount] = mounts
        && let Some(disk) = disk_of(mount)
    {
        return Ok(disk);
    }
    let root = spec
        .root()
        .as_ref()
        .map_or(Path::new("rootfs"), |root| root.path());
    if mounts.is_empty() {
        return Ok(RootfsSource::Directory(bundle.join(root)));
    }
    let target = bundle.join("rootfs");
    let plans = mounts.iter().map(Plan::of).collect::<Result<Vec<_>, _>>()?;
    let count = bundle.join(COUNT);
    fs::write(&count, plans.len().to_string()).map_err(Error::file("write", &count))?;
    let mounted = fs::create_dir_all(&target)
        .map_err(Error::file("create", &target))
        .and_then(|()| plans.iter().try_for_each(|plan| plan.mount(&target)));
    match mounted {
        Ok(()) => Ok(RootfsSource::Directory(target)),
        Err(error) => {
            release(bundle)?;
            Err(error)
        }
    }
}

/// The disk that a mount is of, if the guest can mount it just as the host would.
fn disk_of(mount: &Mount) -> Option<RootfsSource> {
    if mount.type_ != "ext4" || !mount.target.is_empty() {
        return None;
    }
    let mut read_only = false;
    let mut in_file = false;
    for option in &mount.options {
        match option.as_str() {
            "loop" => in_file = true,
            "ro" => read_only = true,
            "rw" => read_only = false,
            "defaults" | "async" | "suid" | "dev" | "exec" | "" => {}
            _ => return None,
        }
    }
    let path = PathBuf::from(&mount.source);
    let kind = fs::metadata(&path).ok()?.file_type();
    let fits = if in_file {
        kind.is_file()
    } else {
        kind.is_block_device()
    };
    fits.then_some(RootfsSource::Disk { path, read_only })
}

/// Undoes what [`prepare`] has mounted, if it has. Blocks. Can be repeated.
///
/// # Errors
/// A mount does not go.
pub fn release(bundle: &Path) -> Result<(), Error> {
    let file = bundle.join(COUNT);
    let count = match fs::read_to_string(&file) {
        Ok(text) => text.trim().parse().unwrap_or(1),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::file("read", file)(error)),
    };
    let target = bundle.join("rootfs");
    for _ in 0..count {
        // Lazily: the file server's own view of it goes with the server.
        match unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not mounted (any more), or never made.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => break,
            Err(error) => return Err(Error::file("unmount", target)(error)),
        }
    }
    fs::remove_file(&file).map_err(Error::file("remove", file))
}

/// A mount in the kernel's terms.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    kind: String,
    source: PathBuf,
    flags: MountFlags,
    bind: Option<Bind>,
    options: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bind {
    One,
    Recursive,
}

impl Plan {
    fn of(mount: &Mount) -> Result<Self, Error> {
        let refuse = |what: &str| {
            Err(Error::Unsupported(format!(
                "the root file system has a mount of type {} from {} {what}",
                mount.type_, mount.source
            )))
        };
        if !mount.target.is_empty() {
            return refuse(&format!("at {}, below the root", mount.target));
        }
        let mut plan = Self {
            kind: mount.type_.clone(),
            source: mount.source.clone().into(),
            flags: MountFlags::empty(),
            bind: (mount.type_ == "bind").then_some(Bind::One),
            options: Vec::new(),
        };
        for option in &mount.options {
            match option.as_str() {
                "bind" => plan.bind = plan.bind.or(Some(Bind::One)),
                "rbind" => plan.bind = Some(Bind::Recursive),
                "ro" => plan.flags |= MountFlags::RDONLY,
                "rw" => plan.flags -= MountFlags::RDONLY,
                "nosuid" => plan.flags |= MountFlags::NOSUID,
                "nodev" => plan.flags |= MountFlags::NODEV,
                "noexec" => plan.flags |= MountFlags::NOEXEC,
                "noatime" => plan.flags |= MountFlags::NOATIME,
                "nodiratime" => plan.flags |= MountFlags::NODIRATIME,
                "relatime" => plan.flags |= MountFlags::RELATIME,
                "strictatime" => plan.flags |= MountFlags::STRICTATIME,
                "sync" => plan.flags |= MountFlags::SYNCHRONOUS,
                "dirsync" => plan.flags |= MountFlags::DIRSYNC,
                "defaults" | "async" | "suid" | "dev" | "exec" | "" => {}
                "loop" => {
                    let others: Vec<_> = mount.options.iter().filter(|o| *o != "loop").collect();
                    return refuse(&format!(
                        "by a loop device with the options {others:?}; only ext4 with ro or rw is supported"
                    ));
                }
                other
                    if ["uidmap=", "gidmap=", "X-containerd."]
                        .iter()
                        .any(|prefix| other.starts_with(prefix)) =>
                {
                    return refuse(&format!("with {other}, which is not supported"));
                }
                other => plan.options.push(other.to_owned()),
            }
        }
        Ok(plan)
    }

    fn mount(&self, target: &Path) -> Result<(), Error> {
        let failed = |error: io::Error| {
            let what = format!("{} from {}: {error}", self.kind, self.source.display());
            Error::file("mount on", target)(io::Error::new(error.kind(), what))
        };
        let options = self.options.join(",");
        let mounted = match self.bind {
            Some(bind) => self.mount_bind(bind, target),
            None if self.kind == "overlay" && options.len() > MAX_OPTIONS => {
                self.mount_long_overlay(target)
            }
            None if options.len() > MAX_OPTIONS => Err(rustix::io::Errno::TOOBIG),
            None => {
                let options = CString::new(options).map_err(|error| failed(error.into()))?;
                mount(
                    &self.source,
                    target,
                    self.kind.as_str(),
                    self.flags,
                    options.as_c_str(),
                )
            }
        };
        mounted.map_err(|error| failed(error.into()))
    }

    fn mount_bind(&self, bind: Bind, target: &Path) -> rustix::io::Result<()> {
        match bind {
            Bind::One => mount_bind(&self.source, target)?,
            Bind::Recursive => mount_bind_recursive(&self.source, target)?,
        }
        if self.flags.is_empty() {
            return Ok(());
        }
        // Flags count on a remount only (mount(2), "Creating a bind mount").
        mount_remount(target, self.flags | MountFlags::BIND, c"").inspect_err(|_| {
            let _ = unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        })
    }

    /// Layer by layer (kernel: filesystems/overlayfs, "lowerdir+", since 6.8), as all together they
    /// are longer than mount(2) takes.
    fn mount_long_overlay(&self, target: &Path) -> rustix::io::Result<()> {
        let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for option in &self.options {
            match option.split_once('=') {
                Some(("lowerdir", layers)) => {
                    for layer in layers.split(':') {
                        fsconfig_set_string(&fs, "lowerdir+", layer)?;
                    }
                }
                Some((key, value)) => fsconfig_set_string(&fs, key, value)?,
                None => fsconfig_set_flag(&fs, option.as_str())?,
            }
        }
        if self.flags.contains(MountFlags::RDONLY) {
            fsconfig_set_flag(&fs, "ro")?;
        }
        fsconfig_create(&fs)?;
        let mut attributes = MountAttrFlags::empty();
        for (flag, attribute) in [
            (MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
            (MountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
            (MountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
            (MountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        ] {
            if self.flags.contains(flag) {
                attributes |= attribute;
            }
        }
        let mounted = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        move_mount(
            &mounted,
            "",
            rustix::fs::CWD,
            target,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        serde_json::from_str(r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"}}"#).unwrap()
    }

    fn mount_of(kind: &str, source: &Path, options: &[&str]) -> Mount {
        Mount {
            type_: kind.to_owned(),
            source: source.display().to_string(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        }
    }

    fn try_prepare(bundle: &Path, mounts: &[Mount]) -> Result<RootfsSource, Error> {
        prepare(&Config::default(), bundle, &spec(), mounts)
    }

    #[test]
    fn erofs_images_are_disks_and_no_mount_is_the_bundles_directory() {
        let bundle = Path::new("/nowhere/bundle");
        let layers = ["/a", "/b"].map(|source| mount_of("erofs", Path::new(source), &["ro"]));
        assert_eq!(
            try_prepare(bundle, &layers).unwrap(),
            RootfsSource::Layers {
                erofs: vec!["/a".into(), "/b".into()],
                upper: Upper::Disk(Config::default().upper_disk_mib)
            }
        );
        assert_eq!(
            try_prepare(bundle, &[]).unwrap(),
            RootfsSource::Directory("/nowhere/bundle/rootfs".into())
        );
    }

    #[test]
    fn a_disk_in_a_file_is_passed_on_unless_it_needs_more_than_that() {
        let bundle = tempfile::tempdir().unwrap();
        let path = bundle.path().join("disk");
        fs::write(&path, "").unwrap();
        let of = |options: &[&str]| try_prepare(bundle.path(), &[mount_of("ext4", &path, options)]);
        for (options, read_only) in [(&["loop"][..], false), (&["loop", "ro"], true)] {
            let path = path.clone();
            assert_eq!(of(options).unwrap(), RootfsSource::Disk { path, read_only });
        }
        let error = of(&["loop", "data=journal"]).unwrap_err().to_string();
        assert!(error.contains("data=journal"), "{error}");
    }

    #[test]
    fn what_is_not_supported_is_refused_before_anything_is_mounted() {
        let bundle = tempfile::tempdir().unwrap();
        for options in [["loop"], ["uidmap=0:1:2"], ["X-containerd.mkdir.path=/x"]] {
            let mounts = [mount_of("ext4", Path::new("/disk"), &options)];
            let error = try_prepare(bundle.path(), &mounts).unwrap_err();
            assert!(matches!(error, Error::Unsupported(_)), "{error}");
        }
        let mut below = mount_of("bind", Path::new("/x"), &[]);
        below.target = "/sub".to_owned();
        assert!(try_prepare(bundle.path(), &[below]).is_err());
        assert_eq!(fs::read_dir(bundle.path()).unwrap().count(), 0);
    }

    /// Runs a test with a bundle, if it may mount.
    fn as_root(test: impl FnOnce(&Path) + Send + 'static) {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: mounting takes root");
            return;
        }
        let bundle = tempfile::tempdir().unwrap();
        let path = bundle.path().to_owned();
        test(&path);
    }

    #[test]
    fn bind_read_only_and_back() {
        as_root(|bundle| {
            let source = bundle.join("source");
            fs::create_dir(&source).unwrap();
            fs::write(source.join("file"), "text").unwrap();
            let mounts = [mount_of("bind", &source, &["rbind", "ro"])];
            let target = bundle.join("rootfs");
            assert_eq!(
                try_prepare(bundle, &mounts).unwrap(),
                RootfsSource::Directory(target.clone())
            );
            assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "text");
            assert!(fs::write(target.join("new"), "").is_err());
            release(bundle).unwrap();
            assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
            release(bundle).unwrap();
            assert!(!bundle.join(COUNT).exists());
        });
    }

    #[test]
    fn a_failing_mount_leaves_nothing() {
        as_root(|bundle| {
            let source = bundle.join("source");
            fs::create_dir(&source).unwrap();
            fs::write(source.join("file"), "").unwrap();
            let mounts = [
                mount_of("bind", &source, &[]),
                mount_of("bind", Path::new("/nowhere/at/all"), &[]),
            ];
            let error = try_prepare(bundle, &mounts).unwrap_err().to_string();
            assert!(error.contains("/nowhere/at/all"), "{error}");
            assert_eq!(fs::read_dir(bundle.join("rootfs")).unwrap().count(), 0);
            assert!(!bundle.join(COUNT).exists());
        });
    }

    #[test]
    fn overlays_of_many_layers() {
        as_root(|bundle| {
            // overlayfs does not stack on every file system; a tmpfs is one it does.
            let disk = bundle.join("disk");
            fs::create_dir(&disk).unwrap();
            mount("tmpfs", &disk, "tmpfs", MountFlags::empty(), c"").unwrap();
            for directory in ["upper", "work"] {
                fs::create_dir(disk.join(directory)).unwrap();
            }
            for count in [2, 100] {
                let layers: Vec<String> = (0..count)
                    .map(|number| {
                        let layer = disk.join(format!("{number:03}-{}", "x".repeat(60)));
                        fs::create_dir_all(&layer).unwrap();
                        fs::write(layer.join(format!("of{number}")), "").unwrap();
                        layer.display().to_string()
                    })
                    .collect();
                let lower = format!("lowerdir={}", layers.join(":"));
                let upper = format!("upperdir={}", disk.join("upper").display());
                let work = format!("workdir={}", disk.join("work").display());
                let mounts = [mount_of(
                    "overlay",
                    Path::new("overlay"),
                    &[&lower, &upper, &work],
                )];
                let prepared = try_prepare(bundle, &mounts);
                if count > 2 && prepared.is_err() {
                    println!("skipped: this kernel takes no overlay of {count} layers");
                    continue;
                }
                prepared.unwrap();
                let target = bundle.join("rootfs");
                assert!(target.join(format!("of{}", count - 1)).exists());
                fs::write(target.join("new"), "").unwrap();
                assert!(disk.join("upper/new").exists());
                release(bundle).unwrap();
            }
            unmount(&disk, UnmountFlags::DETACH).unwrap();
        });
    }
}
