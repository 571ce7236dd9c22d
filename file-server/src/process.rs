//! The server as a child process.

use std::{
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use crate::{
    Error,
    mounts::{self, MountBelow, Share},
};

/// Longest report of a server that does not get ready, bytes.
const MAX_REPORT: usize = 4096;

/// A running file server. Dropping it kills the server and reaps it.
///
/// The server also ends by itself when this handle's process dies and when the
/// VMM closes its end of the vhost-user connection.
#[derive(Debug)]
pub struct FileServer {
    child: Child,
    /// The server reads its end: it ends when this one is closed.
    _lifeline: UnixStream,
    mounts: OwnedFd,
}

impl FileServer {
    /// Starts `program` (caisson-fs) in a pid namespace of its own and waits at most `deadline`
    /// until it has jailed itself. Needs root. The stream is the connection to it for the VMM.
    ///
    /// Blocks; not for an async executor's own threads.
    ///
    /// # Errors
    /// [`Error::Spawn`], [`Error::NotReady`] with the server's own words, [`Error::Io`]. Nothing
    /// is left behind then.
    pub fn spawn(
        program: &Path,
        stderr: Stdio,
        deadline: Duration,
    ) -> Result<(Self, UnixStream), Error> {
        let (listener, connection) = connection().map_err(Error::io("vhost-user socket"))?;
        let (mut lifeline, far) = UnixStream::pair().map_err(Error::io("socketpair"))?;
        let mut child =
            spawn_child(program, &listener, &far, stderr).map_err(|source| Error::Spawn {
                program: program.to_owned(),
                source,
            })?;
        drop(far);
        let ready = wait_ready(&mut lifeline, deadline).and_then(|()| {
            let path = format!("/proc/{}/ns/mnt", child.id());
            rustix::fs::open(
                path,
                rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )
            .map_err(Error::io("mount namespace of the server"))
        });
        match ready {
            Ok(mounts) => Ok((
                Self {
                    child,
                    _lifeline: lifeline,
                    mounts,
                },
                connection,
            )),
            Err(error) => {
                // It may have ended already; then its status is its own.
                let _ = child.kill();
                let status = child.wait();
                Err(match (error, status) {
                    (Error::NotReady(report), Ok(status)) if report.is_empty() => {
                        Error::NotReady(format!("it ended at once ({status})"))
                    }
                    (error, _) => error,
                })
            }
        }
    }

    /// Process id in this process's pid namespace.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets the guest see the directory or file `source`, followed if it is a symbolic link, with
    /// the mounts below it, as `/<index>`. Mounts that come to be below it later are not seen.
    ///
    /// # Errors
    /// [`Error::Source`] naming `source`, [`Error::Exists`], [`Error::Io`]. Nothing is left
    /// behind then.
    pub fn share(&self, index: u32, source: &Path, share: Share) -> Result<(), Error> {
        let tree = mounts::clone_tree(source, share.recursive).map_err(|error| Error::Source {
            path: source.to_owned(),
            source: error,
        })?;
        self.share_tree(index, tree, share)
    }

    /// As [`FileServer::share`] of a detached mount (`open_tree(2)` with `OPEN_TREE_CLONE`).
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Io`].
    pub fn share_tree(&self, index: u32, tree: OwnedFd, share: Share) -> Result<(), Error> {
        mounts::attach(self.mounts.as_fd(), index, &tree, share)
    }

    /// Mounts a copy of the one mount whose root `mount` is on `path`, relative to the share. The
    /// host's own can be unmounted at any time: what it mounts stays in use meanwhile.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Io`]: no such mount point. Nothing is left behind then.
    pub fn mount_below(
        &self,
        index: u32,
        path: &Path,
        mount: BorrowedFd<'_>,
        share: Share,
    ) -> Result<MountBelow, Error> {
        let tree = mounts::clone_mount(mount).map_err(Error::io("copy of a mount"))?;
        mounts::attach_below(self.mounts.as_fd(), index, path, tree, share)
    }

    /// Takes such a mount away. Files that the guest has open there stay open, and what was mounted
    /// stays in use until it has closed and forgotten them.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn unmount_below(&self, mount: MountBelow) -> Result<(), Error> {
        mounts::detach_below(self.mounts.as_fd(), &mount)
    }

    /// Takes a share away. Files that the guest has open there stay open.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Io`].
    pub fn unshare(&self, index: u32) -> Result<(), Error> {
        mounts::detach(self.mounts.as_fd(), index)
    }

    /// The exit status if the server has ended.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, Error> {
        self.child.try_wait().map_err(Error::io("wait"))
    }

    /// Ends the server at once.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn kill(&mut self) -> Result<ExitStatus, Error> {
        self.child.kill().map_err(Error::io("kill"))?;
        self.child.wait().map_err(Error::io("wait"))
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.kill();
    }
}

/// A listener with one connection waiting in it, and that connection's other end.
///
/// The vhost-user-backend library only accepts connections. The socket lies on a tmpfs that is
/// mounted nowhere, so no other process can reach it and no file is left behind.
fn connection() -> io::Result<(UnixListener, UnixStream)> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    let mount = rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?;
    let path = format!("/proc/self/fd/{}/socket", mount.as_raw_fd());
    let listener = UnixListener::bind(&path)?;
    let stream = UnixStream::connect(&path)?;
    Ok((listener, stream))
}

/// Runs the program in a new pid namespace.
fn spawn_child(
    program: &Path,
    listener: &UnixListener,
    lifeline: &UnixStream,
    stderr: Stdio,
) -> io::Result<Child> {
    let fds = [listener.as_raw_fd(), lifeline.as_raw_fd()];
    let mut command = Command::new(program);
    command
        .args(["--listener-fd", &fds[0].to_string()])
        .args(["--lifeline-fd", &fds[1].to_string()])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr);
    // SAFETY: the closure runs between fork and exec and makes two system calls only; it neither
    // allocates nor takes locks.
    unsafe {
        command.pre_exec(move || fds.into_iter().try_for_each(keep_over_exec));
    }
    // A pid namespace is entered by children of the thread that asked for it, which can start no
    // threads from then on: so the thread is one for this purpose only.
    let thread = std::thread::Builder::new()
        .name("spawn-fs".into())
        .stack_size(64 << 10)
        .spawn(move || {
            // SAFETY: NEWPID leaves descriptors shared; that is what the function's contract is about.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWPID) }?;
            command.spawn()
        })?;
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the starting thread failed")))
}

fn keep_over_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: the parent owns the descriptor at this number and outlives the call in its copy.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    Ok(())
}

/// Reads the server's first line: "ready", or why not; nothing when it ended.
fn wait_ready(lifeline: &mut UnixStream, deadline: Duration) -> Result<(), Error> {
    let end = Instant::now() + deadline;
    let mut report = Vec::new();
    let mut chunk = [0; 512];
    while !report.ends_with(b"\n") && report.len() < MAX_REPORT {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::NotReady(format!(
                "no answer within {} ms",
                deadline.as_millis()
            )));
        }
        lifeline
            .set_read_timeout(Some(left))
            .map_err(Error::io("time-out of the lifeline"))?;
        match lifeline.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => report.extend_from_slice(&chunk[..count]),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::TimedOut
                        | io::ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(Error::NotReady(error.to_string())),
        }
    }
    let text = String::from_utf8_lossy(&report);
    match text.trim_end() {
        "ready" => Ok(()),
        other => Err(Error::NotReady(other.to_owned())),
    }
}
