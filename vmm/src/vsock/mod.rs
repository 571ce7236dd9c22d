//! virtio-vsock (virtio 1.2, 5.10) over unix sockets: no vhost-vsock, no CIDs on the host.
//!
//! Host programs connect to a listening unix socket and say which port of the guest they want; connections that the
//! guest opens go to the parent as one end of a socket pair. Payload goes straight between guest memory and sockets;
//! only what a slow host program does not take at once is copied, into a buffer of its connection that bounds the
//! guest's credit. [`muxer`] knows all connections, [`connection`] is the life of one, [`worker`] serves the queues.
//!
//! Connections survive a pause, not a snapshot: a restored guest is told by `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
//!
//! # System calls of the device's thread
//! Made at construction, before the thread: `getsockopt`, `ioctl` (`FIONBIO`), `epoll_create1`. Afterwards the thread
//! calls `epoll_ctl`, `epoll_pwait`, `write` (interrupt), `accept4`, `recvfrom` (first line), `recvmsg`, `sendmsg`,
//! `shutdown`, `socketpair` (`AF_UNIX`), `close`, `clock_gettime` (mostly vDSO), and the allocator's
//! `mmap`, `munmap`, `mprotect`, `brk`, `madvise`, `futex`. A reset closes connections (`close`) in
//! the thread that asks for it. It needs a descriptor per connection, at most 1,024, and one more
//! for a moment.

mod buffer;
mod connection;
mod muxer;
mod packet;
mod socket;
#[cfg(test)]
mod tests;
mod worker;

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

pub use self::{muxer::MAX_CONNECTIONS, socket::SocketError};
use self::{
    muxer::Muxer,
    worker::{Announcement, Worker},
};
use crate::virtio::{Active, ConfigSpace, Device, DeviceError, DeviceState};

const DEVICE_ID: u32 = 19;
/// Receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1;
const STATE_VERSION: u16 = 1;
/// CIDs below are reserved (5.10.4).
const FIRST_GUEST_CID: u32 = 3;

/// Why a vsock device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// A reserved CID.
    #[error("vsock CID {0} is reserved: 3 to 4294967294 are possible")]
    Cid(u32),
    /// A descriptor is not what it should be.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// epoll_create1(2) failed.
    #[error("epoll_create1 for the vsock device: {0}")]
    Epoll(rustix::io::Errno),
}

/// A virtio-vsock device.
pub struct Vsock {
    cid: u32,
    muxer: Muxer,
    announcement: Announcement,
}

impl Vsock {
    /// A device of a guest with this CID. `listener` is a listening unix stream, `acceptor` a connected unix
    /// `SOCK_SEQPACKET`, as `DeviceConfig::Vsock` says. `patience` is how long the other side of a connection may take
    /// for its next step when one is due: the first line of a host program, the guest's answers to REQUEST and to
    /// SHUTDOWN (5 s, times the time-out scale).
    ///
    /// # Errors
    /// [`VsockError`].
    pub fn new(
        cid: u32,
        listener: OwnedFd,
        acceptor: Option<OwnedFd>,
        patience: Duration,
    ) -> Result<Self, VsockError> {
        if !(FIRST_GUEST_CID..u32::MAX).contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        socket::check_listener(&listener)?;
        if let Some(acceptor) = &acceptor {
            socket::check_acceptor(acceptor)?;
        }
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)
            .map_err(VsockError::Epoll)?;
        let muxer = Muxer::new(cid, listener, acceptor, epoll, patience);
        Ok(Self {
            cid,
            muxer,
            announcement: Announcement::None,
        })
    }
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn name(&self) -> &'static str {
        "vsock"
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_vsock_config`: the guest's CID.
    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(u64::from(self.cid).to_le_bytes().to_vec())
    }

    fn run(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        Worker::new(&mut self.muxer, &mut self.announcement, active)?.run()
    }

    fn reset(&mut self) {
        self.muxer.clear();
        self.announcement = Announcement::None;
    }

    /// Connections are not saved: nothing is left to say.
    fn save(&self) -> Result<DeviceState, DeviceError> {
        Ok(DeviceState {
            version: STATE_VERSION,
            data: serde_json::Value::Null,
        })
    }

    /// The guest will be told that its connections are gone; it then reads its CID anew, so that may differ.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        if state.version != STATE_VERSION || !state.data.is_null() {
            let found = state.version;
            return Err(DeviceError::State(format!(
                "vsock: version {found} with data {} is not {STATE_VERSION} without any",
                state.data
            )));
        }
        self.announcement = Announcement::Due;
        Ok(())
    }
}
