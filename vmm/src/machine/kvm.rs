//! KVM's side of a microVM (Linux, Documentation/virt/kvm/api.rst).

use std::{
    os::fd::{FromRawFd, IntoRawFd, OwnedFd},
    sync::{Arc, atomic::AtomicU64},
};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::MachineError;
use crate::{
    arch,
    memory::{self, GuestMemory, GuestRegion, MemoryLayout},
    vcpu::Vcpu,
};

/// The API version that has not changed since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;
/// One page for KVM's own use on Intel, in the device gap.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// Three pages for KVM's own use on Intel.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// `/dev/kvm` as the parent opened it.
pub(super) fn open(fd: OwnedFd) -> Result<Kvm, MachineError> {
    // SAFETY: the descriptor is open and owned here, and its ownership moves on. If it is not
    // /dev/kvm, the ioctl below fails.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    match kvm.get_api_version() {
        KVM_API_VERSION => Ok(kvm),
        other => Err(MachineError::Invalid(format!(
            "the descriptor given as /dev/kvm speaks KVM API version {other}, not {KVM_API_VERSION}"
        ))),
    }
}

/// Maps RAM and hotpluggable RAM, and adds `pmem`.
pub(super) fn map_memory(
    layout: &MemoryLayout,
    shared: bool,
    pmem: Vec<GuestRegion>,
) -> Result<GuestMemory, MachineError> {
    let map = if shared {
        memory::shared
    } else {
        memory::anonymous
    };
    let mut regions: Vec<GuestRegion> = Vec::new();
    for (start, bytes) in layout.ram.iter().chain(&layout.hotplug) {
        regions.push(map(*start, *bytes)?);
    }
    regions.extend(pmem);
    collect(regions)
}

/// Guest memory of these regions.
pub(super) fn collect(regions: Vec<GuestRegion>) -> Result<GuestMemory, MachineError> {
    GuestMemory::from_regions(regions)
        .map_err(|error| MachineError::Invalid(format!("guest memory: {error}")))
}

/// Creates the VM with its memory, interrupt controllers and timer.
pub(super) fn create_vm(kvm: &Kvm, memory: &GuestMemory) -> Result<VmFd, MachineError> {
    let vm = kvm
        .create_vm()
        .map_err(MachineError::kvm("KVM_CREATE_VM"))?;
    for (slot, region) in (0u32..).zip(memory.iter()) {
        set_memory(&vm, slot, region)?;
    }
    // Intel processors without "unrestricted guest" need both; elsewhere they may be refused.
    if let Err(error) = vm.set_identity_map_address(IDENTITY_MAP_ADDRESS) {
        log::debug!("KVM_SET_IDENTITY_MAP_ADDR: {error}");
    }
    if let Err(error) = vm.set_tss_address(TSS_ADDRESS) {
        log::debug!("KVM_SET_TSS_ADDR: {error}");
    }
    vm.create_irq_chip()
        .map_err(MachineError::kvm("KVM_CREATE_IRQCHIP"))?;
    // Linux takes its ticks from the TSC deadline timer where it can, and never touches the PIT
    // then, which would cost a kernel thread.
    if !kvm.check_extension(Cap::TscDeadlineTimer) {
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(pit)
            .map_err(MachineError::kvm("KVM_CREATE_PIT2"))?;
    }
    Ok(vm)
}

fn set_memory(vm: &VmFd, slot: u32, region: &GuestRegion) -> Result<(), MachineError> {
    let flags = if region.prot() & libc::PROT_WRITE == 0 {
        KVM_MEM_READONLY
    } else {
        0
    };
    let description = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
    };
    // SAFETY: the range is a mapping of that length, which `Machine` keeps as long as the VM, and
    // regions do not overlap.
    unsafe { vm.set_user_memory_region(description) }
        .map_err(MachineError::kvm("KVM_SET_USER_MEMORY_REGION"))
}

/// Creates `count` vCPUs, each with its CPUID.
pub(super) fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u8) -> Result<Vec<Vcpu>, MachineError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(MachineError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut vcpus = Vec::with_capacity(count.into());
    for index in 0..count {
        let fd = vm
            .create_vcpu(index.into())
            .map_err(MachineError::kvm("KVM_CREATE_VCPU"))?;
        let cpuid = arch::guest_cpuid(&supported, index, count, tsc_deadline)
            .map_err(|error| MachineError::Invalid(format!("CPUID: {error:?}")))?;
        fd.set_cpuid2(&cpuid)
            .map_err(MachineError::kvm("KVM_SET_CPUID2"))?;
        vcpus.push(Vcpu {
            fd,
            index,
            exits: Arc::new(AtomicU64::new(0)),
        });
    }
    Ok(vcpus)
}
