//! Values that make sense, each by itself and with the others.

use std::path::Path;

use super::{Config, ConfigError, Origin, Setting};

/// `CONFIG_NR_CPUS` of the guest kernel.
const MOST_VCPUS: u8 = 64;

/// The least that the VMM boots a kernel in, MiB.
const LEAST_MEMORY: u32 = 64;

/// The most that the VMM can address, MiB.
const MOST_MEMORY: u32 = 4 << 20;

/// Longest addition to the kernel's command line, bytes: the rest of its 2048 is ours.
const LONGEST_PARAMETERS: usize = 1024;

/// Largest ext4 with blocks of 4 KiB and 32-bit block numbers, MiB.
const LARGEST_DISK: u32 = 16 << 20;

/// A rule that does not hold: the keys it is about, and what it says.
type Broken = (&'static [&'static str], String);

impl Config {
    /// # Errors
    /// The first rule that is broken, told of the key that a file has set last.
    pub(super) fn check(&self, settings: &[Setting]) -> Result<(), ConfigError> {
        let checks = [
            self.check_paths(),
            self.check_parameters(),
            self.check_vcpus(),
            self.check_memory(),
            self.check_limits(),
            self.check_others(),
        ];
        self.check_registries(settings)?;
        let Some((keys, reason)) = checks.into_iter().find_map(Result::err) else {
            return Ok(());
        };
        let setting = |key: &&'static str| settings.iter().find(|setting| setting.key == *key);
        let set = |key: &&&'static str| setting(key).is_some_and(|s| s.origin != Origin::Default);
        let key = keys.iter().find(set).or(keys.first()).unwrap_or(&"");
        Err(ConfigError::Value {
            origin: setting(key).map_or(Origin::Default, |setting| setting.origin.clone()),
            key: (*key).to_owned(),
            value: setting(key).map_or_else(String::new, |setting| setting.value.clone()),
            reason,
        })
    }

    fn check_paths(&self) -> Result<(), Broken> {
        let paths: [(&'static [&'static str], &Path); 7] = [
            (&["vmm"], &self.vmm),
            (&["file_server"], &self.file_server),
            (&["kernel"], &self.kernel),
            (&["guest_image"], &self.guest_image),
            (&["kvm"], &self.kvm),
            (&["run_dir"], &self.run_dir),
            (&["state_dir"], &self.state_dir),
        ];
        for (key, path) in paths {
            ensure(path.is_absolute(), key, || {
                "it must be an absolute path".into()
            })?;
        }
        Ok(())
    }

    fn check_parameters(&self) -> Result<(), Broken> {
        let text = &self.kernel_parameters;
        let printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        ensure(
            printable && text.len() <= LONGEST_PARAMETERS,
            &["kernel_parameters"],
            || format!("it must be at most {LONGEST_PARAMETERS} printable ASCII characters"),
        )
    }

    fn check_vcpus(&self) -> Result<(), Broken> {
        ensure(
            (1..=MOST_VCPUS).contains(&self.max_vcpus),
            &["max_vcpus"],
            || format!("it must be from 1 to {MOST_VCPUS}, the guest kernel's most"),
        )?;
        ensure(
            (1..=self.max_vcpus).contains(&self.default_vcpus),
            &["default_vcpus", "max_vcpus"],
            || {
                format!(
                    "default_vcpus must be from 1 to max_vcpus ({})",
                    self.max_vcpus
                )
            },
        )?;
        ensure(
            self.growth_max_vcpus <= self.max_vcpus,
            &["growth_max_vcpus", "max_vcpus"],
            || {
                format!(
                    "growth_max_vcpus must be at most max_vcpus ({})",
                    self.max_vcpus
                )
            },
        )
    }

    fn check_memory(&self) -> Result<(), Broken> {
        ensure(
            (LEAST_MEMORY..=MOST_MEMORY).contains(&self.min_memory_mib),
            &["min_memory_mib"],
            || format!("it must be from {LEAST_MEMORY} to {MOST_MEMORY}"),
        )?;
        ensure(
            self.max_memory_mib <= MOST_MEMORY,
            &["max_memory_mib"],
            || format!("it must be at most {MOST_MEMORY}, which is 4 TiB"),
        )?;
        let range = self.min_memory_mib..=self.max_memory_mib;
        ensure(
            range.contains(&self.default_memory_mib),
            &["default_memory_mib", "min_memory_mib", "max_memory_mib"],
            || {
                format!(
                    "default_memory_mib must be from min_memory_mib ({}) to max_memory_mib ({})",
                    self.min_memory_mib, self.max_memory_mib
                )
            },
        )?;
        ensure(
            self.growth_max_memory_mib <= self.max_memory_mib,
            &["growth_max_memory_mib", "max_memory_mib"],
            || {
                let most = self.max_memory_mib;
                format!("growth_max_memory_mib must be at most max_memory_mib ({most})")
            },
        )?;
        ensure(
            self.guest_overhead_mib < self.default_memory_mib,
            &["guest_overhead_mib", "default_memory_mib"],
            || {
                let default = self.default_memory_mib;
                format!("guest_overhead_mib must be less than default_memory_mib ({default})")
            },
        )?;
        ensure(
            self.host_overhead_mib <= MOST_MEMORY,
            &["host_overhead_mib"],
            || format!("it must be at most {MOST_MEMORY}"),
        )
    }

    fn check_limits(&self) -> Result<(), Broken> {
        let bursts: [(&'static [&'static str], u64, u64); 4] = [
            (
                &["network_rx_burst_bytes", "network_rx_bytes_per_second"],
                self.network_rx_burst_bytes,
                self.network_rx_bytes_per_second,
            ),
            (
                &["network_rx_burst_packets", "network_rx_packets_per_second"],
                self.network_rx_burst_packets,
                self.network_rx_packets_per_second,
            ),
            (
                &["network_tx_burst_bytes", "network_tx_bytes_per_second"],
                self.network_tx_burst_bytes,
                self.network_tx_bytes_per_second,
            ),
            (
                &["network_tx_burst_packets", "network_tx_packets_per_second"],
                self.network_tx_burst_packets,
                self.network_tx_packets_per_second,
            ),
        ];
        for (keys, burst, rate) in bursts {
            ensure(burst == 0 || rate > 0, keys, || {
                format!("a burst needs a rate: set {}", keys.join(" and "))
            })?;
        }
        Ok(())
    }

    fn check_registries(&self, settings: &[Setting]) -> Result<(), ConfigError> {
        for (name, registry) in &self.registries {
            let reason = if !is_authority(name) {
                "a registry is named by its host and, if need be, port".to_owned()
            } else if let Some(mirror) = registry.mirrors.iter().find(|url| !is_mirror(url)) {
                format!(
                    "the mirror {mirror:?} is no http:// or https:// with a host and port alone"
                )
            } else {
                continue;
            };
            let end = format!(".{}", toml::Value::from(name.as_str()));
            let setting = settings.iter().find(|setting| setting.key.ends_with(&end));
            return Err(ConfigError::Value {
                origin: setting.map_or(Origin::Default, |setting| setting.origin.clone()),
                key: setting.map_or_else(|| name.clone(), |setting| setting.key.clone()),
                value: setting.map_or_else(String::new, |setting| setting.value.clone()),
                reason,
            });
        }
        Ok(())
    }

    fn check_others(&self) -> Result<(), Broken> {
        ensure(
            self.host_overhead_millicpus <= 1_000_000,
            &["host_overhead_millicpus"],
            || "it must be at most 1000000, which are 1000 processors".into(),
        )?;
        ensure(
            (16..=LARGEST_DISK).contains(&self.upper_disk_mib),
            &["upper_disk_mib"],
            || format!("a file system has from 16 to {LARGEST_DISK} MiB"),
        )?;
        let end = self.uid_base.checked_add(self.uid_count);
        ensure(
            self.uid_base > 0 && self.uid_count > 0 && end.is_some_and(|end| end < u32::MAX),
            &["uid_base", "uid_count"],
            || "the user ids must lie from 1 to 4294967293, and be one at least".into(),
        )
    }
}

/// A host and, if need be, port, as they stand in an image's name.
fn is_authority(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte);
    !text.is_empty() && text.len() <= 255 && text.bytes().all(allowed)
}

fn is_mirror(url: &str) -> bool {
    let rest = url
        .strip_prefix("https://")
        .or_else(|| url.strip_prefix("http://"));
    rest.is_some_and(|rest| is_authority(rest.strip_suffix('/').unwrap_or(rest)))
}

fn ensure(
    holds: bool,
    keys: &'static [&'static str],
    reason: impl FnOnce() -> String,
) -> Result<(), Broken> {
    if holds { Ok(()) } else { Err((keys, reason())) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn message(text: &str) -> String {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("config.toml"), text).unwrap();
        let error = Config::load(Some(directory.path())).unwrap_err();
        assert!(matches!(error, ConfigError::Value { .. }), "{error:?}");
        error.to_string()
    }

    #[test]
    fn each_rule_names_its_key() {
        for (text, words) in [
            (
                "vmm = \"caisson-vmm\"",
                "vmm = \"caisson-vmm\": it must be an absolute path",
            ),
            ("state_dir = \"\"", "state_dir"),
            ("kernel_parameters = \"a\\nb\"", "printable"),
            ("max_vcpus = 65", "max_vcpus = 65: it must be from 1 to 64"),
            ("max_vcpus = 0", "max_vcpus = 0"),
            ("default_vcpus = 0", "default_vcpus = 0: "),
            ("growth_max_vcpus = 33", "growth_max_vcpus = 33: "),
            ("min_memory_mib = 8", "min_memory_mib = 8: "),
            ("max_memory_mib = 5000000", "4 TiB"),
            ("default_memory_mib = 63", "default_memory_mib = 63: "),
            (
                "growth_max_memory_mib = 300000",
                "growth_max_memory_mib = 300000: ",
            ),
            ("guest_overhead_mib = 512", "guest_overhead_mib = 512: "),
            ("host_overhead_mib = 5000000", "host_overhead_mib"),
            (
                "host_overhead_millicpus = 1000001",
                "host_overhead_millicpus",
            ),
            ("upper_disk_mib = 15", "upper_disk_mib = 15: "),
            ("uid_base = 0", "uid_base = 0: "),
            (
                "network_tx_burst_packets = 5",
                "network_tx_burst_packets = 5: a burst needs a rate: set network_tx_burst_packets \
                 and network_tx_packets_per_second",
            ),
            ("uid_count = 0", "uid_count = 0: "),
            (
                "registries.\"docker.io\" = { mirrors = [\"m.example\"] }",
                "the mirror \"m.example\" is no http",
            ),
            (
                "registries.\"docker.io/library\" = { insecure = true }",
                "named by its host",
            ),
            ("uid_base = 4294967290", "uid_base = 4294967290: "),
        ] {
            let message = message(text);
            assert!(message.contains(words), "{text}: {message}");
            assert!(message.contains("/config.toml:1: "), "{text}: {message}");
        }
    }

    #[test]
    fn the_key_that_is_set_is_blamed_for_two() {
        let message = message("\nmax_memory_mib = 256");
        assert!(
            message.contains(":2: max_memory_mib = 256: default_memory_mib must be"),
            "{message}"
        );
    }
}
