//! The guest's figures as containerd's cgroup v2 metrics.

use caisson_sandbox::{IoStat, StatsResponse};
use containerd_shim_protos::{
    cgroups_v2::metrics::{
        CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
    },
    protobuf::{Message, MessageField, well_known_types::any::Any},
};

use crate::error::Error;

/// Name that containerd's clients know the message by.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// `stats` as the message of [`TYPE_URL`].
///
/// # Errors
/// It cannot be encoded.
pub fn encode(stats: &StatsResponse) -> Result<Any, Error> {
    let bytes = metrics(stats).write_to_bytes().map_err(|error| Error::Io {
        what: "encode the metrics",
        source: std::io::Error::other(error),
    })?;
    Ok(Any {
        type_url: TYPE_URL.to_owned(),
        value: bytes,
        ..Default::default()
    })
}

fn metrics(stats: &StatsResponse) -> Metrics {
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            limit: stats.pids_max,
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_usec,
            user_usec: stats.cpu_user_usec,
            system_usec: stats.cpu_system_usec,
            nr_periods: stats.cpu_nr_periods,
            nr_throttled: stats.cpu_nr_throttled,
            throttled_usec: stats.cpu_throttled_usec,
            psi: pressure(&stats.cpu_pressure),
            ..Default::default()
        }),
        memory: MessageField::some(memory(stats)),
        memory_events: MessageField::some(memory_events(stats)),
        io: MessageField::some(IOStat {
            usage: stats.io.iter().map(io_entry).collect(),
            psi: pressure(&stats.io_pressure),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Members are named as the keys of memory.stat.
fn memory(stats: &StatsResponse) -> MemoryStat {
    let of = |key: &str| stats.memory_stat.get(key).copied().unwrap_or(0);
    // The kernel has counted files and anonymous memory apart since 5.9.
    let both = |key: &str| of(&format!("{key}_anon")).saturating_add(of(&format!("{key}_file")));
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_refault: both("workingset_refault"),
        workingset_activate: both("workingset_activate"),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: stats.memory_current_bytes,
        usage_limit: stats.memory_max_bytes,
        max_usage: stats.memory_peak_bytes,
        swap_usage: stats.memory_swap_current_bytes,
        psi: pressure(&stats.memory_pressure),
        ..Default::default()
    }
}

fn memory_events(stats: &StatsResponse) -> MemoryEvents {
    let of = |key: &str| stats.memory_events.get(key).copied().unwrap_or(0);
    MemoryEvents {
        low: of("low"),
        high: of("high"),
        max: of("max"),
        oom: of("oom"),
        oom_kill: of("oom_kill"),
        oom_group_kill: of("oom_group_kill"),
        ..Default::default()
    }
}

fn io_entry(io: &IoStat) -> IOEntry {
    IOEntry {
        major: io.major.into(),
        minor: io.minor.into(),
        rbytes: io.read_bytes,
        wbytes: io.write_bytes,
        rios: io.read_ios,
        wios: io.write_ios,
        ..Default::default()
    }
}

/// A `*.pressure` file: lines `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` and `full …`
/// (kernel: accounting/psi). None from a kernel that has none.
fn pressure(text: &str) -> MessageField<PSIStats> {
    let line = |kind: &str| {
        let words = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let of = |key: &str| {
            words
                .split_whitespace()
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        };
        let average = |key: &str| of(key).and_then(|value| value.parse().ok()).unwrap_or(0.0);
        Some(PSIData {
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
            total: of("total")
                .and_then(|value| value.parse().ok())
                .unwrap_or(0),
            ..Default::default()
        })
    };
    let (some, full) = (line("some "), line("full "));
    if some.is_none() && full.is_none() {
        return MessageField::none();
    }
    MessageField::some(PSIStats {
        some: some.into(),
        full: full.into(),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_their_places() {
        let stats = StatsResponse {
            cpu_usage_usec: 1,
            cpu_pressure: "some avg10=1.50 avg60=0.00 avg300=0.25 total=77\n".to_owned(),
            memory_current_bytes: 2,
            memory_max_bytes: u64::MAX,
            memory_peak_bytes: 3,
            memory_stat: [
                ("anon", 4),
                ("workingset_refault_anon", 5),
                ("workingset_refault_file", 6),
            ]
            .map(|(key, value)| (key.to_owned(), value))
            .into(),
            memory_events: [("oom_kill".to_owned(), 7)].into(),
            pids_current: 8,
            pids_max: u64::MAX,
            io: vec![IoStat {
                major: 254,
                write_ios: 9,
                ..Default::default()
            }],
            ..Default::default()
        };
        let any = encode(&stats).unwrap();
        assert_eq!(any.type_url, TYPE_URL);
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage_usec, 1);
        assert_eq!(
            (metrics.cpu.psi.some.avg10, metrics.cpu.psi.some.total),
            (1.5, 77)
        );
        assert!(metrics.cpu.psi.full.is_none() && metrics.memory.psi.is_none());
        assert_eq!((metrics.memory.usage, metrics.memory.max_usage), (2, 3));
        // As the cgroups library of containerd tells "max".
        assert_eq!(
            (metrics.memory.usage_limit, metrics.pids.limit),
            (u64::MAX, u64::MAX)
        );
        assert_eq!(
            (metrics.memory.anon, metrics.memory.workingset_refault),
            (4, 11)
        );
        assert_eq!(metrics.memory_events.oom_kill, 7);
        assert_eq!(
            (metrics.io.usage[0].major, metrics.io.usage[0].wios),
            (254, 9)
        );
    }
}
