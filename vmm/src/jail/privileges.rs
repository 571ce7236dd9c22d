//! Users, capabilities, limits and Landlock.

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus,
    Scope,
};
use rustix::{
    io::Errno,
    process::{DumpableBehavior, Resource, Rlimit},
    thread::{CapabilitySet, CapabilitySets, Gid, Uid},
};

use super::{JailError, KERNEL, Warning, failed};

/// The overflow user and group of Linux (`/proc/sys/kernel/overflowuid`).
pub const NOBODY: u32 = 65534;

/// Open files: 250 in one control packet, 1024 vsock connections, and what devices hold.
const OPEN_FILES: u64 = 2048;
/// Threads, those of io_uring included: 64 vCPUs, 32 devices, and room.
const THREADS: u64 = 512;
/// Locked memory, bytes: rings of io_uring count on kernels before 5.12.
const LOCKED: u64 = 8 << 20;
/// Highest capability number that is tried; the kernel says which there are.
const MAX_CAPABILITY: u32 = 63;
/// Newest Landlock ABI whose rights are known here.
const LANDLOCK_ABI: ABI = ABI::V6;

/// unshare(2) of a user namespace and credentials per thread both want a single thread.
pub fn expect_one_thread() -> Result<(), JailError> {
    let count = std::fs::read_dir("/proc/self/task")
        .map_err(failed("reading /proc/self/task", "mount proc at /proc"))?
        .count();
    if count == 1 {
        return Ok(());
    }
    Err(failed("entering", "enter before any thread is started")(
        io::Error::other(format!("the process has {count} threads")),
    ))
}

/// Lowers limits. `own_user`: nobody else's processes count for the limit of threads.
pub fn limit_resources(own_user: bool) -> Result<(), JailError> {
    limit(Resource::Core, 0)?;
    limit(Resource::Nofile, OPEN_FILES)?;
    limit(Resource::Memlock, LOCKED)?;
    if own_user {
        limit(Resource::Nproc, THREADS)?;
    }
    Ok(())
}

fn limit(resource: Resource, most: u64) -> Result<(), JailError> {
    // A hard limit that is lower already stays: raising it takes CAP_SYS_RESOURCE.
    let hard = rustix::process::getrlimit(resource).maximum;
    let limit = hard.map_or(most, |hard| hard.min(most));
    let both = Rlimit {
        current: Some(limit),
        maximum: Some(limit),
    };
    rustix::process::setrlimit(resource, both).map_err(failed("resource limits", KERNEL))
}

/// A process that is not root cannot become someone else.
pub fn expect_identity(identity: Option<(u32, u32)>) -> Result<(), JailError> {
    let own = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    match identity {
        Some(wanted) if wanted != own => Err(
            failed("the microVM's user", "start the VMM as root")(io::Error::other(format!(
                "user {} cannot become user {} with group {}",
                own.0, wanted.0, wanted.1
            ))),
        ),
        _ => Ok(()),
    }
}

/// Turns root into the user for good.
pub fn become_user(uid: u32, gid: u32) -> Result<(), JailError> {
    const ADVICE: &str = "the parent needs CAP_SETUID, CAP_SETGID and CAP_SETPCAP";
    if uid == 0 || gid == 0 {
        return Err(failed(
            "the microVM's user",
            "give each microVM a user and group of its own",
        )(io::Error::other("user or group 0 is root")));
    }
    empty_bounding_set().map_err(failed("an empty bounding set", ADVICE))?;
    rustix::thread::set_thread_groups(&[]).map_err(failed("setgroups", ADVICE))?;
    // The process has one thread, so the thread's credentials are the process'.
    let gid = Gid::from_raw(gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed("setresgid", ADVICE))?;
    let uid = Uid::from_raw(uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed("setresuid", ADVICE))
}

fn empty_bounding_set() -> rustix::io::Result<()> {
    for number in 0..=MAX_CAPABILITY {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The first number that the kernel does not know.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Empties all capability sets and sees to it that no program can fill them.
pub fn drop_capabilities() -> Result<(), JailError> {
    // A new user namespace fills the bounding set again; whoever has neither a namespace nor
    // root cannot change it, but has nothing to bound either.
    match empty_bounding_set() {
        Ok(()) | Err(Errno::PERM) => {}
        Err(error) => return Err(failed("an empty bounding set", KERNEL)(error)),
    }
    rustix::thread::clear_ambient_capability_set().map_err(failed("ambient set", KERNEL))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(failed("capset", KERNEL))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("no_new_privs", KERNEL))
}

/// Landlock rules without any path, port or foreign process, as far as the kernel knows them.
/// Descriptors that are open already, or that the parent sends, are not concerned.
pub fn allow_no_paths() -> Option<Warning> {
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK_ABI))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(LANDLOCK_ABI)))
        .and_then(|rules| rules.scope(Scope::from_all(LANDLOCK_ABI)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self);
    match restricted {
        Ok(status) if status.ruleset == RulesetStatus::NotEnforced => {
            Some("this kernel has no Landlock".to_owned())
        }
        Ok(_) => None,
        Err(error) => Some(format!("Landlock: {error}")),
    }
}

/// No core file of guest memory, and no ptrace(2) by processes of the same user.
pub fn forbid_dumps() -> Result<(), JailError> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("dumpable", KERNEL))
}
