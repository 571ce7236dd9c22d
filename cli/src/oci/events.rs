//! `events`: a container's figures and what happens to it, a JSON object a line, as runc prints
//! them.

use std::time::{Duration, Instant};

use clap::ArgMatches;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use serde_json::{Value, json};

use super::{
    report::print,
    state::{Container, Root, Status},
};
use crate::{
    arguments::one,
    error::{Error, ShimCode},
    shim::Shim,
};

/// Between figures.
const INTERVAL: Duration = Duration::from_secs(5);

/// Between looks at what has happened.
const LOOK: Duration = Duration::from_millis(250);

/// Runs the verb.
///
/// # Errors
/// The container does not run; nobody reads.
pub fn run(root: &Root, matches: &ArgMatches) -> Result<u8, Error> {
    let container = root.find(one(matches, "id").unwrap_or_default())?;
    let interval = one(matches, "interval").map_or(Ok(INTERVAL), interval)?;
    let once = matches.get_flag("stats");
    crate::event_loop()?.block_on(async {
        let (Status::Created | Status::Running | Status::Paused, Some(shim)) =
            container.status().await
        else {
            return Err(Error::State(format!(
                "container {} has no figures: it is stopped",
                container.record.id
            )));
        };
        if once {
            let metrics = shim.stats(&container.record.id).await?;
            return tell(&container, "stats", Some(figures(&metrics)));
        }
        follow(&container, &shim, interval).await
    })?;
    Ok(0)
}

/// "5s", "1m30s", "200ms", as Go writes durations.
fn interval(text: &str) -> Result<Duration, Error> {
    humantime::parse_duration(text)
        .ok()
        .filter(|interval| !interval.is_zero())
        .ok_or_else(|| Error::Usage(format!("--interval {text}: not a time such as 5s")))
}

/// Until the container has ended.
async fn follow(container: &Container, shim: &Shim, interval: Duration) -> Result<(), Error> {
    let mut last: Option<Instant> = None;
    let mut kills = None;
    loop {
        let metrics = match shim.stats(&container.record.id).await {
            Ok(metrics) => metrics,
            Err(Error::Shim {
                code: ShimCode::Gone | ShimCode::NotFound,
                ..
            }) => return Ok(()),
            Err(error) => {
                return match container.status().await {
                    (Status::Stopped, _) => Ok(()),
                    _ => Err(error),
                };
            }
        };
        let now = metrics.memory_events.oom_kill;
        if kills.replace(now).is_some_and(|before| now > before) {
            tell(container, "oom", None)?;
        }
        if last.is_none_or(|last| last.elapsed() >= interval) {
            last = Some(Instant::now());
            tell(container, "stats", Some(figures(&metrics)))?;
        }
        tokio::time::sleep(LOOK.min(interval)).await;
        if !matches!(
            container.status().await.0,
            Status::Created | Status::Running | Status::Paused
        ) {
            return Ok(());
        }
    }
}

fn tell(container: &Container, kind: &str, data: Option<Value>) -> Result<(), Error> {
    let mut event = json!({ "type": kind, "id": container.record.id });
    if let Some(data) = data {
        event["data"] = data;
    }
    print(&event.to_string())
}

/// The guest's cgroup figures under runc's names.
fn figures(metrics: &Metrics) -> Value {
    let (cpu, memory, pids) = (&metrics.cpu, &metrics.memory, &metrics.pids);
    let ns = |microseconds: u64| microseconds.saturating_mul(1000);
    let io = |of: fn(&containerd_shim_protos::cgroups_v2::metrics::IOEntry) -> [(&str, u64); 2]| {
        let entries = metrics.io.usage.iter().flat_map(|entry| {
            of(entry).map(|(op, value)| {
                json!({ "major": entry.major, "minor": entry.minor, "op": op, "value": value })
            })
        });
        entries.collect::<Vec<_>>()
    };
    json!({
        "cpu": {
            "usage": {
                "total": ns(cpu.usage_usec),
                "kernel": ns(cpu.system_usec),
                "user": ns(cpu.user_usec),
            },
            "throttling": {
                "periods": cpu.nr_periods,
                "throttledPeriods": cpu.nr_throttled,
                "throttledTime": ns(cpu.throttled_usec),
            },
        },
        "memory": {
            "cache": memory.file,
            "usage": {
                "limit": memory.usage_limit,
                "usage": memory.usage,
                "max": memory.max_usage,
                "failcnt": metrics.memory_events.max,
            },
            "swap": { "usage": memory.swap_usage, "limit": memory.swap_limit, "failcnt": 0 },
            "raw": {
                "anon": memory.anon,
                "file": memory.file,
                "kernel_stack": memory.kernel_stack,
                "slab": memory.slab,
                "sock": memory.sock,
                "shmem": memory.shmem,
                "file_mapped": memory.file_mapped,
                "file_dirty": memory.file_dirty,
                "inactive_anon": memory.inactive_anon,
                "active_anon": memory.active_anon,
                "inactive_file": memory.inactive_file,
                "active_file": memory.active_file,
                "unevictable": memory.unevictable,
                "pgfault": memory.pgfault,
                "pgmajfault": memory.pgmajfault,
            },
        },
        "pids": { "current": pids.current, "limit": pids.limit },
        "blkio": {
            "ioServiceBytesRecursive": io(|entry| [("Read", entry.rbytes), ("Write", entry.wbytes)]),
            "ioServicedRecursive": io(|entry| [("Read", entry.rios), ("Write", entry.wios)]),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(interval("1m30s").unwrap(), Duration::from_secs(90));
        assert!(interval("0s").is_err() && interval("soon").is_err());
    }

    #[test]
    fn figures_are_runcs() {
        let mut metrics = Metrics::new();
        metrics.cpu.mut_or_insert_default().usage_usec = 3;
        metrics.memory.mut_or_insert_default().usage = 5;
        let figures = figures(&metrics);
        assert_eq!(figures["cpu"]["usage"]["total"], 3000);
        assert_eq!(figures["memory"]["usage"]["usage"], 5);
        assert_eq!(figures["blkio"]["ioServicedRecursive"], json!([]));
    }
}
