//! System call filters, one per kind of thread (seccomp(2)).
//!
//! [`start`] puts the [`ThreadKind::Api`] filter on the first thread before it reads a byte from
//! outside. Every later thread inherits that one and adds its own by [`enter`]. Stacked filters
//! intersect, so the API thread's list is the union of all lists, and what only building a
//! microVM takes besides; a thread's own list is what it does while the guest runs.
//!
//! A call that is on no list ends the process by the signal SIGSYS, which its parent sees; with
//! [`Mode::Log`] the kernel only logs it (`type=SECCOMP` in the audit log or dmesg).
//!
//! No list has socket(2), execve(2), ptrace(2), a call that makes processes, mounts or
//! namespaces, or executable memory. Two calls answer ENOSYS instead of ending the process,
//! because the C library makes them by itself and does without: clone3(2), which hides its flags
//! in memory where a filter cannot see them (clone(2) follows, which may make threads only), and
//! openat(2), by which malloc's trimming looks at /proc/sys/vm/overcommit_memory.

mod calls;
mod ioctls;

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU8, Ordering},
};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// The first thread: serves the control API, builds, saves and restores.
    Api,
    /// Runs a virtual processor.
    Vcpu,
    /// virtio-blk.
    Block,
    /// virtio-vsock.
    Vsock,
    /// virtio-net.
    Net,
    /// vhost-user-fs.
    Fs,
    /// virtio-balloon.
    Balloon,
    /// virtio-mem.
    Mem,
    /// virtio-pmem.
    Pmem,
    /// virtio-console.
    Console,
    /// virtio-rng.
    Rng,
}

impl ThreadKind {
    /// Every kind.
    pub const ALL: [Self; 11] = [
        Self::Api,
        Self::Vcpu,
        Self::Block,
        Self::Vsock,
        Self::Net,
        Self::Fs,
        Self::Balloon,
        Self::Mem,
        Self::Pmem,
        Self::Console,
        Self::Rng,
    ];

    /// The kind of a device's thread by [`crate::virtio::Device::name`].
    pub fn of_device(name: &str) -> Option<Self> {
        Some(match name {
            "block" => Self::Block,
            "vsock" => Self::Vsock,
            "net" => Self::Net,
            "fs" => Self::Fs,
            "balloon" => Self::Balloon,
            "mem" => Self::Mem,
            "pmem" => Self::Pmem,
            "console" => Self::Console,
            "rng" => Self::Rng,
            _ => return None,
        })
    }
}

/// What a call does that is on no list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// Ends the process by SIGSYS.
    Enforce = 1,
    /// Is done, and logged by the kernel.
    Log = 2,
}

/// Why a filter is not in place.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The lists make no filter.
    #[error("building the system call filter: {0}")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel refused it.
    #[error(
        "installing the system call filter: {0}; the kernel needs CONFIG_SECCOMP_FILTER, and an \
         outer filter must allow seccomp(2)"
    )]
    Install(#[from] seccompiler::Error),
}

/// 0 until [`start`], then a [`Mode`].
static MODE: AtomicU8 = AtomicU8::new(0);

/// Filters the calling thread as [`ThreadKind::Api`], and every thread that [`enter`]s later.
/// Call it once, with one thread, after [`crate::jail::enter`].
///
/// # Errors
/// [`FilterError`]: the process is not filtered and must end.
pub fn start(mode: Mode) -> Result<(), FilterError> {
    seccompiler::apply_filter(&unknown_calls()?)?;
    seccompiler::apply_filter(&program(ThreadKind::Api, mode)?)?;
    MODE.store(mode as u8, Ordering::Release);
    Ok(())
}

/// Narrows the calling thread to its kind for the rest of its life. Does nothing in a process
/// that has not called [`start`] (tests, and programs that use this crate as a library).
///
/// # Errors
/// [`FilterError`]: the thread must not go on.
pub fn enter(kind: ThreadKind) -> Result<(), FilterError> {
    let mode = match MODE.load(Ordering::Acquire) {
        mode if mode == Mode::Enforce as u8 => Mode::Enforce,
        mode if mode == Mode::Log as u8 => Mode::Log,
        _ => return Ok(()),
    };
    seccompiler::apply_filter(&program(kind, mode)?)?;
    Ok(())
}

/// Narrows a test's thread to the kind of the device of that name, so that the tests of a device
/// end by SIGSYS at a call that is missing on its list.
#[cfg(test)]
pub fn enter_in_test(name: &str) {
    if let Some(kind) = ThreadKind::of_device(name) {
        seccompiler::apply_filter(&program(kind, Mode::Enforce).unwrap()).unwrap();
    }
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn program(kind: ThreadKind, mode: Mode) -> Result<BpfProgram, FilterError> {
    let mismatch = match mode {
        Mode::Enforce => SeccompAction::KillProcess,
        Mode::Log => SeccompAction::Log,
    };
    let filter = SeccompFilter::new(
        rules(kind)?,
        mismatch,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}

/// ENOSYS for [`calls::UNKNOWN`]. A stricter answer wins, so the other filters let them through.
fn unknown_calls() -> Result<BpfProgram, FilterError> {
    let filter = SeccompFilter::new(
        calls::UNKNOWN
            .iter()
            .map(|number| (*number, Vec::new()))
            .collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}

fn rules(kind: ThreadKind) -> Result<Rules, FilterError> {
    let mut rules = Rules::new();
    // A call without conditions is allowed whatever its arguments.
    let lists = calls::EVERYWHERE.iter().chain(calls::of(kind));
    rules.extend(lists.map(|number| (*number, Vec::new())));
    let ioctls = ioctls::of(kind);
    if !ioctls.is_empty() {
        rules.insert(libc::SYS_ioctl, any_of(1, &ioctls)?);
    }
    let not_executable = || masked(2, libc::PROT_EXEC.unsigned_abs(), 0);
    rules.insert(libc::SYS_mmap, vec![not_executable()?]);
    rules.insert(libc::SYS_mprotect, vec![not_executable()?]);
    rules.insert(libc::SYS_fcntl, any_of(1, calls::fcntl_of(kind))?);
    if matches!(kind, ThreadKind::Api | ThreadKind::Vsock) {
        let unix = [libc::AF_UNIX.unsigned_abs()];
        rules.insert(libc::SYS_socketpair, any_of(0, &unix)?);
    }
    if kind == ThreadKind::Api {
        rules.insert(libc::SYS_clone, vec![thread_only()?]);
        rules.insert(libc::SYS_prctl, any_of(0, calls::PRCTL)?);
        // Of itself only: limits of other processes are not its business.
        rules.insert(libc::SYS_prlimit64, any_of(0, &[0])?);
        let filter = [libc::SECCOMP_SET_MODE_FILTER];
        rules.insert(libc::SYS_seccomp, any_of(0, &filter)?);
    }
    Ok(rules)
}

/// One rule per value, of which one has to match. Compared are 32 bits: flags, commands and
/// requests have no more.
fn any_of(argument: u8, values: &[u32]) -> Result<Vec<SeccompRule>, FilterError> {
    values
        .iter()
        .map(|value| masked(argument, u32::MAX, *value))
        .collect()
}

fn masked(argument: u8, mask: u32, value: u32) -> Result<SeccompRule, FilterError> {
    let operator = if mask == u32::MAX {
        SeccompCmpOp::Eq
    } else {
        SeccompCmpOp::MaskedEq(mask.into())
    };
    let condition =
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into())?;
    Ok(SeccompRule::new(vec![condition])?)
}

/// clone(2) with the flags of a thread and without a new namespace.
fn thread_only() -> Result<SeccompRule, FilterError> {
    const THREAD: u64 = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND) as u64;
    const NAMESPACES: u64 = (libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET) as u64;
    let condition = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Qword,
        SeccompCmpOp::MaskedEq(THREAD | NAMESPACES),
        THREAD,
    )?;
    Ok(SeccompRule::new(vec![condition])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_filter_compiles() {
        for kind in ThreadKind::ALL {
            for mode in [Mode::Enforce, Mode::Log] {
                let program = program(kind, mode).unwrap();
                // The kernel's limit (BPF_MAXINSNS) is 4096.
                assert!((50..4096).contains(&program.len()), "{kind:?}");
            }
        }
        assert!(!unknown_calls().unwrap().is_empty());
    }

    #[test]
    fn the_api_threads_filter_allows_what_any_other_does() {
        let api = rules(ThreadKind::Api).unwrap();
        for kind in ThreadKind::ALL {
            for (number, conditions) in rules(kind).unwrap() {
                let wide = api
                    .get(&number)
                    .unwrap_or_else(|| panic!("{kind:?} allows call {number}, Api does not"));
                assert!(
                    wide.is_empty() || !conditions.is_empty(),
                    "{kind:?} allows call {number} with any argument, Api does not"
                );
                for rule in &conditions {
                    assert!(
                        wide.is_empty() || wide.contains(rule),
                        "{kind:?}: a rule of call {number} is not in Api"
                    );
                }
            }
        }
    }

    #[test]
    fn no_list_has_what_leads_out() {
        for kind in ThreadKind::ALL {
            let rules = rules(kind).unwrap();
            for number in [
                libc::SYS_open,
                libc::SYS_openat2,
                libc::SYS_open_by_handle_at,
                libc::SYS_socket,
                libc::SYS_connect,
                libc::SYS_bind,
                libc::SYS_execve,
                libc::SYS_execveat,
                libc::SYS_fork,
                libc::SYS_vfork,
                libc::SYS_ptrace,
                libc::SYS_process_vm_writev,
                libc::SYS_unshare,
                libc::SYS_setns,
                libc::SYS_mount,
                libc::SYS_kill,
                libc::SYS_bpf,
                libc::SYS_userfaultfd,
                libc::SYS_perf_event_open,
                libc::SYS_keyctl,
            ] {
                assert!(!rules.contains_key(&number), "{kind:?} allows {number}");
            }
        }
    }

    #[test]
    fn what_is_answered_by_an_error_does_not_end_the_process() {
        for number in calls::UNKNOWN {
            assert!(rules(ThreadKind::Api).unwrap().contains_key(number));
        }
        for kind in ThreadKind::ALL {
            assert!(rules(kind).unwrap().contains_key(&libc::SYS_openat));
        }
    }

    #[test]
    fn every_device_has_its_kind() {
        for name in [
            "block", "vsock", "net", "fs", "balloon", "mem", "pmem", "console", "rng",
        ] {
            let kind = ThreadKind::of_device(name).unwrap();
            assert_eq!(format!("{kind:?}").to_lowercase(), name);
        }
        assert_eq!(ThreadKind::of_device("floppy"), None);
    }
}
