//! What belongs to the pod as a whole: clock, entropy, names, network, sysctls.

use std::{fs, os::fd::AsRawFd, path::Path, time::Duration};

use caisson_protocol::agent::{ConfigureSandboxRequest, Network};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::{
    boot,
    container::{Manager, is_sysctl_name},
    failure::{During, Failure, Result},
    network,
};

/// Fewest bytes of entropy that a pod may start with.
const MIN_ENTROPY: usize = 32;

/// Applies the request.
///
/// # Errors
/// The first part that fails.
pub fn configure(
    manager: &Manager,
    names: &Names,
    request: &ConfigureSandboxRequest,
) -> Result<()> {
    set_clock(request.realtime_ns)?;
    add_entropy(&request.entropy_seed)?;
    rustix::system::sethostname(names.hostname.as_bytes())
        .during(|| format!("set the hostname \"{}\"", names.hostname))?;
    write_pod_files(names, request)?;
    for (name, value) in &request.sysctls {
        set_sysctl(name, value)?;
    }
    if request.shm_size_bytes != 0 {
        resize_shm(request.shm_size_bytes)?;
    }
    if request.shared_pid_namespace {
        manager.keep_pid_namespace()?;
    }
    network::configure_loopback()
}

/// Applies the pod's network, and names its addresses in the hosts file.
///
/// # Errors
/// See [`network::configure`].
pub fn configure_network(names: &Names, request: &Network) -> Result<()> {
    network::configure(request)?;
    let addresses = request
        .interfaces
        .iter()
        .flat_map(|interface| &interface.addresses)
        .filter_map(|address| address.split('/').next())
        .filter(|address| !is_of_one_link(address))
        .collect::<Vec<_>>();
    names.write_hosts(&addresses)
}

/// Whether nobody but the neighbours on the link can be reached from it (RFC 4291, section 2.5.6): no
/// address for a name.
fn is_of_one_link(address: &str) -> bool {
    address
        .parse::<std::net::Ipv6Addr>()
        .is_ok_and(|address| address.is_unicast_link_local())
}

/// The pod's own name and the other lines of its hosts file.
#[derive(Debug, Clone, Default)]
pub struct Names {
    hostname: String,
    extra_hosts: Vec<String>,
}

impl Names {
    /// Those of the request.
    pub fn of(request: &ConfigureSandboxRequest) -> Self {
        let hostname = if request.hostname.is_empty() {
            "caisson".to_owned()
        } else {
            request.hostname.clone()
        };
        Self {
            hostname,
            extra_hosts: request.extra_hosts.clone(),
        }
    }

    /// Containers have the file mounted, so it is written in its place.
    fn write_hosts(&self, addresses: &[&str]) -> Result<()> {
        let mut hosts =
            String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
        let unconnected = ["127.0.1.1"];
        let addresses = if addresses.is_empty() {
            &unconnected
        } else {
            addresses
        };
        for address in addresses {
            hosts.push_str(&format!("{address}\t{}\n", self.hostname));
        }
        for line in &self.extra_hosts {
            hosts.push_str(line);
            hosts.push('\n');
        }
        let path = Path::new(boot::POD_FILES_DIR).join("hosts");
        fs::write(&path, hosts).during(|| format!("write {}", path.display()))
    }
}

/// Drops what nobody uses of these entries of the share, which have gone; without any, of everything.
///
/// # Errors
/// The kernel refuses.
pub fn forget_files(entries: &[String]) -> Result<()> {
    if entries.is_empty() {
        // Clean pages, and then the inodes that they kept (Linux: admin-guide/sysctl/vm.rst).
        return fs::write("/proc/sys/vm/drop_caches", "3").during(|| "drop the caches".to_owned());
    }
    for entry in entries {
        // The kernel asks for it anew, hears that it has gone, and forgets what is below it.
        let _ = Path::new(boot::SHARE_DIR).join(entry).symlink_metadata();
    }
    Ok(())
}

fn set_clock(realtime_ns: i64) -> Result<()> {
    if realtime_ns <= 0 {
        return Err(Failure::invalid("the host sent no time of day"));
    }
    let time = Timespec {
        tv_sec: realtime_ns / 1_000_000_000,
        tv_nsec: realtime_ns % 1_000_000_000,
    };
    clock_settime(ClockId::Realtime, time).during(|| "set the clock".to_owned())
}

/// RNDADDENTROPY of random(4): credited, so that getrandom(2) never waits.
fn add_entropy(seed: &[u8]) -> Result<()> {
    if seed.len() < MIN_ENTROPY || seed.len() > 4096 {
        return Err(Failure::invalid(format!(
            "an entropy seed of {} bytes; {MIN_ENTROPY} to 4096 are needed",
            seed.len()
        )));
    }
    let device = fs::File::options()
        .write(true)
        .open("/dev/random")
        .during(|| "open /dev/random".to_owned())?;
    let length = i32::try_from(seed.len()).unwrap_or(0);
    // struct rand_pool_info: entropy in bits, size in bytes, the bytes.
    let mut information = Vec::with_capacity(8 + seed.len());
    information.extend_from_slice(&(length * 8).to_ne_bytes());
    information.extend_from_slice(&length.to_ne_bytes());
    information.extend_from_slice(seed);
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    // SAFETY: the kernel reads the two integers and as many bytes as the second says, all of
    // which `information` holds; alignment does not matter to copy_from_user.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, information.as_ptr()) };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error()).during(|| "add entropy".to_owned())
    }
}

fn write_pod_files(names: &Names, request: &ConfigureSandboxRequest) -> Result<()> {
    names.write_hosts(&[])?;
    let mut resolver = String::new();
    if !request.dns_searches.is_empty() {
        resolver.push_str(&format!("search {}\n", request.dns_searches.join(" ")));
    }
    for server in &request.dns_servers {
        resolver.push_str(&format!("nameserver {server}\n"));
    }
    if !request.dns_options.is_empty() {
        resolver.push_str(&format!("options {}\n", request.dns_options.join(" ")));
    }
    let directory = Path::new(boot::POD_FILES_DIR);
    for (path, text) in [
        (directory.join("hostname"), format!("{}\n", names.hostname)),
        (directory.join("resolv.conf"), resolver.clone()),
        (Path::new("/run/resolv.conf").to_owned(), resolver),
    ] {
        fs::write(&path, text).during(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Sets a sysctl of the calling process's namespaces.
///
/// # Errors
/// A malformed name, one that the kernel does not have, a refused value.
pub fn set_sysctl(name: &str, value: &str) -> Result<()> {
    if !is_sysctl_name(name) {
        return Err(Failure::invalid(format!(
            "\"{name}\" is no name of a sysctl"
        )));
    }
    // sysctl(8): with dots as separators a slash stands for a dot, and the other way round.
    let path = if name
        .find(['.', '/'])
        .is_some_and(|at| name.as_bytes()[at] == b'/')
    {
        name.to_owned()
    } else {
        name.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect()
    };
    if path.split('/').any(|part| part == "..") {
        return Err(Failure::invalid(format!(
            "\"{name}\" is no name of a sysctl"
        )));
    }
    fs::write(Path::new("/proc/sys").join(&path), value)
        .during(|| format!("set the sysctl {name} to \"{value}\""))
}

fn resize_shm(bytes: u64) -> Result<()> {
    let flags = rustix::mount::MountFlags::NOSUID
        | rustix::mount::MountFlags::NODEV
        | rustix::mount::MountFlags::NOEXEC;
    rustix::mount::mount_remount(boot::SHM_DIR, flags, format!("mode=1777,size={bytes}"))
        .during(|| format!("give {} {bytes} bytes", boot::SHM_DIR))
}

/// Brings described processors online until there are `wanted`.
///
/// # Errors
/// There are not so many.
pub fn online_cpus(wanted: u32) -> Result<u32> {
    let mut online = count_cpus();
    let mut number = 1;
    while online < wanted {
        let file = format!("/sys/devices/system/cpu/cpu{number}/online");
        match fs::read_to_string(&file) {
            Ok(state) if state.trim() == "0" => {
                fs::write(&file, "1").during(|| format!("bring processor {number} online"))?;
                online += 1;
            }
            Ok(_) => {}
            Err(_) => {
                return Err(Failure::invalid(format!(
                    "{wanted} processors are wanted, the guest has {number}"
                )));
            }
        }
        number += 1;
    }
    Ok(count_cpus())
}

/// Processors that run.
pub fn count_cpus() -> u32 {
    fs::read_to_string("/proc/stat").map_or(1, |text| {
        let lines = text
            .lines()
            .filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "));
        u32::try_from(lines.count()).unwrap_or(1)
    })
}

/// Lets the guest have as many threads as its kernel would by itself, had it booted with the memory
/// that was added since.
pub fn allow_threads() {
    const FILE: &str = "/proc/sys/kernel/threads-max";
    let wanted = threads_of(memory_total());
    let allowed = fs::read_to_string(FILE).ok();
    let enough = allowed
        .and_then(|text| text.trim().parse::<u64>().ok())
        .is_some_and(|allowed| allowed >= wanted);
    if !enough && let Err(error) = fs::write(FILE, wanted.to_string()) {
        log::warn!("the guest has no more threads than at its boot: {error}");
    }
}

/// Threads whose stacks take an eighth of `memory` bytes (Linux, `set_max_threads`).
fn threads_of(memory: u64) -> u64 {
    const STACK: u64 = 16 << 10;
    // The greatest and least of the kernel: FUTEX_TID_MASK, and enough to boot.
    (memory / 8 / STACK).clamp(20, 0x3fff_ffff)
}

/// MemTotal in bytes.
pub fn memory_total() -> u64 {
    fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("MemTotal:"))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        })
        .map_or(0, |kib| kib * 1024)
}

/// Ends every container and the guest.
///
/// # Errors
/// The kernel refuses to reset.
pub async fn shutdown(manager: &Manager, grace: Duration) -> Result<()> {
    let signal_all = |number: i32| {
        for id in manager.ids() {
            let request = caisson_protocol::agent::SignalRequest {
                container_id: id,
                signal: number.unsigned_abs(),
                all: number == libc::SIGKILL,
                ..Default::default()
            };
            // One that has ended needs none.
            let _ = manager.signal(&request);
        }
    };
    if !grace.is_zero() {
        signal_all(libc::SIGTERM);
        let deadline = tokio::time::Instant::now() + grace;
        while tokio::time::Instant::now() < deadline
            && !manager.ids().iter().all(|id| manager.has_ended(id))
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    signal_all(libc::SIGKILL);
    rustix::fs::sync();
    Ok(())
}

/// Resets the machine, which ends it (`reboot=k`: the VMM sees the keyboard controller's reset).
///
/// # Errors
/// Those of reboot(2); on success it does not return.
pub fn power_off() -> Result<()> {
    rustix::system::reboot(rustix::system::RebootCommand::Restart)
        .during(|| "reset the machine".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_follow_the_memory() {
        assert_eq!(threads_of(512 << 20), 4096);
        assert_eq!(threads_of(64 << 30), 524_288);
        assert_eq!((threads_of(0), threads_of(u64::MAX)), (20, 0x3fff_ffff));
    }
}
