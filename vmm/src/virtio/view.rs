//! What can be told of a device in a slot without the slot's lock.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use super::mmio::{STATUS_ACKNOWLEDGE, STATUS_DRIVER_OK};

/// A transport from outside. A vCPU whose guest resets the device holds the slot's lock until the
/// device has stopped; who only wants to look need not wait for that.
pub struct View {
    pub(super) name: &'static str,
    pub(super) status: Arc<AtomicU32>,
    pub(super) completed: Arc<AtomicU64>,
}

impl View {
    /// [`super::Device::name`].
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Requests completed.
    pub fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }

    /// A driver set DRIVER_OK and has not reset the device.
    pub fn is_active(&self) -> bool {
        self.status() & STATUS_DRIVER_OK != 0
    }

    /// No driver has taken the device since its reset. Linux acknowledges a device again after its
    /// driver has gone.
    pub fn is_unbound(&self) -> bool {
        self.status() & !STATUS_ACKNOWLEDGE == 0
    }

    fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }
}
