//! The process that keeps a pod's PID namespace: `caisson-agent pod-init`.
//!
//! Kubernetes' `shareProcessNamespace` wants a namespace that outlives each of the pod's
//! containers. Where a container holds the pod ("pause"), that one's is it; where none does
//! (containerd's sandbox API), this process is the namespace's PID 1. Containers see it, so it has
//! nothing that they could want: an empty root, no capability, no descriptor.

use std::{
    os::fd::AsFd,
    process::{Command, ExitCode, Stdio},
};

use rustix::{
    fs::{Gid, Uid},
    mount::{MountPropagationFlags, MoveMountFlags, UnmountFlags},
    process::DumpableBehavior,
    thread::{CapabilitySet, CapabilitySets, UnshareFlags},
};

use super::mounts::new_mount;
use crate::failure::{During, Failure, Result};

/// First argument of the program when it is this process.
pub const VERB: &str = "pod-init";

/// Nobody in particular; no program of a guest's image runs as it.
const NOBODY: u32 = 65534;

/// Starts the process and gives its PID in the guest.
///
/// # Errors
/// What kept it from being set up.
pub fn start() -> Result<u32> {
    // The agent's one thread is here, so that nobody else reaps the first step.
    let output = Command::new("/proc/self/exe")
        .arg(VERB)
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .during(|| "start the process that holds the pod's PID namespace".to_owned())?;
    let answer = String::from_utf8_lossy(&output.stdout);
    answer.trim().parse().map_err(|_| {
        Failure::internal(format!(
            "the process that holds the pod's PID namespace was not set up: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    })
}

/// Runs the process: a first step that prints the PID of the second, which stays.
pub fn main() -> ExitCode {
    if let Err(failure) = prepare() {
        eprintln!("{failure}");
        return ExitCode::FAILURE;
    }
    // SAFETY: the process is single-threaded, so the child may go on as if nothing had happened.
    match unsafe { libc::fork() } {
        -1 => {
            eprintln!("cannot fork: {}", std::io::Error::last_os_error());
            ExitCode::FAILURE
        }
        0 => reap_for_ever(),
        child => {
            println!("{child}");
            ExitCode::SUCCESS
        }
    }
}

/// Makes the namespaces, and leaves all that the agent's process has.
fn prepare() -> Result<()> {
    let flags = UnshareFlags::NEWPID | UnshareFlags::NEWNS;
    // SAFETY: the process is single-threaded and shares no descriptor table; FILES is not asked for.
    unsafe { rustix::thread::unshare_unsafe(flags) }.during(|| "make namespaces".to_owned())?;
    enter_empty_root()?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .during(|| "close the process to others".to_owned())?;
    rustix::thread::set_no_new_privs(true).during(|| "give up new privileges".to_owned())?;
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    rustix::thread::set_thread_groups(&[])
        .and_then(|()| rustix::thread::set_thread_res_gid(group, group, group))
        .and_then(|()| rustix::thread::set_thread_res_uid(user, user, user))
        .during(|| "become nobody".to_owned())?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    rustix::thread::set_capabilities(None, sets).during(|| "give up capabilities".to_owned())
}

fn enter_empty_root() -> Result<()> {
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .during(|| "make the mounts private".to_owned())?;
    let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC;
    let mount = new_mount("tmpfs", Some("caisson"), &[], &[], attributes)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(mount.as_fd(), "", rustix::fs::CWD, "/mnt", flags)
        .and_then(|()| rustix::process::fchdir(mount.as_fd()))
        .and_then(|()| rustix::process::pivot_root(".", "."))
        // The old root now lies over the new one.
        .and_then(|()| rustix::mount::unmount(".", UnmountFlags::DETACH))
        .and_then(|()| rustix::process::chdir("/"))
        .during(|| "enter the empty root".to_owned())
}

/// As a namespace's PID 1 it gets no signal of its members, and every orphan of theirs.
fn reap_for_ever() -> ExitCode {
    // SAFETY: ignoring a signal runs no code of ours; the kernel then reaps children by itself
    // (sigaction(2), SA_NOCLDWAIT).
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    for fd in 0..3 {
        // SAFETY: nothing of this process uses its standard streams any more.
        unsafe { libc::close(fd) };
    }
    loop {
        // SAFETY: it takes no arguments and touches no memory.
        unsafe { libc::pause() };
    }
}
