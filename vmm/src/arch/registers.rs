//! The state a vCPU starts in: 64-bit mode with the first 4 GiB mapped to
//! themselves (Linux, Documentation/arch/x86/boot.rst, "64-bit boot protocol").

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::boot::{BOOT_PARAMETERS, BootError, GDT, PAGE_TABLES, STACK};
use crate::memory::GuestMemory;

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_AM: u64 = 1 << 18;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_LARGE: u64 = 1 << 7;
/// `__BOOT_CS` and `__BOOT_DS` of the boot protocol.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const GDT_ENTRIES: [u64; 4] = [
    0,
    0,
    // 64-bit code and flat data, each of 4 GiB, accessed.
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
];

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back: without it Linux also does without PAT.
const MTRR_ON_WRITE_BACK: u64 = (1 << 11) | 6;

const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTINT: u32 = 7 << 8;

/// Puts the boot vCPU at `entry` in 64-bit mode; writes the tables this needs to `memory`.
///
/// # Errors
/// [`BootError`].
pub fn set_boot_registers(
    vcpu: &VcpuFd,
    memory: &GuestMemory,
    entry: u64,
) -> Result<(), BootError> {
    write_page_tables(memory)?;
    for (index, descriptor) in GDT_ENTRIES.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(GDT + 8 * index as u64))?;
    }
    let mut sregs = vcpu.get_sregs().map_err(BootError::kvm("KVM_GET_SREGS"))?;
    let code = segment(CODE_SELECTOR, 0xb, true);
    let data = segment(DATA_SELECTOR, 0x3, false);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (GDT_ENTRIES.len() * 8 - 1) as u16;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs)
        .map_err(BootError::kvm("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        // Bit 1 is always set.
        rflags: 2,
        rip: entry,
        rsp: STACK,
        rbp: STACK,
        rsi: BOOT_PARAMETERS,
        ..Default::default()
    };
    vcpu.set_regs(&regs)
        .map_err(BootError::kvm("KVM_SET_REGS"))?;
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(BootError::kvm("KVM_SET_FPU"))
}

/// Model-specific registers that firmware would have set. KVM may lack some; Linux does without.
pub fn set_boot_msrs(vcpu: &VcpuFd) {
    for (index, data) in [
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK),
    ] {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let Ok(msrs) = Msrs::from_entries(&[entry]) else {
            continue;
        };
        match vcpu.set_msrs(&msrs) {
            Ok(1) => {}
            result => log::warn!("MSR {index:#x} cannot be set: {result:?}"),
        }
    }
}

/// LINT0 takes interrupts of the 8259, LINT1 is the NMI.
///
/// # Errors
/// [`BootError::Kvm`].
pub fn set_lapic_lines(vcpu: &VcpuFd) -> Result<(), BootError> {
    let mut lapic = vcpu.get_lapic().map_err(BootError::kvm("KVM_GET_LAPIC"))?;
    for (offset, mode) in [
        (LAPIC_LVT_LINT0, DELIVERY_EXTINT),
        (LAPIC_LVT_LINT1, DELIVERY_NMI),
    ] {
        for (register, byte) in lapic.regs[offset..offset + 4]
            .iter_mut()
            .zip(mode.to_le_bytes())
        {
            // A register is 4 bytes; the type is c_char.
            *register = byte as i8;
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(BootError::kvm("KVM_SET_LAPIC"))
}

/// The first 4 GiB in pages of 2 MiB: one level-4 entry, four level-3 entries, four level-2 tables.
fn write_page_tables(memory: &GuestMemory) -> Result<(), BootError> {
    let level3 = PAGE_TABLES + 0x1000;
    let level2 = PAGE_TABLES + 0x2000;
    memory.write_obj(level3 | PAGE_PRESENT_WRITABLE, GuestAddress(PAGE_TABLES))?;
    for gib in 0..4 {
        let table = level2 + gib * 0x1000;
        memory.write_obj(
            table | PAGE_PRESENT_WRITABLE,
            GuestAddress(level3 + 8 * gib),
        )?;
        let mut entries = Vec::with_capacity(4096);
        for page in 0..512 {
            let address = (gib << 30) | (page << 21);
            let entry = address | PAGE_PRESENT_WRITABLE | PAGE_LARGE;
            entries.extend_from_slice(&entry.to_le_bytes());
        }
        memory.write_slice(&entries, GuestAddress(table))?;
    }
    Ok(())
}

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}
