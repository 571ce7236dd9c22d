//! A processor's state, in the orders that KVM needs (Documentation/virt/kvm/api.rst).

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::state::{SavedVcpu, SnapshotError};

/// How far the host's TSC may run from the saved one without scaling, parts per million: what
/// Linux takes for one and the same clock.
const TSC_TOLERANCE_PPM: u64 = 250;

/// State of a vCPU that does not run. `msr_indexes`: those KVM lists as to be saved.
///
/// # Errors
/// [`SnapshotError::Kvm`].
pub fn save_vcpu(fd: &VcpuFd, msr_indexes: &[u32]) -> Result<SavedVcpu, SnapshotError> {
    let kvm = SnapshotError::kvm;
    // Tells the guest's watchdog that the pause was not its fault; fails without kvmclock.
    let _ = fd.kvmclock_ctrl();
    Ok(SavedVcpu {
        // First: KVM may process a pending INIT or SIPI here.
        mp_state: fd.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?,
        regs: fd.get_regs().map_err(kvm("KVM_GET_REGS"))?,
        sregs: fd.get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
        xsave: fd.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?,
        xcrs: fd.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?,
        debug_registers: fd.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?,
        lapic: fd.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?,
        msrs: get_msrs(fd, msr_indexes)?,
        cpuid: fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("KVM_GET_CPUID2"))?
            .as_slice()
            .to_vec(),
        // Last: reading the others can inject events.
        events: fd.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?,
        tsc_khz: fd.get_tsc_khz().ok(),
    })
}

/// Brings a fresh vCPU into a saved state.
///
/// # Errors
/// [`SnapshotError::Kvm`]; [`SnapshotError::Mismatch`] when the host's TSC runs at another speed
/// and cannot be scaled.
pub fn restore_vcpu(fd: &VcpuFd, saved: &SavedVcpu) -> Result<(), SnapshotError> {
    let kvm = SnapshotError::kvm;
    let cpuid = CpuId::from_entries(&saved.cpuid)
        .map_err(|error| SnapshotError::Malformed(format!("CPUID: {error:?}")))?;
    fd.set_cpuid2(&cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
    set_tsc_speed(fd, saved.tsc_khz)?;
    fd.set_mp_state(saved.mp_state)
        .map_err(kvm("KVM_SET_MP_STATE"))?;
    fd.set_regs(&saved.regs).map_err(kvm("KVM_SET_REGS"))?;
    fd.set_sregs(&saved.sregs).map_err(kvm("KVM_SET_SREGS"))?;
    // SAFETY: without dynamically enabled features, which this VMM never requests, KVM reads 4096
    // bytes, the size of the structure.
    unsafe { fd.set_xsave(&saved.xsave) }.map_err(kvm("KVM_SET_XSAVE"))?;
    fd.set_xcrs(&saved.xcrs).map_err(kvm("KVM_SET_XCRS"))?;
    fd.set_debug_regs(&saved.debug_registers)
        .map_err(kvm("KVM_SET_DEBUGREGS"))?;
    fd.set_lapic(&saved.lapic).map_err(kvm("KVM_SET_LAPIC"))?;
    // After the LAPIC, whose mode decides whether the deadline MSR is taken.
    set_msrs(fd, &saved.msrs);
    fd.set_vcpu_events(&saved.events)
        .map_err(kvm("KVM_SET_VCPU_EVENTS"))
}

/// KVM_GET_MSRS stops at the first register it does not know; that one is left out.
fn get_msrs(fd: &VcpuFd, indexes: &[u32]) -> Result<Vec<kvm_msr_entry>, SnapshotError> {
    let mut saved = Vec::with_capacity(indexes.len());
    let mut rest = indexes;
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().map(|index| entry(*index)).collect();
        let mut msrs = Msrs::from_entries(&entries)
            .map_err(|error| SnapshotError::Malformed(format!("MSR list: {error:?}")))?;
        let count = fd
            .get_msrs(&mut msrs)
            .map_err(SnapshotError::kvm("KVM_GET_MSRS"))?;
        saved.extend_from_slice(&msrs.as_slice()[..count]);
        if let Some(unknown) = rest.get(count) {
            log::debug!("MSR {unknown:#x} cannot be saved");
        }
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(saved)
}

/// KVM_SET_MSRS stops at the first register it refuses; the guest has to do without that one.
fn set_msrs(fd: &VcpuFd, saved: &[kvm_msr_entry]) {
    let mut rest = saved;
    while !rest.is_empty() {
        let Ok(msrs) = Msrs::from_entries(rest) else {
            return;
        };
        let count = fd.set_msrs(&msrs).unwrap_or(0);
        if let Some(refused) = rest.get(count) {
            log::debug!("MSR {:#x} cannot be restored", refused.index);
        }
        rest = rest.get(count + 1..).unwrap_or_default();
    }
}

fn entry(index: u32) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        ..Default::default()
    }
}

fn set_tsc_speed(fd: &VcpuFd, saved: Option<u32>) -> Result<(), SnapshotError> {
    let (Some(saved), Ok(host)) = (saved, fd.get_tsc_khz()) else {
        return Ok(());
    };
    let difference = u64::from(saved.abs_diff(host)) * 1_000_000;
    if difference <= u64::from(host) * TSC_TOLERANCE_PPM {
        return Ok(());
    }
    fd.set_tsc_khz(saved).map_err(|error| {
        SnapshotError::Mismatch(format!(
            "the guest's TSC runs at {saved} kHz, this host's at {host} kHz, and it cannot be \
             scaled: KVM_SET_TSC_KHZ: {error}"
        ))
    })
}
