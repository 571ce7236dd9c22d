//! Descriptors that the event loop waits for.

use std::{io, os::fd::OwnedFd};

use tokio::io::unix::AsyncFd;

/// Puts a non-blocking descriptor under the event loop's eye.
///
/// # Errors
/// Those of epoll_ctl(2).
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names one open descriptor, the same one, until it is dropped, and the
    // AsyncFd that owns it takes it out of epoll before that.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}
