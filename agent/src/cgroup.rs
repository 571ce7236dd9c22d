//! cgroups of containers, below one directory of the guest's only hierarchy.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
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

/// Directory of the cgroup that all containers are in.
pub fn of_containers() -> PathBuf {
    Path::new(ROOT).join(CONTAINERS)
}

/// A container's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
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

    /// PIDs (of the guest) in it.
    pub fn processes(&self) -> Vec<u32> {
        self.read("cgroup.procs")
            .lines()
            .filter_map(|line| line.parse().ok())
            .collect()
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
            if !self.processes().is_empty() {
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

/// Removes a cgroup with those that the container made in it.
fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}
