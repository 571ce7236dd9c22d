//! What a sandbox may leave on a host: taken before and after a test, the difference is a leak.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Programs whose processes are Caisson's.
const PROGRAMS: [&str; 4] = [
    "caisson",
    "caisson-vmm",
    "caisson-fs",
    "containerd-shim-caisson-v2",
];

/// Where Caisson keeps state that must go with its container.
const STATE: [&str; 4] = [
    "/run/caisson",
    "/var/lib/caisson/containers",
    "/var/lib/caisson/networks",
    "/run/containerd",
];

/// What is made on its first use and kept: by containerd and `ctr`, and the command line's default
/// network.
const KEPT: [&str; 5] = [
    "/var/lib/caisson/networks/attached",
    "/var/lib/caisson/networks/caisson.json",
    "/run/containerd",
    "/run/containerd/fifo",
    "/run/containerd/s",
];

/// One line for each thing found, such as `mount /run/caisson/x (tmpfs)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// Looks at the machine.
    pub fn now() -> Self {
        let mut found = BTreeSet::new();
        processes(&mut found);
        mounts(&mut found);
        cgroups(&mut found);
        links(&mut found);
        unix_sockets(&mut found);
        loop_devices(&mut found);
        for directory in STATE {
            files(Path::new(directory), &mut found);
        }
        unfinished_loads(&mut found);
        named(Path::new("/run/netns"), "network namespace", "", &mut found);
        named(Path::new("/dev/shm"), "shared memory", "", &mut found);
        named(Path::new("/tmp"), "temporary file", "caisson", &mut found);
        named(
            Path::new("/var/tmp"),
            "temporary file",
            "caisson",
            &mut found,
        );
        Self(found)
    }

    /// What is there now and was not in `earlier`.
    pub fn since(&self, earlier: &Self) -> Vec<String> {
        self.0.difference(&earlier.0).cloned().collect()
    }
}

/// Other services come and go on a host; in the testbed nothing but the tests happens.
fn everything_is_ours() -> bool {
    std::env::var_os("CAISSON_TESTBED").is_some()
}

fn processes(found: &mut BTreeSet<String>) {
    for pid in numbers(Path::new("/proc")) {
        let base = format!("/proc/{pid}");
        // The name in `stat` also covers zombies, whose `exe` is gone; the kernel cuts it at 15.
        let name = fs::read_to_string(format!("{base}/comm")).unwrap_or_default();
        let name = name.trim_end();
        let program = fs::read_link(format!("{base}/exe"))
            .ok()
            .and_then(|exe| Some(exe.file_name()?.to_str()?.to_owned()))
            .unwrap_or_default();
        let program = program.trim_end_matches(" (deleted)");
        let ours = PROGRAMS.iter().any(|ours| {
            program == *ours || name == *ours || (name.len() == 15 && ours.starts_with(name))
        });
        if ours {
            let words = fs::read(format!("{base}/cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words).replace('\0', " ");
            found.insert(format!("process {pid} {name} ({})", words.trim_end()));
        }
        memory_files(pid, found);
    }
}

/// Memory files without a name live only in processes; a guest's memory in a foreign one is a leak.
fn memory_files(pid: u32, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return;
    };
    for entry in entries.flatten() {
        if let Ok(target) = fs::read_link(entry.path())
            && let Some(name) = target.to_str()
            && name.starts_with("/memfd:")
            && (everything_is_ours() || name.contains("caisson"))
        {
            found.insert(format!("memory file {name} in process {pid}"));
        }
    }
}

fn mounts(found: &mut BTreeSet<String>) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in table.lines() {
        // proc_pid_mountinfo(5): "... root point options ... - type source options".
        let (left, right) = line.split_once(" - ").unwrap_or((line, ""));
        let point = left.split(' ').nth(4).unwrap_or_default();
        let kind = right.split(' ').next().unwrap_or_default();
        found.insert(format!("mount {point} ({kind})"));
    }
}

fn cgroups(found: &mut BTreeSet<String>) {
    fn walk(directory: &Path, found: &mut BTreeSet<String>) {
        let Ok(entries) = fs::read_dir(directory) else {
            return;
        };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let path = entry.path();
                if everything_is_ours() || path.to_string_lossy().contains("caisson") {
                    found.insert(format!("cgroup {}", path.display()));
                }
                walk(&path, found);
            }
        }
    }
    walk(Path::new("/sys/fs/cgroup"), found);
}

fn links(found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir("/sys/class/net") else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let kind = if entry.path().join("tun_flags").exists() {
            "tap device"
        } else {
            "network interface"
        };
        found.insert(format!("{kind} {name}"));
    }
}

fn unix_sockets(found: &mut BTreeSet<String>) {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    for line in table.lines() {
        if let Some(path) = line.split_whitespace().nth(7)
            && path.contains("caisson")
        {
            found.insert(format!("open socket {path}"));
        }
    }
}

fn loop_devices(found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir("/sys/block") else {
        return;
    };
    for entry in entries.flatten() {
        if let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file")) {
            let name = entry.file_name().to_string_lossy().into_owned();
            found.insert(format!("loop device {name} on {}", file.trim_end()));
        }
    }
}

fn files(directory: &Path, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        let what = if kind.is_dir() {
            "directory"
        } else if kind.is_socket() {
            "socket"
        } else if kind.is_fifo() {
            "fifo"
        } else {
            "file"
        };
        if !KEPT.iter().any(|kept| path == Path::new(kept)) {
            found.insert(format!("{what} {}", path.display()));
        }
        if kind.is_dir() {
            files(&path, found);
        }
    }
}

/// Images stay, and so do their layers; what is half loaded must not.
fn unfinished_loads(found: &mut BTreeSet<String>) {
    let mut all = BTreeSet::new();
    files(Path::new("/var/lib/caisson/images"), &mut all);
    found.extend(
        all.into_iter()
            .filter(|line| line.contains("tmp") || line.contains("partial"))
            // The folder in which loads work may stay.
            .filter(|line| !line.starts_with("directory ") || !line.ends_with("/tmp")),
    );
}

fn named(directory: &Path, what: &str, with: &str, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.contains(with) {
            found.insert(format!("{what} {}", directory.join(name).display()));
        }
    }
}

fn numbers(directory: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// The tests of this module watch the same machine.
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

    #[test]
    fn a_process_named_like_ours_is_found_and_then_not() {
        let _one = ONE.lock();
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("caisson-vmm");
        fs::copy("/bin/sleep", &program).unwrap();
        let before = Traces::now();
        let mut child = std::process::Command::new(&program)
            .arg("100")
            .spawn()
            .unwrap();
        let seen = Traces::now().since(&before);
        child.kill().unwrap();
        // Killed but not yet waited for: a zombie is a leak too.
        let zombie = crate::until(std::time::Duration::from_secs(5), || {
            let state = fs::read_to_string(format!("/proc/{}/stat", child.id())).ok()?;
            state.contains(") Z ").then(|| Traces::now().since(&before))
        });
        child.wait().unwrap();
        let about = |lines: &[String]| {
            lines
                .iter()
                .any(|line| line.starts_with(&format!("process {}", child.id())))
        };
        assert!(about(&seen), "{seen:?}");
        assert!(about(&zombie.unwrap()));
        assert!(!about(&Traces::now().since(&before)));
    }

    #[test]
    fn a_socket_and_a_temporary_file_are_found() {
        let _one = ONE.lock();
        let before = Traces::now();
        let directory = tempfile::Builder::new()
            .prefix("caisson-leak-test")
            .tempdir_in("/tmp")
            .unwrap();
        let path = directory.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let seen = Traces::now().since(&before);
        let path = path.display().to_string();
        assert!(seen.contains(&format!("open socket {path}")), "{seen:?}");
        assert!(
            seen.contains(&format!("temporary file {}", directory.path().display())),
            "{seen:?}"
        );
    }
}
