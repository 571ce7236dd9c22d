//! What happens by itself, on its way from the threads to the API.

use std::{
    collections::VecDeque,
    os::fd::{AsRawFd, RawFd},
    sync::{Mutex, PoisonError},
};

use caisson_vmm_api::ExitReason;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most notices kept: a device fails at most once until its driver resets it, which a guest can
/// repeat.
const MAX_NOTICES: usize = 256;

/// Something that happened.
#[derive(Debug)]
pub enum Notice {
    /// The guest is over.
    Ended(ExitReason),
    /// A device stopped.
    DeviceFailed {
        /// Its slot.
        slot: u32,
        /// Why.
        message: String,
    },
}

/// A queue of notices that can be polled.
pub struct Notices {
    queue: Mutex<VecDeque<Notice>>,
    event: EventFd,
}

impl Notices {
    /// An empty queue.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            queue: Mutex::new(VecDeque::new()),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Appends a notice. Device failures beyond the limit are dropped, the end is not.
    pub fn push(&self, notice: Notice) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() < MAX_NOTICES || matches!(notice, Notice::Ended(_)) {
            queue.push_back(notice);
        }
        drop(queue);
        // A counter that is full is readable as well.
        let _ = self.event.write(1);
    }

    /// Takes all notices.
    pub fn take(&self) -> VecDeque<Notice> {
        let _ = self.event.read();
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut queue)
    }
}

impl AsRawFd for Notices {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}
