//! From a jailed process to one that serves: the file system, the seccomp
//! filter, the vhost-user daemon.

use std::{
    os::{
        fd::{FromRawFd, IntoRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::ExitCode,
    sync::Arc,
};

use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as BackendError, VhostUserDaemon};
use virtiofsd::{
    passthrough::{self, CachePolicy, InodeFileHandlesMode, NegotiationMode, PassthroughFs},
    vhost_user::{VhostUserFsBackend, VhostUserFsBackendBuilder},
};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use caisson_fs::VALIDITY;

use crate::{filter, jail, policy::SharePolicy};

/// Descriptors that the guest's files may not take up: one per memory region that vhost-user
/// allows (509), and some for the server's own use.
const RESERVED_DESCRIPTORS: u64 = 640;

/// Why the server cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Jail(#[from] jail::Error),
    #[error(
        "at most {0} open files are allowed (RLIMIT_NOFILE), which is too few; allow at least 1024"
    )]
    Descriptors(u64),
    #[error("file system: {0}")]
    FileSystem(std::io::Error),
    #[error("seccomp: {0}")]
    Filter(#[from] filter::Error),
    #[error("vhost-user: {0}")]
    Backend(String),
}

type Backend = Arc<VhostUserFsBackend<SharePolicy>>;

/// A server that is ready to accept its one connection.
pub struct Server {
    daemon: VhostUserDaemon<Backend>,
    listener: Listener,
}

/// Jails the process and builds the server in it.
pub fn prepare(listener: OwnedFd, lifeline: &UnixStream) -> Result<Server, Error> {
    let jail = jail::enter(&listener, lifeline)?;
    let guest_fd_limit = jail
        .open_files
        .checked_sub(RESERVED_DESCRIPTORS)
        .filter(|left| *left >= 128)
        .ok_or(Error::Descriptors(jail.open_files))?;
    let config = passthrough::Config {
        entry_timeout: VALIDITY,
        attr_timeout: VALIDITY,
        cache_policy: CachePolicy::Auto,
        root_dir: "/".into(),
        proc_sfd_rawfd: Some(jail.self_descriptors),
        // A client that asks for security.capability at every write would be slow; one that has
        // HANDLE_KILLPRIV_V2 does not.
        xattr: true,
        killpriv_v2: true,
        posix_acl: NegotiationMode::Never,
        security_label: NegotiationMode::Never,
        // Handles would need CAP_DAC_READ_SEARCH, with which any file of a shared file system
        // could be opened.
        inode_file_handles: InodeFileHandlesMode::Never,
        readdirplus: true,
        // As file systems of their own they could be unmounted in the guest while a file's release
        // waits for its readahead and holds the inode: Linux 6.12 finds that busy and panics.
        announce_submounts: false,
        writeback: false,
        guest_fd_limit,
        ..Default::default()
    };
    let file_system = PassthroughFs::new(config).map_err(Error::FileSystem)?;
    // Before the first thread, so that all threads have it.
    filter::install()?;
    let backend = VhostUserFsBackendBuilder::default()
        .set_thread_pool_size(0)
        .build(SharePolicy::new(file_system))
        .map_err(|error| Error::Backend(error.to_string()))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let daemon = VhostUserDaemon::new("vhost-user".into(), Arc::new(backend), memory)
        .map_err(|error| Error::Backend(error.to_string()))?;
    // SAFETY: `listener` is open and gives its ownership away here.
    let listener = unsafe { Listener::from_raw_fd(listener.into_raw_fd()) };
    Ok(Server { daemon, listener })
}

impl Server {
    /// Serves until the VMM hangs up.
    pub fn run(mut self) -> ExitCode {
        let served = self
            .daemon
            .start(&mut self.listener)
            .and_then(|()| self.daemon.wait());
        match served {
            Ok(())
            | Err(BackendError::HandleRequest(
                VhostUserError::Disconnected | VhostUserError::PartialMessage,
            )) => ExitCode::SUCCESS,
            Err(error) => {
                log::error!("vhost-user: {error}");
                ExitCode::FAILURE
            }
        }
    }
}

/// Warnings and errors, ours and the libraries', go to standard error.
pub fn log_to_stderr() {
    static LOGGER: Stderr = Stderr;
    // Fails only when a logger is set already.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

struct Stderr;

impl log::Log for Stderr {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            eprintln!("caisson-fs: {}: {}", record.level(), record.args());
        }
    }

    fn flush(&self) {}
}
