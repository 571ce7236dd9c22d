//! Host directories and files in the guest: one file server per sandbox, started when the first
//! one is needed.

use std::{
    os::{fd::BorrowedFd, unix::net::UnixStream},
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use caisson_fs::{FileServer, MountBelow, Share};

use crate::{deadline::scaled, error::Error};

/// Request queues of the device.
pub const QUEUES: u16 = 1;

/// The file server of a sandbox.
pub struct Shares {
    server: FileServer,
    next: AtomicU32,
}

impl Shares {
    /// Starts the server; the stream is for the VMM. Blocks.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(program: &Path) -> Result<(Self, UnixStream), Error> {
        if !program.is_file() {
            return Err(Error::Asset {
                what: "file server",
                path: program.to_owned(),
                reason: "no such file".to_owned(),
            });
        }
        let (server, socket) =
            FileServer::spawn(program, Stdio::null(), scaled(Duration::from_secs(5)))?;
        let shares = Self {
            server,
            next: AtomicU32::new(0),
        };
        Ok((shares, socket))
    }

    /// Process id of the server.
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// Shares what is at `source` now and returns its name in the share. Blocks.
    ///
    /// Every call makes an entry of its own: what a path names changes (an unmount, a mount over
    /// it), so an entry is never found again by its path, and a name is never used twice, so
    /// that the guest cannot take a new entry for one that it has cached.
    ///
    /// # Errors
    /// It is not there, or no directory or regular file.
    pub fn add(&self, source: &Path, share: Share) -> Result<u32, Error> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        self.server.share(index, source, share)?;
        Ok(index)
    }

    /// Mounts a copy of `mount` on `path` below an entry. Blocks.
    ///
    /// # Errors
    /// There is no such mount point.
    pub fn mount_below(
        &self,
        index: u32,
        path: &Path,
        mount: BorrowedFd<'_>,
        share: Share,
    ) -> Result<MountBelow, Error> {
        Ok(self.server.mount_below(index, path, mount, share)?)
    }

    /// Takes such a mount away; what the guest has open there stays open. Blocks.
    ///
    /// # Errors
    /// The server has gone.
    pub fn unmount_below(&self, mount: MountBelow) -> Result<(), Error> {
        Ok(self.server.unmount_below(mount)?)
    }

    /// Takes an entry away; what the guest has open there stays open. Blocks.
    ///
    /// # Errors
    /// There is no such entry.
    pub fn remove(&self, index: u32) -> Result<(), Error> {
        Ok(self.server.unshare(index)?)
    }
}
