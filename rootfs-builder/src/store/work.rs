//! The directory in which one load works, and the removal of those whose load has died.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::Store;
use super::disk::names;
use crate::error::{Error, Result};

/// A directory of its own under `tmp/`, removed with everything in it on drop.
#[derive(Debug)]
pub(super) struct WorkDir {
    path: PathBuf,
    /// Holds an flock for as long as its owner lives; the kernel releases it however the owner dies.
    _lock: File,
}

impl WorkDir {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next sweep, as the lock goes in any case.
        if let Err(error) = fs::remove_dir_all(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

impl Store {
    /// Makes a directory for one load.
    pub(super) fn work_dir(&self) -> Result<WorkDir> {
        let parent = self.temporary_dir();
        // Under the store's lock, so that a sweep cannot see the directory before it is locked.
        let _store_lock = self.lock()?;
        let dir = tempfile::Builder::new()
            .prefix("load-")
            .tempdir_in(&parent)
            .map_err(Error::on("create a directory in", &parent))?;
        let lock = File::open(dir.path()).map_err(Error::on("open", dir.path()))?;
        lock.lock().map_err(Error::on("lock", dir.path()))?;
        Ok(WorkDir {
            path: dir.keep(),
            _lock: lock,
        })
    }

    /// Removes what loads that died have left. Does nothing while another process changes the store, as that one
    /// or the next will do it.
    pub(super) fn sweep(&self) -> Result<()> {
        let parent = self.temporary_dir();
        if names(&parent)?.is_empty() {
            return Ok(());
        }
        let Some(_store_lock) = self.try_lock()? else {
            return Ok(());
        };
        let mut swept = false;
        // Read again under the lock: nobody makes or publishes anything now.
        for name in names(&parent)? {
            let path = parent.join(&name);
            swept |= remove_if_stale(&path)?;
        }
        if swept {
            // It may have died between publishing its layers and its image.
            self.delete_orphan_layers()?;
        }
        Ok(())
    }
}

/// Removes a directory that no one has locked, or a file: files are made and renamed under the store's lock only.
fn remove_if_stale(path: &Path) -> Result<bool> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        // Its owner has just removed it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io("read", path, error)),
    };
    if !metadata.is_dir() {
        fs::remove_file(path).map_err(Error::on("remove", path))?;
        return Ok(true);
    }
    let Ok(dir) = File::open(path) else {
        return Ok(false);
    };
    if dir.try_lock().is_err() {
        return Ok(false);
    }
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("remove", path, error)),
    }
}
