//! Host memory of a sandbox's processes, guest memory excluded.

use std::{fs, path::Path};

use crate::error::BenchError;

/// Proportional set size of a process in MiB, less its mappings that hold guest memory: private or
/// memfd mappings of at least half the guest's size (`/proc/PID/smaps`, proc_pid_smaps(5)).
///
/// # Errors
/// When the process is gone.
pub fn overhead_mib(process: u32, guest_mib: u32) -> Result<f64, BenchError> {
    let path = format!("/proc/{process}/smaps");
    let text = fs::read_to_string(&path).map_err(BenchError::io(format!("cannot read {path}")))?;
    Ok(overhead_kib(&text, u64::from(guest_mib) * 1024) as f64 / 1024.0)
}

fn overhead_kib(smaps: &str, guest_kib: u64) -> u64 {
    let mut total = 0;
    let mut guest = false;
    let mut file = false;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        let value = || -> u64 {
            line.split_ascii_whitespace()
                .nth(1)
                .and_then(|v| v.parse().ok())
                .unwrap_or(0)
        };
        match first {
            "Size:" => guest = !file && value() * 2 >= guest_kib,
            "Pss:" if !guest => total += value(),
            // "start-end perms offset device inode path" opens a mapping.
            _ if first.contains('-') && !first.ends_with(':') => {
                let name = words.nth(4).unwrap_or("");
                file = name.starts_with('/') && !name.starts_with("/memfd:");
            }
            _ => {}
        }
    }
    total
}

/// Ids of the processes whose program is called one of `names` (first argument's last component).
///
/// # Errors
/// When /proc cannot be read.
pub fn processes(names: &[&str]) -> Result<Vec<(String, u32)>, BenchError> {
    let mut found = Vec::new();
    let entries = fs::read_dir("/proc").map_err(BenchError::io("cannot read /proc"))?;
    for entry in entries.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // A process may end while we look.
        let Ok(arguments) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let program = arguments.split(|&b| b == 0).next().unwrap_or_default();
        let program = String::from_utf8_lossy(program);
        let name = Path::new(program.as_ref())
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        if names.contains(&name.as_str()) {
            found.push((name, id));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55a000000000-55a000001000 r-xp 00000000 08:01 77 /usr/bin/caisson-vmm
Size:                  4 kB
Rss:                   4 kB
Pss:                   3 kB
7f0000000000-7f0008000000 rw-s 00000000 00:01 99 /memfd:guest (deleted)
Size:             131072 kB
Pss:               40000 kB
7f1000000000-7f1008000000 rw-p 00000000 00:00 0
Size:             131072 kB
Pss:               20000 kB
7f2000000000-7f2008000000 r--p 00000000 08:01 78 /usr/share/vmlinux
Size:             131072 kB
Pss:                 500 kB
7f3000000000-7f3000001000 rw-p 00000000 00:00 0 [stack]
Size:                  4 kB
Pss:                   4 kB
";

    #[test]
    fn guest_memory_is_left_out() {
        assert_eq!(overhead_kib(SMAPS, 128 * 1024), 507);
        // With a larger guest those mappings are the monitor's own.
        assert_eq!(overhead_kib(SMAPS, 1024 * 1024), 60507);
    }

    #[test]
    fn we_find_ourselves() {
        let mine = fs::read("/proc/self/cmdline").unwrap();
        let mine = String::from_utf8(mine.split(|&b| b == 0).next().unwrap().to_vec()).unwrap();
        let name = Path::new(&mine).file_name().unwrap().to_str().unwrap();
        let found = processes(&[name]).unwrap();
        assert!(found.iter().any(|(_, id)| *id == std::process::id()));
        assert!(overhead_mib(std::process::id(), 1024).unwrap() > 0.0);
    }
}
