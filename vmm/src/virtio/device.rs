//! What a device is to its transport.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::{Arc, atomic::AtomicU64},
};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, ChainError, Interrupt, QueueError};
use crate::memory::GuestMemory;

/// A virtio device.
///
/// Ownership is the state machine: the transport owns a device while no driver
/// runs it; at `DRIVER_OK` the device moves into a thread of its own, which
/// calls [`Device::run`]; reset, pause and detach stop that thread and take the
/// device back. So no method needs a lock.
pub trait Device: Send {
    /// Device type, virtio 1.2 section 5.
    fn id(&self) -> u32;

    /// `type` of the device's `DeviceConfig` ("block", "net", …); also names its thread.
    fn name(&self) -> &'static str;

    /// Feature bits offered besides `VERSION_1`, `RING_EVENT_IDX` and
    /// `RING_INDIRECT_DESC`, which the transport adds.
    fn features(&self) -> u64;

    /// Largest size of each queue, a power of two of at most 32768 each.
    fn queue_sizes(&self) -> &[u16];

    /// The configuration space, which vCPU threads read and write while the device runs.
    fn config(&self) -> Arc<dyn ConfigSpace>;

    /// Works until `active.stop` is readable, then returns with nothing in flight.
    ///
    /// It may be called again with the same `active` (after a pause), and with a new one
    /// (after [`Device::reset`]). It must look at all queues once before it first waits: kicks
    /// from before a pause or restore are not repeated.
    ///
    /// # Errors
    /// [`DeviceError`]: the transport then sets `DEVICE_NEEDS_RESET` and tells the parent; the
    /// microVM goes on.
    fn run(&mut self, active: &mut Active) -> Result<(), DeviceError>;

    /// Forgets what the driver did, as after power-on. Called while not running.
    fn reset(&mut self);

    /// State beyond the transport's and the queues', which are saved by the transport. Called
    /// while not running.
    ///
    /// # Errors
    /// [`DeviceError`] when the state cannot be had.
    fn save(&self) -> Result<DeviceState, DeviceError>;

    /// Takes over a state written by [`Device::save`]. Called before the first [`Device::run`].
    ///
    /// # Errors
    /// [`DeviceError::State`] when it is of another version or does not fit.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError>;
}

/// A device's configuration space. Offsets are from its start.
pub trait ConfigSpace: Send + Sync {
    /// Fills `data` from `offset` on; bytes beyond the space read as 0.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Stores `data` at `offset`; what is not writable ignores it.
    fn write(&self, _offset: u64, _data: &[u8]) {}

    /// Changes whenever the contents changed other than by the driver's writes (virtio 1.2
    /// section 2.5).
    fn generation(&self) -> u32 {
        0
    }
}

/// The configuration space of a device that has none.
#[derive(Debug, Default)]
pub struct EmptyConfig;

impl ConfigSpace for EmptyConfig {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
}

/// An immutable configuration is readable as it stands.
impl ConfigSpace for Vec<u8> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(self.len());
        let tail = &self[start..];
        let count = tail.len().min(data.len());
        data[..count].copy_from_slice(&tail[..count]);
    }
}

/// What a running device works with.
pub struct Active {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Features the driver accepted.
    pub features: u64,
    /// The queues in order; `None` where the driver did not enable one.
    pub queues: Vec<Option<ActiveQueue>>,
    /// To the driver.
    pub interrupt: Interrupt,
    /// Readable when [`Device::run`] must return. Do not read it: the transport resets it.
    pub stop: EventFd,
    /// Requests completed; [`ActiveQueue::complete`] counts. Devices whose queues are served
    /// elsewhere may add to it.
    pub completed: Arc<AtomicU64>,
}

impl Active {
    /// Queue `index`.
    ///
    /// # Errors
    /// [`DeviceError::QueueMissing`] when the driver did not enable it.
    pub fn queue(&mut self, index: usize) -> Result<&mut ActiveQueue, DeviceError> {
        self.queues
            .get_mut(index)
            .and_then(Option::as_mut)
            .ok_or(DeviceError::QueueMissing(index))
    }

    /// Waits until the driver has kicked one of `queues` (true; the kicks are taken) or the
    /// device has to stop (false). For devices that wait for nothing else.
    ///
    /// # Errors
    /// [`DeviceError::QueueMissing`], [`DeviceError::Io`].
    pub fn wait(&mut self, queues: &[usize]) -> Result<bool, DeviceError> {
        self.wait_or(queues, None)
    }

    /// As [`Active::wait`], also until `event` is written to, which is then taken as well.
    ///
    /// # Errors
    /// As [`Active::wait`].
    pub fn wait_or(
        &mut self,
        queues: &[usize],
        event: Option<&EventFd>,
    ) -> Result<bool, DeviceError> {
        let mut fds = Vec::with_capacity(queues.len() + 2);
        fds.push(libc::pollfd {
            fd: self.stop.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        });
        for &index in queues {
            fds.push(libc::pollfd {
                fd: self.queue(index)?.kick().as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            });
        }
        if let Some(event) = event {
            fds.push(libc::pollfd {
                fd: event.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            });
        }
        loop {
            // SAFETY: `fds` is an array of as many entries as said.
            let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
            if ready >= 0 {
                break;
            }
            let error = std::io::Error::last_os_error();
            if error.kind() != std::io::ErrorKind::Interrupted {
                return Err(DeviceError::io("poll")(error));
            }
        }
        if fds[0].revents != 0 {
            return Ok(false);
        }
        for (&index, fd) in queues.iter().zip(&fds[1..]) {
            if fd.revents != 0 {
                // Someone else cannot have read it, but an error would be harmless.
                let _ = self.queue(index)?.kick().read();
            }
        }
        if let Some(event) = event
            && fds.last().is_some_and(|fd| fd.revents != 0)
        {
            let _ = event.read();
        }
        Ok(true)
    }
}

/// An event as a descriptor that can be polled.
pub fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns its descriptor and is borrowed as long as the result.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// A device's saved state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Version of `data`, chosen by the device.
    pub version: u16,
    /// As the device wrote it.
    pub data: serde_json::Value,
}

impl DeviceState {
    /// Fails unless the state is of version `known`.
    ///
    /// # Errors
    /// [`DeviceError::State`].
    pub fn expect_version(&self, known: u16) -> Result<(), DeviceError> {
        if self.version == known {
            return Ok(());
        }
        Err(DeviceError::State(format!(
            "version {} is not the {known} this VMM knows",
            self.version
        )))
    }
}

/// Why a device stopped.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke a queue.
    #[error("broken queue: {0}")]
    Queue(#[from] QueueError),
    /// The driver built a request that is shorter than its kind requires.
    #[error("broken request: {0}")]
    Chain(#[from] ChainError),
    /// The driver set DRIVER_OK without a queue that the device needs.
    #[error("queue {0} is not enabled")]
    QueueMissing(usize),
    /// The device's back end failed.
    #[error("{0}")]
    Backend(String),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Saved state does not fit.
    #[error("saved state: {0}")]
    State(String),
}

impl DeviceError {
    /// For `map_err`: [`DeviceError::Io`] naming what was tried.
    pub fn io<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            what,
            source: source.into(),
        }
    }
}
