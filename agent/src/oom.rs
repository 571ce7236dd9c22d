//! Notices at once that the kernel killed a process of a container for want of memory.
//!
//! The kernel says so by changing the `memory.events` of the container's cgroup (Linux:
//! admin-guide/cgroup-v2.rst, "memory.events": "generates a file modified event"), which
//! covers the cgroups that a container makes inside its own, and processes that are
//! nobody's to report.

use std::{
    collections::HashMap,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use tokio::io::unix::AsyncFd;

use crate::{
    container::Manager,
    failure::{During, Result},
};

/// Holds dozens of events; none of ours has a name.
const BUFFER: usize = 2048;

/// One inotify instance for all containers.
pub struct Watch {
    fd: AsyncFd<OwnedFd>,
    /// Container of a watch.
    watched: Mutex<HashMap<i32, String>>,
}

impl Watch {
    /// Watches nothing yet. Needs a running event loop.
    ///
    /// # Errors
    /// Those of inotify_init1(2).
    pub fn new() -> Result<Self> {
        let during = || "watch for processes killed for want of memory".to_owned();
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).during(during)?;
        Ok(Self {
            fd: crate::readiness::watch(fd).during(during)?,
            watched: Mutex::default(),
        })
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<i32, String>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches `file` for container `id`. Ends by itself when the file goes with its cgroup.
    ///
    /// # Errors
    /// Those of inotify_add_watch(2).
    pub fn add(&self, file: &Path, id: &str) -> Result<()> {
        // Held over the call, so that no event is looked up before its watch is known.
        let mut watched = self.watched();
        let watch = inotify::add_watch(self.fd.get_ref(), file, WatchFlags::MODIFY)
            .during(|| format!("watch {}", file.display()))?;
        watched.insert(watch, id.to_owned());
        Ok(())
    }

    /// Waits until something may have happened and returns the containers it concerns.
    async fn next(&self) -> Result<Vec<String>> {
        let during = || "hear of processes killed for want of memory".to_owned();
        let mut guard = self.fd.readable().await.during(during)?;
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut reader = Reader::new(self.fd.get_ref(), &mut buffer);
        let mut concerned = Vec::new();
        loop {
            let (watch, events) = match reader.next() {
                Ok(event) => (event.wd(), event.events()),
                Err(Errno::AGAIN) => {
                    guard.clear_ready();
                    return Ok(concerned);
                }
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error).during(during),
            };
            let mut watched = self.watched();
            if events.contains(ReadFlags::IGNORED) {
                watched.remove(&watch);
            } else if events.contains(ReadFlags::QUEUE_OVERFLOW) {
                concerned = watched.values().cloned().collect();
            } else if let Some(id) = watched.get(&watch)
                && !concerned.contains(id)
            {
                concerned.push(id.clone());
            }
        }
    }
}

/// Tells the host of every such death for ever.
///
/// # Errors
/// The inotify instance fails.
pub async fn run(manager: Arc<Manager>) -> Result<()> {
    loop {
        for id in manager.oom_watch.next().await? {
            manager.check_memory(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_change_names_its_container_once_and_a_removed_file_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let watch = Watch::new().unwrap();
        let file = |name: &str| directory.path().join(name);
        for name in ["a", "b"] {
            fs::write(file(name), "oom_kill 0\n").unwrap();
            watch.add(&file(name), name).unwrap();
        }
        assert!(watch.add(&file("none"), "none").is_err());
        let append = |name: &str| {
            use std::io::Write;
            let mut file = fs::File::options().append(true).open(file(name)).unwrap();
            file.write_all(b"oom_kill 1\n").unwrap();
        };
        append("b");
        append("b");
        assert_eq!(watch.next().await.unwrap(), ["b"]);
        let quiet = tokio::time::timeout(Duration::from_millis(20), watch.next()).await;
        assert!(quiet.is_err(), "{quiet:?}");
        fs::remove_file(file("b")).unwrap();
        append("a");
        assert_eq!(watch.next().await.unwrap(), ["a"]);
        assert_eq!(watch.watched().len(), 1);
    }
}
