//! OCI resource limits and statistics in terms of cgroup v2 files
//! (Linux: admin-guide/cgroup-v2.rst).

pub mod devices;
mod stats;

use std::collections::HashMap;

use oci_spec::runtime::LinuxResources;

pub use stats::stats;

use crate::failure::{Failure, Kind, Result};

/// "key value" lines.
pub fn keyed(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

/// A limit that OCI writes as a number with -1 for none.
fn limit(value: i64) -> String {
    if value < 0 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

/// Files of a cgroup and the values that `resources` puts in them, in an order that works.
///
/// # Errors
/// A limit that cgroup v2 does not have.
pub fn settings(resources: &LinuxResources) -> Result<Vec<(String, String)>> {
    let mut settings = Vec::new();
    let mut set = |file: &str, value: String| settings.push((file.to_owned(), value));
    if let Some(memory) = resources.memory() {
        if memory.kernel().is_some_and(|value| value > 0)
            || memory.kernel_tcp().is_some_and(|value| value > 0)
        {
            return Err(unsupported("memory.kernel"));
        }
        if let Some(value) = memory.limit() {
            set("memory.max", limit(value));
        }
        if let Some(value) = memory.reservation() {
            set("memory.low", limit(value));
        }
        if let Some(total) = memory.swap() {
            // OCI counts memory and swap together, cgroup v2 swap alone.
            let value = match memory.limit() {
                _ if total < 0 => "max".to_owned(),
                Some(limit) if limit >= 0 => total.saturating_sub(limit).max(0).to_string(),
                _ => return Err(Failure::invalid("a swap limit needs a memory limit")),
            };
            set("memory.swap.max", value);
        }
    }
    if let Some(cpu) = resources.cpu() {
        if cpu.realtime_runtime().is_some_and(|value| value != 0) {
            return Err(unsupported("cpu.realtimeRuntime"));
        }
        if cpu.quota().is_some() || cpu.period().is_some() {
            let quota = cpu.quota().filter(|quota| *quota > 0);
            let period = cpu.period().filter(|period| *period > 0).unwrap_or(100_000);
            set(
                "cpu.max",
                format!(
                    "{} {period}",
                    quota.map_or("max".to_owned(), |quota| quota.to_string())
                ),
            );
        }
        if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
            // 2..=262144 to 1..=10000, as the kernel's cgroup v1 to v2 conversions have it.
            let shares = shares.clamp(2, 262_144);
            set(
                "cpu.weight",
                (1 + (shares - 2) * 9999 / 262_142).to_string(),
            );
        }
        if let Some(burst) = cpu.burst() {
            set("cpu.max.burst", burst.to_string());
        }
        if let Some(idle) = cpu.idle() {
            set("cpu.idle", idle.to_string());
        }
        if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
            set("cpuset.cpus", cpus.clone());
        }
        if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
            set("cpuset.mems", mems.clone());
        }
    }
    if let Some(pids) = resources.pids() {
        let value = pids.limit();
        set(
            "pids.max",
            if value <= 0 {
                "max".to_owned()
            } else {
                value.to_string()
            },
        );
    }
    if resources.block_io().is_some() {
        block_io(resources, &mut set)?;
    }
    for page in resources.hugepage_limits().iter().flatten() {
        // What may be used, and what may be set aside: a mapping beyond the second is refused when
        // it is made, not by a signal when it is touched.
        for file in ["max", "rsvd.max"] {
            let file = format!("hugetlb.{}.{file}", page.page_size());
            set(&file, limit(page.limit()));
        }
    }
    if resources.network().as_ref().is_some_and(|network| {
        network.class_id().is_some_and(|id| id != 0)
            || network.priorities().as_ref().is_some_and(|p| !p.is_empty())
    }) {
        return Err(unsupported("network.classID and network.priorities"));
    }
    for (file, value) in resources.unified().iter().flatten() {
        if file.contains('/') || !file.contains('.') {
            return Err(Failure::invalid(format!(
                "\"{file}\" is no file of a cgroup"
            )));
        }
        set(file, value.clone());
    }
    Ok(settings)
}

fn block_io(resources: &LinuxResources, set: &mut impl FnMut(&str, String)) -> Result<()> {
    let Some(io) = resources.block_io() else {
        return Ok(());
    };
    if io.leaf_weight().is_some()
        || io
            .weight_device()
            .as_ref()
            .is_some_and(|list| !list.is_empty())
    {
        return Err(unsupported("blockIO.leafWeight and blockIO.weightDevice"));
    }
    if let Some(weight) = io.weight().filter(|weight| *weight > 0) {
        // blkio's 10..=1000 to io.weight's 1..=10000.
        let weight = u64::from(weight.clamp(10, 1000));
        set(
            "io.weight",
            format!("default {}", 1 + (weight - 10) * 9999 / 990),
        );
    }
    for (key, list) in [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ] {
        for one in list.iter().flatten() {
            set(
                "io.max",
                format!("{}:{} {key}={}", one.major(), one.minor(), one.rate()),
            );
        }
    }
    Ok(())
}

fn unsupported(what: &str) -> Failure {
    Failure::new(
        Kind::Unimplemented,
        format!("{what}: cgroup v2 has no such limit"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Vec<(String, String)> {
        settings(&serde_json::from_str(json).unwrap()).unwrap()
    }

    #[test]
    fn dockers_limits() {
        let list = of(
            r#"{"memory":{"limit":67108864,"swap":134217728},"cpu":{"quota":50000,"period":100000,"shares":1024},"pids":{"limit":50}}"#,
        );
        let expected = [
            ("memory.max", "67108864"),
            ("memory.swap.max", "67108864"),
            ("cpu.max", "50000 100000"),
            ("cpu.weight", "39"),
            ("pids.max", "50"),
        ];
        assert_eq!(list, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    #[test]
    fn huge_pages_are_limited_in_use_and_in_reserve() {
        let list = of(
            r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304},{"pageSize":"1GB","limit":-1}]}"#,
        );
        let expected = [
            ("hugetlb.2MB.max", "4194304"),
            ("hugetlb.2MB.rsvd.max", "4194304"),
            ("hugetlb.1GB.max", "max"),
            ("hugetlb.1GB.rsvd.max", "max"),
        ];
        assert_eq!(list, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    #[test]
    fn none_is_max() {
        let list =
            of(r#"{"memory":{"limit":-1,"swap":-1},"pids":{"limit":-1},"cpu":{"quota":-1}}"#);
        assert!(
            list.iter().all(|(_, value)| value.starts_with("max")),
            "{list:?}"
        );
    }

    #[test]
    fn foreign_files_are_refused() {
        let resources = serde_json::from_str(r#"{"unified":{"../x.y":"1"}}"#).unwrap();
        assert!(settings(&resources).is_err());
    }
}
