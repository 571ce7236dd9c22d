//! Network namespaces that outlive their makers (network_namespaces(7)): mounts on files.

use std::{fs, io, path::Path};

use rustix::{
    mount::{UnmountFlags, mount_bind, unmount},
    thread::UnshareFlags,
};

use crate::error::Error;

/// Makes a namespace that can be opened by `path`; one that is there stays as it is.
///
/// # Errors
/// No permission.
pub fn make(path: &Path) -> Result<(), Error> {
    if is_there(path) {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).map_err(Error::file("create", parent))?;
    fs::write(path, []).map_err(Error::file("create", path))?;
    let target = path.to_owned();
    // Not a thread that others use afterwards: it stays in the namespace.
    let made = std::thread::spawn(move || -> io::Result<()> {
        enter_new()?;
        Ok(mount_bind("/proc/thread-self/ns/net", &target)?)
    })
    .join()
    .unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")));
    made.map_err(|error| {
        let _ = fs::remove_file(path);
        Error::file("make the network namespace", path)(error)
    })
}

#[allow(unsafe_code)]
fn enter_new() -> io::Result<()> {
    // SAFETY: file descriptors are not unshared; that is what the function's contract is about.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.map_err(io::Error::from)
}

/// Whether a namespace is mounted there, and not only a file left by a host that has restarted.
fn is_there(path: &Path) -> bool {
    // NSFS_MAGIC of linux/magic.h.
    rustix::fs::statfs(path).is_ok_and(|data| data.f_type == 0x6e73_6673)
}

/// Lets go of a namespace; what is in it goes with its last user.
///
/// # Errors
/// It cannot be unmounted.
pub fn remove(path: &Path) -> Result<(), Error> {
    if is_there(path) {
        unmount(path, UnmountFlags::DETACH)
            .map_err(Error::file("unmount the network namespace", path))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}
