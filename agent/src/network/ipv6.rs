//! An interface's settings of IPv6 (`net.ipv6.conf`; Documentation/networking/ip-sysctl.rst).

use std::{collections::BTreeMap, fs, io};

use caisson_protocol::agent::NetworkInterface;

use crate::failure::{During, Result};

/// What each interface, by its index, was told last.
pub type Told = BTreeMap<u32, Settings>;

/// What the host says of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    disable_ipv6: bool,
    accept_ra: u32,
    autoconf: bool,
}

impl Settings {
    /// Of an interface that the kernel has just made.
    const KERNELS: Self = Self {
        disable_ipv6: false,
        accept_ra: 1,
        autoconf: true,
    };

    fn of(interface: &NetworkInterface) -> Self {
        Self {
            disable_ipv6: interface.disable_ipv6,
            accept_ra: interface.accept_ra,
            autoconf: interface.autoconf,
        }
    }

    /// Those that are to be written after `before`, by their names.
    fn changes(self, before: Self) -> impl Iterator<Item = (&'static str, u32)> {
        let values = |all: Self| {
            [
                ("accept_ra", all.accept_ra),
                ("autoconf", all.autoconf.into()),
                // The last one: with it an interface that is up may begin to listen.
                ("disable_ipv6", all.disable_ipv6.into()),
            ]
        };
        let pairs = values(self).into_iter().zip(values(before));
        pairs.filter_map(|(new, old)| (new != old).then_some(new))
    }
}

/// Sets what the host says of the interface of this index. A setting that was told before is left
/// alone: a sysctl of the pod's own may have changed it since.
///
/// # Errors
/// The kernel's.
pub fn set(interface: &NetworkInterface, index: u32, told: &mut Told) -> Result<()> {
    /// `IN6_ADDR_GEN_MODE_NONE`: no link-local addresses are made, as those of the host's interface
    /// need not follow from its MAC.
    const NONE: u32 = 1;
    if !write(&interface.name, "addr_gen_mode", NONE)? {
        // Should it get IPv6 later (by a larger MTU), it begins as the kernel makes it.
        told.remove(&index);
        return Ok(());
    }
    let before = told.get(&index).copied().unwrap_or(Settings::KERNELS);
    let settings = Settings::of(interface);
    for (name, value) in settings.changes(before) {
        write(&interface.name, name, value)?;
    }
    told.insert(index, settings);
    Ok(())
}

/// Whether a sysctl has turned IPv6 off for the interface: the kernel refuses addresses and routes
/// then.
pub fn is_off(interface: &str) -> bool {
    let setting = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"));
    setting.is_ok_and(|text| text.trim() != "0")
}

/// False: the kernel, or the interface, has no IPv6.
fn write(interface: &str, name: &str, value: u32) -> Result<bool> {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/{name}");
    match fs::write(&path, value.to_string()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        result => result.during(|| format!("write {path}")).map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_host_changes_is_written() {
        let settings = |disable_ipv6, accept_ra, autoconf| Settings {
            disable_ipv6,
            accept_ra,
            autoconf,
        };
        let changes = |new: Settings, old| new.changes(old).collect::<Vec<_>>();
        // Of an interface of which the host could tell nothing.
        let nothing = Settings::of(&NetworkInterface::default());
        assert_eq!(
            changes(nothing, Settings::KERNELS),
            [("accept_ra", 0), ("autoconf", 0)]
        );
        assert_eq!(changes(nothing, nothing), []);
        assert_eq!(
            changes(settings(false, 2, true), settings(true, 1, true)),
            [("accept_ra", 2), ("disable_ipv6", 0)]
        );
    }
}
