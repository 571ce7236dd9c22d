//! cgroups of containers, below one directory of the guest's only hierarchy.

use std::{
    collections::VecDeque,
    fs, io,
    os::fd::AsFd,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use rustix::fs::{Mode, OFlags};

use crate::{
    failure::{During, Failure, Result},
    resources,
};

/// Parent of all containers' cgroups, relative to [`ROOT`].
pub const CONTAINERS: &str = "caisson";

const ROOT: &str = "/sys/fs/cgroup";

/// Most cgroups of one container that are searched for processes.
const MAX_SEARCHED: usize = 4096;

/// Directory of the cgroup that all containers are in.
pub fn of_containers() -> PathBuf {
    Path::new(ROOT).join(CONTAINERS)
}

/// Makes the calling process a member of a container's cgroup.
///
/// A container that passes its controllers on to cgroups of its own (systemd, docker) leaves none
/// of its processes in the upper one, and the kernel lets nobody else in (cgroup v2, "No Internal
/// Process Constraint"). The process then goes where `init`, the container's first, is. To be
/// called in the agent's namespaces.
///
/// # Errors
/// Those of the write.
pub fn enter(cgroup: &Path, init: Option<u32>) -> Result<()> {
    let join = |path: &Path| fs::write(path.join("cgroup.procs"), "0");
    let entered = match (join(cgroup), init) {
        (Err(error), Some(init)) if error.kind() == io::ErrorKind::ResourceBusy => {
            let memberships = fs::read_to_string(format!("/proc/{init}/cgroup"));
            match memberships.ok().and_then(|text| below(cgroup, &text)) {
                Some(inner) => join(&inner),
                None => Err(error),
            }
        }
        (result, _) => result,
    };
    entered.during(|| format!("enter the cgroup {}", cgroup.display()))
}

/// The cgroup of a process, by its /proc/PID/cgroup, if it lies below `cgroup`.
fn below(cgroup: &Path, memberships: &str) -> Option<PathBuf> {
    let own = memberships
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))?;
    let path = Path::new(ROOT).join(own);
    let inside = path.starts_with(cgroup)
        && path != cgroup
        && !path.components().any(|part| part == Component::ParentDir);
    inside.then_some(path)
}

/// A container's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// A directory that stands for a cgroup.
    #[cfg(test)]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Makes the cgroup of container `id`, whose form has been checked, and sets its limits.
    ///
    /// # Errors
    /// A limit that cannot be set; the cgroup is gone then.
    pub fn create(id: &str, limits: Option<&oci_spec::runtime::LinuxResources>) -> Result<Self> {
        let cgroup = Self {
            path: of_containers().join(id),
        };
        fs::create_dir(&cgroup.path)
            .during(|| format!("create the cgroup {}", cgroup.path.display()))?;
        let ready = limits.map_or(Ok(()), |limits| cgroup.update(limits));
        if ready.is_err() {
            let _ = fs::remove_dir(&cgroup.path);
        }
        ready.map(|()| cgroup)
    }

    /// Lets the members open only the devices of `limits`. Comes after the container's root has
    /// been put together, which takes block devices that its program must not have.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn restrict_devices(
        &self,
        limits: Option<&oci_spec::runtime::LinuxResources>,
    ) -> Result<()> {
        let Some(rules) = limits.and_then(|limits| limits.devices().as_ref()) else {
            return Ok(());
        };
        let directory = rustix::fs::open(
            &self.path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .during(|| format!("open {}", self.path.display()))?;
        resources::devices::attach(directory.as_fd(), rules)
            .during(|| "restrict the container's devices".to_owned())
    }

    /// Sets what `limits` names and leaves the rest.
    ///
    /// # Errors
    /// The first file that refuses its value, by name.
    pub fn update(&self, limits: &oci_spec::runtime::LinuxResources) -> Result<()> {
        for (file, value) in resources::settings(limits)? {
            // Of sizes of huge pages that the processor does not have nobody uses any: kubelets say
            // so of each size that the host has.
            let none = value == "0" || value == "max";
            if none && file.starts_with("hugetlb.") && !self.path.join(&file).exists() {
                continue;
            }
            self.write(&file, &value)?;
        }
        Ok(())
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        match fs::write(&path, value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Failure::invalid(
                format!("the guest's kernel has no {file}: this limit cannot be set"),
            )),
            result => result.during(|| format!("write \"{value}\" to {file}")),
        }
    }

    /// Directory of the cgroup.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Text of one of its files; empty when there is none.
    pub fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    /// Times that the kernel killed a process here for want of memory.
    pub fn oom_kills(&self) -> u64 {
        resources::keyed(&self.read("memory.events"))
            .get("oom_kill")
            .copied()
            .unwrap_or(0)
    }

    /// PIDs (of the guest) in it and in the cgroups that the container made in it.
    pub fn processes(&self) -> Vec<u32> {
        let mut found = Vec::new();
        let mut queue = VecDeque::from([self.path.clone()]);
        for _ in 0..MAX_SEARCHED {
            let Some(path) = queue.pop_front() else { break };
            let members = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
            found.extend(members.lines().filter_map(|line| line.parse::<u32>().ok()));
            let room = MAX_SEARCHED.saturating_sub(queue.len());
            queue.extend(children(&path).take(room));
        }
        found
    }

    /// Whether a process lives in it or below.
    fn is_populated(&self) -> bool {
        self.read("cgroup.events").contains("populated 1")
    }

    /// Kills every process in it, forks in flight included (cgroup v2, "cgroup.kill").
    ///
    /// # Errors
    /// Those of the write.
    pub fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Stops or continues all of it and waits until that is so.
    ///
    /// # Errors
    /// Those of the write; not frozen within 10 s.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value)?;
        let wanted = format!("frozen {value}");
        for _ in 0..1000 {
            if self.read("cgroup.events").contains(&wanted) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if frozen {
            // The container goes on as its state says.
            self.write("cgroup.freeze", "0")?;
        }
        Err(Failure::new(
            crate::failure::Kind::DeadlineExceeded,
            "the container's processes did not all stop in 10 s",
        ))
    }

    /// Kills what is left and removes it.
    ///
    /// # Errors
    /// It is still in use after 10 s.
    pub async fn remove(&self) -> Result<()> {
        let mut last = Ok(());
        for _ in 0..1000 {
            if self.is_populated() {
                self.kill()?;
            }
            match remove_tree(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Ok(()) => return Ok(()),
                Err(error) => last = Err(error),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        last.during(|| format!("remove the cgroup {}", self.path.display()))
    }
}

/// Cgroups right below `path`.
fn children(path: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}

/// Removes a cgroup with those that the container made in it.
fn remove_tree(path: &Path) -> io::Result<()> {
    for child in children(path) {
        // One that stays keeps the upper one, which then tells.
        let _ = remove_tree(&child);
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_goes_only_where_the_first_process_is_below_the_containers_cgroup() {
        let cgroup = Path::new("/sys/fs/cgroup/caisson/one");
        let inner = |text: &str| below(cgroup, text);
        assert_eq!(
            inner("0::/caisson/one/init.scope\n"),
            Some(cgroup.join("init.scope"))
        );
        assert_eq!(
            inner("1:name=systemd:/\n0::/caisson/one/a/b\n"),
            Some(cgroup.join("a/b"))
        );
        for outside in [
            "",
            "0::/\n",
            "0::/agent\n",
            "0::/caisson/one\n",
            "0::/caisson/one-more/a\n",
            "0::/caisson/one/../two\n",
            "0:://etc\n",
            "1:memory:/caisson/one/a\n",
        ] {
            assert_eq!(inner(outside), None, "{outside}");
        }
    }

    #[test]
    fn processes_of_inner_cgroups_are_the_containers() {
        let directory = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::at(directory.path().to_owned());
        for (path, members) in [("", ""), ("a", "10\n11\n"), ("a/b", "12\n"), ("c", "13\n")] {
            let path = directory.path().join(path);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("cgroup.procs"), members).unwrap();
        }
        let mut processes = cgroup.processes();
        processes.sort_unstable();
        assert_eq!(processes, [10, 11, 12, 13]);
    }
}
