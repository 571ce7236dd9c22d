//! The sandbox's cgroup on the host (cgroup v2).

use std::{
    fs,
    io::{self, Write},
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{config::user, cpuset::CpuSet};

const ROOT: &str = "/sys/fs/cgroup";

/// Holds the sandboxes that belong in no pod's cgroup.
const DEFAULT_PARENT: &str = "caisson";

/// Controllers that the sandbox's limits need.
const CONTROLLERS: [&str; 3] = ["cpu", "cpuset", "memory"];

/// Period of the CPU limit, µs: the kernel's own default.
const PERIOD: u64 = 100_000;

/// Directory for the cgroup of sandbox `id`; None where cgroup v2 is not mounted on its own
/// (v1 or hybrid hosts): the sandbox then stays in its parent's.
pub fn path_for(id: &str, parent: Option<&Path>) -> Option<PathBuf> {
    if !Path::new(ROOT).join("cgroup.controllers").exists() {
        return None;
    }
    let parent = parent.map_or_else(default_parent, |parent| {
        parent.strip_prefix("/").unwrap_or(parent).to_owned()
    });
    Some(Path::new(ROOT).join(parent).join(id))
}

/// Below the root for root; for a user without root beside the process' own cgroup, which is the
/// user's if it is part of what has been delegated to the user.
fn default_parent() -> PathBuf {
    let own = match user() {
        None => String::new(),
        Some(_) => fs::read_to_string("/proc/self/cgroup").unwrap_or_default(),
    };
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let beside = own.and_then(|own| Path::new(own).parent());
    beside.unwrap_or(Path::new("")).join(DEFAULT_PARENT)
}

/// The cgroup that holds the container whose specification has this `linux.cgroupsPath`: as in
/// /proc/self/cgroup. None: it says nothing of it.
///
/// A path as it is for cgroup drivers that use the file system; `slice:prefix:name` for systemd,
/// where a dash in a slice's name stands for a level (systemd.slice(5)).
pub fn parent_of(cgroups_path: &Path) -> Option<PathBuf> {
    let text = cgroups_path.to_str()?;
    let parent = match text.split_once(':') {
        Some((slice, rest)) if rest.contains(':') => slice_path(slice)?,
        _ => cgroups_path.parent()?.to_owned(),
    };
    let plain = parent
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::RootDir));
    let parent = Path::new("/").join(parent);
    (plain && parent != Path::new("/")).then_some(parent)
}

fn slice_path(slice: &str) -> Option<PathBuf> {
    let name = match slice {
        "" => "system",
        slice => slice.strip_suffix(".slice")?,
    };
    let mut path = PathBuf::new();
    for (dash, _) in name.match_indices('-') {
        path.push(format!("{}.slice", &name[..dash]));
    }
    path.push(format!("{name}.slice"));
    Some(path)
}

/// Extended attributes of a cgroup that was made on the way to a sandbox's: it goes with the last one
/// below it, whichever that is. The second is for users, who may not set the first.
const OURS: [&str; 2] = ["trusted.caisson", "user.caisson"];

/// Makes the cgroup, with controllers as far as the host lets us.
///
/// # Errors
/// The host does not let us (a container without delegation): the caller goes on without.
pub fn create(path: &Path) -> io::Result<()> {
    for _ in 0..100 {
        match create_with_parents(path) {
            // Another sandbox that ended has just removed the parent.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(()) => {
                enable_controllers(path);
                return Ok(());
            }
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

fn create_with_parents(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent()
        && !parent.exists()
    {
        create_with_parents(parent)?;
        // Without a mark it stays, and is empty.
        let none = rustix::fs::XattrFlags::empty();
        let _ = OURS
            .iter()
            .any(|name| rustix::fs::setxattr(parent, *name, b"", none).is_ok());
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// From the root down to the parent of `path`. Where it fails, [`limit`] tells.
fn enable_controllers(path: &Path) {
    let mut above: Vec<&Path> = path
        .ancestors()
        .skip(1)
        .take_while(|path| path.starts_with(ROOT))
        .collect();
    above.reverse();
    for directory in above {
        let file = directory.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&file).unwrap_or_default();
        for controller in CONTROLLERS {
            if !enabled.split_whitespace().any(|word| word == controller) {
                let _ = fs::write(&file, format!("+{controller}"));
            }
        }
    }
}

/// Puts `pid` into the cgroup.
///
/// # Errors
/// Those of the write.
pub fn add(path: &Path, pid: u32) -> io::Result<()> {
    fs::write(path.join("cgroup.procs"), pid.to_string())
}

/// Bounds the memory of all processes in the cgroup.
///
/// # Errors
/// The host has not given the controller to the parent.
pub fn limit_memory(path: &Path, mib: u64) -> io::Result<()> {
    let file = path.join("memory.max");
    fs::write(file, (mib << 20).to_string())
}

/// Bounds the CPU time of all processes in the cgroup.
///
/// # Errors
/// As [`limit_memory`].
pub fn limit_cpu(path: &Path, millicpus: u64) -> io::Result<()> {
    let quota = millicpus.saturating_mul(PERIOD / 1000);
    fs::write(path.join("cpu.max"), format!("{quota} {PERIOD}"))
}

/// Binds all processes in the cgroup to processors and memory nodes; None: all of the parent's.
///
/// # Errors
/// As [`limit_memory`].
pub fn bind(path: &Path, cpus: Option<&CpuSet>, nodes: Option<&CpuSet>) -> io::Result<()> {
    let text = |set: Option<&CpuSet>| set.map_or_else(|| "\n".to_owned(), CpuSet::to_string);
    fs::write(path.join("cpuset.cpus"), text(cpus))?;
    fs::write(path.join("cpuset.mems"), text(nodes))
}

/// Kills what is in it and removes it, and what was made above it for the likes of it unless it is
/// still used.
///
/// # Errors
/// It is still in use at the deadline.
pub fn remove(path: &Path, deadline: Instant) -> io::Result<()> {
    loop {
        // Not there on kernels before 5.14, where the processes were killed one by one before.
        let kill = fs::File::options()
            .write(true)
            .open(path.join("cgroup.kill"));
        let _ = kill.and_then(|mut file| file.write_all(b"1"));
        match fs::remove_dir(path) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    for parent in path.ancestors().skip(1) {
        let mut nothing = [0; 1];
        let ours = OURS
            .iter()
            .any(|name| rustix::fs::getxattr(parent, *name, &mut nothing[..]).is_ok());
        // Fails while another sandbox has its cgroup there.
        if !ours || fs::remove_dir(parent).is_err() {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_by_either_driver() {
        let of = |path: &str| parent_of(Path::new(path)).map(|path| path.display().to_string());
        let some = |path: &str| Some(path.to_owned());
        assert_eq!(
            of("/kubepods/burstable/pod7/abc"),
            some("/kubepods/burstable/pod7")
        );
        assert_eq!(of("default/abc"), some("/default"));
        assert_eq!(
            of("kubepods-burstable-pod7.slice:cri-containerd:abc"),
            some("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7.slice")
        );
        assert_eq!(of("system.slice:docker:abc"), some("/system.slice"));
        assert_eq!(of(":docker:abc"), some("/system.slice"));
        for nothing in [
            "",
            "/abc",
            "abc",
            "/a/../../b/c",
            "noslice:x:y",
            "/a/b:c/../d",
        ] {
            assert_eq!(of(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn parents_that_were_made_go_with_the_last_below_them() {
        if !rustix::process::geteuid().is_root() {
            return; // Nobody else can mark them, and the runtime is root's.
        }
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("others")).unwrap();
        for name in ["others/a/b/one", "others/a/b/two", "others/three"] {
            create(&path(name)).unwrap();
        }
        let now = Instant::now();
        // The one that made the parents goes first.
        remove(&path("others/a/b/one"), now).unwrap();
        assert!(path("others/a/b/two").exists());
        remove(&path("others/a/b/two"), now).unwrap();
        assert!(!path("others/a").exists());
        remove(&path("others/three"), now).unwrap();
        assert!(path("others").exists(), "made by somebody else");
    }
}
