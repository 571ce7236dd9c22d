//! How large a microVM its container's specification asks for.

use caisson_sandbox::Config;
use oci_spec::runtime::Spec;

/// vCPUs and MiB of memory; 0 = the configuration's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// As many as the CPU quota can use at once.
    pub vcpus: u8,
    /// The memory limit and what the guest itself needs.
    pub memory_mib: u32,
}

impl Size {
    /// Size for `spec`.
    pub fn of(config: &Config, spec: &Spec) -> Self {
        let resources = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let quota = cpu.and_then(|cpu| cpu.quota()).filter(|quota| *quota > 0);
        let vcpus = quota.map_or(0, |quota| {
            let period = cpu
                .and_then(|cpu| cpu.period())
                .filter(|period| *period > 0)
                .unwrap_or(100_000);
            let whole = quota.unsigned_abs().div_ceil(period);
            u8::try_from(whole)
                .unwrap_or(u8::MAX)
                .clamp(1, config.max_vcpus)
        });
        let limit = resources
            .and_then(|resources| resources.memory().as_ref())
            .and_then(|memory| memory.limit())
            .filter(|limit| *limit > 0);
        let memory_mib = limit.map_or(0, |limit| {
            let mib = u32::try_from(limit.unsigned_abs().div_ceil(1 << 20)).unwrap_or(u32::MAX);
            mib.saturating_add(config.guest_overhead_mib)
        });
        Self { vcpus, memory_mib }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(resources: &str) -> Size {
        let text = format!(r#"{{"ociVersion":"1.2.0","linux":{{"resources":{resources}}}}}"#);
        Size::of(&Config::default(), &serde_json::from_str(&text).unwrap())
    }

    #[test]
    fn limits_round_up() {
        assert_eq!(
            size("{}"),
            Size {
                vcpus: 0,
                memory_mib: 0
            }
        );
        assert_eq!(size(r#"{"cpu":{"quota":150000,"period":100000}}"#).vcpus, 2);
        assert_eq!(size(r#"{"cpu":{"quota":1000}}"#).vcpus, 1);
        assert_eq!(size(r#"{"cpu":{"quota":-1}}"#).vcpus, 0);
        let overhead = Config::default().guest_overhead_mib;
        assert_eq!(
            size(r#"{"memory":{"limit":67108865}}"#).memory_mib,
            65 + overhead
        );
    }
}
