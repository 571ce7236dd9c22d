//! Without root: the program goes on as root of a user namespace of its own (user_namespaces(7)).
//!
//! User 0 of it is the caller, users 1 and up are the caller's ranges of `/etc/subuid` and
//! `/etc/subgid`. With it comes a mount namespace, which keeps the network namespaces of
//! containers. Every command has namespaces of its own: what two of them share are files and
//! sockets, and processes that belong to the same user outside. So nothing has to be kept running
//! for the next command, and what the last process leaves is gone with it.

mod ranges;

use std::{
    fs, io,
    os::unix::{fs::DirBuilderExt, process::CommandExt},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use caisson_sandbox::{Config, ConfigError, ENTERED};
use rustix::thread::{Gid, Uid, UnshareFlags};

use ranges::Ranges;
pub use ranges::checks;

/// Why the caller cannot do without root.
#[derive(Debug, thiserror::Error)]
pub enum RootlessError {
    /// The programs that map ids are not there.
    #[error(
        "the program {0} is not installed, which a user without root needs: install the package \
         uidmap (Debian; shadow-utils elsewhere)"
    )]
    NoProgram(&'static str),
    /// The user has no ids but its own.
    #[error(
        "user {user} has no range of ids in {file}, which a user without root needs: as root, \
         usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user} (a range that \
         nobody else has)"
    )]
    NoRange {
        /// Its name, or its id.
        user: String,
        /// `/etc/subuid` or `/etc/subgid`.
        file: &'static str,
    },
    /// The kernel refuses.
    #[error(
        "cannot make a user namespace: {0}; see whether the host forbids them to users: \
         user.max_user_namespaces, kernel.unprivileged_userns_clone, \
         kernel.apparmor_restrict_unprivileged_userns (sysctl)"
    )]
    Namespace(io::Error),
    /// newuidmap or newgidmap refuses.
    #[error("cannot map the ids of /etc/subuid and /etc/subgid: {0}")]
    Mapping(String),
    /// Another system call.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> RootlessError {
    move |source| RootlessError::Io {
        what: what.into(),
        source: source.into(),
    }
}

/// Verbs that need nothing of a user namespace.
const OUTSIDE: [&str; 4] = ["check", "version", "login", "logout"];

/// Lets a caller who is not root begin anew as root of a user namespace; returns for root, and for
/// verbs that do not need it. The process must have one thread.
///
/// # Errors
/// The host does not let the user.
pub fn enter(verb: &str) -> Result<(), RootlessError> {
    if rustix::process::geteuid().is_root() || OUTSIDE.contains(&verb) {
        return Ok(());
    }
    let uid = rustix::process::getuid().as_raw();
    let ranges = Ranges::of(uid)?;
    make_private(&Config::load(None)?.state_dir)?;
    // It stays in the caller's user namespace, where alone it may give out ids.
    let mapper = mapper(&ranges)?;
    unshare().map_err(RootlessError::Namespace)?;
    finish(mapper)?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)
        .map_err(failed("become root of the user namespace"))?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
        .map_err(failed("become root of the user namespace"))?;
    let program = std::env::current_exe().map_err(failed("find this program"))?;
    // The groups stay: that of /dev/kvm is one of them.
    let error = Command::new(&program)
        .args(std::env::args_os().skip(1))
        .env(ENTERED, uid.to_string())
        .exec();
    Err(failed(format!("run {}", program.display()))(error))
}

/// Waits for a line, then maps ids of the user namespace that this process has made by then.
fn mapper(ranges: &Ranges) -> Result<Child, RootlessError> {
    const SCRIPT: &str = r#"read -r _ && "$0" "$1" $2 && "$3" "$1" $4"#;
    let [uidmap, gidmap] = ["newuidmap", "newgidmap"].map(program);
    Command::new("/bin/sh")
        .args(["-c", SCRIPT])
        .arg(uidmap?)
        .arg(std::process::id().to_string())
        .arg(&ranges.users)
        .arg(gidmap?)
        .arg(&ranges.groups)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed("run /bin/sh"))
}

fn finish(mut mapper: Child) -> Result<(), RootlessError> {
    use io::Write;
    if let Some(mut stdin) = mapper.stdin.take() {
        // One that has gone tells why by its status.
        let _ = stdin.write_all(b"\n");
    }
    let output = mapper
        .wait_with_output()
        .map_err(failed("wait for newuidmap"))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(RootlessError::Mapping(if words.is_empty() {
        output.status.to_string()
    } else {
        words
    }))
}

/// Those that map ids are in sbin on some distributions, which is not in every user's PATH.
fn program(name: &'static str) -> Result<PathBuf, RootlessError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .ok_or(RootlessError::NoProgram(name))
}

#[allow(unsafe_code)]
fn unshare() -> io::Result<()> {
    // SAFETY: file descriptors are not unshared; that is what the function's contract is about.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) }
        .map_err(io::Error::from)
}

/// What is of a user's containers is nobody else's to see.
fn make_private(directory: &std::path::Path) -> Result<(), RootlessError> {
    let what = || format!("create {}", directory.display());
    if let Some(parent) = directory.parent() {
        fs::create_dir_all(parent).map_err(failed(what()))?;
    }
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(failed(what())),
    }
}
