//! Which system calls each kind of thread makes.

use libc::c_long;

use super::ThreadKind;

/// Calls that another filter answers by ENOSYS.
pub const UNKNOWN: &[c_long] = &[libc::SYS_clone3, libc::SYS_openat];

/// What every thread does: memory, waiting, its own start and end, a last word on standard
/// error, and the eventfds of queues. mmap, mprotect and fcntl come with conditions besides.
pub const EVERYWHERE: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_getrandom,
    // Answered by ENOSYS, see UNKNOWN: malloc opens a file when it gives memory back.
    libc::SYS_openat,
    // Start and end of a thread, and abort(3).
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
];

/// Options of prctl(2) for the API thread: names of threads, and what comes before a filter.
pub const PRCTL: &[u32] = &[
    libc::PR_SET_NAME.unsigned_abs(),
    libc::PR_SET_NO_NEW_PRIVS.unsigned_abs(),
];

const EPOLL: [c_long; 4] = [
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
];

/// A reset by the guest runs in the vCPU's thread: vsock closes its connections (epoll_ctl,
/// shutdown), fs tells its server (sendmsg, recvmsg).
const VCPU: &[c_long] = &[
    libc::SYS_epoll_ctl,
    libc::SYS_shutdown,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
];

const BLOCK: &[c_long] = &[
    EPOLL[0],
    EPOLL[1],
    EPOLL[2],
    EPOLL[3],
    libc::SYS_timerfd_settime,
    libc::SYS_io_uring_enter,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
];

const VSOCK: &[c_long] = &[
    EPOLL[0],
    EPOLL[1],
    EPOLL[2],
    EPOLL[3],
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

const NET: &[c_long] = &[libc::SYS_timerfd_settime, libc::SYS_readv];

/// An eventfd for each queue goes to the file server when the driver starts the device.
const FS: &[c_long] = &[
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
];

/// Pages of shared memory are given back by punching holes into their memfd.
const BALLOON: &[c_long] = &[libc::SYS_fallocate];

const MEM: &[c_long] = &[libc::SYS_fallocate];

const PMEM: &[c_long] = &[libc::SYS_fdatasync, libc::SYS_fsync, libc::SYS_msync];

const CONSOLE: &[c_long] = &[];

const RNG: &[c_long] = &[];

/// The union of the lists above (every thread inherits this one), what building takes (memory,
/// eventfds, rings, timers, vhost-user) and what saving and restoring take.
const API: &[c_long] = &[
    EPOLL[0],
    EPOLL[1],
    EPOLL[2],
    EPOLL[3],
    libc::SYS_accept4,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_io_uring_enter,
    libc::SYS_msync,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_timerfd_settime,
    // Answered by ENOSYS, see UNKNOWN.
    libc::SYS_clone3,
    // Descriptors of its own.
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_memfd_create,
    libc::SYS_timerfd_create,
    // Descriptors that it was given: what they are, their contents, their sizes.
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_getsockopt,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_setsockopt,
    libc::SYS_statx,
    libc::SYS_copy_file_range,
    // The allocator asks for the size of memory.
    libc::SYS_sysinfo,
];

/// What `kind` does besides [`EVERYWHERE`].
pub fn of(kind: ThreadKind) -> &'static [c_long] {
    match kind {
        ThreadKind::Api => API,
        ThreadKind::Vcpu => VCPU,
        ThreadKind::Block => BLOCK,
        ThreadKind::Vsock => VSOCK,
        ThreadKind::Net => NET,
        ThreadKind::Fs => FS,
        ThreadKind::Balloon => BALLOON,
        ThreadKind::Mem => MEM,
        ThreadKind::Pmem => PMEM,
        ThreadKind::Console => CONSOLE,
        ThreadKind::Rng => RNG,
    }
}

/// Commands of fcntl(2). Copies of eventfds are made when the driver starts a device; a debug
/// build asks F_GETFD before it closes anything.
const FCNTL: &[u32] = &[
    libc::F_DUPFD_CLOEXEC.unsigned_abs(),
    libc::F_GETFD.unsigned_abs(),
    libc::F_GETFL.unsigned_abs(),
];

const FCNTL_API: &[u32] = &[
    FCNTL[0],
    FCNTL[1],
    FCNTL[2],
    libc::F_SETFD.unsigned_abs(),
    libc::F_SETFL.unsigned_abs(),
    libc::F_ADD_SEALS.unsigned_abs(),
    libc::F_GET_SEALS.unsigned_abs(),
];

/// Commands of fcntl(2) for `kind`.
pub fn fcntl_of(kind: ThreadKind) -> &'static [u32] {
    match kind {
        ThreadKind::Api => FCNTL_API,
        _ => FCNTL,
    }
}
