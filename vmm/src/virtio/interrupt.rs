//! Interrupts from a device to its driver.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering},
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
    /// Someone else raises `irqfd`, for used buffers, and sets no status.
    elsewhere: AtomicBool,
    irqfd: EventFd,
}

impl Interrupt {
    /// A line that raises `irqfd`.
    pub fn new(irqfd: EventFd) -> Self {
        Self(Arc::new(Line {
            status: AtomicU32::new(0),
            elsewhere: AtomicBool::new(false),
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

    /// From now on, or no longer, someone else tells the driver of used buffers by
    /// [`Interrupt::irqfd`] alone. As any interrupt may then be such a one, `InterruptStatus` always
    /// says so; a driver that looks for used buffers in vain does no harm. Who ends this calls
    /// [`Interrupt::used`] after it: an interrupt may be on its way.
    pub fn raised_elsewhere(&self, elsewhere: bool) {
        self.0.elsewhere.store(elsewhere, Ordering::Release);
    }

    /// `InterruptStatus`, which the driver reads once per interrupt and takes away by it.
    ///
    /// virtio 1.2 section 4.2.2 leaves the latter to a write to `InterruptACK`, for which a guest
    /// would have to be left once more; here KVM swallows that write ([`super::INTERRUPT_ACK`]).
    /// Linux reads, acknowledges what it has read, and then serves it (`vm_interrupt` of
    /// `drivers/virtio/virtio_mmio.c`), so it cannot tell the difference; and what comes after the
    /// read raises the line anew.
    pub fn take_status(&self) -> u32 {
        let status = self.0.status.swap(0, Ordering::AcqRel);
        if self.0.elsewhere.load(Ordering::Acquire) {
            status | USED
        } else {
            status
        }
    }

    /// What the driver has not read yet.
    pub fn status(&self) -> u32 {
        self.0.status.load(Ordering::Acquire)
    }

    /// Forgets what the driver has not read (a reset).
    pub fn clear(&self) {
        self.0.status.store(0, Ordering::Release);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_raise_always_has_a_reason() {
        let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        assert_eq!(interrupt.take_status(), 0);
        interrupt.raised_elsewhere(true);
        interrupt.config_changed();
        assert_eq!(interrupt.take_status(), USED | CONFIG);
        assert_eq!(interrupt.take_status(), USED);
        interrupt.raised_elsewhere(false);
        assert_eq!(interrupt.take_status(), 0);
    }
}
