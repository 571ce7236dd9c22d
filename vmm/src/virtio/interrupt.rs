//! Interrupts from a device to its driver.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use vmm_sys_util::eventfd::EventFd;

/// `InterruptStatus` bit: a used buffer (virtio 1.2 section 4.2.2).
const USED: u32 = 1;
/// `InterruptStatus` bit: configuration change.
const CONFIG: u32 = 2;

/// A device's interrupt line with its `InterruptStatus` register. Clones are the same line.
#[derive(Clone)]
pub struct Interrupt(Arc<Line>);

struct Line {
    status: AtomicU32,
    irqfd: EventFd,
}

impl Interrupt {
    /// A line that raises `irqfd`.
    pub fn new(irqfd: EventFd) -> Self {
        Self(Arc::new(Line {
            status: AtomicU32::new(0),
            irqfd,
        }))
    }

    /// Tells the driver of used buffers. [`super::ActiveQueue::signal`] does so when the driver wants it.
    pub fn used(&self) {
        self.raise(USED);
    }

    /// Tells the driver that the configuration space or the device status changed.
    pub fn config_changed(&self) {
        self.raise(CONFIG);
    }

    /// The event on which KVM injects the interrupt.
    pub fn irqfd(&self) -> &EventFd {
        &self.0.irqfd
    }

    /// `InterruptStatus`.
    pub fn status(&self) -> u32 {
        self.0.status.load(Ordering::Acquire)
    }

    /// `InterruptACK`: the driver has seen `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.0.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Sets `InterruptStatus` bits and interrupts if there are any (after a restore).
    pub fn reraise(&self, bits: u32) {
        if bits != 0 {
            self.raise(bits);
        }
    }

    fn raise(&self, bits: u32) {
        self.0.status.fetch_or(bits, Ordering::AcqRel);
        // An event counter that is full is as good as written.
        if let Err(error) = self.0.irqfd.write(1)
            && error.kind() != std::io::ErrorKind::WouldBlock
        {
            log::error!("interrupt: {error}");
        }
    }
}
