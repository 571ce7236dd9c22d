//! What PID 1 does before anything else: file systems, cgroups, the loopback interface.

use std::{fs, io::ErrorKind, path::Path};

use caisson_protocol::agent::BootStage;
use rustix::{
    mount::{MountFlags, mount},
    process::{Resource, Rlimit, setrlimit},
};

use crate::failure::{During, Result};

/// Controllers that containers may have.
pub const CONTROLLERS: &str = "+cpuset +cpu +io +memory +hugetlb +pids";

/// Where the pod's virtio-fs share is mounted, out of every container's sight.
pub const SHARE_DIR: &str = "/run/caisson/share";

/// Where the pod's hugetlbfs are mounted, each on a directory named by its number.
pub const HUGE_DIR: &str = "/run/caisson/huge";

/// Files that the agent makes for the pod: hosts, hostname, resolv.conf.
pub const POD_FILES_DIR: &str = "/run/caisson/pod";

/// Where copies of published volumes are, by their numbers.
pub const PUBLISHED_DIR: &str = "/run/caisson/published";

/// Shared memory of the pod, bound to every container's /dev/shm.
pub const SHM_DIR: &str = "/dev/shm";

/// Descriptors that a process may have open unless its container's specification says otherwise:
/// what container runtimes' services have elsewhere, and the kernel's own bound by default.
const DESCRIPTORS: u64 = 1 << 20;

/// Greatest number of PIDs (Linux, `PID_MAX_LIMIT` of 64-bit kernels).
const PIDS: i64 = 4 << 20;

/// When the guest reached which stage.
#[derive(Debug, Clone, Default)]
pub struct Stages(Vec<(&'static str, u64)>);

impl Stages {
    /// Notes the time.
    pub fn reached(&mut self, name: &'static str) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let nanoseconds = now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs();
        self.0.push((name, nanoseconds));
    }

    /// As messages of the protocol.
    pub fn to_proto(&self) -> Vec<BootStage> {
        self.0
            .iter()
            .map(|(name, nanoseconds)| BootStage {
                name: (*name).to_owned(),
                nanoseconds: *nanoseconds,
                ..Default::default()
            })
            .collect()
    }
}

struct Volume {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static str,
}

const fn flags(parts: &[MountFlags]) -> MountFlags {
    let mut bits = 0;
    let mut index = 0;
    while index < parts.len() {
        bits |= parts[index].bits();
        index += 1;
    }
    MountFlags::from_bits_retain(bits)
}

const SAFE: MountFlags = flags(&[MountFlags::NOSUID, MountFlags::NODEV, MountFlags::NOEXEC]);
const NO_SUID: MountFlags = flags(&[MountFlags::NOSUID, MountFlags::NOEXEC]);
const NO_DEV: MountFlags = flags(&[MountFlags::NOSUID, MountFlags::NODEV]);

const VOLUMES: [Volume; 9] = [
    Volume {
        kind: "proc",
        target: "/proc",
        flags: SAFE,
        data: "",
    },
    Volume {
        kind: "sysfs",
        target: "/sys",
        flags: SAFE,
        data: "",
    },
    // The kernel has mounted it already when CONFIG_DEVTMPFS_MOUNT is set.
    Volume {
        kind: "devtmpfs",
        target: "/dev",
        flags: NO_SUID,
        data: "mode=0755",
    },
    Volume {
        kind: "tmpfs",
        target: "/run",
        flags: NO_DEV,
        data: "mode=0755",
    },
    Volume {
        kind: "tmpfs",
        target: "/tmp",
        flags: NO_DEV,
        data: "mode=1777",
    },
    Volume {
        kind: "devpts",
        target: "/dev/pts",
        flags: NO_SUID,
        data: "mode=0620,ptmxmode=0666,gid=5",
    },
    Volume {
        kind: "tmpfs",
        target: SHM_DIR,
        flags: SAFE,
        data: "mode=1777,size=64m",
    },
    Volume {
        kind: "mqueue",
        target: "/dev/mqueue",
        flags: SAFE,
        data: "",
    },
    Volume {
        kind: "cgroup2",
        target: "/sys/fs/cgroup",
        flags: SAFE,
        data: "nsdelegate",
    },
];

/// Mounts the agent's file systems and readies cgroups.
///
/// # Errors
/// The first mount that fails; without any of them no container can run.
pub fn mount_all() -> Result<()> {
    for volume in &VOLUMES {
        if let Err(error) = fs::create_dir_all(volume.target)
            && error.kind() != ErrorKind::ReadOnlyFilesystem
        {
            return Err(error).during(|| format!("create {}", volume.target));
        }
        let data = std::ffi::CString::new(volume.data).unwrap_or_default();
        match mount(
            volume.kind,
            volume.target,
            volume.kind,
            volume.flags,
            data.as_c_str(),
        ) {
            Err(rustix::io::Errno::BUSY) if volume.kind == "devtmpfs" => {}
            result => result.during(|| format!("mount {} on {}", volume.kind, volume.target))?,
        }
    }
    for directory in [SHARE_DIR, POD_FILES_DIR, PUBLISHED_DIR] {
        fs::create_dir_all(directory).during(|| format!("create {directory}"))?;
    }
    ready_cgroups()?;
    protect_self();
    raise_limits();
    Ok(())
}

/// The agent in a leaf of its own, everything else below [`crate::cgroup::CONTAINERS`].
fn ready_cgroups() -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let own = root.join("agent");
    let containers = root.join(crate::cgroup::CONTAINERS);
    for directory in [&own, &containers] {
        fs::create_dir(directory).during(|| format!("create {}", directory.display()))?;
    }
    let write = |path: &Path, value: &str| {
        fs::write(path, value).during(|| format!("write \"{value}\" to {}", path.display()))
    };
    write(&own.join("cgroup.procs"), "0")?;
    for directory in [root, &containers] {
        let file = directory.join("cgroup.subtree_control");
        // Controller by controller: a kernel without one of them still serves the others.
        for controller in CONTROLLERS.split(' ') {
            if let Err(failure) = write(&file, controller) {
                log::warn!("{failure}");
            }
        }
    }
    Ok(())
}

/// A pod that eats all memory must not take its supervisor along.
fn protect_self() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        log::warn!("cannot protect the agent from the out-of-memory killer: {error}");
    }
}

/// What containers inherit unless their specification says otherwise. The kernel's defaults are
/// for 1992 (1024 descriptors) and for the memory at boot, which may grow (processes of a user).
fn raise_limits() {
    let most = fs::read_to_string("/proc/sys/fs/nr_open");
    for (resource, value) in [
        (
            Resource::Nofile,
            Some(descriptors(&most.unwrap_or_default())),
        ),
        (Resource::Nproc, None),
    ] {
        let limit = Rlimit {
            current: value,
            maximum: value,
        };
        if let Err(error) = setrlimit(resource, limit) {
            log::warn!("containers get the kernel's limit {resource:?}: {error}");
        }
    }
    // Of the memory and the processors at boot too, and the first far fewer than one process may
    // have. Both count as memory of their container, which bounds them better.
    for (setting, value) in [("fs/file-max", i64::MAX), ("kernel/pid_max", PIDS)] {
        if let Err(error) = fs::write(format!("/proc/sys/{setting}"), value.to_string()) {
            log::warn!("all containers together get the kernel's limit {setting}: {error}");
        }
    }
}

/// As many as are wanted, if the kernel's bound, "fs.nr_open", allows so many.
fn descriptors(nr_open: &str) -> u64 {
    let most = nr_open.trim().parse().unwrap_or(DESCRIPTORS);
    DESCRIPTORS.min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_stay_within_the_kernels_bound() {
        assert_eq!(descriptors("1048576\n"), 1_048_576);
        assert_eq!(descriptors("1073741816\n"), 1_048_576);
        assert_eq!(descriptors("65536\n"), 65536);
        assert_eq!(descriptors(""), 1_048_576);
    }
}
