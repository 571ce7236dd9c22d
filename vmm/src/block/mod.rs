//! virtio-blk (virtio 1.2, 5.2) over raw files: one queue, no copies, io_uring.
//!
//! A request's descriptors become an iovec list that points straight into guest memory; the kernel fills or drains it.
//! Read-only is enforced here, whatever the guest's mount says. What a disk consists of is in [`disk`], made-up
//! partition tables in [`partitions`], the driver's requests in [`request`], how they reach the file in [`engine`].
//!
//! # System calls of the device's thread
//! Made at construction, before the thread: `io_uring_setup`, `io_uring_register`, `mmap`, `fstat`, `fcntl`, `lseek`,
//! `epoll_create1`, `timerfd_create`. Afterwards the thread calls `epoll_ctl`, `epoll_pwait`, `write` (interrupt),
//! `timerfd_settime`, and, with io_uring, `io_uring_enter`, `sched_yield`; without, `preadv`, `pwritev`, `fdatasync`;
//! either way, `fallocate`, `pwrite64`, `ioctl` (`BLKDISCARD` 0x1277, `BLKZEROOUT` 0x127f) for discards and zeroes;
//! and the allocator's `mmap`, `munmap`, `mprotect`, `brk`, `madvise`, `futex`. Dropping the device calls `munmap` and `close`.

pub mod disk;
mod engine;
mod partitions;
mod request;
mod state;
#[cfg(test)]
mod tests;
mod worker;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use caisson_vmm_api::RateLimit;

pub use self::disk::{Disk, DiskError};
use self::{
    engine::Engine,
    request::{
        ID_BYTES, MAX_DISCARD_SECTORS, MAX_SEGMENT_BYTES, MAX_SEGMENTS, MAX_WRITE_ZEROES_SECTORS,
    },
    worker::Worker,
};
use crate::{
    rate_limit::RateLimiter,
    virtio::{Active, ConfigSpace, Device, DeviceError, DeviceState},
};

const DEVICE_ID: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [128];

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Sectors that a discard should be aligned to: a page, which file systems punch without zeroing edges.
const DISCARD_ALIGNMENT: u32 = 8;

/// Called once with a message when the back end first fails; the guest sees I/O errors.
pub type ReportFailure = Box<dyn Fn(String) + Send>;

/// Why a block device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The serial does not fit `VIRTIO_BLK_T_GET_ID`.
    #[error("block serial {0:?}: up to 20 of 0-9, A-Z, a-z, '.', '_', '-' are allowed")]
    Serial(String),
    /// The files make no disk.
    #[error("block device {serial:?}: {error}")]
    Disk {
        /// The device.
        serial: String,
        /// Why.
        error: DiskError,
    },
    /// A system call failed.
    #[error("{call} for block device {serial:?}: {error}")]
    Io {
        /// The device.
        serial: String,
        /// Which call.
        call: &'static str,
        /// What it said.
        error: rustix::io::Errno,
    },
}

/// What a disk consists of, as `BlockContents` with the descriptors in place.
#[derive(Debug)]
pub enum Contents {
    /// One raw file or block device.
    File(OwnedFd),
    /// Read-only files as partitions.
    Partitions(Vec<OwnedFd>),
}

/// A virtio-blk device.
pub struct Block {
    serial: String,
    read_only: bool,
    disk: Disk,
    engine: Engine,
    limiter: Option<RateLimiter>,
    epoll: OwnedFd,
    report: ReportFailure,
    reported: bool,
}

impl Block {
    /// A device over `contents`. Everything that takes a descriptor is made here.
    ///
    /// # Errors
    /// [`BlockError`]: the configuration makes no disk, or the kernel refused.
    pub fn new(
        serial: String,
        contents: Contents,
        read_only: bool,
        rate_limit: Option<&RateLimit>,
        report: ReportFailure,
    ) -> Result<Self, BlockError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if serial.len() > ID_BYTES || !serial.bytes().all(allowed) {
            return Err(BlockError::Serial(serial));
        }
        let disk = match contents {
            Contents::File(file) => Disk::from_file(file, read_only),
            Contents::Partitions(_) if !read_only => Err(DiskError::WritablePartitions),
            Contents::Partitions(files) => Disk::from_partitions(files, &serial),
        };
        let disk = match disk {
            Ok(disk) => disk,
            Err(error) => return Err(BlockError::Disk { serial, error }),
        };
        let io = |call| {
            let serial = serial.clone();
            move |error| BlockError::Io {
                serial,
                call,
                error,
            }
        };
        let limiter = match rate_limit {
            Some(limit) => RateLimiter::new(limit).map_err(io("timerfd_create"))?,
            None => None,
        };
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)
            .map_err(io("epoll_create1"))?;
        Ok(Self {
            serial,
            read_only,
            disk,
            engine: Engine::new(),
            limiter,
            epoll,
            report,
            reported: false,
        })
    }

    /// Serves the disk by plain system calls even where io_uring is there.
    #[cfg(test)]
    fn without_uring(mut self) -> Self {
        self.engine = Engine::blocking();
        self
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn name(&self) -> &'static str {
        "block"
    }

    fn features(&self) -> u64 {
        let common = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE;
        if self.read_only {
            common | F_RO
        } else {
            common | F_FLUSH | F_DISCARD | F_WRITE_ZEROES
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_blk_config`; fields of features not offered are 0.
    fn config(&self) -> Arc<dyn ConfigSpace> {
        let mut config = vec![0u8; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.sectors().to_le_bytes());
        put(8, &MAX_SEGMENT_BYTES.to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &512u32.to_le_bytes());
        if !self.read_only {
            // Without F_CONFIG_WCE the field is not read; the cache is write-back, so flushes count.
            put(32, &[1]);
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &1u32.to_le_bytes());
            put(44, &DISCARD_ALIGNMENT.to_le_bytes());
            put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
            put(52, &1u32.to_le_bytes());
            put(56, &[1]);
        }
        Arc::new(config)
    }

    fn run(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        Worker::new(self, active)?.run()
    }

    fn reset(&mut self) {
        self.reported = false;
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        state::save(self)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        state::check(self, state)
    }
}
