//! A directory that looks like an installed Caisson, with fakes in it.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use caisson_sandbox::{Config, Error, Event, Sandbox, SandboxSpec};
use tempfile::TempDir;
use tokio::sync::mpsc;

pub struct Host {
    directory: TempDir,
    /// Of the sandbox; its own, since cgroups are seen by all tests.
    id: String,
    pub config: Config,
}

impl Host {
    /// With a VMM (and an agent) that behaves so, and a file server that does its part.
    pub fn new(behaviour: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("vmlinux"), b"\x7fELF").unwrap();
        let mut image = vec![0; 1024];
        image.extend_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
        fs::write(at("guest.erofs"), image).unwrap();
        let config = Config {
            vmm: link(directory.path(), &format!("vmm-{behaviour}")),
            file_server: link(directory.path(), "fs-ok"),
            kernel: at("vmlinux"),
            guest_image: at("guest.erofs"),
            kvm: "/dev/null".into(),
            run_dir: at("run"),
            state_dir: at("state"),
            ..Config::default()
        };
        let name = directory.path().file_name().unwrap().to_string_lossy();
        Self {
            id: name.replace('.', "pod"),
            directory,
            config,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Lets another fake be the file server.
    pub fn file_server(mut self, behaviour: &str) -> Self {
        self.config.file_server = link(self.directory.path(), &format!("fs-{behaviour}"));
        self
    }

    pub async fn start(&self) -> Result<(Sandbox, mpsc::Receiver<Event>), Error> {
        self.start_as(SandboxSpec::default()).await
    }

    pub async fn start_as(
        &self,
        spec: SandboxSpec,
    ) -> Result<(Sandbox, mpsc::Receiver<Event>), Error> {
        let spec = SandboxSpec {
            id: self.id.clone(),
            shares_directories: true,
            ..spec
        };
        Sandbox::start(&self.config, spec).await
    }

    /// The error of a start that cannot succeed; it comes within `limit` and leaves nothing.
    pub async fn fails_within(&self, limit: Duration) -> Error {
        let begin = Instant::now();
        let error = self.start().await.err().expect("the start succeeded");
        let took = begin.elapsed();
        assert!(took < limit, "it took {took:?} to say: {error}");
        self.assert_empty();
        error
    }

    /// What the fakes were asked for, one request a line.
    pub fn requests(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("requests")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Process ids of the fakes that run.
    pub fn processes(&self) -> Vec<u32> {
        let prefix = self.directory.path().as_os_str().as_encoded_bytes();
        let own = |pid: u32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.starts_with(prefix)
        };
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| own(*pid))
            .collect()
    }

    /// No process, directory or cgroup of the sandbox is there.
    pub fn assert_empty(&self) {
        assert_eq!(self.processes(), Vec::<u32>::new(), "processes are left");
        assert!(!self.path("run/sandboxes").exists(), "a record is left");
        assert!(!self.path("run/uids").exists(), "a user id is left");
        let cgroup = Path::new("/sys/fs/cgroup/caisson").join(&self.id);
        assert!(!cgroup.exists(), "{} is left", cgroup.display());
    }
}

fn link(directory: &Path, name: &str) -> PathBuf {
    let path = directory.join(name);
    symlink(std::env::current_exe().unwrap(), &path).unwrap();
    path
}
