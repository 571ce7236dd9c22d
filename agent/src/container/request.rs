//! What the agent and a container's init process say to each other.
//!
//! The request comes in a memory file; after it the two talk over a
//! `SOCK_SEQPACKET` pair, one JSON document a packet.

use std::{
    fs::File,
    io::{Seek, Write},
    path::PathBuf,
};

use oci_spec::runtime::{Process, Spec};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use crate::failure::{During, Failure, Result};

/// What the init process shall become.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// First process of a new container.
    Container(Box<ContainerRequest>),
    /// One more process of a running container.
    Exec(Box<ExecRequest>),
}

/// First process of a new container.
#[derive(Debug, Serialize, Deserialize)]
pub struct ContainerRequest {
    /// The container.
    pub id: String,
    /// As the host gave it.
    pub spec: Spec,
    /// Where the root file system comes from.
    pub rootfs: Rootfs,
    /// Bind the pod's hosts, hostname and resolv.conf.
    pub pod_files: bool,
    /// PID (in the guest) of the process whose PID namespace to join.
    pub pid_namespace_of: Option<u32>,
    /// "USER[:GROUP]" to be resolved by the container's own passwd and group.
    pub user: Option<String>,
    /// Rows and columns of the terminal, when there is one.
    pub terminal: Option<(u16, u16)>,
    /// Directory of the container's cgroup.
    pub cgroup: PathBuf,
}

/// One more process of a running container.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// PID (in the guest) of the container's first process.
    pub init: u32,
    /// As the host gave it.
    pub process: Process,
    /// "USER[:GROUP]" to be resolved by the container's own passwd and group.
    pub user: Option<String>,
    /// Rows and columns of the terminal, when there is one.
    pub terminal: Option<(u16, u16)>,
    /// Directory of the container's cgroup.
    pub cgroup: PathBuf,
    /// What the out-of-memory killer is told: never the agent's own, which spares its process.
    pub oom_score: i32,
    /// Copy files, by the agent's own code, instead of executing a program.
    pub archive: Option<caisson_archive::Request>,
    /// The container's seccomp filter, which its specification has and an exec's has not.
    pub seccomp: Option<oci_spec::runtime::LinuxSeccomp>,
}

/// Where a container's root file system comes from.
#[derive(Debug, Serialize, Deserialize)]
pub struct Rootfs {
    /// Read-only layers, bottom first.
    pub layers: Vec<Layer>,
    /// What can be written.
    pub upper: Upper,
}

/// One read-only layer.
#[derive(Debug, Serialize, Deserialize)]
pub enum Layer {
    /// A block device with an EROFS image.
    Erofs(String),
    /// Entry of the pod's share.
    Share(String),
}

/// What can be written of a root file system.
#[derive(Debug, Serialize, Deserialize)]
pub enum Upper {
    /// A tmpfs of this many bytes.
    Tmpfs(u64),
    /// An ext4 block device.
    Ext4(String),
    /// Nothing.
    ReadOnly,
    /// Entry of the pod's share, which is the whole root file system.
    Share(String),
    /// An ext4 block device, which is the whole root file system.
    Disk {
        /// Its node.
        device: String,
        /// The device cannot be written.
        read_only: bool,
    },
}

/// A file of `bytes` in memory, to be read from its beginning by another process.
///
/// # Errors
/// Out of memory or descriptors.
pub fn memory_file(name: &str, bytes: &[u8]) -> Result<File> {
    let during = || format!("make the memory file \"{name}\"");
    let mut file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).during(during)?);
    file.write_all(bytes)
        .and_then(|()| file.rewind())
        .during(during)?;
    Ok(file)
}

/// From the init process to the agent.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The process that stays has this PID in the guest.
    Pid(u32),
    /// The packet carries the terminal's master.
    Terminal,
    /// All is set up; the process waits for [`START`].
    Ready,
    /// It did not work; the process ends.
    Failed(Failure),
}

/// From the agent to the init process: execute the program now.
pub const START: &[u8] = b"start";

/// Longest packet either way, bytes.
pub const MAX_PACKET: usize = 16 * 1024;
