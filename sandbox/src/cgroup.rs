//! The sandbox's cgroup on the host (cgroup v2).

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const ROOT: &str = "/sys/fs/cgroup";

/// Directory for the cgroup of sandbox `id`; None where cgroup v2 is not mounted on its own
/// (v1 or hybrid hosts): the sandbox then stays in its parent's.
pub fn path_for(id: &str, parent: Option<&Path>) -> Option<PathBuf> {
    if !Path::new(ROOT).join("cgroup.controllers").exists() {
        return None;
    }
    let parent = parent.map_or(Path::new("caisson"), |parent| {
        parent.strip_prefix("/").unwrap_or(parent)
    });
    Some(Path::new(ROOT).join(parent).join(id))
}

/// Makes the cgroup and puts `pid` into it.
///
/// # Errors
/// The host does not let us (a container without delegation): the caller goes on without.
pub fn create(path: &Path) -> io::Result<()> {
    for _ in 0..100 {
        match fs::create_dir_all(path) {
            // Another sandbox that ended has just removed the parent.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => return result,
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// Puts `pid` into the cgroup.
///
/// # Errors
/// Those of the write.
pub fn add(path: &Path, pid: u32) -> io::Result<()> {
    fs::write(path.join("cgroup.procs"), pid.to_string())
}

/// Kills what is in it, removes it and a parent that has become empty.
///
/// # Errors
/// It is still in use at the deadline.
pub fn remove(path: &Path, deadline: Instant) -> io::Result<()> {
    loop {
        // Not there on kernels before 5.14, where the processes were killed one by one before.
        let _ = fs::write(path.join("cgroup.kill"), "1");
        match fs::remove_dir(path) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    if let Some(parent) = path.parent().filter(|parent| parent.ends_with("caisson")) {
        // Fails while another sandbox has its cgroup there.
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}
