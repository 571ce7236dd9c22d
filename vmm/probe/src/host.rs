//! Checks of what else of the host Caisson uses. Each is independent, changes nothing and takes
//! no time worth mentioning. Nothing here keeps a microVM from running except a lack of memfd,
//! which no kernel since 3.17 has.

use std::{fs, io, path::Path};

use crate::Check;

/// Memory of the smallest pod, MiB.
const SMALL_POD_MIB: u64 = 256;

/// All checks of this module.
pub fn checks() -> Vec<Check> {
    vec![
        namespaces(),
        cgroup(Path::new("/sys/fs/cgroup")),
        memfd(),
        io_uring(),
        landlock(),
        seccomp(),
        memory(),
        tun(Path::new("/dev/net/tun")),
    ]
}

/// User, mount, network, PID, IPC and UTS namespaces for the jails.
pub fn namespaces() -> Check {
    let id = "namespaces";
    let missing: Vec<_> = ["user", "mnt", "net", "pid", "ipc", "uts"]
        .into_iter()
        .filter(|kind| !Path::new("/proc/self/ns").join(kind).exists())
        .collect();
    if !missing.is_empty() {
        return Check::warning(
            id,
            format!("this kernel lacks namespaces: {}", missing.join(", ")),
            "use a kernel with all namespaces: the VMM's jail is weaker without them",
        );
    }
    match read_number("/proc/sys/user/max_user_namespaces") {
        Some(0) => Check::warning(
            id,
            "user namespaces are switched off (user.max_user_namespaces is 0)",
            "sysctl user.max_user_namespaces=10000: the VMM's jail is weaker without them",
        ),
        _ => Check::ok(id, "namespaces are there for the jails"),
    }
}

/// cgroup v2 at `root` with the controllers that limit a pod.
pub fn cgroup(root: &Path) -> Check {
    let id = "cgroup";
    let Ok(controllers) = fs::read_to_string(root.join("cgroup.controllers")) else {
        return Check::warning(
            id,
            format!("{} is not cgroup v2", root.display()),
            "boot with systemd.unified_cgroup_hierarchy=1: without it the host side of a pod has no \
             limits of its own (limits inside the guest work)",
        );
    };
    let missing: Vec<_> = ["cpu", "memory", "pids"]
        .into_iter()
        .filter(|name| !controllers.split_whitespace().any(|there| there == *name))
        .collect();
    if missing.is_empty() {
        return Check::ok(id, "cgroup v2 with cpu, memory and pids");
    }
    Check::warning(
        id,
        format!("cgroup v2 lacks the controllers {}", missing.join(", ")),
        "have them delegated to this cgroup (cgroup.subtree_control of its parents): without them the \
         host side of a pod has fewer limits",
    )
}

/// memfd_create(2), which holds shared guest memory.
pub fn memfd() -> Check {
    match rustix::fs::memfd_create("caisson-check", rustix::fs::MemfdFlags::CLOEXEC) {
        Ok(_) => Check::ok("memfd", "memfd is there for shared guest memory"),
        Err(error) => Check::failed(
            "memfd",
            format!("memfd_create fails: {error}"),
            "use a Linux kernel of 5.10 or newer, and no seccomp filter that forbids memfd_create",
        ),
    }
}

/// io_uring, with which disks do their work where it is allowed.
pub fn io_uring() -> Check {
    let id = "io_uring";
    let mut parameters = rustix::io_uring::io_uring_params::default();
    // SAFETY: the kernel fills `parameters` and gives a descriptor, which is owned and dropped here;
    // no ring is mapped.
    let ring = unsafe { rustix::io_uring::io_uring_setup(2, &mut parameters) };
    match ring {
        Ok(_) => Check::ok(id, "io_uring is there for disks"),
        Err(error) => Check::warning(
            id,
            format!("io_uring_setup fails: {error}"),
            "sysctl kernel.io_uring_disabled=0: disks are slower without io_uring",
        ),
    }
}

/// Landlock, one of the walls of the jails.
pub fn landlock() -> Check {
    const VERSION: libc::c_ulong = 1; // LANDLOCK_CREATE_RULESET_VERSION
    // SAFETY: with this flag the call takes no pointer and returns a number
    // (`Documentation/userspace-api/landlock.rst`).
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0usize,
            VERSION,
        )
    };
    if version > 0 {
        return Check::ok("landlock", format!("Landlock is there, ABI {version}"));
    }
    Check::warning(
        "landlock",
        format!("Landlock is missing: {}", io::Error::last_os_error()),
        "boot with landlock among the lsm= names: one of the jail's walls is missing without it",
    )
}

/// seccomp filters that end the process.
pub fn seccomp() -> Check {
    let actions = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    if actions
        .split_whitespace()
        .any(|action| action == "kill_process")
    {
        return Check::ok("seccomp", "seccomp filters are there");
    }
    Check::failed(
        "seccomp",
        "this kernel has no seccomp filters, without which the VMM does not start",
        "use a kernel of 5.10 or newer with CONFIG_SECCOMP_FILTER",
    )
}

/// Memory for at least one small pod.
pub fn memory() -> Check {
    let id = "memory";
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match available_mib(&text) {
        Some(mib) if mib >= SMALL_POD_MIB => Check::ok(id, format!("{mib} MiB of memory are free")),
        Some(mib) => Check::warning(
            id,
            format!("only {mib} MiB of memory are free"),
            format!("a pod takes {SMALL_POD_MIB} MiB unless limited to less: free some memory"),
        ),
        None => Check::warning(
            id,
            "/proc/meminfo does not say how much memory is free",
            "mount /proc",
        ),
    }
}

/// The device that makes taps, for pods with a network.
pub fn tun(path: &Path) -> Check {
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Check::ok("tun", format!("{} is there for networks", path.display())),
        Err(error) => Check::warning(
            "tun",
            format!("{} cannot be opened: {error}", path.display()),
            "load the module (modprobe tun): pods have no network without it",
        ),
    }
}

fn read_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// `MemAvailable` of a `/proc/meminfo` in MiB.
fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn available_memory_is_read() {
        assert_eq!(
            available_mib("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"),
            Some(2)
        );
        assert_eq!(available_mib("MemTotal: 9 kB\n"), None);
        assert_eq!(available_mib("MemAvailable: much\n"), None);
    }

    #[test]
    fn missing_controllers_are_named() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(cgroup(root.path()).status, Status::Warning);
        let file = root.path().join("cgroup.controllers");
        fs::write(&file, "cpuset cpu io memory\n").unwrap();
        let check = cgroup(root.path());
        assert!(check.text.ends_with("pids"), "{check:?}");
        fs::write(&file, "cpuset cpu io memory pids\n").unwrap();
        assert_eq!(cgroup(root.path()).status, Status::Ok);
    }

    #[test]
    fn a_missing_tun_is_no_failure() {
        let check = tun(Path::new("/no/such/tun"));
        assert_eq!(check.status, Status::Warning);
        assert!(check.text.contains("/no/such/tun"));
    }

    #[test]
    fn every_check_that_complains_gives_advice() {
        for check in checks() {
            println!("{check:?}");
            assert_eq!(
                check.status == Status::Ok,
                check.advice.is_none(),
                "{check:?}"
            );
        }
    }
}
