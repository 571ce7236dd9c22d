//! Containers on disk: `<state_dir>/containers/<id>/`.
//!
//! `container.json` says what was asked for and what became of it. It is written
//! whole and renamed into place; whoever changes it holds the directory's lock.
//! A container's monitor writes its life; when the monitor has died, whoever
//! looks next finishes the story ([`Containers::refresh`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    path::PathBuf,
    time::SystemTime,
};

use caisson_rootfs_builder::Store;
use caisson_sandbox::Config;
use serde::{Deserialize, Serialize};

use crate::{
    document,
    error::Error,
    lock::Lock,
    network::{self, Mode, Wanted},
    shim,
};

/// Version of `container.json`.
const VERSION: u32 = 1;

/// 128 + SIGKILL: nobody saw how it ended.
const KILLED: i32 = 137;

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its microVM boots, or the start failed.
    Created,
    /// Its program runs.
    Running,
    /// Its program has ended.
    Exited,
}

impl Status {
    /// Docker's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Exited => "exited",
        }
    }
}

/// What became of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Where it is in its life.
    pub status: Status,
    /// Process of its microVM on the host.
    pub pid: u32,
    /// Of its program.
    pub exit_code: i32,
    /// Why it could not start or ended before its time.
    pub error: String,
    /// The kernel killed a process of it for want of memory.
    pub oom_killed: bool,
    /// When its program started.
    pub started_at: Option<SystemTime>,
    /// When it ended.
    pub finished_at: Option<SystemTime>,
}

/// A process that is only itself if it began at that time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// Field 22 of /proc/PID/stat.
    pub start_time: u64,
}

/// What was asked for, as far as `inspect` tells it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Host name inside.
    pub hostname: String,
    /// "USER[:GROUP]".
    pub user: String,
    /// Variables.
    pub env: Vec<String>,
    /// Working directory.
    pub working_dir: String,
    /// Program and arguments in front of `cmd`.
    pub entrypoint: Vec<String>,
    /// Arguments.
    pub cmd: Vec<String>,
    /// It has a terminal.
    pub tty: bool,
    /// It has a standard input.
    pub open_stdin: bool,
    /// Which ends with the `run` that started it.
    #[serde(default)]
    pub stdin_once: bool,
    /// Signal of `stop`.
    pub stop_signal: u32,
    /// Bytes, 0 = no limit.
    pub memory: u64,
    /// Microseconds per 100 ms, 0 = no limit.
    pub cpu_quota: i64,
    /// -1 = no limit.
    pub pids_limit: i64,
    /// Bytes of /dev/shm; 0 in containers of versions that did not note it: docker's 64 MiB.
    #[serde(default)]
    pub shm_size: u64,
    /// Root is read-only.
    pub read_only: bool,
    /// Capabilities added.
    pub cap_add: Vec<String>,
    /// Capabilities dropped.
    pub cap_drop: Vec<String>,
    /// Shares: source, target, read-only.
    pub volumes: Vec<(String, String, bool)>,
    /// Those of them that are volumes, by their target.
    #[serde(default)]
    pub volume_names: BTreeMap<String, VolumeName>,
    /// Targets below which the host's later mounts are seen.
    #[serde(default)]
    pub following: BTreeSet<String>,
    /// Image's labels.
    pub labels: BTreeMap<String, String>,
    /// Networks and ports; none in containers of versions that had none.
    #[serde(default)]
    pub network: Wanted,
}

/// Name of a volume that a container has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeName {
    /// The volume's.
    pub name: String,
    /// It was made for this container alone.
    pub anonymous: bool,
}

/// A share, and where it is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shared {
    /// On the host, absolute.
    pub source: String,
    /// In the container, absolute.
    pub target: String,
    /// No writing.
    pub read_only: bool,
    /// It gets what the image has at the target when it is empty.
    pub copies: bool,
    /// What the host mounts and unmounts below later is seen.
    pub follows: bool,
    /// The volume's, if it is one.
    pub volume: Option<VolumeName>,
}

impl Request {
    /// Notes a share.
    pub fn add_share(&mut self, share: &Shared) {
        let (source, target) = (share.source.clone(), share.target.clone());
        if let Some(name) = &share.volume {
            self.volume_names.insert(target.clone(), name.clone());
        }
        if share.follows {
            self.following.insert(target.clone());
        }
        self.volumes.push((source, target, share.read_only));
    }

    /// Whether one of its shares is this volume.
    pub fn has_volume(&self, name: &str) -> bool {
        self.volume_names.values().any(|volume| volume.name == name)
    }

    /// Volumes that were made for the container alone.
    pub fn anonymous_volumes(&self) -> impl Iterator<Item = &str> {
        let volumes = self.volume_names.values();
        volumes
            .filter(|volume| volume.anonymous)
            .map(|volume| volume.name.as_str())
    }
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    version: u32,
    /// 64 hexadecimal digits.
    pub id: String,
    /// Unique.
    pub name: String,
    /// As the user wrote it.
    pub image: String,
    /// The image's digest.
    pub image_id: String,
    /// Layer images, bottom first.
    pub layers: Vec<PathBuf>,
    /// When it was asked for.
    pub created: SystemTime,
    /// Remove it when it has ended.
    pub auto_remove: bool,
    /// What was asked for.
    pub request: Request,
    /// Who supervises it.
    pub monitor: Option<Identity>,
    /// What became of it.
    pub state: State,
}

impl Container {
    /// A container that has not started.
    pub fn new(
        id: String,
        name: String,
        image: String,
        image_id: String,
        layers: Vec<PathBuf>,
    ) -> Self {
        Self {
            version: VERSION,
            id,
            name,
            image,
            image_id,
            layers,
            created: SystemTime::now(),
            auto_remove: false,
            request: Request::default(),
            monitor: None,
            state: State {
                status: Status::Created,
                pid: 0,
                exit_code: 0,
                error: String::new(),
                oom_killed: false,
                started_at: None,
                finished_at: None,
            },
        }
    }

    /// Id of the container in whose microVM it is, if that is not its own.
    pub fn pod(&self) -> Option<&str> {
        match &self.request.network.mode {
            Mode::Container(id) => Some(id),
            _ => None,
        }
    }

    /// First twelve digits, as docker shortens ids.
    pub fn short_id(&self) -> &str {
        self.id.get(..12).unwrap_or(&self.id)
    }

    /// Whether its monitor lives.
    pub fn is_monitored(&self) -> bool {
        self.monitor
            .is_some_and(|monitor| start_time(monitor.pid) == Some(monitor.start_time))
    }

    /// Whether its program runs or is about to.
    pub fn is_active(&self) -> bool {
        self.state.status == Status::Running
            || (self.state.status == Status::Created && self.is_monitored())
    }
}

/// Field 22 of /proc/PID/stat; None when there is no such process, or only its zombie.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Identity of this process.
pub fn own_identity() -> Identity {
    let pid = std::process::id();
    Identity {
        pid,
        start_time: start_time(pid).unwrap_or(0),
    }
}

/// All containers of this host.
pub struct Containers {
    /// The host's settings.
    pub config: Config,
    directory: PathBuf,
}

impl Containers {
    /// Opens the store.
    ///
    /// # Errors
    /// The configuration is wrong, or the directory cannot be made.
    pub fn open() -> Result<Self, Error> {
        let config = Config::load(None)?;
        let directory = config.state_dir.join("containers");
        document::private_directory(&directory)?;
        Ok(Self { config, directory })
    }

    /// The image store.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn images(&self) -> Result<Store, Error> {
        Ok(Store::open(self.config.state_dir.join("images"))?)
    }

    /// Directory of a container.
    pub fn directory(&self, id: &str) -> PathBuf {
        self.directory.join(id)
    }

    /// Directory of a container's OCI bundle.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.directory(id).join("bundle")
    }

    /// Keeps others from adding containers and changing names.
    ///
    /// # Errors
    /// The lock cannot be taken.
    pub fn lock(&self) -> Result<Lock, Error> {
        Lock::take(&self.directory)
    }

    /// Keeps others from changing a container.
    ///
    /// # Errors
    /// There is none.
    pub fn lock_one(&self, id: &str) -> Result<Lock, Error> {
        Lock::take(&self.directory(id))
    }

    /// A new id.
    ///
    /// # Errors
    /// No entropy.
    pub fn new_id() -> Result<String, Error> {
        let mut bytes = [0; 32];
        File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut bytes))
            .map_err(Error::io("read /dev/urandom"))?;
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Every container that can be read, the newest first, with its state as it is now.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn all(&self) -> Result<Vec<Container>, Error> {
        let (containers, damaged) = self.with_damaged()?;
        for error in damaged {
            log::warn!("{error}");
        }
        Ok(containers)
    }

    /// As [`Containers::all`], for who must not miss one.
    ///
    /// # Errors
    /// One cannot be read.
    pub fn every(&self) -> Result<Vec<Container>, Error> {
        let (containers, damaged) = self.with_damaged()?;
        match damaged.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(containers),
        }
    }

    /// Every container, and why others cannot be read.
    fn with_damaged(&self) -> Result<(Vec<Container>, Vec<Error>), Error> {
        let (mut containers, mut damaged) = (Vec::new(), Vec::new());
        for id in self.ids()? {
            match self.find_whole(&id) {
                Ok(Some(container)) => containers.push(self.refresh(container)),
                Ok(None) => {}
                Err(error) => damaged.push(error),
            }
        }
        containers.sort_by_key(|container| std::cmp::Reverse(container.created));
        Ok((containers, damaged))
    }

    fn ids(&self) -> Result<Vec<String>, Error> {
        let entries =
            fs::read_dir(&self.directory).map_err(Error::file("list", &self.directory))?;
        Ok(entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect())
    }

    /// The container of that name, id, or beginning of an id.
    ///
    /// # Errors
    /// None, or several.
    pub fn find(&self, name: &str) -> Result<Container, Error> {
        let wanted = name.trim_start_matches('/');
        let mut found: Vec<Container> = Vec::new();
        for id in self.ids()? {
            let container = match self.find_whole(&id) {
                Ok(Some(container)) => container,
                Err(error) if !wanted.is_empty() && id.starts_with(wanted) => return Err(error),
                _ => continue,
            };
            if container.id == wanted || container.name == wanted {
                return Ok(self.refresh(container));
            }
            if !wanted.is_empty() && container.id.starts_with(wanted) {
                found.push(container);
            }
        }
        match found.len() {
            0 => Err(Error::NoSuchContainer(name.to_owned())),
            1 => Ok(self.refresh(found.remove(0))),
            _ => Err(Error::Ambiguous(name.to_owned())),
        }
    }

    /// Reads a container as it was written last.
    ///
    /// # Errors
    /// It is gone or damaged.
    pub fn read(&self, id: &str) -> Result<Container, Error> {
        self.find_whole(id)?
            .ok_or_else(|| Error::NoSuchContainer(id.to_owned()))
    }

    /// A container; None for one that is half made, or gone.
    fn find_whole(&self, id: &str) -> Result<Option<Container>, Error> {
        let path = self.directory(id).join("container.json");
        let damaged = |error| Error::DamagedContainer {
            id: id.to_owned(),
            source: Box::new(error),
        };
        let Some(container) = document::read::<Container>(&path).map_err(damaged)? else {
            return Ok(None);
        };
        if container.version != VERSION {
            return Err(Error::State(format!(
                "{} is of version {}, this program knows {VERSION}",
                path.display(),
                container.version
            )));
        }
        Ok(Some(container))
    }

    /// Writes a container.
    ///
    /// # Errors
    /// No space, or it has been removed.
    pub fn write(&self, container: &Container) -> Result<(), Error> {
        document::write(
            &self.directory(&container.id).join("container.json"),
            container,
        )
    }

    /// Changes a container under its lock.
    ///
    /// # Errors
    /// It is gone, or cannot be written.
    pub fn change(
        &self,
        id: &str,
        change: impl FnOnce(&mut Container),
    ) -> Result<Container, Error> {
        let _lock = self.lock_one(id)?;
        let mut container = self.read(id)?;
        change(&mut container);
        self.write(&container)?;
        Ok(container)
    }

    /// The container as it is now: one whose monitor has died is brought to its end.
    fn refresh(&self, container: Container) -> Container {
        if container.state.status == Status::Exited
            || container.is_monitored()
            || container.monitor.is_none()
        {
            return container;
        }
        let finished = self.finish_for_monitor(&container.id);
        finished.unwrap_or(container)
    }

    fn finish_for_monitor(&self, id: &str) -> Result<Container, Error> {
        let _lock = self.lock_one(id)?;
        let mut container = self.read(id)?;
        if container.state.status == Status::Exited || container.is_monitored() {
            return Ok(container);
        }
        let bundle = self.bundle(id);
        if container.pod().is_some() {
            shim::end_task(&bundle, id);
        }
        self.end_by_force(id);
        container.state.status = Status::Exited;
        container.state.pid = 0;
        container.state.exit_code = KILLED;
        container.state.error = "its monitor was killed".to_owned();
        container.state.oom_killed |= bundle.join("oom").exists();
        container.state.finished_at = Some(SystemTime::now());
        self.write(&container)?;
        Ok(container)
    }

    /// Ends the microVM of a container whose monitor has gone, and takes its networks away.
    fn end_by_force(&self, id: &str) {
        let bundle = self.bundle(id);
        shim::end_orphan(&bundle);
        if let Err(error) = shim::delete(&self.config, (shim::NAMESPACE, id), &bundle) {
            log::warn!("{error}");
        }
        if let Err(error) = network::detach(&self.config, id) {
            log::warn!("{error}");
        }
    }

    /// Ends and removes a container of which nothing can be read.
    ///
    /// # Errors
    /// Its directory cannot be removed.
    pub fn remove_damaged(&self, id: &str) -> Result<(), Error> {
        let _lock = self.lock()?;
        self.end_by_force(id);
        self.remove(id)
    }

    /// Removes containers that a `run` that was killed has half made. The caller holds the lock
    /// under which they are made.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn sweep(&self) -> Result<(), Error> {
        for id in self.ids()? {
            if !self.directory(&id).join("container.json").exists() {
                self.remove(&id)?;
            }
        }
        Ok(())
    }

    /// Removes all of a container that does not run.
    ///
    /// # Errors
    /// Its directory cannot be removed.
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        network::detach(&self.config, id)?;
        self.images()?.release(id)?;
        let directory = self.directory(id);
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::file("remove", directory)(error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn containers(directory: &Path) -> Containers {
        let config = Config {
            state_dir: directory.to_owned(),
            run_dir: directory.join("run"),
            ..Config::default()
        };
        let directory = directory.join("containers");
        fs::create_dir_all(&directory).unwrap();
        Containers { config, directory }
    }

    fn add(containers: &Containers, id: &str, name: &str) -> Container {
        fs::create_dir_all(containers.bundle(id)).unwrap();
        let container = Container::new(
            id.to_owned(),
            name.to_owned(),
            "i".to_owned(),
            "d".to_owned(),
            vec![],
        );
        containers.write(&container).unwrap();
        container
    }

    #[test]
    fn names_ids_and_their_beginnings() {
        let directory = tempfile::tempdir().unwrap();
        let all = containers(directory.path());
        add(&all, "abc1", "one");
        add(&all, "abd2", "two");
        assert_eq!(all.find("two").unwrap().id, "abd2");
        assert_eq!(all.find("/one").unwrap().id, "abc1");
        assert_eq!(all.find("abc").unwrap().name, "one");
        assert!(matches!(all.find("ab"), Err(Error::Ambiguous(_))));
        assert!(matches!(all.find("x"), Err(Error::NoSuchContainer(_))));
        assert!(matches!(all.find(""), Err(Error::NoSuchContainer(_))));
    }

    #[test]
    fn a_dead_monitors_container_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let all = containers(directory.path());
        add(&all, "a", "one");
        all.change("a", |container| {
            container.state.status = Status::Running;
            container.monitor = Some(Identity {
                pid: std::process::id(),
                start_time: 1,
            });
        })
        .unwrap();
        let seen = all.find("one").unwrap();
        assert_eq!(
            (seen.state.status, seen.state.exit_code),
            (Status::Exited, 137)
        );
        assert_eq!(all.read("a").unwrap().state.status, Status::Exited);
    }

    #[test]
    fn a_live_monitors_container_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let all = containers(directory.path());
        add(&all, "a", "one");
        all.change("a", |container| {
            container.state.status = Status::Running;
            container.monitor = Some(own_identity());
        })
        .unwrap();
        assert!(all.find("one").unwrap().is_active());
        all.remove("a").unwrap();
        assert!(all.all().unwrap().is_empty());
    }
}
