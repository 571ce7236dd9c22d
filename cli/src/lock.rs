//! Locks of directories: flock(2), which ends with its process.

use std::{fs::File, path::Path};

use rustix::fs::{FlockOperation, flock};

use crate::error::Error;

/// Holds a directory's lock.
pub struct Lock(#[expect(dead_code, reason = "held, not read")] File);

impl Lock {
    /// Waits for the lock of a directory.
    ///
    /// # Errors
    /// There is no such directory.
    pub fn take(directory: &Path) -> Result<Self, Error> {
        let file = File::open(directory).map_err(Error::file("open", directory))?;
        flock(&file, FlockOperation::LockExclusive).map_err(Error::file("lock", directory))?;
        Ok(Self(file))
    }
}
