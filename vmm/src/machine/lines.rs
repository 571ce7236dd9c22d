//! The interrupt lines of slots, which share them from the twentieth device on.

use std::collections::BTreeMap;

use kvm_ioctls::VmFd;
use libc::{EFD_CLOEXEC, EFD_NONBLOCK};
use vmm_sys_util::eventfd::EventFd;

use super::{MachineError, bus::slot_interrupt};

/// The event of each line that a device has had so far.
///
/// One for all devices of a line: KVM raises and lowers it by a work item of the event (`irqfd_inject`
/// of virt/kvm/eventfd.c), which never overlaps itself. Those of two events would, and an edge that
/// one raises before the other has lowered the line is none: the guest would never hear of it.
#[derive(Default)]
pub struct Lines(BTreeMap<u32, EventFd>);

impl Lines {
    /// The event that raises a slot's line. It stays connected when the slot is emptied.
    ///
    /// # Errors
    /// Those of eventfd(2), dup(2) and `KVM_IRQFD`.
    pub fn of(&mut self, slot: u32, vm: &VmFd) -> Result<EventFd, MachineError> {
        let failed = MachineError::io("making the event of an interrupt line");
        let line = slot_interrupt(slot);
        if let Some(event) = self.0.get(&line) {
            return event.try_clone().map_err(failed);
        }
        let made = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let both = made.and_then(|event| Ok((event.try_clone()?, event)));
        let (copy, event) = both.map_err(failed)?;
        vm.register_irqfd(&event, line)
            .map_err(MachineError::kvm("KVM_IRQFD"))?;
        self.0.insert(line, event);
        Ok(copy)
    }
}
