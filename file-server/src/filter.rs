//! The server's seccomp filter: what virtiofsd and the vhost-user daemon call
//! while they serve, and nothing that makes sockets, processes, mounts,
//! namespaces or executable memory.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

/// Why the filter could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("building the filter: {0}")]
    Build(#[from] seccompiler::BackendError),
    #[error("installing the filter: {0}")]
    Install(#[from] seccompiler::Error),
    #[error("no filter for the architecture {0}")]
    Architecture(&'static str),
}

/// Calls allowed with any arguments.
const ALLOWED: &[libc::c_long] = &[
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads, clocks, signals, ends.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_membarrier,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_getrandom,
    // The vhost-user connection (accept4, messages with descriptors) and its events.
    libc::SYS_accept4,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    // Credentials for requests of the guest's users.
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_umask,
    // Files.
    libc::SYS_close,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Installs the filter on all threads. A forbidden call ends the process with SIGSYS.
pub fn install() -> Result<(), Error> {
    for program in programs()? {
        apply_filter_all_threads(&program)?;
    }
    Ok(())
}

fn programs() -> Result<[BpfProgram; 2], Error> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)
        .map_err(|_| Error::Architecture(std::env::consts::ARCH))?;
    // clone3 hides its flags in memory. ENOSYS makes the C library use clone, whose flags can be
    // seen. The stricter filter wins, so the main one lets clone3 through.
    let no_clone3 = SeccompFilter::new(
        [(libc::SYS_clone3, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        architecture,
    )?;
    let mut rules: std::collections::BTreeMap<_, _> =
        ALLOWED.iter().map(|number| (*number, Vec::new())).collect();
    rules.insert(libc::SYS_clone3, Vec::new());
    rules.insert(libc::SYS_clone, vec![thread_only()?]);
    rules.insert(libc::SYS_mmap, vec![not_executable()?]);
    rules.insert(libc::SYS_mprotect, vec![not_executable()?]);
    rules.insert(
        libc::SYS_prctl,
        vec![
            equal(0, libc::PR_SET_NAME as u64)?,
            // libcap-ng reads all sets before it changes the effective one.
            equal(0, libc::PR_CAPBSET_READ as u64)?,
            ambient_read()?,
        ],
    );
    // Non-blocking mode of sockets.
    rules.insert(libc::SYS_ioctl, vec![equal(1, libc::FIONBIO)?]);
    let main = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        architecture,
    )?;
    // The main one last: it forbids installing filters.
    Ok([no_clone3.try_into()?, main.try_into()?])
}

fn thread_only() -> Result<SeccompRule, Error> {
    let flags = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND) as u64;
    rule(0, SeccompCmpOp::MaskedEq(flags), flags)
}

fn not_executable() -> Result<SeccompRule, Error> {
    rule(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0)
}

fn equal(argument: u8, value: u64) -> Result<SeccompRule, Error> {
    rule(argument, SeccompCmpOp::Eq, value)
}

fn ambient_read() -> Result<SeccompRule, Error> {
    let conditions = vec![
        condition(0, SeccompCmpOp::Eq, libc::PR_CAP_AMBIENT as u64)?,
        condition(1, SeccompCmpOp::Eq, libc::PR_CAP_AMBIENT_IS_SET as u64)?,
    ];
    Ok(SeccompRule::new(conditions)?)
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(vec![condition(
        argument, operator, value,
    )?])?)
}

fn condition(
    argument: u8,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Qword, operator, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_compiles() {
        let [no_clone3, main] = programs().unwrap();
        assert!(main.len() > ALLOWED.len());
        assert!(!no_clone3.is_empty());
    }
}
