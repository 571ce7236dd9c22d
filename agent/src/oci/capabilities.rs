//! Capability sets of a process (capabilities(7), OCI runtime-spec "capabilities").

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
};

use crate::failure::{During, Result};

/// The five sets of a process as bits, bit = capability number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sets {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

/// Number of the last capability of Linux 6.12.
const LAST: u32 = 40;

impl From<&LinuxCapabilities> for Sets {
    fn from(wanted: &LinuxCapabilities) -> Self {
        let bits =
            |set: &Option<Capabilities>| set.iter().flatten().map(|one| 1u64 << number(*one)).sum();
        Self {
            bounding: bits(wanted.bounding()),
            effective: bits(wanted.effective()),
            permitted: bits(wanted.permitted()),
            inheritable: bits(wanted.inheritable()),
            ambient: bits(wanted.ambient()),
        }
    }
}

impl Sets {
    /// Drops from the bounding set what is not in it. Needs CAP_SETPCAP, so comes first.
    ///
    /// # Errors
    /// Those of prctl(2).
    pub fn bound(&self) -> Result<()> {
        for bit in (0..=LAST).filter(|bit| self.bounding >> bit & 1 == 0) {
            remove_capability_from_bounding_set(one(bit))
                .during(|| format!("drop capability {bit}"))?;
        }
        Ok(())
    }

    /// Sets the other four. Comes after the change of user.
    ///
    /// # Errors
    /// Those of capset(2) and prctl(2).
    pub fn apply(&self) -> Result<()> {
        set_capabilities(
            None,
            CapabilitySets {
                effective: CapabilitySet::from_bits_retain(self.effective),
                permitted: CapabilitySet::from_bits_retain(self.permitted),
                inheritable: CapabilitySet::from_bits_retain(self.inheritable),
            },
        )
        .during(|| "set the capabilities".to_owned())?;
        clear_ambient_capability_set().during(|| "clear the ambient capabilities".to_owned())?;
        for bit in (0..=LAST).filter(|bit| self.ambient >> bit & 1 == 1) {
            // Ambient is only possible for what is permitted and inheritable; a spec that asks
            // for more gets what it can have, as under runc.
            if let Err(error) = configure_capability_in_ambient_set(one(bit), true) {
                log::warn!("capability {bit} cannot be ambient: {error}");
            }
        }
        Ok(())
    }
}

fn one(bit: u32) -> CapabilitySet {
    CapabilitySet::from_bits_retain(1 << bit)
}

/// Number in linux/capability.h.
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_default_set() {
        let names = r#"["CAP_CHOWN","CAP_DAC_OVERRIDE","CAP_FSETID","CAP_FOWNER","CAP_MKNOD","CAP_NET_RAW","CAP_SETGID",
            "CAP_SETUID","CAP_SETFCAP","CAP_SETPCAP","CAP_NET_BIND_SERVICE","CAP_SYS_CHROOT","CAP_KILL","CAP_AUDIT_WRITE"]"#;
        let wanted: LinuxCapabilities =
            serde_json::from_str(&format!(r#"{{"bounding":{names},"effective":{names}}}"#))
                .unwrap();
        let sets = Sets::from(&wanted);
        assert_eq!(sets.bounding, 0xa804_25fb);
        assert_eq!((sets.effective, sets.ambient), (sets.bounding, 0));
    }
}
