//! Interrupt controllers, timer and clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use super::state::{SavedVm, SnapshotError};

/// State of a VM none of whose vCPUs runs.
///
/// # Errors
/// [`SnapshotError::Kvm`].
pub fn save_vm(vm: &VmFd) -> Result<SavedVm, SnapshotError> {
    let mut irqchips = Vec::new();
    for chip_id in [
        KVM_IRQCHIP_PIC_MASTER,
        KVM_IRQCHIP_PIC_SLAVE,
        KVM_IRQCHIP_IOAPIC,
    ] {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)
            .map_err(SnapshotError::kvm("KVM_GET_IRQCHIP"))?;
        irqchips.push(chip);
    }
    Ok(SavedVm {
        clock: vm
            .get_clock()
            .map_err(SnapshotError::kvm("KVM_GET_CLOCK"))?,
        irqchips,
        // Fails where none was created.
        pit: vm.get_pit2().ok(),
    })
}

/// Brings a fresh VM, whose vCPUs are restored, into a saved state. The guest's monotonic clock
/// goes on from where it was.
///
/// # Errors
/// [`SnapshotError::Kvm`].
pub fn restore_vm(vm: &VmFd, saved: &SavedVm) -> Result<(), SnapshotError> {
    let clock = kvm_clock_data {
        clock: saved.clock.clock,
        ..Default::default()
    };
    vm.set_clock(&clock)
        .map_err(SnapshotError::kvm("KVM_SET_CLOCK"))?;
    for chip in &saved.irqchips {
        vm.set_irqchip(chip)
            .map_err(SnapshotError::kvm("KVM_SET_IRQCHIP"))?;
    }
    if let Some(pit) = &saved.pit {
        vm.set_pit2(pit)
            .map_err(SnapshotError::kvm("KVM_SET_PIT2"))?;
    }
    Ok(())
}
