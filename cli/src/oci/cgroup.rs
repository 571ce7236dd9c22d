//! The container's cgroup on the host: where callers of an OCI runtime look for its processes and
//! figures. It holds the process that stands for the container, and the microVM below it.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use caisson_sandbox::scaled;
use serde::{Deserialize, Serialize};

use crate::error::Error;

const ROOT: &str = "/sys/fs/cgroup";

/// Longest to wait for systemd to move a process.
const MOVE_LIMIT: Duration = Duration::from_secs(10);

/// Longest to wait for the last process of a cgroup to be gone.
const EMPTY_LIMIT: Duration = Duration::from_secs(5);

/// Where a container's cgroup is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// As in /proc/PID/cgroup.
    pub path: PathBuf,
    /// systemd makes and removes it: slice and scope.
    pub systemd: Option<(String, String)>,
    /// The closest one above it that was there before.
    pub above: PathBuf,
}

impl Place {
    /// By config.json's `linux.cgroupsPath`.
    ///
    /// # Errors
    /// It is malformed.
    pub fn of(cgroups_path: &str, systemd: bool) -> Result<Self, Error> {
        let malformed =
            |why: &str| Error::State(format!("linux.cgroupsPath \"{cgroups_path}\" {why}"));
        if systemd {
            let mut parts = cgroups_path.split(':');
            let (Some(slice), Some(prefix), Some(name), None) =
                (parts.next(), parts.next(), parts.next(), parts.next())
            else {
                return Err(malformed("is not SLICE:PREFIX:NAME"));
            };
            let slice = if slice.is_empty() {
                "system.slice"
            } else {
                slice
            };
            let unit = if name.ends_with(".slice") {
                return Err(malformed("names a slice, not a scope"));
            } else if prefix.is_empty() {
                format!("{name}.scope")
            } else {
                format!("{prefix}-{name}.scope")
            };
            if unit.contains('/') {
                return Err(malformed("has a slash in its name"));
            }
            let parent = expand(slice).ok_or_else(|| malformed("has a malformed slice"))?;
            return Ok(Self {
                path: parent.join(&unit),
                systemd: Some((slice.to_owned(), unit)),
                above: parent,
            });
        }
        let path = Path::new("/").join(cgroups_path);
        if path
            .components()
            .any(|part| matches!(part, Component::ParentDir))
        {
            return Err(malformed("leads out of the hierarchy"));
        }
        let above = path
            .ancestors()
            .skip(1)
            .find(|above| below_root(above).is_dir())
            .unwrap_or(Path::new("/"))
            .to_owned();
        Ok(Self {
            path,
            systemd: None,
            above,
        })
    }

    fn directory(&self) -> PathBuf {
        below_root(&self.path)
    }

    /// Makes the cgroup and puts this process into it.
    ///
    /// # Errors
    /// The host does not let us, or systemd does not run.
    pub fn enter(&self) -> Result<(), Error> {
        if !is_unified() {
            ::log::warn!("no cgroup: {ROOT} is not cgroup v2");
            return Ok(());
        }
        if let Some((slice, unit)) = &self.systemd {
            return self.enter_scope(slice, unit);
        }
        let directory = self.directory();
        // Controllers count only where every cgroup above has them on.
        let mut above = PathBuf::from(ROOT);
        fs::create_dir_all(&directory).map_err(Error::file("create the cgroup", &directory))?;
        let parts: Vec<_> = self.path.components().skip(1).collect();
        for part in &parts {
            enable_controllers(&above);
            above.push(part);
        }
        self.join()
    }

    /// Puts this process into the cgroup, which is there.
    ///
    /// # Errors
    /// The host does not let us.
    pub fn join(&self) -> Result<(), Error> {
        if !is_unified() {
            return Ok(());
        }
        let procs = self.directory().join("cgroup.procs");
        // 0 is the writer, whose id in its PID namespace is another than here.
        fs::write(&procs, "0").map_err(Error::file("enter the cgroup", procs))
    }

    /// A transient scope, by the manager's D-Bus interface (org.freedesktop.systemd1(5)).
    fn enter_scope(&self, slice: &str, unit: &str) -> Result<(), Error> {
        if !Path::new("/run/systemd/system").is_dir() {
            return Err(Error::State(
                "--systemd-cgroup: systemd does not run on this host; use the cgroupfs manager"
                    .to_owned(),
            ));
        }
        let pid = std::process::id().to_string();
        let output = Command::new("busctl")
            .args([
                "--system",
                "call",
                "org.freedesktop.systemd1",
                "/org/freedesktop/systemd1",
                "org.freedesktop.systemd1.Manager",
                "StartTransientUnit",
                "ssa(sv)a(sa(sv))",
                unit,
                "fail",
                "8",
                "Description",
                "s",
                "Caisson container",
                "Slice",
                "s",
                slice,
                "Delegate",
                "b",
                "true",
                "PIDs",
                "au",
                "1",
                &pid,
                "DefaultDependencies",
                "b",
                "false",
                "CPUAccounting",
                "b",
                "true",
                "MemoryAccounting",
                "b",
                "true",
                "TasksAccounting",
                "b",
                "true",
                "0",
            ])
            .output()
            .map_err(Error::file("run", "busctl"))?;
        if !output.status.success() {
            return Err(Error::State(format!(
                "systemd does not make the scope {unit}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
        // The answer is a job; the process is in the scope when that is done.
        let end = Instant::now() + scaled(MOVE_LIMIT);
        let wanted = format!("0::{}\n", self.path.display());
        while fs::read_to_string("/proc/self/cgroup").is_ok_and(|text| !text.ends_with(&wanted)) {
            if Instant::now() > end {
                return Err(Error::State(format!(
                    "systemd has not moved process {pid} into {}",
                    self.path.display()
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Removes the cgroup, of which all processes are about to end. Can be repeated.
    ///
    /// # Errors
    /// Something lives in it.
    pub fn remove(&self) -> Result<(), Error> {
        let directory = self.directory();
        let end = Instant::now() + scaled(EMPTY_LIMIT);
        loop {
            match remove_tree(&directory) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) if Instant::now() > end => {
                    return Err(Error::file("remove the cgroup", directory)(error));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        let made = self.path.ancestors().skip(1);
        for directory in made.take_while(|above| *above != self.above) {
            // Fails while it holds another container's.
            let _ = fs::remove_dir(below_root(directory));
        }
        Ok(())
    }
}

fn below_root(path: &Path) -> PathBuf {
    Path::new(ROOT).join(path.strip_prefix("/").unwrap_or(path))
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

fn is_unified() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// For all below; those that cannot be are missing from the figures, nothing else.
fn enable_controllers(directory: &Path) {
    let available = fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        let _ = fs::write(
            directory.join("cgroup.subtree_control"),
            format!("+{controller}"),
        );
    }
}

/// "a-b.slice" is below "a.slice" (systemd.slice(5)).
fn expand(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::from("/");
    if name == "-" {
        return Some(path);
    }
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() || part.contains('/') {
            return None;
        }
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let path = |text: &str, systemd| Place::of(text, systemd).map(|place| place.path);
        assert_eq!(
            path("machine.slice:libpod:abc", true).unwrap(),
            Path::new("/machine.slice/libpod-abc.scope")
        );
        assert_eq!(
            path("kubepods-besteffort.slice:cri:x", true).unwrap(),
            Path::new("/kubepods.slice/kubepods-besteffort.slice/cri-x.scope")
        );
        assert_eq!(
            path(":docker:x", true).unwrap(),
            Path::new("/system.slice/docker-x.scope")
        );
        for bad in [
            "/a/b",
            "a.slice:b",
            "a--b.slice:c:d",
            "a.slice:b:../c",
            "x:y:z",
        ] {
            assert!(path(bad, true).is_err(), "{bad}");
        }
        assert_eq!(
            path("/libpod_parent/x", false).unwrap(),
            Path::new("/libpod_parent/x")
        );
        assert_eq!(path("x", false).unwrap(), Path::new("/x"));
        assert!(path("/a/../../b", false).is_err());
    }
}
