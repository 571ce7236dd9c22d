//! Host memory of a sandbox's processes, guest memory excluded.

use std::{fs, path::Path};

use crate::error::BenchError;

/// Proportional set size of a process in MiB, less its mappings that hold guest memory
/// (`/proc/PID/smaps`, proc_pid_smaps(5)): private or memfd mappings of at least half the guest's
/// size; the guest kernel's file, which is mapped into guest memory; and what of guest memory lies
/// before, between and after its segments.
///
/// # Errors
/// When the process is gone.
pub fn overhead_mib(process: u32, guest_mib: u32) -> Result<f64, BenchError> {
    let path = format!("/proc/{process}/smaps");
    let text = fs::read_to_string(&path).map_err(BenchError::io(format!("cannot read {path}")))?;
    Ok(overhead_kib(&text, u64::from(guest_mib) * 1024) as f64 / 1024.0)
}

struct Mapping {
    start: u64,
    end: u64,
    name: String,
    pss_kib: u64,
}

impl Mapping {
    fn is_kernel(&self) -> bool {
        self.name.ends_with("/vmlinux")
    }

    fn is_of_a_file(&self) -> bool {
        self.name.starts_with('/') && !self.name.starts_with("/memfd:")
    }
}

fn overhead_kib(smaps: &str, guest_kib: u64) -> u64 {
    let mappings = mappings(smaps);
    let is_kernel = |index: Option<usize>| index.is_some_and(|index| mappings[index].is_kernel());
    let touches = |index: usize| {
        let own = &mappings[index];
        let before = index
            .checked_sub(1)
            .filter(|other| mappings[*other].end == own.start);
        let after = Some(index + 1).filter(|other| {
            mappings
                .get(*other)
                .is_some_and(|other| other.start == own.end)
        });
        is_kernel(before) || is_kernel(after)
    };
    let of_the_guest = |index: usize| {
        let own = &mappings[index];
        let large = (own.end - own.start) / 1024 * 2 >= guest_kib;
        own.is_kernel() || (!own.is_of_a_file() && (large || touches(index)))
    };
    (0..mappings.len())
        .filter(|index| !of_the_guest(*index))
        .map(|index| mappings[index].pss_kib)
        .sum()
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        // "start-end perms offset device inode path" opens a mapping.
        if let Some((start, end)) = first.split_once('-').filter(|_| !first.ends_with(':')) {
            let address = |text| u64::from_str_radix(text, 16).unwrap_or(0);
            found.push(Mapping {
                start: address(start),
                end: address(end),
                name: words.nth(4).unwrap_or("").to_owned(),
                pss_kib: 0,
            });
        } else if first == "Pss:"
            && let Some(last) = found.last_mut()
        {
            last.pss_kib = words.next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
        }
    }
    found
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
Pss:               40000 kB
7f1000000000-7f1001000000 rw-p 00000000 00:00 0
Pss:                1000 kB
7f1001000000-7f1001800000 rw-p 00000000 08:01 78 /usr/share/vmlinux
Pss:                 500 kB
7f1001800000-7f1001801000 rw-p 00000000 00:00 0
Pss:                   4 kB
7f1001801000-7f1002000000 rw-p 00801000 08:01 78 /usr/share/vmlinux
Pss:                 500 kB
7f1002000000-7f1008000000 rw-p 00000000 00:00 0
Pss:               20000 kB
7f1009000000-7f1009001000 rw-p 00000000 00:00 0
Pss:                  16 kB
7f3000000000-7f3000001000 rw-p 00000000 00:00 0 [stack]
Pss:                   4 kB
";

    #[test]
    fn guest_memory_is_left_out() {
        assert_eq!(overhead_kib(SMAPS, 128 * 1024), 3 + 16 + 4);
        // Of a larger guest, only what touches its kernel is known.
        assert_eq!(overhead_kib(SMAPS, 1024 * 1024), 3 + 40000 + 16 + 4);
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
