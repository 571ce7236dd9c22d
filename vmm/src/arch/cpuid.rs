//! What CPUID tells the guest (Intel SDM volume 2A, AMD APM volume 3).
//!
//! The base is what KVM supports on this host. On top: one package with one
//! core per vCPU, a hypervisor that is KVM, and nothing a container has no use for.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const LEAF6_EAX_ARAT: u32 = 1 << 2;
const EXTENDED1_ECX_SVM: u32 = 1 << 2;
const EXTENDED1_ECX_TOPOLOGY: u32 = 1 << 22;
/// Most entries KVM takes.
const MAX_ENTRIES: usize = 256;

/// The CPUID of vCPU `index` of `count` from what KVM supports.
///
/// `tsc_deadline`: KVM has the TSC deadline timer, which older kernels do not put into `supported`.
///
/// # Errors
/// The error of kvm-bindings when there are more entries than KVM takes.
pub fn guest_cpuid(
    supported: &CpuId,
    index: u8,
    count: u8,
    tsc_deadline: bool,
) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        // Made anew below.
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .copied()
        .collect();
    for entry in &mut entries {
        filter(entry, index, count, tsc_deadline);
    }
    let basic = entries.iter().find(|entry| entry.function == 0);
    let highest = basic.map_or(0, |entry| entry.eax);
    for function in [0xb, 0x1f] {
        if function <= highest && entries.len() + 2 <= MAX_ENTRIES {
            entries.extend(topology(function, index, count));
        }
    }
    CpuId::from_entries(&entries)
}

fn filter(entry: &mut kvm_cpuid_entry2, index: u8, count: u8, tsc_deadline: bool) {
    let id = u32::from(index);
    let cores = u32::from(count);
    match entry.function {
        0x1 => {
            entry.ebx = (entry.ebx & 0xffff) | (cores << 16) | (id << 24);
            entry.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC;
            entry.ecx &= !LEAF1_ECX_VMX;
            if tsc_deadline {
                entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
            }
            entry.edx &= !LEAF1_EDX_HTT;
            if count > 1 {
                entry.edx |= LEAF1_EDX_HTT;
            }
        }
        // Caches: cores of the package less one; the last level is shared by all, others by none.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { cores - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | ((cores - 1).min(63) << 26);
        }
        // Power management is the host's; only that the APIC timer never stops is of use.
        0x6 => {
            entry.eax &= LEAF6_EAX_ARAT;
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
        }
        // No performance counters, no nested virtualisation.
        0xa | 0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => entry.ecx &= !EXTENDED1_ECX_SVM,
        // AMD: number of cores less one, and bits of the APIC id that count them.
        0x8000_0008 => {
            entry.ecx = (entry.ecx & !0xf0ff) | (cores - 1) | (core_bits(count) << 12);
        }
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { cores - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
        }
        // AMD: extended APIC id, core id with one thread per core, node 0 of 1.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
    if entry.function == 0x8000_0001 && count == 1 {
        // The topology leaves are of no use to a single core, and 0x8000001e may be missing.
        entry.ecx &= !EXTENDED1_ECX_TOPOLOGY;
    }
}

/// Leaf 0xb or 0x1f: one thread per core, all cores in one package.
fn topology(function: u32, index: u8, count: u8) -> [kvm_cpuid_entry2; 2] {
    let entry = |subleaf, shift, processors, kind: u32| kvm_cpuid_entry2 {
        function,
        index: subleaf,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: subleaf | (kind << 8),
        edx: u32::from(index),
        ..Default::default()
    };
    [
        entry(0, 0, 1, 1),
        entry(1, core_bits(count), u32::from(count), 2),
    ]
}

/// Bits that number `count` cores.
fn core_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    #[test]
    fn virtualisation_and_counters_are_hidden_and_kvm_is_shown() {
        let supported = CpuId::from_entries(&[
            entry(0, [0xd, 0, 0, 0]),
            entry(1, [0, 0x1234_5678, LEAF1_ECX_VMX, 0]),
            entry(0xa, [0x0730_0402, 1, 2, 3]),
            entry(0x8000_0001, [0, 0, EXTENDED1_ECX_SVM, 0]),
            entry(0x8000_000a, [1, 2, 3, 4]),
        ])
        .unwrap();
        let cpuid = guest_cpuid(&supported, 1, 3, true).unwrap();
        let first = find(&cpuid, 1, 0);
        assert_eq!(first.ebx, 0x0103_5678);
        assert_eq!(
            first.ecx,
            LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC | LEAF1_ECX_TSC_DEADLINE
        );
        assert_eq!(first.edx, LEAF1_EDX_HTT);
        assert_eq!(find(&cpuid, 0xa, 0).eax, 0);
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx, 0);
        assert_eq!(find(&cpuid, 0x8000_000a, 0).edx, 0);
    }

    #[test]
    fn each_vcpu_is_a_core_of_one_package() {
        let supported = CpuId::from_entries(&[
            entry(0, [0xd, 0, 0, 0]),
            entry(0xb, [9, 9, 9, 9]),
            entry(4, [0xfc00_0163, 0, 0, 0]),
            entry(0x8000_0008, [0x3030, 0, 0x7, 0]),
        ])
        .unwrap();
        let cpuid = guest_cpuid(&supported, 2, 3, false).unwrap();
        let core = find(&cpuid, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        let thread = find(&cpuid, 0xb, 0);
        assert_eq!((thread.eax, thread.ebx, thread.edx), (0, 1, 2));
        // 0x1f is beyond this processor's highest leaf.
        assert!(cpuid.as_slice().iter().all(|entry| entry.function != 0x1f));
        assert_eq!(find(&cpuid, 4, 0).eax, 0x0800_8163);
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 0x2002);
    }
}
