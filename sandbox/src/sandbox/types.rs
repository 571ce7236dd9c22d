//! What callers ask of a sandbox, and what they are told.

use std::{collections::HashMap, path::PathBuf, time::SystemTime};

use oci_spec::runtime::Spec;
use tokio::net::UnixStream;

use super::NetworkNamespace;
use crate::{network::InterfaceLimits, spec::host_binds, vmm::Gone};

/// A sandbox to be started.
#[derive(Debug, Clone, Default)]
pub struct SandboxSpec {
    /// Unique on the host.
    pub id: String,
    /// Of the pod; empty = "caisson".
    pub hostname: String,
    /// 0 = the configuration's default.
    pub vcpus: u8,
    /// 0 = the configuration's default.
    pub memory_mib: u32,
    /// cgroup below which the sandbox's is made, as in /proc/self/cgroup.
    pub cgroup_parent: Option<PathBuf>,
    /// Lines of resolv.conf.
    pub dns_servers: Vec<String>,
    /// Lines of resolv.conf.
    pub dns_searches: Vec<String>,
    /// Lines of resolv.conf.
    pub dns_options: Vec<String>,
    /// Lines of /etc/hosts beside those of the pod's own names.
    pub extra_hosts: Vec<String>,
    /// Set in the guest before there are containers.
    pub sysctls: HashMap<String, String>,
    /// Containers may join a PID namespace of the pod, and none of them holds the pod.
    pub shared_pid_namespace: bool,
    /// Where its interfaces are.
    pub network: NetworkNamespace,
    /// What the pod allows each of its interfaces; the host's limits hold beside them.
    pub limits: InterfaceLimits,
    /// Host directories may be shared with it, now or later. Its memory is then a file that a file
    /// server can map, at the price of a copy of the kernel in each VM.
    pub shares_directories: bool,
}

/// A container to be created.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    /// Unique in the sandbox.
    pub id: String,
    /// OCI config.json as the host has it.
    pub spec_json: Vec<u8>,
    /// Its root file system.
    pub rootfs: RootfsSource,
    /// Its streams.
    pub stdio: Stdio,
    /// Bind the pod's hosts, hostname and resolv.conf.
    pub pod_files: bool,
}

/// Where a root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootfsSource {
    /// EROFS images (files or block devices), bottom first, and what is written on top.
    Layers {
        /// The images.
        erofs: Vec<PathBuf>,
        /// What is written.
        upper: Upper,
    },
    /// A directory of the host, served as it is.
    Directory(PathBuf),
    /// An ext4 file system (a raw file or a block device), used as it is.
    Disk {
        /// The file or device.
        path: PathBuf,
        /// The guest cannot write to it.
        read_only: bool,
    },
}

impl RootfsSource {
    /// A container of this specification with this root file system needs the file server: see
    /// [`SandboxSpec::shares_directories`].
    pub fn shares_directories(&self, spec: &Spec) -> bool {
        matches!(self, Self::Directory(_)) || !host_binds(spec).is_empty()
    }
}

/// The writable part of a root file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upper {
    /// An ext4 disk of this many MiB, sparse on the host.
    Disk(u32),
    /// Guest memory, at most so many bytes.
    Tmpfs(u64),
    /// None.
    ReadOnly,
}

/// Which streams a process has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stdio {
    /// One terminal instead of three streams.
    pub terminal: bool,
    /// Rows and columns of it.
    pub size: (u32, u32),
    /// A stream, else /dev/null.
    pub stdin: bool,
    /// A stream, else /dev/null.
    pub stdout: bool,
    /// A stream, else /dev/null.
    pub stderr: bool,
}

/// Connected streams of a process.
#[derive(Debug, Default)]
pub struct Streams {
    /// To the process; half-closing it ends the process's stdin.
    pub stdin: Option<UnixStream>,
    /// From the process.
    pub stdout: Option<UnixStream>,
    /// From the process.
    pub stderr: Option<UnixStream>,
    /// Both ways.
    pub terminal: Option<UnixStream>,
}

/// A created process.
#[derive(Debug)]
pub struct Created {
    /// In the guest; 0 for an exec that has not been started.
    pub pid: u32,
    /// Its streams.
    pub streams: Streams,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// In the guest.
    pub pid: u32,
    /// 0..=255.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// What happened in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A process ended; `exec` is empty for a container's first.
    Exited {
        /// The container.
        container: String,
        /// The exec.
        exec: String,
        /// How.
        exit: Exit,
    },
    /// The kernel killed a process of the container for want of memory.
    OutOfMemory {
        /// The container.
        container: String,
    },
    /// The microVM is gone, and every container with it. The last event.
    Gone(Gone),
}

/// State of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Where it is in its life.
    pub status: Status,
    /// In the guest.
    pub pid: u32,
    /// Once it has ended.
    pub exit: Option<Exit>,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Waits for start.
    Created,
    /// Runs.
    Running,
    /// Has ended.
    Stopped,
    /// Its container is frozen.
    Paused,
}

/// A process of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    /// In the container's PID namespace.
    pub pid: u32,
    /// In the guest.
    pub guest_pid: u32,
    /// Empty unless it is an exec's first process.
    pub exec: String,
    /// Its command line.
    pub command: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_directories_are_told_from_disks() {
        let spec = |mounts: &str| -> Spec {
            serde_json::from_str(&format!(r#"{{"ociVersion":"1.2.0","mounts":{mounts}}}"#)).unwrap()
        };
        let plain = spec(r#"[{"destination":"/proc","type":"proc","source":"proc"}]"#);
        let bound =
            spec(r#"[{"destination":"/d","type":"bind","source":"/srv","options":["ro"]}]"#);
        let disks = RootfsSource::Layers {
            erofs: vec!["/layer".into()],
            upper: Upper::ReadOnly,
        };
        assert!(!disks.shares_directories(&plain));
        assert!(disks.shares_directories(&bound));
        assert!(RootfsSource::Directory("/rootfs".into()).shares_directories(&plain));
    }
}
