//! What a sandbox costs the host.

use std::fs;

use serde::{Deserialize, Serialize};

/// A process of the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostProcess {
    /// "vmm", "shim", "file-server".
    pub role: String,
    /// Its id.
    pub pid: u32,
    /// Proportional set size, bytes: pages that several processes share are counted in parts. The
    /// VMM's holds the memory that the guest has touched.
    pub pss_bytes: u64,
    /// Processor time in the kernel (the VMM's has the guest's with it) and outside, seconds.
    pub cpu_seconds: f64,
}

impl HostProcess {
    /// As /proc tells it (proc_pid_smaps(5), proc_pid_stat(5)). `None` when it has gone.
    pub fn look(role: &str, pid: u32) -> Option<Self> {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self {
            role: role.to_owned(),
            pid,
            pss_bytes: pss(&rollup)?,
            cpu_seconds: ticks(&stat)? as f64 / rustix::param::clock_ticks_per_second() as f64,
        })
    }
}

fn pss(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// `utime` and `stime`, fields 14 and 15; the second one, a name, may hold blanks and brackets.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_from_proc() {
        let own = HostProcess::look("shim", std::process::id()).unwrap();
        assert!(own.pss_bytes > 4096 && own.cpu_seconds >= 0.0, "{own:?}");
        assert_eq!(HostProcess::look("vmm", u32::MAX), None);
        let stat = "7 (a) b) S 1 7 7 0 -1 4 9 0 0 0 250 50 0 0 20";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(pss("x\nPss:        12 kB\nPss_Anon: 3 kB\n"), Some(12288));
    }
}
