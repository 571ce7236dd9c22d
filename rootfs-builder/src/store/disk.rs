//! Paths, the lock, and writing files so that they are whole or absent.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::Store;
use crate::digest::Digest;
use crate::error::{Error, Result};

/// The format of the tree in the module's documentation.
const VERSION: &str = "1";
const VERSION_FILE: &str = "version";
const LAYERS: &str = "layers";
const IMAGES: &str = "images";
const LEASES: &str = "leases";
const BLOBS: &str = "blobs";
const TEMPORARY: &str = "tmp";
const LOCK: &str = "lock";

/// How often a held lock is tried again.
const LOCK_POLL: Duration = Duration::from_millis(10);

/// The store's exclusive lock; released on drop and by the kernel when the process dies.
#[derive(Debug)]
pub(super) struct ExclusiveLock {
    _file: File,
}

impl Store {
    pub(super) fn layers_dir(&self) -> PathBuf {
        self.root.join(LAYERS)
    }

    pub(super) fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.layers_dir().join(format!("{}.erofs", diff_id.hex()))
    }

    pub(super) fn blobs_dir(&self) -> PathBuf {
        self.root.join(BLOBS)
    }

    pub(super) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs_dir().join(digest.hex())
    }

    pub(super) fn images_dir(&self) -> PathBuf {
        self.root.join(IMAGES)
    }

    pub(super) fn image_dir(&self, id: &Digest) -> PathBuf {
        self.images_dir().join(id.hex())
    }

    pub(super) fn leases_dir(&self) -> PathBuf {
        self.root.join(LEASES)
    }

    pub(super) fn temporary_dir(&self) -> PathBuf {
        self.root.join(TEMPORARY)
    }

    /// Makes the directories and checks the format's version.
    pub(super) fn create_skeleton(&self) -> Result<()> {
        for dir in [
            self.root.clone(),
            self.layers_dir(),
            self.blobs_dir(),
            self.images_dir(),
            self.leases_dir(),
            self.temporary_dir(),
        ] {
            // Layers may hold setuid programs and device nodes: nobody but the owner reaches them.
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .map_err(Error::on("create", &dir))?;
        }
        let path = self.root.join(VERSION_FILE);
        match read_text(&path)? {
            Some(found) if found.trim() == VERSION => Ok(()),
            Some(found) => Err(Error::StoreVersion {
                path: self.root.clone(),
                found: found.trim().chars().take(40).collect(),
                wanted: VERSION,
            }),
            None => {
                let _lock = self.lock()?;
                self.replace(&path, format!("{VERSION}\n").as_bytes())
            }
        }
    }

    fn open_lock(&self) -> Result<(File, PathBuf)> {
        let path = self.root.join(LOCK);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::on("open", &path))?;
        Ok((file, path))
    }

    /// Takes the lock, waiting for [`Store::with_lock_timeout`] at most.
    pub(super) fn lock(&self) -> Result<ExclusiveLock> {
        let deadline = Instant::now() + self.lock_timeout;
        loop {
            if let Some(lock) = self.try_lock()? {
                return Ok(lock);
            }
            if Instant::now() >= deadline {
                return Err(Error::Busy {
                    path: self.root.join(LOCK),
                });
            }
            thread::sleep(LOCK_POLL);
        }
    }

    /// Takes the lock if nobody has it.
    pub(super) fn try_lock(&self) -> Result<Option<ExclusiveLock>> {
        let (file, path) = self.open_lock()?;
        match file.try_lock() {
            Ok(()) => Ok(Some(ExclusiveLock { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(Error::io("lock", &path, source)),
        }
    }

    /// Replaces the file at `path` (in the root or a directory below it) in one step that survives a power cut.
    pub(super) fn replace(&self, path: &Path, content: &[u8]) -> Result<()> {
        let mut file = tempfile::Builder::new()
            .prefix("file-")
            .tempfile_in(self.temporary_dir())
            .map_err(Error::on("create a file in", &self.temporary_dir()))?;
        file.write_all(content).map_err(Error::on("write", path))?;
        file.as_file().sync_all().map_err(Error::on("sync", path))?;
        file.persist(path)
            .map_err(|error| Error::io("rename", path, error.error))?;
        sync_parent(path)
    }
}

/// Makes the directory entry of `path` durable.
pub(super) fn sync_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    sync_dir(parent)
}

/// Makes the entries of a directory durable.
pub(super) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::on("sync", path))
}

/// The text of a small file of the store, `None` when there is none.
pub(super) fn read_text(path: &Path) -> Result<Option<String>> {
    /// No text file of the store is longer; a record of 500 layers has 50 KB.
    const MAX: u64 = 64 << 20;
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path, error)),
    };
    let mut text = String::new();
    match file.take(MAX).read_to_string(&mut text) {
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(Error::Corrupt {
            path: path.to_owned(),
            reason: "it is not UTF-8".to_owned(),
        }),
        Err(error) => Err(Error::io("read", path, error)),
    }
}

/// Removes a file; that there is none is no error.
pub(super) fn remove_file(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("remove", path, error)),
    }
}

/// The names in a directory, sorted; those that are not UTF-8 are not ours and are left out.
pub(super) fn names(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(Error::on("read", path))? {
        let entry = entry.map_err(Error::on("read", path))?;
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
