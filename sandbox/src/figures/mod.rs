//! What can be counted of a running sandbox, for whoever watches the host.
//!
//! The sandbox's owner answers with a [`Figures`] document, as JSON, to everybody who connects to
//! [`socket`].

mod latency;
mod processes;

use std::path::{Path, PathBuf};

use caisson_vmm_api::Description;
use serde::{Deserialize, Serialize};

pub use latency::{BOUNDS, Latencies, Latency};
pub use processes::HostProcess;

use crate::{config::Config, record};

/// Of one sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Name of the sandbox on this host.
    pub sandbox: String,
    /// Who has it: containerd's namespace, or "caisson" of the command line's own containers.
    pub manager: String,
    /// When it had booted, seconds since 1970.
    pub booted_at: u64,
    /// Time from the start of the VMM to each stage of the boot.
    pub boot: Vec<Stage>,
    /// The VMM's own account.
    pub vmm: Description,
    /// vCPUs that the guest uses.
    pub vcpus_online: u8,
    /// The guest answered when it was asked for `containers`.
    pub guest_answers: bool,
    /// Containers in the guest.
    pub containers: Vec<ContainerFigures>,
    /// How long the guest's agent took to answer.
    pub requests: Vec<Latency>,
    /// Processes of the host that the sandbox consists of.
    pub processes: Vec<HostProcess>,
}

/// A step of the boot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// "host", "vmm" or "guest": whose clock it is, each of which begins with that one's own start.
    pub clock: String,
    /// What was reached.
    pub name: String,
    /// Seconds.
    pub seconds: f64,
}

impl Stage {
    pub(crate) fn new(clock: &str, name: &str, seconds: f64) -> Self {
        Self {
            clock: clock.to_owned(),
            name: name.to_owned(),
            seconds,
        }
    }
}

/// Of one container, as the guest counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerFigures {
    /// The container.
    pub id: String,
    /// Processor time, microseconds.
    pub cpu_usec: u64,
    /// Bytes of memory in use (cgroup v2, memory.current).
    pub memory_bytes: u64,
    /// Processes.
    pub pids: u64,
    /// Processes that were killed for want of memory.
    pub oom_kills: u64,
}

/// Where the figures of the sandbox `id` are told.
pub fn socket(config: &Config, id: &str) -> PathBuf {
    in_directory(&record::directory_of(&config.run_dir, id))
}

/// All sandboxes of this host: their names, and where their figures are told.
///
/// # Errors
/// The directory of sandboxes cannot be read.
pub fn sockets(config: &Config) -> std::io::Result<Vec<(String, PathBuf)>> {
    let directory = match std::fs::read_dir(config.run_dir.join("sandboxes")) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in directory {
        let entry = entry?;
        if let Ok(name) = entry.file_name().into_string() {
            found.push((name, in_directory(&entry.path())));
        }
    }
    found.sort();
    Ok(found)
}

fn in_directory(sandbox: &Path) -> PathBuf {
    // As short as its neighbour `vsock.sock`: paths of sockets have 107 bytes (unix(7)).
    sandbox.join("stats.sock")
}
