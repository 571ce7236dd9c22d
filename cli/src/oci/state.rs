//! Containers on disk: `<root>/<id>/`.
//!
//! | file | written by | says |
//! |---|---|---|
//! | `record.json` | `create` | what was asked for |
//! | `bundle/` | `create`, the shim | the shim's bundle |
//! | `process.json` | `create` | the process that stands for the container |
//! | `monitor.json` | the monitor | who it is |
//! | `created` | the monitor | the container is there |
//! | `exit.json` | the monitor | how it ended |

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use caisson_sandbox::{Config, hooks::Hooks};
use containerd_shim_protos::api::Status as TaskStatus;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::cgroup::Place;
use crate::{
    container::{Identity, start_time},
    error::Error,
    shim::Shim,
};

/// Version of `record.json`.
const VERSION: u32 = 1;

/// Longest id, as podman's and docker's: it is part of the paths of sockets, which have 107 bytes
/// (unix(7)).
const MAX_ID: usize = 64;

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Of this structure.
    pub version: u32,
    /// The container.
    pub id: String,
    /// config.json's.
    pub oci_version: String,
    /// The caller's directory.
    pub bundle: PathBuf,
    /// The root file system.
    pub rootfs: PathBuf,
    /// When.
    pub created: SystemTime,
    /// config.json's.
    pub annotations: BTreeMap<String, String>,
    /// Its cgroup on the host.
    pub cgroup: Option<Place>,
    /// Those of the host.
    pub hooks: Hooks,
}

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code.
    pub status: u8,
    /// The shim has removed all it had made.
    pub clean: bool,
    /// `<bundle>/oom` was written for the caller.
    pub oom: bool,
}

/// Where a container is in its life (OCI runtime-spec, "State"; paused as in runc).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Being created.
    Creating,
    /// Waits for `start`.
    Created,
    /// Runs.
    Running,
    /// Is frozen.
    Paused,
    /// Has ended.
    Stopped,
}

impl Status {
    /// The specification's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// A container of a [`Root`].
pub struct Container {
    /// Its directory.
    pub directory: PathBuf,
    /// What was asked for.
    pub record: Record,
}

/// A directory of containers.
pub struct Root {
    /// The host's settings.
    pub config: Config,
    /// containerd's namespace for its containers: one for each root, as ids are unique in it only.
    pub namespace: String,
    directory: PathBuf,
}

fn default_root(config: &Config) -> PathBuf {
    config.run_dir.join("oci")
}

/// Whether a container of that id was made below the default root.
pub fn is_known(id: &str) -> bool {
    check_id(id).is_ok()
        && Config::load(None)
            .is_ok_and(|config| default_root(&config).join(id).join("record.json").is_file())
}

/// As runc, but for "+" and the length: ids become names of sandboxes.
fn check_id(id: &str) -> Result<(), Error> {
    let valid = !id.is_empty()
        && id.len() <= MAX_ID
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if valid {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "\"{id}\" is no container id: there are letters, digits, \"_\", \"-\" and \".\", not in front; at most {MAX_ID}"
    )))
}

/// Writes a file so that nobody sees half of it.
///
/// # Errors
/// Those of the writes.
pub fn write(path: &Path, text: impl AsRef<[u8]>) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.{}", std::process::id()));
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, path))
        .inspect_err(|_| {
            let _ = fs::remove_file(&new);
        })
        .map_err(Error::file("write", path))
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| Error::file("read", path)(io::Error::other(error))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file("read", path)(error)),
    }
}

impl Root {
    /// The directory given by `--root`, or the default.
    ///
    /// # Errors
    /// The host's settings are wrong.
    pub fn open(directory: Option<&str>) -> Result<Self, Error> {
        let config = Config::load(None)?;
        let default = default_root(&config);
        let directory = match directory {
            Some(directory) => {
                std::path::absolute(directory).map_err(Error::file("find", directory))?
            }
            None => default.clone(),
        };
        let namespace = if directory == default {
            "oci".to_owned()
        } else {
            // Short: the paths of a sandbox's sockets have room for 107 bytes (unix(7)).
            format!("o{:06x}", hash(&directory) & 0x00ff_ffff)
        };
        Ok(Self {
            config,
            namespace,
            directory,
        })
    }

    /// A directory for a new container.
    ///
    /// # Errors
    /// There is one of that id.
    pub fn claim(&self, id: &str) -> Result<PathBuf, Error> {
        check_id(id)?;
        let directory = self.directory.join(id);
        fs::create_dir_all(&self.directory).map_err(Error::file("create", &self.directory))?;
        match fs::create_dir(&directory) {
            Ok(()) => Ok(directory),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Error::State(
                format!("container with given ID already exists: {id}"),
            )),
            Err(error) => Err(Error::file("create", directory)(error)),
        }
    }

    /// A container.
    ///
    /// # Errors
    /// There is none of that id: "container does not exist", words that callers look for.
    pub fn find(&self, id: &str) -> Result<Container, Error> {
        check_id(id)?;
        let directory = self.directory.join(id);
        match read::<Record>(&directory.join("record.json"))? {
            Some(record) if record.version == VERSION => Ok(Container { directory, record }),
            Some(record) => Err(Error::State(format!(
                "container {id} was made by another version of caisson (its record has version {}): use that one to delete it",
                record.version
            ))),
            // Made by a `create` that died at once.
            None if directory.is_dir() => Ok(Container {
                record: Record::new(id),
                directory,
            }),
            None => Err(Error::State(format!("container does not exist: {id}"))),
        }
    }

    /// All containers, by their ids.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn all(&self) -> Result<Vec<Container>, Error> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::file("read", &self.directory)(error)),
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| check_id(name).is_ok())
            .collect();
        names.sort();
        // Others may be deleted meanwhile.
        Ok(names.iter().filter_map(|id| self.find(id).ok()).collect())
    }

    /// Removes a container's directory, and the root when that was the last one.
    ///
    /// # Errors
    /// Those of the removal.
    pub fn remove(&self, directory: &Path) -> Result<(), Error> {
        match fs::remove_dir_all(directory) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::file("remove", directory)(error)),
        }
        if self.directory == default_root(&self.config) {
            // Fails while there are others.
            let _ = fs::remove_dir(&self.directory);
            let _ = fs::remove_dir(&self.config.run_dir);
        }
        Ok(())
    }
}

/// FNV-1a, 32 bits: tells roots of one host apart.
fn hash(directory: &Path) -> u32 {
    directory
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0x811c_9dc5, |hash, byte| {
            (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
        })
}

impl Record {
    /// Of a container that nothing else is known of.
    pub fn new(id: &str) -> Self {
        Self {
            version: VERSION,
            id: id.to_owned(),
            oci_version: String::new(),
            bundle: PathBuf::new(),
            rootfs: PathBuf::new(),
            created: SystemTime::now(),
            annotations: BTreeMap::new(),
            cgroup: None,
            hooks: Hooks::default(),
        }
    }
}

impl Container {
    /// The shim's bundle.
    pub fn shim_bundle(&self) -> PathBuf {
        shim_bundle(&self.directory)
    }

    /// Writes the record.
    ///
    /// # Errors
    /// Those of the write.
    pub fn save(&self) -> Result<(), Error> {
        write(
            &self.directory.join("record.json"),
            json!(self.record).to_string(),
        )
    }

    /// The process on the host that stands for it, if that lives.
    pub fn process(&self) -> Option<Identity> {
        live_process(&self.directory.join("process.json"))
    }

    /// How it ended.
    pub fn exit(&self) -> Option<Exit> {
        read(&self.directory.join("exit.json")).ok().flatten()
    }

    /// Where it is in its life, and its shim if that answers.
    pub async fn status(&self) -> (Status, Option<Shim>) {
        if self.process().is_none() {
            return (Status::Stopped, None);
        }
        if !self.directory.join("created").exists() {
            return (Status::Creating, None);
        }
        let Ok(shim) = Shim::of_bundle(&self.shim_bundle()).await else {
            // Its process is at its last steps.
            return (Status::Stopped, None);
        };
        let status = match shim.status(&self.record.id).await {
            Ok(TaskStatus::CREATED) => Status::Created,
            Ok(TaskStatus::RUNNING) => Status::Running,
            Ok(TaskStatus::PAUSED | TaskStatus::PAUSING) => Status::Paused,
            _ => Status::Stopped,
        };
        (status, Some(shim))
    }

    /// The specification's state, with runc's additions.
    pub fn state(&self, status: Status) -> Value {
        let record = &self.record;
        let pid = match status {
            Status::Stopped => 0,
            _ => self.process().map_or(0, |process| process.pid),
        };
        let mut state = json!({
            "ociVersion": record.oci_version,
            "id": record.id,
            "pid": pid,
            "status": status.word(),
            "bundle": record.bundle,
            "rootfs": record.rootfs,
            "created": humantime::format_rfc3339_nanos(record.created).to_string(),
            "owner": "",
        });
        if !record.annotations.is_empty() {
            state["annotations"] = json!(record.annotations);
        }
        state
    }
}

/// The shim's bundle in a container's directory.
pub fn shim_bundle(directory: &Path) -> PathBuf {
    directory.join("bundle")
}

/// The process that a file names, if it lives.
pub fn live_process(file: &Path) -> Option<Identity> {
    let identity: Identity = read(file).ok().flatten()?;
    (start_time(identity.pid) == Some(identity.start_time)).then_some(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(directory: &Path) -> Root {
        Root {
            config: Config::default(),
            namespace: "oci".to_owned(),
            directory: directory.join("root"),
        }
    }

    #[test]
    fn ids() {
        for id in ["a", "A-b_c.d", &"x".repeat(64)] {
            check_id(id).unwrap();
        }
        for id in ["", ".", "..", ".a", "a/b", "a b", "é", &"x".repeat(65)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }

    #[test]
    fn one_id_is_given_once() {
        let directory = tempfile::tempdir().unwrap();
        let root = root(directory.path());
        let claimed = root.claim("one").unwrap();
        let error = root.claim("one").unwrap_err().to_string();
        assert!(error.contains("already exists"), "{error}");
        // As a create that died left it.
        let half = root.find("one").unwrap();
        assert!(half.process().is_none());
        let container = Container {
            directory: claimed.clone(),
            record: Record {
                bundle: "/b".into(),
                ..Record::new("one")
            },
        };
        container.save().unwrap();
        assert_eq!(root.find("one").unwrap().record, container.record);
        assert_eq!(root.all().unwrap().len(), 1);
        root.remove(&claimed).unwrap();
        let error = root.find("one").err().unwrap().to_string();
        assert!(error.contains("does not exist"), "{error}");
        assert!(root.find("../one").is_err());
        assert!(root.all().unwrap().is_empty());
    }

    #[test]
    fn a_state_is_runcs() {
        let directory = tempfile::tempdir().unwrap();
        let mut record = Record::new("one");
        record.annotations.insert("a".to_owned(), "b".to_owned());
        let container = Container {
            directory: directory.path().to_owned(),
            record,
        };
        let identity = crate::container::own_identity();
        write(
            &directory.path().join("process.json"),
            json!(identity).to_string(),
        )
        .unwrap();
        let state = container.state(Status::Running);
        assert_eq!(state["pid"], identity.pid);
        assert_eq!(state["status"], "running");
        assert_eq!(state["annotations"]["a"], "b");
        assert_eq!(container.state(Status::Stopped)["pid"], 0);
        let of_runc = [
            "ociVersion",
            "id",
            "pid",
            "status",
            "bundle",
            "rootfs",
            "created",
            "owner",
        ];
        assert!(of_runc.iter().all(|key| state.get(key).is_some()));
    }
}
