//! The process gives up everything before it reads a byte from outside.
//!
//! [`enter`] takes these steps, in this order, and why in this order:
//!
//! 1. close every descriptor but 0, 1, 2 and the control socket;
//! 2. resource limits (a hard limit can only be lowered later);
//! 3. without root: a user namespace, whose capabilities the next steps need;
//! 4. own mount, network, IPC and UTS namespaces, all empty (the parent made the PID namespace,
//!    which a process cannot enter by itself, and puts it into its cgroup);
//! 5. an empty, read-only root; the host's tree is detached;
//! 6. as root: an empty bounding set, no groups, the microVM's own user and group;
//! 7. as root: a user namespace that maps only that user, so user 0 does not exist;
//! 8. no capability in any set, no new privileges by execve(2);
//! 9. Landlock rules that allow nothing, for what a hole in the above would leave;
//! 10. not dumpable: no core file, no ptrace by the same user.
//!
//! `PR_SET_PDEATHSIG` is not among them: it fires when the parent *thread* ends, and the parent
//! spawns from a short-lived one, whose new PID namespace stays with it. The control socket's
//! end is what tells the VMM that its parent is gone.
//!
//! Sources: namespaces(7), user_namespaces(7), capabilities(7), pivot_root(2),
//! `Documentation/userspace-api/landlock.rst`.

mod namespaces;
mod privileges;
mod root;

use std::{io, os::fd::RawFd};

pub use privileges::NOBODY;

/// What the jailed process keeps.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// The control socket; stays open besides standard input, output and error.
    pub api_fd: RawFd,
    /// The microVM's own user and group. Without it a root process becomes [`NOBODY`], and any
    /// other process stays who it is.
    pub identity: Option<(u32, u32)>,
}

/// A step without which the process must not go on.
#[derive(Debug, thiserror::Error)]
#[error("jail: {step}: {source}; {advice}")]
pub struct JailError {
    /// What failed.
    pub step: &'static str,
    /// What to do about it.
    pub advice: &'static str,
    /// Why it failed.
    pub source: io::Error,
}

/// A step that this host forbids and that others stand in for; for people.
pub type Warning = String;

fn failed<E: Into<io::Error>>(
    step: &'static str,
    advice: &'static str,
) -> impl FnOnce(E) -> JailError {
    move |source| JailError {
        step,
        advice,
        source: source.into(),
    }
}

/// Jails the process. Call it before anything else, with one thread.
///
/// # Errors
/// [`JailError`]: the process is then partly jailed and must end.
pub fn enter(config: &Config) -> Result<Vec<Warning>, JailError> {
    let mut warnings = Vec::new();
    close_all_but(config.api_fd).map_err(failed("closing inherited descriptors", KERNEL))?;
    privileges::expect_one_thread()?;
    let proc = namespaces::open_proc()?;
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = config.identity.unwrap_or((NOBODY, NOBODY));
        privileges::limit_resources(config.identity.is_some())?;
        namespaces::leave_shared()?;
        root::become_empty()?;
        privileges::become_user(uid, gid)?;
        if let Err(error) = namespaces::enter_user_namespace(&proc) {
            warnings.push(format!("no user namespace of its own: {error}"));
        }
    } else {
        privileges::expect_identity(config.identity)?;
        privileges::limit_resources(false)?;
        match namespaces::enter_user_namespace(&proc) {
            Ok(()) => {
                namespaces::leave_shared()?;
                root::become_empty()?;
            }
            Err(error) => warnings.push(format!(
                "neither root nor a user namespace: the host's files and network stay in sight of \
                 this process, Landlock and seccomp alone hold it ({error})"
            )),
        }
    }
    drop(proc);
    privileges::drop_capabilities()?;
    if let Some(warning) = privileges::allow_no_paths() {
        warnings.push(warning);
    }
    privileges::forbid_dumps()?;
    Ok(warnings)
}

const KERNEL: &str = "use a Linux kernel of 5.10 or newer";

fn close_all_but(keep: RawFd) -> io::Result<()> {
    // The caller gave a descriptor above standard error, so neither range is odd.
    let keep = libc::c_uint::try_from(keep).map_err(|_| io::ErrorKind::InvalidInput)?;
    if keep < 3 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (first, last) in [(3, keep - 1), (keep + 1, libc::c_uint::MAX)] {
        // SAFETY: the process has opened nothing by itself yet, so no owner of these exists.
        if first <= last && unsafe { libc::close_range(first, last, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
