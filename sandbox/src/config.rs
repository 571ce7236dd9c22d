//! The configuration file and where things are.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// Where the file is unless somebody says otherwise.
const DEFAULT_PATH: &str = "/etc/caisson/config.toml";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is there and cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It has an unknown key, a value of the wrong type, or is no TOML.
    #[error("the configuration {} is wrong: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The parser's words, with the line.
        reason: String,
    },
    /// A value that makes no sense.
    #[error("the configuration {}: {key} is {value}: {reason}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Which.
        key: &'static str,
        /// As given.
        value: String,
        /// Why not.
        reason: &'static str,
    },
}

/// Settings of a host. Every member can be set in `/etc/caisson/config.toml` under its name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
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
    /// vCPUs of a microVM whose container has no limit.
    pub default_vcpus: u8,
    /// Most vCPUs of a microVM.
    pub max_vcpus: u8,
    /// Memory of a microVM whose container has no limit, MiB.
    pub default_memory_mib: u32,
    /// On top of a container's limit, for the guest's kernel and agent, MiB.
    pub guest_overhead_mib: u32,
    /// Least memory that a guest boots in, MiB.
    pub min_memory_mib: u32,
    /// Most memory of a microVM, MiB.
    pub max_memory_mib: u32,
    /// Size of a container's writable layer, MiB; sparse, so only what is written counts.
    pub upper_disk_mib: u32,
    /// First of the user ids that VMMs run as, each one its own.
    pub uid_base: u32,
    /// How many there are.
    pub uid_count: u32,
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
            default_memory_mib: 512,
            guest_overhead_mib: 48,
            min_memory_mib: 64,
            max_memory_mib: 256 * 1024,
            upper_disk_mib: 16 * 1024,
            uid_base: 2_000_000_000,
            uid_count: 65_536,
        }
    }
}

impl Config {
    /// Reads `path`, which must be there, or the default file, which need not.
    ///
    /// # Errors
    /// [`ConfigError`], which names the file and the key.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(source) => {
                return Err(ConfigError::Read {
                    path: file.to_owned(),
                    source,
                });
            }
        };
        let config: Self = toml::from_str(&text).map_err(|error| ConfigError::Malformed {
            path: file.to_owned(),
            reason: error.to_string(),
        })?;
        config.check(file)?;
        Ok(config)
    }

    fn check(&self, file: &Path) -> Result<(), ConfigError> {
        let wrong = |key, value: String, reason| {
            Err(ConfigError::Value {
                path: file.to_owned(),
                key,
                value,
                reason,
            })
        };
        if self.default_vcpus == 0 || self.default_vcpus > self.max_vcpus {
            return wrong(
                "default_vcpus",
                self.default_vcpus.to_string(),
                "it must be from 1 to max_vcpus",
            );
        }
        if self.max_vcpus > 64 {
            return wrong(
                "max_vcpus",
                self.max_vcpus.to_string(),
                "the guest kernel takes 64 at most",
            );
        }
        if !(self.min_memory_mib..=self.max_memory_mib).contains(&self.default_memory_mib) {
            return wrong(
                "default_memory_mib",
                self.default_memory_mib.to_string(),
                "it must be from min_memory_mib to max_memory_mib",
            );
        }
        if self.upper_disk_mib < 16 {
            return wrong(
                "upper_disk_mib",
                self.upper_disk_mib.to_string(),
                "a file system needs 16 MiB at least",
            );
        }
        if self.uid_base == 0
            || self.uid_count == 0
            || self.uid_base.checked_add(self.uid_count).is_none()
        {
            return wrong(
                "uid_base",
                self.uid_base.to_string(),
                "the range must be of 1 to 4294967294 without 0",
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        Config::load(Some(file.path()))
    }

    #[test]
    fn members_and_defaults() {
        let config = load("kernel = \"/k\"\ndefault_vcpus = 2\n").unwrap();
        assert_eq!(
            (config.kernel.as_path(), config.default_vcpus),
            (Path::new("/k"), 2)
        );
        assert_eq!(config.run_dir, Path::new("/run/caisson"));
    }

    #[test]
    fn mistakes_are_named() {
        let message = |text| load(text).unwrap_err().to_string();
        assert!(message("kernle = \"/k\"").contains("kernle"));
        assert!(message("default_vcpus = 0").contains("default_vcpus"));
        assert!(message("uid_base = 0").contains("uid_base"));
        assert!(
            Config::load(Some(Path::new("/nowhere.toml")))
                .unwrap_err()
                .to_string()
                .contains("/nowhere.toml")
        );
    }
}
