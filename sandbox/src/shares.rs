//! Host directories and files in the guest: one file server per sandbox, started when the first
//! one is needed.

use std::{
    collections::HashMap,
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use caisson_fs::{FileServer, Share};

use crate::{deadline::scaled, error::Error};

/// Request queues of the device.
pub const QUEUES: u16 = 1;

/// The file server of a sandbox and what it shares.
pub struct Shares {
    server: FileServer,
    shared: HashMap<(PathBuf, bool, bool), u32>,
    next: u32,
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
        Ok((
            Self {
                server,
                shared: HashMap::new(),
                next: 0,
            },
            socket,
        ))
    }

    /// Process id of the server.
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// Shares `source` and returns its name in the share. Blocks.
    ///
    /// # Errors
    /// It is not there, or no directory or regular file.
    pub fn add(&mut self, source: &Path, share: Share) -> Result<String, Error> {
        let key = (source.to_owned(), share.read_only, share.set_id);
        if let Some(index) = self.shared.get(&key) {
            return Ok(index.to_string());
        }
        let index = self.next;
        self.server.share(index, source, share)?;
        self.next += 1;
        self.shared.insert(key, index);
        Ok(index.to_string())
    }
}

/// For the VMM's request.
pub fn descriptor(socket: &UnixStream) -> std::os::fd::BorrowedFd<'_> {
    socket.as_fd()
}
