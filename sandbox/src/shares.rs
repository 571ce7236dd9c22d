//! Host directories and files in the guest: one file server per sandbox, started when the first
//! one is needed.

use std::{
    os::unix::{ffi::OsStrExt, net::UnixStream},
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use caisson_fs::{FileServer, Share};

use crate::{deadline::scaled, error::Error};

/// Request queues of the device.
pub const QUEUES: u16 = 1;

/// Whether something is mounted below the directory at `path`.
pub fn has_mounts(path: &Path) -> bool {
    // What cannot be found is told when it is shared.
    let Ok(path) = path.canonicalize() else {
        return false;
    };
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    is_above_a_mount(path.as_os_str().as_bytes(), &table)
}

/// The same of a table as proc_pid_mountinfo(5) has it: the fifth field is the mount point.
fn is_above_a_mount(path: &[u8], table: &[u8]) -> bool {
    let start: Vec<u8> = path
        .strip_suffix(b"/")
        .unwrap_or(path)
        .iter()
        .chain(b"/")
        .flat_map(|byte| match byte {
            b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
            other => vec![*other],
        })
        .collect();
    table.split(|byte| *byte == b'\n').any(|line| {
        line.split(|byte| *byte == b' ')
            .nth(4)
            .is_some_and(|point| point.starts_with(&start) && point != start)
    })
}

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

    /// Takes an entry away; what the guest has open there stays open. Blocks.
    ///
    /// # Errors
    /// There is no such entry.
    pub fn remove(&self, index: u32) -> Result<(), Error> {
        Ok(self.server.unshare(index)?)
    }
}

#[cfg(test)]
mod tests {
    use super::is_above_a_mount;

    #[test]
    fn mounts_are_found_below_and_not_beside() {
        let table = b"22 1 8:1 / / rw - ext4 /dev/a rw\n\
            23 22 0:5 / /srv/a\\040b/c rw - tmpfs x rw\n\
            24 22 0:6 / /srv/other rw - tmpfs x rw\n";
        for above in ["/", "/srv", "/srv/a b"] {
            assert!(is_above_a_mount(above.as_bytes(), table), "{above}");
        }
        for other in ["/srv/a b/c", "/srv/othe", "/srv/other", "/home"] {
            assert!(!is_above_a_mount(other.as_bytes(), table), "{other}");
        }
    }
}
