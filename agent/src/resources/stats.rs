//! Statistics of a cgroup.

use std::{collections::HashMap, fs, path::Path};

use caisson_protocol::agent::{IoStat, StatsResponse};

use super::keyed;

/// Figures of the cgroup at `directory`; a file that is not there (a controller that is off, the
/// hierarchy's root) leaves its members 0.
pub fn stats(directory: &Path) -> StatsResponse {
    let read = |file: &str| fs::read_to_string(directory.join(file)).unwrap_or_default();
    let number = |file: &str| match read(file).trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    };
    let cpu = keyed(&read("cpu.stat"));
    let of = |map: &HashMap<String, u64>, key: &str| map.get(key).copied().unwrap_or(0);
    StatsResponse {
        cpu_usage_usec: of(&cpu, "usage_usec"),
        cpu_user_usec: of(&cpu, "user_usec"),
        cpu_system_usec: of(&cpu, "system_usec"),
        cpu_nr_periods: of(&cpu, "nr_periods"),
        cpu_nr_throttled: of(&cpu, "nr_throttled"),
        cpu_throttled_usec: of(&cpu, "throttled_usec"),
        memory_current_bytes: number("memory.current"),
        memory_max_bytes: number("memory.max"),
        memory_peak_bytes: number("memory.peak"),
        memory_swap_current_bytes: number("memory.swap.current"),
        memory_stat: keyed(&read("memory.stat")),
        memory_events: keyed(&read("memory.events")),
        pids_current: number("pids.current"),
        pids_max: number("pids.max"),
        io: read("io.stat").lines().filter_map(io_stat).collect(),
        cpu_pressure: read("cpu.pressure"),
        memory_pressure: read("memory.pressure"),
        io_pressure: read("io.pressure"),
        ..Default::default()
    }
}

fn io_stat(line: &str) -> Option<IoStat> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut stat = IoStat {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        ..Default::default()
    };
    for word in words {
        let (key, value) = word.split_once('=')?;
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => stat.read_bytes = value,
            "wbytes" => stat.write_bytes = value,
            "rios" => stat.read_ios = value,
            "wios" => stat.write_ios = value,
            _ => {}
        }
    }
    Some(stat)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_lines() {
        let stat = io_stat("254:16 rbytes=4096 wbytes=1 rios=2 wios=3 dbytes=0 dios=0").unwrap();
        assert_eq!(
            (stat.major, stat.minor, stat.read_bytes, stat.write_ios),
            (254, 16, 4096, 3)
        );
        assert!(io_stat("nonsense").is_none());
    }
}
