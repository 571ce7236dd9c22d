//! How operations reach files: io_uring, or plain system calls where the kernel has none or forbids it.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, Probe, opcode, register::Restriction, types};
use rustix::io::Errno;

/// Entries of the submission ring: what one queue has in flight.
const RING_ENTRIES: u32 = 128;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// preadv(2) into the buffers.
    Read,
    /// pwritev(2) from the buffers.
    Write,
    /// fdatasync(2).
    Flush,
    /// fallocate(2) that gives the range's blocks back.
    PunchHole,
    /// fallocate(2) that keeps the blocks and makes them read as zeros.
    ZeroRange,
}

const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// One system call's worth of work on a file.
#[derive(Debug)]
pub struct Operation<'a> {
    /// What to do.
    pub action: Action,
    /// On which file.
    pub file: BorrowedFd<'a>,
    /// From which byte.
    pub offset: u64,
    /// How many bytes (for fallocate).
    pub length: u64,
    /// Buffers (for reads and writes), at most 1,024.
    pub buffers: &'a [libc::iovec],
}

/// Carries operations out and says what came of them.
pub enum Engine {
    /// Asynchronously.
    Uring(Box<IoUring>),
    /// At once; results wait here.
    Blocking(VecDeque<(u64, Result<u32, Errno>)>),
}

impl Engine {
    /// io_uring if this kernel lets us have one that can do all we need. The ring is made here, before seccomp.
    pub fn new() -> Self {
        match uring() {
            Ok(ring) => Self::Uring(Box::new(ring)),
            Err(error) => {
                log::info!("block: no io_uring ({error}): plain system calls serve the disk");
                Self::blocking()
            }
        }
    }

    /// Plain system calls.
    pub fn blocking() -> Self {
        Self::Blocking(VecDeque::with_capacity(RING_ENTRIES as usize))
    }

    /// Readable when results wait. None: results are there as soon as an operation was started.
    pub fn readable(&self) -> Option<BorrowedFd<'_>> {
        match self {
            // SAFETY: the ring owns the descriptor and outlives the borrow of `self`.
            Self::Uring(ring) => Some(unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) }),
            Self::Blocking(_) => None,
        }
    }

    /// Starts an operation, whose result will bear `token`.
    ///
    /// # Errors
    /// io_uring refused to take more; nothing was started.
    ///
    /// # Safety
    /// The buffer list must stay where it is, and the file open, until the result is out. Each buffer must lie in
    /// memory that stays mapped as long and that Rust holds no reference to.
    pub unsafe fn start(&mut self, token: u64, operation: &Operation<'_>) -> std::io::Result<()> {
        match self {
            Self::Uring(ring) => {
                let entry = entry(operation).user_data(token);
                // SAFETY: the caller vouches for buffers and file.
                while unsafe { ring.submission().push(&entry) }.is_err() {
                    submit(ring, 0)?;
                }
            }
            Self::Blocking(results) => {
                // SAFETY: the caller vouches for the buffers.
                let result = unsafe { perform(operation) };
                results.push_back((token, result));
            }
        }
        Ok(())
    }

    /// Lets the kernel see what was started, and waits for a result if `wait` and none is there.
    ///
    /// # Errors
    /// io_uring_enter(2) failed for good.
    pub fn submit(&mut self, wait: bool) -> std::io::Result<()> {
        match self {
            Self::Uring(ring) => {
                let idle = ring.submission().is_empty();
                if idle && (!wait || !ring.completion().is_empty()) {
                    return Ok(());
                }
                submit(ring, usize::from(wait))
            }
            Self::Blocking(_) => Ok(()),
        }
    }

    /// The next result: bytes done, or why not.
    pub fn next_result(&mut self) -> Option<(u64, Result<u32, Errno>)> {
        match self {
            Self::Uring(ring) => {
                let entry = ring.completion().next()?;
                let result = u32::try_from(entry.result())
                    .map_err(|_| Errno::from_raw_os_error(-entry.result()));
                Some((entry.user_data(), result))
            }
            Self::Blocking(results) => results.pop_front(),
        }
    }
}

fn uring() -> std::io::Result<IoUring> {
    // Disabled until it is restricted: operations of a ring pass no system call filter, and the
    // kernel knows more of them than this thread may make (files, sockets).
    let ring = IoUring::builder().setup_r_disabled().build(RING_ENTRIES)?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
    ];
    if !ring.params().is_feature_nodrop() || !needed.iter().all(|code| probe.is_supported(*code)) {
        return Err(std::io::Error::other("the kernel's io_uring is too old"));
    }
    let mut allowed = needed.map(Restriction::sqe_op);
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}

/// io_uring_enter(2), again when interrupted; a full completion ring is no failure: results must be taken out first.
fn submit(ring: &IoUring, wait: usize) -> std::io::Result<()> {
    loop {
        match ring.submit_and_wait(wait) {
            Ok(_) => return Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EBUSY | libc::EAGAIN) => {
                    // Memory is short or results pile up: both pass by themselves once the kernel gets to run.
                    std::thread::yield_now();
                    if wait == 0 {
                        return Ok(());
                    }
                }
                _ => return Err(error),
            },
        }
    }
}

fn entry(operation: &Operation<'_>) -> io_uring::squeue::Entry {
    let fd = types::Fd(operation.file.as_raw_fd());
    let (buffers, count) = (operation.buffers.as_ptr(), operation.buffers.len() as u32);
    let fallocate = |mode| {
        opcode::Fallocate::new(fd, operation.length)
            .offset(operation.offset)
            .mode(mode)
            .build()
    };
    match operation.action {
        Action::Read => opcode::Readv::new(fd, buffers, count)
            .offset(operation.offset)
            .build(),
        Action::Write => opcode::Writev::new(fd, buffers, count)
            .offset(operation.offset)
            .build(),
        Action::Flush => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Action::PunchHole => fallocate(PUNCH_HOLE),
        Action::ZeroRange => fallocate(ZERO_RANGE),
    }
}

/// # Safety
/// Each buffer must lie in mapped memory that Rust holds no reference to.
unsafe fn perform(operation: &Operation<'_>) -> Result<u32, Errno> {
    let fd = operation.file.as_raw_fd();
    let (buffers, count) = (operation.buffers.as_ptr(), operation.buffers.len() as i32);
    // Offsets come from a disk whose length is a file's, so they fit.
    let (offset, length) = (operation.offset as i64, operation.length as i64);
    let done = match operation.action {
        // SAFETY: the caller vouches for the buffers; the list is a slice.
        Action::Read => unsafe { libc::preadv(fd, buffers, count, offset) },
        // SAFETY: as above.
        Action::Write => unsafe { libc::pwritev(fd, buffers, count, offset) },
        // SAFETY: takes no pointers.
        Action::Flush => unsafe { libc::fdatasync(fd) as isize },
        // SAFETY: takes no pointers.
        Action::PunchHole => unsafe { libc::fallocate(fd, PUNCH_HOLE, offset, length) as isize },
        // SAFETY: takes no pointers.
        Action::ZeroRange => unsafe { libc::fallocate(fd, ZERO_RANGE, offset, length) as isize },
    };
    u32::try_from(done).map_err(|_| last_errno())
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// BLKDISCARD (linux/fs.h): `_IO(0x12, 119)`.
const BLKDISCARD: libc::c_ulong = 0x1277;
/// BLKZEROOUT (linux/fs.h): `_IO(0x12, 127)`.
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// Discards, or zeroes, a range of a block device. Waits for it: there is no asynchronous form before Linux 6.12.
pub fn block_device_range(
    file: BorrowedFd<'_>,
    discard: bool,
    offset: u64,
    length: u64,
) -> Result<(), Errno> {
    let request = if discard { BLKDISCARD } else { BLKZEROOUT };
    let range = [offset, length];
    // SAFETY: both requests read two u64 at the pointer and write nothing.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, range.as_ptr()) };
    if result < 0 {
        Err(last_errno())
    } else {
        Ok(())
    }
}

/// Writes zeros, for file systems that cannot do it by fallocate(2).
pub fn write_zeros(file: BorrowedFd<'_>, mut offset: u64, mut length: u64) -> Result<(), Errno> {
    static ZEROS: [u8; 65536] = [0; 65536];
    while length > 0 {
        let count = length.min(ZEROS.len() as u64) as usize;
        match rustix::io::pwrite(file, &ZEROS[..count], offset) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => {
                offset += written as u64;
                length -= written as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_refuses_what_a_disk_does_not_need() {
        let Ok(mut ring) = uring() else {
            println!("no io_uring here: nothing tested");
            return;
        };
        let entry = opcode::Nop::new().build().user_data(7);
        // SAFETY: the operation has no buffers.
        unsafe { ring.submission().push(&entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        let refused = ring.completion().next().unwrap();
        assert_eq!(
            (refused.user_data(), refused.result()),
            (7, -libc::EACCES),
            "an operation that is on no list was done"
        );
    }
}
