//! What a process can change of itself only by calls that the compiler cannot judge.

use std::{
    fs, io,
    os::fd::{BorrowedFd, RawFd},
};

use rustix::{
    io::{FdFlags, fcntl_getfd, fcntl_setfd},
    thread::UnshareFlags,
};

use crate::error::Error;

/// Keeps what this process has inherited, besides its standard streams, from its children: one
/// that stays would hold a caller's pipe open.
///
/// # Errors
/// /proc is not mounted.
pub fn keep_descriptors() -> Result<(), Error> {
    let entries = fs::read_dir("/proc/self/fd").map_err(Error::file("read", "/proc/self/fd"))?;
    let open: Vec<RawFd> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        // SAFETY: the number is only used for two fcntl(2) calls that change nothing but the
        // close-on-exec flag; the directory's own descriptor, closed by now, makes them fail.
        #[allow(unsafe_code, reason = "see above")]
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        if let Ok(flags) = fcntl_getfd(fd) {
            let _ = fcntl_setfd(fd, flags | FdFlags::CLOEXEC);
        }
    }
    Ok(())
}

/// Gives this process namespaces of its own. To be called before there are threads: they would stay
/// in the old ones.
///
/// # Errors
/// Those of unshare(2).
pub fn unshare(namespaces: UnshareFlags) -> Result<(), Error> {
    // SAFETY: callers ask for namespaces alone, never for FILES: no descriptor that others hold
    // changes its meaning, and no memory is touched.
    #[allow(unsafe_code, reason = "see above")]
    let unshared = unsafe { rustix::thread::unshare_unsafe(namespaces) };
    unshared.map_err(|error| Error::io("make a namespace")(io::Error::from(error)))
}
