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
    /// Size for a pod whose first container has `spec`.
    pub fn of(config: &Config, spec: &Spec) -> Self {
        let (quota, period, limit) = of_pod(spec).unwrap_or_else(|| of_container(spec));
        let vcpus = quota.filter(|quota| *quota > 0).map_or(0, |quota| {
            let period = period.filter(|period| *period > 0).unwrap_or(100_000);
            let whole = quota.unsigned_abs().div_ceil(period);
            u8::try_from(whole)
                .unwrap_or(u8::MAX)
                .clamp(1, config.max_vcpus)
        });
        let memory_mib = limit.filter(|limit| *limit > 0).map_or(0, |limit| {
            let mib = u32::try_from(limit.unsigned_abs().div_ceil(1 << 20)).unwrap_or(u32::MAX);
            mib.saturating_add(config.guest_overhead_mib)
        });
        Self { vcpus, memory_mib }
    }
}

/// CPU quota, CPU period (both µs) and memory limit (bytes).
type Limits = (Option<i64>, Option<u64>, Option<i64>);

/// What the containers of a Kubernetes pod may use together: the first one, which only holds the
/// pod, has next to no limits of its own.
fn of_pod(spec: &Spec) -> Option<Limits> {
    let annotations = spec.annotations().as_ref()?;
    let of = |name: &str| annotations.get(&format!("io.kubernetes.cri.sandbox-{name}"));
    let (quota, period, memory) = (of("cpu-quota"), of("cpu-period"), of("memory"));
    if quota.is_none() && memory.is_none() {
        return None;
    }
    Some((
        quota.and_then(|text| text.parse().ok()),
        period.and_then(|text| text.parse().ok()),
        memory.and_then(|text| text.parse().ok()),
    ))
}

fn of_container(spec: &Spec) -> Limits {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    (
        cpu.and_then(|cpu| cpu.quota()),
        cpu.and_then(|cpu| cpu.period()),
        resources
            .and_then(|resources| resources.memory().as_ref())
            .and_then(|memory| memory.limit()),
    )
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
    #[test]
    fn of_a_kubernetes_pod() {
        let text = r#"{"ociVersion":"1.2.0",
            "annotations":{
                "io.kubernetes.cri.sandbox-cpu-period":"100000",
                "io.kubernetes.cri.sandbox-cpu-quota":"250000",
                "io.kubernetes.cri.sandbox-cpu-shares":"2560",
                "io.kubernetes.cri.sandbox-memory":"1073741824"},
            "linux":{"resources":{"cpu":{"quota":1000},"memory":{"limit":1048576}}}}"#;
        let config = Config::default();
        let size = Size::of(&config, &serde_json::from_str(text).unwrap());
        assert_eq!(size.vcpus, 3);
        assert_eq!(size.memory_mib, 1024 + config.guest_overhead_mib);
        let unlimited = text.replace("250000", "0").replace("1073741824", "0");
        let size = Size::of(&config, &serde_json::from_str(&unlimited).unwrap());
        assert_eq!(
            (size.vcpus, size.memory_mib),
            (0, 0),
            "the configuration's default"
        );
    }
}
