//! The host's configuration: `config.toml` and its drop-ins, and where things are.

mod check;
mod files;
mod place;

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use toml::Table;

use files::Layer;
pub use place::{ENTERED, ETC, user};

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A user without root has no place for things.
    #[error(
        "neither {0} nor HOME is the absolute path of a directory: a user without root needs one of them"
    )]
    NoHome(&'static str),
    /// It is there and cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is no TOML.
    #[error("{origin}: this is no TOML: {reason}")]
    Syntax {
        /// The file and line.
        origin: Origin,
        /// The parser's words.
        reason: String,
    },
    /// An unknown key, or a value of the wrong type.
    #[error("{origin}: the key {key}: {reason}")]
    Key {
        /// The file and line.
        origin: Origin,
        /// Which.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A value that makes no sense.
    #[error("{origin}: {key} = {value}: {reason}")]
    Value {
        /// The file and line.
        origin: Origin,
        /// Which.
        key: String,
        /// As given.
        value: String,
        /// Why not.
        reason: String,
    },
}

/// Where a setting comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody has set it.
    Default,
    /// A file.
    File {
        /// Its path.
        path: PathBuf,
        /// From 1.
        line: usize,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => write!(f, "default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
        }
    }
}

/// One key of the merged configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Its name.
    pub key: String,
    /// As TOML.
    pub value: String,
    /// Who says so.
    pub origin: Origin,
}

/// A merged configuration and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// What counts.
    pub config: Config,
    /// Every key, in the order of [`Config`]'s members.
    pub settings: Vec<Setting>,
    /// The files that were read, in their order.
    pub files: Vec<PathBuf>,
}

/// Settings of a host. Every member can be set in `/etc/caisson/config.toml`, or in a file of
/// `/etc/caisson/config.d`, under its name; docs/configuration.md tells what each is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The VMM; `<prefix>/libexec/caisson/caisson-vmm`.
    pub vmm: PathBuf,
    /// The file server; `<prefix>/libexec/caisson/caisson-fs`.
    pub file_server: PathBuf,
    /// The guest kernel; `<prefix>/share/caisson/vmlinux`.
    pub kernel: PathBuf,
    /// The guest image; `<prefix>/share/caisson/guest.erofs`.
    pub guest_image: PathBuf,
    /// KVM's device; `/dev/kvm`.
    pub kvm: PathBuf,
    /// What goes with a reboot: sockets, records; `/run/caisson`.
    pub run_dir: PathBuf,
    /// What stays: images, containers, caches; `/var/lib/caisson`.
    pub state_dir: PathBuf,
    /// Words added to the guest kernel's command line.
    pub kernel_parameters: String,
    /// vCPUs of a microVM for containers without a limit.
    pub default_vcpus: u8,
    /// Most vCPUs of a microVM.
    pub max_vcpus: u8,
    /// Most vCPUs that a microVM can have brought online after its boot; 0 = as many as the host
    /// has processors, 8 at most. Each one that is only possible costs memory and boot time.
    pub growth_max_vcpus: u8,
    /// Memory of a microVM for containers without a limit, MiB.
    pub default_memory_mib: u32,
    /// Least memory that a guest boots in, MiB.
    pub min_memory_mib: u32,
    /// Most memory of a microVM, MiB.
    pub max_memory_mib: u32,
    /// Most memory that a microVM can be grown to after its boot, MiB; 0 = what the host has.
    pub growth_max_memory_mib: u32,
    /// On top of the containers' limits, for the guest's kernel and agent, MiB.
    pub guest_overhead_mib: u32,
    /// On top of the guest's memory, for the sandbox's processes on the host, MiB.
    pub host_overhead_mib: u32,
    /// On top of the containers' CPU limits, for the guest and the sandbox's processes on the host,
    /// thousandths of a processor.
    pub host_overhead_millicpus: u32,
    /// Size of a container's writable layer, MiB; sparse, so only what is written counts.
    pub upper_disk_mib: u32,
    /// The host's kernel moves the frames of interfaces without a limit, where it has vhost-net.
    pub vhost_net: bool,
    /// Most bytes a second that pass each interface to the pod; 0 = unlimited.
    pub network_rx_bytes_per_second: u64,
    /// Bytes that pass at once after idle time; 0 = a tenth of a second's.
    pub network_rx_burst_bytes: u64,
    /// Most packets a second, to the pod; 0 = unlimited.
    pub network_rx_packets_per_second: u64,
    /// Packets that pass at once after idle time; 0 = a tenth of a second's.
    pub network_rx_burst_packets: u64,
    /// Most bytes a second that pass each interface from the pod; 0 = unlimited.
    pub network_tx_bytes_per_second: u64,
    /// Bytes that pass at once after idle time; 0 = a tenth of a second's.
    pub network_tx_burst_bytes: u64,
    /// Most packets a second, from the pod; 0 = unlimited.
    pub network_tx_packets_per_second: u64,
    /// Packets that pass at once after idle time; 0 = a tenth of a second's.
    pub network_tx_burst_packets: u64,
    /// First of the user ids that VMMs run as, each one its own.
    pub uid_base: u32,
    /// How many there are.
    pub uid_count: u32,
    /// Registries that images are pulled from otherwise than by their name alone, by host and port.
    pub registries: BTreeMap<String, Registry>,
}

/// How one registry is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Registry {
    /// Tried before it, in this order: `http://` or `https://`, host and port.
    pub mirrors: Vec<String>,
    /// Its certificate is not verified, and plain HTTP will do.
    pub insecure: bool,
}

/// `<prefix>` of an executable at `<prefix>/bin/x` or `<prefix>/libexec/caisson/x`.
fn prefix() -> PathBuf {
    let executable = std::env::current_exe().unwrap_or_default();
    let directory = executable.parent().unwrap_or(Path::new("/usr/bin"));
    let above = if directory.ends_with("libexec/caisson") {
        directory.parent().and_then(Path::parent)
    } else {
        directory.parent()
    };
    above.unwrap_or(Path::new("/usr")).to_owned()
}

impl Default for Config {
    fn default() -> Self {
        let prefix = prefix();
        Self {
            vmm: prefix.join("libexec/caisson/caisson-vmm"),
            file_server: prefix.join("libexec/caisson/caisson-fs"),
            kernel: prefix.join("share/caisson/vmlinux"),
            guest_image: prefix.join("share/caisson/guest.erofs"),
            kvm: "/dev/kvm".into(),
            run_dir: "/run/caisson".into(),
            state_dir: "/var/lib/caisson".into(),
            kernel_parameters: String::new(),
            default_vcpus: 1,
            max_vcpus: 32,
            growth_max_vcpus: 0,
            default_memory_mib: 512,
            min_memory_mib: 64,
            max_memory_mib: 256 * 1024,
            growth_max_memory_mib: 0,
            guest_overhead_mib: 48,
            host_overhead_mib: 128,
            host_overhead_millicpus: 250,
            upper_disk_mib: 16 * 1024,
            vhost_net: false,
            network_rx_bytes_per_second: 0,
            network_rx_burst_bytes: 0,
            network_rx_packets_per_second: 0,
            network_rx_burst_packets: 0,
            network_tx_bytes_per_second: 0,
            network_tx_burst_bytes: 0,
            network_tx_packets_per_second: 0,
            network_tx_burst_packets: 0,
            uid_base: 2_000_000_000,
            uid_count: 65_536,
            registries: BTreeMap::new(),
        }
    }
}

impl Config {
    /// Reads `config.toml` and `config.d/*.toml` (in the order of their names; a later file
    /// overrides an earlier one key by key) in `directory`, or in `/etc/caisson`; for a user
    /// without root then those in `$XDG_CONFIG_HOME/caisson`. None of them need be there.
    ///
    /// # Errors
    /// [`ConfigError`], which names the file, the line and the key.
    pub fn load(directory: Option<&Path>) -> Result<Self, ConfigError> {
        Ok(Self::effective(directory)?.config)
    }

    /// As [`Config::load`], with where each setting comes from.
    ///
    /// # Errors
    /// As there.
    pub fn effective(directory: Option<&Path>) -> Result<Effective, ConfigError> {
        let (places, layers) = match directory {
            Some(directory) => (Table::new(), vec![Layer::all(directory)]),
            None => place::layers()?,
        };
        files::merged(places, &layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_documented_with_its_default() {
        let text = include_str!("../../../docs/configuration.md");
        for setting in Config::effective(Some(Path::new("/nowhere")))
            .unwrap()
            .settings
        {
            let row = format!("| `{}` | ", setting.key);
            let row = text.lines().find(|line| line.starts_with(&row));
            let row = row.unwrap_or_else(|| panic!("{} is not documented", setting.key));
            let default = setting.value.trim_matches('"');
            let told = row.contains(&format!("| {default} |"))
                || row.contains(&format!("| `{default}` |"));
            let relative = row.contains("`<prefix>/") || row.contains("| empty |");
            assert!(told || relative, "{} = {default}: {row}", setting.key);
        }
    }
}
