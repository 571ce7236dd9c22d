//! The guest's figures as containerd's cgroup v2 metrics.

use caisson_sandbox::StatsResponse;
use containerd_shim_protos::{
    cgroups_v2::metrics::{CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat},
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
    let memory = |key: &str| stats.memory_stat.get(key).copied().unwrap_or(0);
    let event = |key: &str| stats.memory_events.get(key).copied().unwrap_or(0);
    let entries = stats.io.iter().map(|io| IOEntry {
        major: io.major.into(),
        minor: io.minor.into(),
        rbytes: io.read_bytes,
        wbytes: io.write_bytes,
        rios: io.read_ios,
        wios: io.write_ios,
        ..Default::default()
    });
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            limit: if stats.pids_max == u64::MAX {
                0
            } else {
                stats.pids_max
            },
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_usec,
            user_usec: stats.cpu_user_usec,
            system_usec: stats.cpu_system_usec,
            nr_periods: stats.cpu_nr_periods,
            nr_throttled: stats.cpu_nr_throttled,
            throttled_usec: stats.cpu_throttled_usec,
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon: memory("anon"),
            file: memory("file"),
            kernel_stack: memory("kernel_stack"),
            slab: memory("slab"),
            sock: memory("sock"),
            shmem: memory("shmem"),
            file_mapped: memory("file_mapped"),
            file_dirty: memory("file_dirty"),
            file_writeback: memory("file_writeback"),
            anon_thp: memory("anon_thp"),
            inactive_anon: memory("inactive_anon"),
            active_anon: memory("active_anon"),
            inactive_file: memory("inactive_file"),
            active_file: memory("active_file"),
            unevictable: memory("unevictable"),
            slab_reclaimable: memory("slab_reclaimable"),
            slab_unreclaimable: memory("slab_unreclaimable"),
            pgfault: memory("pgfault"),
            pgmajfault: memory("pgmajfault"),
            usage: stats.memory_current_bytes,
            usage_limit: stats.memory_max_bytes,
            swap_usage: stats.memory_swap_current_bytes,
            ..Default::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            low: event("low"),
            high: event("high"),
            max: event("max"),
            oom: event("oom"),
            oom_kill: event("oom_kill"),
            ..Default::default()
        }),
        io: MessageField::some(IOStat {
            usage: entries.collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}
