//! virtio-fs (virtio 1.2 section 5.11) whose requests a file server in another
//! process answers by vhost-user.
//!
//! This device only introduces the two to each other: the server works on the
//! queues in guest memory and raises the interrupt by itself. When the server
//! goes away this device answers in its place, with I/O errors.
//!
//! Which requests a server that went away had in flight is seen from the used
//! ring alone, so the server must complete each queue's requests in the order
//! they were made available, as caisson-fs does (it serves one at a time).
//!
//! System calls of the thread: poll, write (eventfds), sendmsg,
//! sendto, recvfrom (the server's socket), close, write (log), and the
//! allocator's and futex.

mod orphan;
#[cfg(test)]
mod tests;

mod vhost_user;

use std::{
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use vm_memory::{Bytes, GuestAddress};

use crate::{
    memory::GuestMemory,
    virtio::{
        Active, ConfigSpace, Device, DeviceError, DeviceState, F_EVENT_IDX, F_INDIRECT_DESC,
        F_VERSION_1, event_fd,
    },
};
use vhost_user::{Backend, MAX_REGIONS, shared_regions};

/// Device type.
const ID: u32 = 26;
/// Largest size of a queue.
const QUEUE_SIZE: u16 = 1024;
/// Longest mount tag, bytes.
const MAX_TAG: usize = 36;
/// Most request queues.
const MAX_REQUEST_QUEUES: u16 = 8;
/// Features the transport offers for every device, which the server must have.
const TRANSPORT_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// Told once, with the reason, when the file server is lost.
pub type Report = Box<dyn Fn(String) + Send>;

/// A virtio-fs device.
pub struct Fs {
    config: Arc<Vec<u8>>,
    queue_sizes: Vec<u16>,
    /// `None` once it is lost.
    backend: Option<Backend>,
    /// The server still has the session of a driver that has gone.
    stale: bool,
    report: Report,
}

impl Fs {
    /// Greets the file server on `socket`, a connected stream. `queues` request queues are
    /// offered besides the priority queue. The server gets `deadline` for each answer.
    ///
    /// # Errors
    /// [`DeviceError::Backend`]: a bad tag or number of queues, memory that cannot be shared, or
    /// a server that does not answer as it should.
    pub fn new(
        tag: &str,
        socket: OwnedFd,
        queues: u16,
        memory: &GuestMemory,
        deadline: Duration,
        report: Report,
    ) -> Result<Self, DeviceError> {
        if tag.is_empty() || tag.len() > MAX_TAG || tag.contains('\0') {
            return Err(DeviceError::Backend(format!(
                "mount tag {tag:?} is not of 1 to {MAX_TAG} bytes without NUL"
            )));
        }
        if !(1..=MAX_REQUEST_QUEUES).contains(&queues) {
            return Err(DeviceError::Backend(format!(
                "{queues} request queues: 1 to {MAX_REQUEST_QUEUES} are possible"
            )));
        }
        let regions = shared_regions(memory)
            .collect::<Result<Vec<_>, _>>()
            .map_err(backend_error)?;
        if regions.len() > MAX_REGIONS {
            return Err(DeviceError::Backend(format!(
                "{} regions of guest memory: at most {MAX_REGIONS} can be shared",
                regions.len()
            )));
        }
        let total = queues + 1;
        let backend = Backend::connect(socket, deadline, TRANSPORT_FEATURES, total.into())
            .map_err(backend_error)?;
        let mut config = vec![0; MAX_TAG];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config.extend_from_slice(&u32::from(queues).to_le_bytes());
        Ok(Self {
            config: Arc::new(config),
            queue_sizes: vec![QUEUE_SIZE; total.into()],
            backend: Some(backend),
            stale: false,
            report,
        })
    }

    /// Gives the server up.
    fn lose(&mut self, error: &vhost_user::Error) {
        self.backend = None;
        (self.report)(error.to_string());
    }
}

impl Device for Fs {
    fn id(&self) -> u32 {
        ID
    }

    fn name(&self) -> &'static str {
        "fs"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        self.config.clone()
    }

    fn run(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        if let Some(backend) = &mut self.backend {
            let before = used_indexes(active)?;
            let served = if std::mem::take(&mut self.stale) {
                backend.reset()
            } else {
                Ok(())
            };
            active.interrupt.raised_elsewhere(true);
            let served = served.and_then(|()| serve(backend, active));
            active.interrupt.raised_elsewhere(false);
            // What the server raised at the last moment, and answers whose notification it did
            // not live to send.
            active.interrupt.used();
            // The back end has moved the rings; without it, what it has not answered is open.
            let used = used_indexes(active)?;
            count(active, &before, &used);
            for (queue, used) in active.queues.iter_mut().zip(used) {
                if let Some(queue) = queue {
                    queue.set_position(used, used);
                }
            }
            match served {
                Ok(()) => return Ok(()),
                Err(error) => self.lose(&error),
            }
        }
        orphan::answer(active)
    }

    /// The server hears of it in [`Device::run`]: this is a vCPU's thread, which should not wait
    /// for another process.
    fn reset(&mut self) {
        self.stale = true;
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        Err(DeviceError::Backend(
            "a microVM with shared directories cannot be saved: what the guest has open lives in \
             the file server; detach the device first"
                .into(),
        ))
    }

    fn restore(&mut self, _state: &DeviceState) -> Result<(), DeviceError> {
        Err(DeviceError::State(
            "shared directories cannot be restored".into(),
        ))
    }
}

/// Lets the back end work until `active.stop` is readable.
fn serve(backend: &mut Backend, active: &Active) -> Result<(), vhost_user::Error> {
    backend.start(active.features, &active.memory)?;
    let queues = || (0u32..).zip(&active.queues);
    for (index, queue) in queues() {
        if let Some(queue) = queue {
            backend.start_queue(index, queue, active.interrupt.irqfd())?;
            // It looks at the queue once: earlier kicks may be lost. A full counter is as good.
            let _ = queue.kick().write(1);
        }
    }
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(event_fd(&active.stop), PollFlags::IN),
            PollFd::new(backend, PollFlags::IN | PollFlags::RDHUP),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [stop, gone] = fds.map(|fd| !fd.revents().is_empty());
        if stop {
            break;
        }
        if gone {
            return Err(vhost_user::Error::Closed);
        }
    }
    for (index, queue) in queues() {
        if queue.is_some() {
            backend.stop_queue(index)?;
        }
    }
    Ok(())
}

/// The used index of each queue, as the back end has left it in guest memory. What a guest could
/// write there instead only confuses itself: the queue checks positions.
fn used_indexes(active: &Active) -> Result<Vec<u16>, DeviceError> {
    active
        .queues
        .iter()
        .map(|queue| match queue {
            None => Ok(0),
            Some(queue) => active
                .memory
                .load(GuestAddress(queue.rings().used + 2), Ordering::Acquire)
                .map_err(|error| DeviceError::Queue(error.into())),
        })
        .collect()
}

/// Adds the requests between two readings of the used indexes.
fn count(active: &Active, before: &[u16], after: &[u16]) {
    let completed: u64 = before
        .iter()
        .zip(after)
        .map(|(before, after)| u64::from(after.wrapping_sub(*before)))
        .sum();
    active.completed.fetch_add(completed, Ordering::Relaxed);
}

fn backend_error(error: vhost_user::Error) -> DeviceError {
    DeviceError::Backend(error.to_string())
}
