//! Unix sockets at paths of any length: those of users may be longer than an address of unix(7).

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};
use tokio::net::UnixStream;

/// Longest path of a unix socket (unix(7)), bytes.
const MAX_PATH: usize = 107;

/// Another name of a socket whose own is too long, for as long as the descriptor is open.
fn short(socket: &Path) -> io::Result<(Option<OwnedFd>, PathBuf)> {
    let long = socket.as_os_str().len() > MAX_PATH;
    let (true, Some(directory), Some(name)) = (long, socket.parent(), socket.file_name()) else {
        return Ok((None, socket.to_owned()));
    };
    let directory = rustix::fs::open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let path = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string());
    Ok((Some(directory), path.join(name)))
}

/// Listens at a path of any length.
///
/// # Errors
/// Those of bind(2) and listen(2).
pub fn listen(socket: &Path) -> io::Result<UnixListener> {
    let (_directory, path) = short(socket)?;
    UnixListener::bind(path)
}

/// Connects to a socket at a path of any length.
///
/// # Errors
/// Those of connect(2).
pub async fn connect(socket: &Path) -> io::Result<UnixStream> {
    let (_directory, path) = short(socket)?;
    UnixStream::connect(path).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn paths_may_be_long() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("a".repeat(90)).join("b".repeat(90));
        std::fs::create_dir_all(&deep).unwrap();
        let socket = deep.join("vsock.sock");
        let listener = listen(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        connect(&socket).await.unwrap();
        listener.accept().unwrap();
        assert!(socket.exists());
    }
}
