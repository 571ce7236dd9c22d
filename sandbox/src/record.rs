//! What a sandbox has made on the host, written down before it is made.
//!
//! The record is `<run_dir>/sandboxes/<id>/record.json`; the directory holds
//! the sandbox's sockets too. Taking a sandbox down walks the record from its
//! end; each step is fine with finding nothing, so it can be repeated.

use std::{
    fs, io,
    io::Write,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
    thread::{Uid, set_thread_res_uid},
};
use serde::{Deserialize, Serialize};

use crate::{cgroup, deadline::scaled};

/// Why a record could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A sandbox of this id exists.
    #[error("sandbox {0} exists already")]
    Exists(String),
    /// Not an id.
    #[error(
        "\"{0}\" cannot be a sandbox id: letters, digits, '_', '.', '-' only, at most 128 of them"
    )]
    Id(String),
    /// A system call.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file is no record.
    #[error("the record {} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The parser's words.
        reason: String,
    },
    /// Something would not go.
    #[error("could not remove {0}")]
    Stuck(String),
}

/// One thing on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// A process; the start time (clock ticks since boot) tells it from a later one of the same id.
    Process {
        /// Its id.
        pid: u32,
        /// Field 22 of /proc/PID/stat.
        start_time: u64,
    },
    /// A cgroup directory and all in it; also what was made above it for the likes of it.
    Cgroup(PathBuf),
    /// An empty directory, or one that is empty once the sandbox is gone.
    Directory(PathBuf),
}

/// The record of one sandbox.
#[derive(Debug)]
pub struct Record {
    directory: PathBuf,
    resources: Vec<Resource>,
}

const FILE: &str = "record.json";

fn check_id(id: &str) -> Result<(), RecordError> {
    let valid = !id.is_empty()
        && id.len() <= 128
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
        && !id.starts_with('.');
    if valid {
        Ok(())
    } else {
        Err(RecordError::Id(id.to_owned()))
    }
}

/// Where the sandbox `id` has its record and its sockets.
pub fn directory_of(run_dir: &Path, id: &str) -> PathBuf {
    run_dir.join("sandboxes").join(id)
}

/// Makes a directory for root alone below directories that a sandbox that ends at this moment may
/// be removing.
pub fn make_private_directory(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    for _ in 0..100 {
        if let Some(parent) = directory.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o711)
                .create(parent)?;
        }
        match fs::DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => return result,
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

impl Record {
    /// Begins the record of a new sandbox.
    ///
    /// # Errors
    /// There is one of this id, or the directory cannot be made.
    pub fn create(run_dir: &Path, id: &str) -> Result<Self, RecordError> {
        check_id(id)?;
        let directory = directory_of(run_dir, id);
        make_private_directory(&directory).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => RecordError::Exists(id.to_owned()),
            _ => RecordError::Io {
                what: "create",
                path: directory.clone(),
                source,
            },
        })?;
        let record = Self {
            directory,
            resources: Vec::new(),
        };
        record.write()?;
        Ok(record)
    }

    /// The record of a sandbox whose owner has died. None: there is no such sandbox.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn load(run_dir: &Path, id: &str) -> Result<Option<Self>, RecordError> {
        check_id(id)?;
        let directory = directory_of(run_dir, id);
        let path = directory.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            // Died between the directory and its file.
            Err(error) if error.kind() == io::ErrorKind::NotFound && directory.exists() => {
                b"[]".to_vec()
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(RecordError::Io {
                    what: "read",
                    path,
                    source,
                });
            }
        };
        let resources = serde_json::from_slice(&text).map_err(|error| RecordError::Damaged {
            path,
            reason: error.to_string(),
        })?;
        Ok(Some(Self {
            directory,
            resources,
        }))
    }

    /// Where the sandbox's sockets are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The sandbox's cgroup, if it has one.
    pub fn cgroup(&self) -> Option<&Path> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::Cgroup(path) => Some(path.as_path()),
            _ => None,
        })
    }

    /// Notes what is about to be made.
    ///
    /// # Errors
    /// The file cannot be written; nothing must be made then.
    pub fn add(&mut self, resource: Resource) -> Result<(), RecordError> {
        self.resources.push(resource);
        self.write()
    }

    fn write(&self) -> Result<(), RecordError> {
        let path = self.directory.join(FILE);
        let new = self.directory.join("record.new");
        let text = serde_json::to_vec(&self.resources).unwrap_or_default();
        // The run directory is in memory: a power cut takes what it describes along, so no fsync.
        fs::File::create(&new)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|source| RecordError::Io {
                what: "write",
                path,
                source,
            })
    }

    /// Removes all that the record names, then the record. Can be repeated.
    ///
    /// # Errors
    /// What is left after 10 s (scaled), by name; the record stays then.
    pub fn teardown(&self) -> Result<(), RecordError> {
        let deadline = Instant::now() + scaled(Duration::from_secs(10));
        for resource in self.resources.iter().rev() {
            match resource {
                Resource::Process { pid, start_time } => end_process(*pid, *start_time, deadline)?,
                Resource::Cgroup(path) => {
                    cgroup::remove(path, deadline).map_err(|source| RecordError::Io {
                        what: "remove",
                        path: path.clone(),
                        source,
                    })?;
                }
                Resource::Directory(path) => remove_directory(path)?,
            }
        }
        match fs::remove_dir_all(&self.directory) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(RecordError::Io {
                    what: "remove",
                    path: self.directory.clone(),
                    source,
                });
            }
        }
        remove_empty_parents(&self.directory);
        Ok(())
    }
}

/// Removes the directories above `path` that are empty now, at most up to the run directory.
fn remove_empty_parents(path: &Path) {
    for parent in path.ancestors().skip(1).take(2) {
        if fs::remove_dir(parent).is_err() {
            return;
        }
    }
}

fn remove_directory(path: &Path) -> Result<(), RecordError> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(RecordError::Io {
            what: "remove",
            path: path.to_owned(),
            source: error,
        }),
        _ => {
            remove_empty_parents(path);
            Ok(())
        }
    }
}

/// Field 22 of /proc/PID/stat; None when there is no such process (or only its zombie).
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, so count from its closing parenthesis.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn end_process(pid: u32, expected: u64, deadline: Instant) -> Result<(), RecordError> {
    let same = || start_time(pid) == Some(expected);
    if let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw)
        && let Ok(pidfd) = pidfd_open(raw, PidfdFlags::empty())
        // Checked after the descriptor is held, so that the signal cannot go astray.
        && same()
        && pidfd_send_signal(&pidfd, Signal::KILL) == Err(Errno::PERM)
    {
        kill_as(owner(pid), &pidfd);
    }
    while same() {
        if Instant::now() > deadline {
            return Err(RecordError::Stuck(format!(
                "process {pid}, which does not die"
            )));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// User of a process; None: it has gone.
fn owner(pid: u32) -> Option<Uid> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let real = line.split_whitespace().next()?.parse().ok()?;
    Some(Uid::from_raw(real))
}

/// Kills a process in another user namespace, of which this one is not root, as the user that it
/// runs as: that is the same user in all namespaces of one caller without root.
fn kill_as(user: Option<Uid>, process: &OwnedFd) {
    let Some(user) = user else { return };
    std::thread::scope(|scope| {
        // The change of user is this thread's alone, and ends with it.
        let thread = scope.spawn(|| {
            set_thread_res_uid(user, user, user)?;
            pidfd_send_signal(process, Signal::KILL)
        });
        let _ = thread.join();
    });
}

/// Claims a user id that no other sandbox has: a directory of that name, which goes with the record.
///
/// # Errors
/// All are taken, or the directory cannot be made.
pub fn claim_uid(
    record: &mut Record,
    run_dir: &Path,
    id: &str,
    base: u32,
    count: u32,
) -> Result<u32, RecordError> {
    let start = id.bytes().fold(0u32, |hash, byte| {
        hash.wrapping_mul(31).wrapping_add(byte.into())
    });
    for offset in 0..count.min(4096) {
        let uid = base + (start.wrapping_add(offset)) % count;
        let path = run_dir.join("uids").join(uid.to_string());
        match make_private_directory(&path) {
            Ok(()) => {
                record.add(Resource::Directory(path))?;
                return Ok(uid);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => {
                return Err(RecordError::Io {
                    what: "create",
                    path,
                    source,
                });
            }
        }
    }
    Err(RecordError::Stuck(
        "a free user id: too many sandboxes".to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_goes_and_may_go_twice() {
        let run = tempfile::tempdir().unwrap();
        let run_dir = run.path().join("run");
        let mut record = Record::create(&run_dir, "a").unwrap();
        assert!(matches!(
            Record::create(&run_dir, "a"),
            Err(RecordError::Exists(_))
        ));
        let uid = claim_uid(&mut record, &run_dir, "a", 1000, 10).unwrap();
        assert!((1000..1010).contains(&uid));
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let start = start_time(child.id()).unwrap();
        record
            .add(Resource::Process {
                pid: child.id(),
                start_time: start,
            })
            .unwrap();
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        let loaded = Record::load(&run_dir, "a").unwrap().unwrap();
        loaded.teardown().unwrap();
        assert!(!reaper.join().unwrap().success());
        assert!(!run_dir.exists(), "empty parents go too");
        record.teardown().unwrap();
        assert!(Record::load(&run_dir, "a").unwrap().is_none());
    }

    #[test]
    fn another_process_of_the_same_id_lives() {
        let run = tempfile::tempdir().unwrap();
        let mut record = Record::create(run.path(), "b").unwrap();
        let own = std::process::id();
        record
            .add(Resource::Process {
                pid: own,
                start_time: 1,
            })
            .unwrap();
        record.teardown().unwrap();
    }

    #[test]
    fn ids_that_are_paths_are_refused() {
        for id in ["", "..", "a/b", ".x"] {
            assert!(matches!(
                Record::create(Path::new("/nowhere"), id),
                Err(RecordError::Id(_))
            ));
        }
    }
}
