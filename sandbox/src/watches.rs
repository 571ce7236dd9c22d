//! Watches of directories, all by one instance of inotify(7): a user may have few of those
//! (`fs.inotify.max_user_instances`, 128 by default), and root's are those of the whole node.

use std::{
    collections::HashMap,
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use tokio::{io::unix::AsyncFd, sync::watch, task::JoinHandle};

/// The instance, which is there while anything is watched.
#[derive(Clone, Default)]
pub struct Watches(Arc<Mutex<Option<Instance>>>);

struct Instance {
    inotify: Arc<AsyncFd<OwnedFd>>,
    /// By watch descriptor: the kernel has one of a directory, however many watch it.
    watched: HashMap<i32, watch::Sender<()>>,
    reader: JoinHandle<()>,
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Somebody's watch of a directory.
pub struct Watch {
    changed: watch::Receiver<()>,
    /// After the receiver, so that it is not counted any more.
    _sweep: Sweep,
}

struct Sweep(Watches);

impl Drop for Sweep {
    fn drop(&mut self) {
        sweep(&mut self.0.lock());
    }
}

impl Watches {
    /// Watches what comes into the directory and goes from it, from now on. Needs a runtime.
    ///
    /// # Errors
    /// No such directory, or the host has no watches left.
    pub fn watch(&self, directory: &Path) -> io::Result<Watch> {
        let mut place = self.lock();
        let instance = match place.as_mut() {
            Some(instance) => instance,
            None => place.insert(Instance::new(self)?),
        };
        match instance.watch(directory) {
            Ok(changed) => Ok(Watch {
                changed,
                _sweep: Sweep(self.clone()),
            }),
            Err(error) => {
                sweep(&mut place);
                Err(error.into())
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instance>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of all that happens, while the instance is there and can be read.
    async fn read(self, inotify: Arc<AsyncFd<OwnedFd>>) {
        while let Ok(mut ready) = inotify.readable().await {
            let mut place = self.lock();
            // Another one has a reader of its own.
            let Some(instance) = place
                .as_mut()
                .filter(|instance| Arc::ptr_eq(&instance.inotify, &inotify))
            else {
                return;
            };
            let told = ready.try_io(|_| Err::<(), _>(instance.tell().into()));
            // Else there is no more for now.
            if let Ok(Err(error)) = told {
                log::error!(
                    "directories are watched no longer: cannot read inotify's events: {error}"
                );
                *place = None;
                return;
            }
        }
    }
}

/// Lets go of the watches that nobody waits for, and with the last one of the instance.
fn sweep(place: &mut Option<Instance>) {
    let Some(instance) = place else { return };
    let inotify = instance.inotify.get_ref();
    instance.watched.retain(|descriptor, changed| {
        let awaited = changed.receiver_count() > 0;
        if !awaited {
            // It cannot fail in a way that matters: the directory may have gone just now.
            let _ = inotify::remove_watch(inotify, *descriptor);
        }
        awaited
    });
    if instance.watched.is_empty() {
        *place = None;
    }
}

impl Instance {
    fn new(watches: &Watches) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // SAFETY: an OwnedFd names one open descriptor, the same one, until it is dropped, and the
        // AsyncFd that owns it takes it out of epoll before that.
        let inotify = unsafe { AsyncFd::register(inotify) };
        let inotify = Arc::new(inotify.map_err(io::Error::from)?);
        let reader = tokio::spawn(watches.clone().read(inotify.clone()));
        Ok(Self {
            inotify,
            watched: HashMap::new(),
            reader,
        })
    }

    fn watch(&mut self, directory: &Path) -> rustix::io::Result<watch::Receiver<()>> {
        let events = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::ONLYDIR;
        let descriptor = inotify::add_watch(self.inotify.get_ref(), directory, events)?;
        let changed = self.watched.entry(descriptor).or_default();
        Ok(changed.subscribe())
    }

    /// Tells of the events that are there. Returns why there are no more.
    fn tell(&mut self) -> Errno {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(self.inotify.get_ref(), &mut buffer);
        loop {
            let (descriptor, what) = match reader.next() {
                Ok(event) => (event.wd(), event.events()),
                Err(error) => return error,
            };
            if what.contains(ReadFlags::QUEUE_OVERFLOW) {
                // Of any of them.
                for changed in self.watched.values() {
                    changed.send_replace(());
                }
            } else if what.contains(ReadFlags::IGNORED) {
                // The directory was removed or unmounted.
                self.watched.remove(&descriptor);
            } else if let Some(changed) = self.watched.get(&descriptor) {
                changed.send_replace(());
            }
        }
    }
}

impl Watch {
    /// Comes back after a change, however many there were; false when the directory has gone. Safe
    /// to cancel.
    pub async fn next(&mut self) -> bool {
        // The end counts, whatever else was before it.
        self.changed.changed().await.is_ok() && self.changed.has_changed().is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn watched(watches: &Watches) -> Option<usize> {
        let place = watches.lock();
        place.as_ref().map(|instance| instance.watched.len())
    }

    #[tokio::test]
    async fn all_are_of_one_instance() {
        let place = tempfile::tempdir().unwrap();
        let (one, other) = (place.path().join("one"), place.path().join("other"));
        let watches = Watches::default();
        assert!(watches.watch(&one).is_err());
        assert_eq!(watched(&watches), None);
        fs::create_dir(&one).unwrap();
        fs::create_dir(&other).unwrap();
        let mut first = watches.watch(&one).unwrap();
        let mut second = watches.watch(&one).unwrap();
        let third = watches.watch(&other).unwrap();
        assert_eq!(watched(&watches), Some(2));
        assert!(watches.watch(&place.path().join("nowhere")).is_err());
        fs::write(one.join("a"), "").unwrap();
        assert!(first.next().await && second.next().await);
        drop(first);
        assert_eq!(watched(&watches), Some(2), "the second needs it");
        fs::write(one.join("b"), "").unwrap();
        assert!(second.next().await);
        drop(second);
        assert_eq!(watched(&watches), Some(1));
        drop(third);
        assert_eq!(watched(&watches), None);
    }

    #[tokio::test]
    async fn one_that_ends_takes_none_along() {
        let place = tempfile::tempdir().unwrap();
        let (stays, goes) = (place.path().join("stays"), place.path().join("goes"));
        fs::create_dir(&stays).unwrap();
        fs::create_dir(&goes).unwrap();
        let watches = Watches::default();
        let mut stayer = watches.watch(&stays).unwrap();
        let mut goer = watches.watch(&goes).unwrap();
        fs::remove_dir(&goes).unwrap();
        while goer.next().await {}
        drop(goer);
        assert_eq!(watched(&watches), Some(1));
        fs::write(stays.join("a"), "").unwrap();
        assert!(stayer.next().await);
        // The first after the last is of another instance.
        drop(stayer);
        let mut stayer = watches.watch(&stays).unwrap();
        fs::remove_file(stays.join("a")).unwrap();
        assert!(stayer.next().await);
    }
}
