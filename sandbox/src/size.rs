//! How large a microVM its containers need: at its boot, and while they come and go.

use std::path::Path;

use oci_spec::runtime::{LinuxResources, Spec};
use serde::Deserialize;

use crate::spec::holds_pod;
use crate::{
    config::Config,
    cpuset::CpuSet,
    error::Error,
    huge_pages::{HugePages, Pools},
};

const MIB: u64 = 1 << 20;

/// Most vCPUs that a guest without a setting can grow to.
const UNASKED_VCPUS: u8 = 8;

/// Most memory that a guest without a setting can grow to, MiB. KVM and the guest keep tables of what
/// may come.
const UNASKED_MEMORY: u32 = 64 << 10;

/// The region for growth is whole blocks of Linux, the largest of which is this, MiB.
const REGION_STEP: u32 = 2 << 10;

/// Memory is plugged in steps of this, MiB.
const PLUG_STEP: u32 = 2;

/// CRI-O's names for what the containers of a pod may use together.
const CRIO_RESOURCES: [&str; 2] = [
    "pod-linux-resources.crio.io",
    "io.kubernetes.cri-o.PodLinuxResources",
];

/// What a container may use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPU time by its quota, thousandths of a processor. None: no limit.
    pub quota: Option<u64>,
    /// Memory, bytes. None: no limit.
    pub memory: Option<u64>,
    /// Processors of the host. None: all.
    pub cpus: Option<CpuSet>,
    /// Memory nodes of the host. None: all.
    pub nodes: Option<CpuSet>,
    /// Beside the memory.
    pub huge_pages: HugePages,
}

impl Limits {
    /// Limits of the container with this specification. None: it only holds a pod, and needs
    /// nothing.
    ///
    /// # Errors
    /// A set of processors or nodes that is none, or that the host does not have; a size of huge
    /// pages that is none; a mount of a single file in such pages.
    pub fn of(spec: &Spec) -> Result<Option<Self>, Error> {
        if holds_pod(spec) {
            return Ok(None);
        }
        let linux = spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let none = Self {
            huge_pages: HugePages::of_mounts(spec)?,
            ..Self::default()
        };
        resources
            .map_or_else(|| Ok(none.clone()), |it| none.updated(it))
            .map(Some)
    }

    /// These limits in a pod whose cgroup on the host is `cgroup`.
    pub fn within_pod(self, cgroup: &Path) -> Self {
        Self {
            huge_pages: self.huge_pages.within_pod(cgroup),
            ..self
        }
    }

    /// These limits with what `resources` says changed; what it leaves out stays.
    ///
    /// # Errors
    /// As [`Limits::of`].
    pub fn updated(&self, resources: &LinuxResources) -> Result<Self, Error> {
        let cpu = resources.cpu().as_ref();
        let quota = cpu.and_then(|cpu| cpu.quota());
        let memory = resources
            .memory()
            .as_ref()
            .and_then(|memory| memory.limit());
        let (cpus, nodes) = cpu.map_or((None, None), |cpu| {
            (cpu.cpus().as_ref(), cpu.mems().as_ref())
        });
        Ok(Self {
            quota: quota.map_or(self.quota, |quota| {
                millicpus(Some(quota), cpu.and_then(|cpu| cpu.period()))
            }),
            memory: memory.map_or(self.memory, positive),
            cpus: host_set("cpu", "processors", cpus)?.or_else(|| self.cpus.clone()),
            nodes: host_set("node", "memory nodes", nodes)?.or_else(|| self.nodes.clone()),
            huge_pages: self.huge_pages.updated(resources)?,
        })
    }

    /// CPU time that can be used, thousandths of a processor. None: no limit.
    pub fn millicpus(&self) -> Option<u64> {
        let all = self.cpus.as_ref().map(|cpus| cpus.len() as u64 * 1000);
        match (self.quota, all) {
            (Some(quota), Some(all)) => Some(quota.min(all)),
            (quota, all) => quota.or(all),
        }
    }

    /// What is enough for a container with either limits.
    pub fn either(&self, other: &Self) -> Self {
        let larger = |a: Option<u64>, b: Option<u64>| Some(a?.max(b?));
        Self {
            quota: larger(self.quota, other.quota),
            memory: larger(self.memory, other.memory),
            cpus: union(&self.cpus, &other.cpus),
            nodes: union(&self.nodes, &other.nodes),
            huge_pages: self.huge_pages.either(&other.huge_pages),
        }
    }

    /// What the containers of a Kubernetes pod may use together, if its first container tells. That
    /// one itself only holds the pod and has next to no limits of its own.
    fn of_pod(spec: &Spec) -> Option<Self> {
        let annotations = spec.annotations().as_ref()?;
        let number = |name: &str| {
            let text = annotations.get(&format!("io.kubernetes.cri.sandbox-{name}"))?;
            text.parse::<i64>().ok()
        };
        let (quota, period, memory) = (number("cpu-quota"), number("cpu-period"), number("memory"));
        if quota.is_some() || memory.is_some() {
            let or_none = |limit: Option<i64>| limit.unwrap_or(0);
            return Some(Self::of_cri(
                or_none(quota),
                or_none(period),
                or_none(memory),
            ));
        }
        let text = CRIO_RESOURCES
            .iter()
            .find_map(|key| annotations.get(*key))?;
        let told: CrioResources = serde_json::from_str(text).ok()?;
        Some(Self::of_cri(
            told.cpu_quota,
            told.cpu_period,
            told.memory_limit_in_bytes,
        ))
    }

    /// Limits in the terms of CRI's `LinuxContainerResources`: CPU time and its period in
    /// microseconds, memory in bytes; 0 and less mean no limit, a period of 0 is 100 ms.
    pub fn of_cri(cpu_quota: i64, cpu_period: i64, memory: i64) -> Self {
        Self {
            quota: millicpus(Some(cpu_quota), cpu_period.try_into().ok()),
            memory: positive(memory),
            ..Self::default()
        }
    }
}

/// What is needed of CRI's `LinuxContainerResources`; the rest is for containers.
#[derive(Deserialize)]
struct CrioResources {
    #[serde(default)]
    cpu_quota: i64,
    #[serde(default)]
    cpu_period: i64,
    #[serde(default)]
    memory_limit_in_bytes: i64,
}

/// None is all.
fn union(a: &Option<CpuSet>, b: &Option<CpuSet>) -> Option<CpuSet> {
    Some(a.as_ref()?.union(b.as_ref()?))
}

/// A set of what the host has: `kind` as in sysfs. None where nothing is said.
fn host_set(kind: &str, name: &str, text: Option<&String>) -> Result<Option<CpuSet>, Error> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let set: CpuSet = text
        .parse()
        .map_err(|()| Error::Invalid(format!("\"{text}\" is no list of {name}, such as 0-3,7")))?;
    let file = format!("/sys/devices/system/{kind}/possible");
    let possible = std::fs::read_to_string(&file).unwrap_or_default();
    // A host that does not tell will have its kernel decide.
    if let Ok(possible) = possible.parse::<CpuSet>()
        && !set.is_subset(&possible)
    {
        return Err(Error::Invalid(format!(
            "the {name} {set} are asked for; this host can have {possible}"
        )));
    }
    Ok(Some(set))
}

/// Of a quota and a period in µs.
fn millicpus(quota: Option<i64>, period: Option<u64>) -> Option<u64> {
    let period = period.filter(|period| *period > 0).unwrap_or(100_000);
    let quota = quota.and_then(positive)?;
    Some(quota.saturating_mul(1000).div_ceil(period))
}

/// A limit; OCI writes none as 0 or -1.
fn positive(limit: i64) -> Option<u64> {
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

/// vCPUs and MiB of memory; 0 = the configuration's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// As many as the CPU limit can use at once, `max_vcpus` at most.
    pub vcpus: u8,
    /// The memory limit, huge pages, and what the guest itself needs.
    pub memory_mib: u32,
}

impl Size {
    /// Size for a pod whose first container has `spec`.
    pub fn of(config: &Config, spec: &Spec) -> Self {
        // What cannot be understood is told when the container is created.
        let own = || Limits::of(spec).ok().flatten().unwrap_or_default();
        Self::within(config, &Limits::of_pod(spec).unwrap_or_else(own))
    }

    /// Size for a pod whose containers have these limits together.
    pub fn within(config: &Config, limits: &Limits) -> Self {
        let vcpus = limits.millicpus().map(whole);
        let huge = mib(Pools::of(std::iter::once(&limits.huge_pages)).bytes());
        let guest = match limits.memory {
            Some(limit) => mib(limit).saturating_add(config.guest_overhead_mib),
            None if huge == 0 => 0,
            None => config.default_memory_mib,
        };
        Self {
            vcpus: vcpus.map_or(0, |vcpus| vcpus.clamp(1, config.max_vcpus)),
            memory_mib: guest.saturating_add(huge),
        }
    }
}

fn whole(millicpus: u64) -> u8 {
    u8::try_from(millicpus.div_ceil(1000)).unwrap_or(u8::MAX)
}

fn mib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(MIB)).unwrap_or(u32::MAX)
}

/// What a microVM has at boot, and what it can have later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// vCPUs at boot.
    pub boot_vcpus: u8,
    /// vCPUs at most.
    pub max_vcpus: u8,
    /// Memory at boot, MiB.
    pub boot_mib: u32,
    /// Memory at most, MiB.
    pub max_mib: u32,
}

impl Room {
    /// Room of a microVM that is asked to have `vcpus` and `memory_mib` (0 = default) on this host.
    ///
    /// # Errors
    /// More or less than the configuration allows.
    pub fn of(config: &Config, vcpus: u8, memory_mib: u32) -> Result<Self, Error> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let information = rustix::system::sysinfo();
        let host_bytes = information
            .totalram
            .saturating_mul(information.mem_unit.into());
        let or = |asked: u32, default: u32| if asked == 0 { default } else { asked };
        let boot_vcpus = if vcpus == 0 {
            config.default_vcpus
        } else {
            vcpus
        };
        let boot_mib = or(memory_mib, config.default_memory_mib);
        if boot_vcpus > config.max_vcpus {
            return Err(Error::Invalid(format!(
                "{boot_vcpus} vCPUs are more than this host's configuration allows ({})",
                config.max_vcpus
            )));
        }
        if boot_mib < config.min_memory_mib {
            return Err(Error::Invalid(format!(
                "{boot_mib} MiB of memory are too little for a microVM to boot: {} MiB are the least",
                config.min_memory_mib
            )));
        }
        if boot_mib > config.max_memory_mib {
            return Err(Error::Invalid(format!(
                "{boot_mib} MiB of memory are more than this host's configuration allows ({} MiB)",
                config.max_memory_mib
            )));
        }
        let vcpus = match config.growth_max_vcpus {
            0 => u8::try_from(processors)
                .unwrap_or(u8::MAX)
                .min(UNASKED_VCPUS)
                .min(config.max_vcpus),
            set => set,
        };
        let memory = match config.growth_max_memory_mib {
            0 => mib(host_bytes)
                .min(UNASKED_MEMORY)
                .min(config.max_memory_mib),
            set => set,
        };
        Ok(Self {
            boot_vcpus,
            max_vcpus: boot_vcpus.max(vcpus),
            boot_mib,
            max_mib: boot_mib.max(memory),
        })
    }

    /// Address space that memory can be plugged into, MiB; 0 = none.
    pub fn region_mib(&self) -> u32 {
        (self.max_mib - self.boot_mib).next_multiple_of(REGION_STEP)
    }

    /// What the guest must have plugged to have `memory_mib`, MiB.
    pub fn plugged_mib(&self, memory_mib: u32) -> u32 {
        memory_mib
            .saturating_sub(self.boot_mib)
            .next_multiple_of(PLUG_STEP)
    }

    /// What a microVM with these containers needs.
    ///
    /// # Errors
    /// More memory than it can be given.
    pub fn needed<'a>(
        &self,
        config: &Config,
        containers: impl Iterator<Item = &'a Limits>,
    ) -> Result<Needed, Error> {
        let (mut millicpus, mut memory) = (0u64, u64::from(config.guest_overhead_mib));
        let mut huge = Vec::new();
        let (mut any_cpu, mut any_memory) = (false, false);
        let mut together: Option<Limits> = None;
        for limits in containers {
            together = Some(together.map_or_else(|| limits.clone(), |all| all.either(limits)));
            huge.push(&limits.huge_pages);
            match limits.millicpus() {
                Some(limit) => millicpus = millicpus.saturating_add(limit),
                None => any_cpu = true,
            }
            match limits.memory {
                Some(limit) => memory = memory.saturating_add(u64::from(mib(limit))),
                None => any_memory = true,
            }
        }
        // Containers without a limit share what a microVM without limits has.
        if any_memory {
            let default = config.default_memory_mib - config.guest_overhead_mib;
            memory = memory.saturating_add(default.into());
        }
        if any_cpu {
            millicpus = millicpus.saturating_add(u64::from(config.default_vcpus) * 1000);
        }
        let huge_pages = Pools::of(huge.into_iter());
        let memory = memory
            .saturating_add(mib(huge_pages.bytes()).into())
            .max(self.boot_mib.into());
        let memory_mib = u32::try_from(memory)
            .ok()
            .filter(|memory| *memory <= self.max_mib)
            .ok_or_else(|| {
                Error::Invalid(format!(
                    "the pod's containers may use {memory} MiB of memory together, with huge pages \
                     and the guest's own; this microVM can grow to {} MiB (growth_max_memory_mib)",
                    self.max_mib
                ))
            })?;
        let vcpus = whole(millicpus).clamp(self.boot_vcpus, self.max_vcpus);
        let all = u64::from(vcpus) * 1000;
        Ok(Needed {
            vcpus,
            memory_mib,
            millicpus: if together.is_some() && !any_cpu {
                millicpus.min(all)
            } else {
                all
            },
            cpus: together.as_ref().and_then(|all| all.cpus.clone()),
            nodes: together.and_then(|all| all.nodes),
            huge_pages,
        })
    }
}

/// What a microVM needs for its containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needed {
    /// vCPUs.
    pub vcpus: u8,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// CPU time that the containers may use, thousandths of a processor.
    pub millicpus: u64,
    /// Processors of the host that they may use. None: all.
    pub cpus: Option<CpuSet>,
    /// Memory nodes of the host that they may use. None: all.
    pub nodes: Option<CpuSet>,
    /// Huge pages that the guest keeps for them, within its memory.
    pub huge_pages: Pools,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(members: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"ociVersion":"1.2.0",{members}}}"#)).unwrap()
    }

    fn size(resources: &str) -> Size {
        let spec = spec(&format!(r#""linux":{{"resources":{resources}}}"#));
        Size::of(&Config::default(), &spec)
    }

    #[test]
    fn limits_round_up() {
        let none = Size {
            vcpus: 0,
            memory_mib: 0,
        };
        assert_eq!(size("{}"), none);
        assert_eq!(size(r#"{"cpu":{"quota":150000,"period":100000}}"#).vcpus, 2);
        assert_eq!(size(r#"{"cpu":{"quota":1000}}"#).vcpus, 1);
        assert_eq!(size(r#"{"cpu":{"quota":-1}}"#).vcpus, 0);
        assert_eq!(size(r#"{"cpu":{"quota":9000000000000000000}}"#).vcpus, 32);
        let overhead = Config::default().guest_overhead_mib;
        assert_eq!(
            size(r#"{"memory":{"limit":67108865}}"#).memory_mib,
            65 + overhead
        );
    }

    #[test]
    fn of_a_kubernetes_pod() {
        let text = r#""annotations":{
                "io.kubernetes.cri.container-type":"sandbox",
                "io.kubernetes.cri.sandbox-cpu-period":"100000",
                "io.kubernetes.cri.sandbox-cpu-quota":"250000",
                "io.kubernetes.cri.sandbox-cpu-shares":"2560",
                "io.kubernetes.cri.sandbox-memory":"1073741824"},
            "linux":{"resources":{"cpu":{"quota":1000},"memory":{"limit":1048576}}}"#;
        let config = Config::default();
        let size = Size::of(&config, &spec(text));
        assert_eq!(size.vcpus, 3);
        assert_eq!(size.memory_mib, 1024 + config.guest_overhead_mib);
        let unlimited = text.replace("250000", "0").replace("1073741824", "0");
        let size = Size::of(&config, &spec(&unlimited));
        assert_eq!((size.vcpus, size.memory_mib), (0, 0), "the default");
        assert_eq!(
            Limits::of(&spec(text)).unwrap(),
            None,
            "it only holds the pod"
        );
    }

    #[test]
    fn of_a_pod_by_crio() {
        for key in CRIO_RESOURCES {
            let told = r#"{\"cpu_period\":100000,\"cpu_quota\":150000,\"cpu_shares\":2,\"memory_limit_in_bytes\":104857600,\"unified\":{}}"#;
            let size = Size::of(
                &Config::default(),
                &spec(&format!(r#""annotations":{{"{key}":"{told}"}}"#)),
            );
            assert_eq!((size.vcpus, size.memory_mib), (2, 148));
        }
        let none = spec(r#""annotations":{"pod-linux-resources.crio.io":"{}"}"#);
        assert_eq!(Size::of(&Config::default(), &none).memory_mib, 0);
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let before = Limits {
            quota: Some(500),
            memory: Some(5),
            ..Limits::default()
        };
        let update = |json: &str| {
            before
                .updated(&serde_json::from_str(json).unwrap())
                .unwrap()
        };
        assert_eq!(update("{}"), before);
        assert_eq!(update(r#"{"cpu":{"shares":7}}"#), before);
        assert_eq!(
            update(r#"{"cpu":{"quota":20000,"period":10000}}"#).quota,
            Some(2000)
        );
        assert_eq!(update(r#"{"cpu":{"quota":-1}}"#).quota, None);
        assert_eq!(update(r#"{"memory":{"limit":9}}"#).memory, Some(9));
        assert_eq!(update(r#"{"memory":{"limit":-1}}"#).memory, None);
    }

    const ROOM: Room = Room {
        boot_vcpus: 1,
        max_vcpus: 4,
        boot_mib: 112,
        max_mib: 4096,
    };

    fn needed(containers: &[(Option<u64>, Option<u64>)]) -> Result<Needed, Error> {
        let limits: Vec<Limits> = containers
            .iter()
            .map(|(millicpus, memory)| Limits {
                quota: *millicpus,
                memory: memory.map(|mib| mib * MIB),
                ..Limits::default()
            })
            .collect();
        ROOM.needed(&Config::default(), limits.iter())
    }

    #[test]
    fn containers_add_up() {
        let of = |containers: &[_]| {
            let needed = needed(containers).unwrap();
            (needed.vcpus, needed.memory_mib, needed.millicpus)
        };
        assert_eq!(of(&[]), (1, 112, 1000), "never less than at boot");
        assert_eq!(of(&[(Some(500), Some(64))]), (1, 112, 500));
        assert_eq!(
            of(&[(Some(500), Some(64)), (Some(500), Some(64))]),
            (1, 176, 1000)
        );
        assert_eq!(
            of(&[(Some(500), Some(64)), (Some(600), Some(100))]),
            (2, 212, 1100)
        );
        assert_eq!(
            of(&[(None, None), (None, None)]),
            (1, 512, 1000),
            "one default"
        );
        assert_eq!(
            of(&[(Some(1500), Some(1024)), (None, None)]),
            (3, 1536, 3000)
        );
        assert_eq!(of(&[(Some(90_000), Some(8))]).0, 4, "vCPUs end at the most");
        let message = needed(&[(None, Some(4096))]).unwrap_err().to_string();
        assert!(
            message.contains("4144 MiB") && message.contains("4096 MiB"),
            "{message}"
        );
        assert!(needed(&[(None, Some(u64::MAX / MIB)), (None, Some(1 << 40))]).is_err());
    }

    #[test]
    fn sets_of_processors_are_the_hosts() {
        let limits = |json: &str| Limits::default().updated(&serde_json::from_str(json).unwrap());
        let first =
            limits(r#"{"cpu":{"cpus":"0","mems":"0","quota":250000,"period":100000}}"#).unwrap();
        assert_eq!(first.millicpus(), Some(1000), "no more than the processors");
        let wide = Limits {
            cpus: Some("2-4".parse().unwrap()),
            ..Limits::default()
        };
        assert_eq!(wide.millicpus(), Some(3000));
        let needed = |list: &[Limits]| ROOM.needed(&Config::default(), list.iter()).unwrap();
        let both = needed(&[first.clone(), wide.clone()]);
        assert_eq!((both.vcpus, both.millicpus), (4, 4000));
        assert_eq!(both.cpus.unwrap().to_string(), "0,2-4");
        assert_eq!(both.nodes, None, "one has no such limit");
        assert_eq!(needed(&[first, Limits::default()]).cpus, None);
        let absent = limits(r#"{"cpu":{"cpus":"8000"}}"#)
            .unwrap_err()
            .to_string();
        assert!(
            absent.contains("processors 8000") && absent.contains("can have 0"),
            "{absent}"
        );
        let wrong = limits(r#"{"cpu":{"mems":"zero"}}"#)
            .unwrap_err()
            .to_string();
        assert!(
            wrong.contains("\"zero\" is no list of memory nodes"),
            "{wrong}"
        );
    }

    #[test]
    fn memory_is_plugged_in_steps() {
        assert_eq!(ROOM.region_mib(), 4096);
        assert_eq!(ROOM.plugged_mib(112), 0);
        assert_eq!(ROOM.plugged_mib(113), 2);
        assert_eq!(ROOM.plugged_mib(4096), 3984);
    }

    #[test]
    fn the_configuration_bounds_the_room() {
        let config = Config {
            growth_max_vcpus: 6,
            growth_max_memory_mib: 1024,
            ..Config::default()
        };
        let room = Room::of(&config, 0, 0).unwrap();
        assert_eq!((room.boot_vcpus, room.max_vcpus), (1, 6));
        assert_eq!((room.boot_mib, room.max_mib), (512, 1024));
        let room = Room::of(&config, 8, 2000).unwrap();
        assert_eq!(
            (room.max_vcpus, room.max_mib, room.region_mib()),
            (8, 2000, 0)
        );
        assert!(Room::of(&config, 33, 0).is_err());
        assert!(Room::of(&config, 0, 63).is_err());
        assert!(Room::of(&config, 0, 262_145).is_err());
    }
}
