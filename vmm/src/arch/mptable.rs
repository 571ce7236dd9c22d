//! The MP table (Intel MultiProcessor Specification 1.4): how a kernel without
//! ACPI learns of its processors and interrupts.

use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;

/// Where the floating pointer lies: Linux searches the BIOS area 0xF0000..0x100000.
const TABLE: u64 = 0xf_0000;
/// Pins of KVM's I/O APIC.
const IOAPIC_PINS: u8 = 24;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// Of both APICs that KVM emulates.
const APIC_VERSION: u8 = 0x14;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const ALL_LAPICS: u8 = 0xff;

/// Why no table could be made.
#[derive(Debug, thiserror::Error)]
pub enum MpTableError {
    /// More processors than 8-bit APIC ids allow besides the I/O APIC's.
    #[error("{0} vCPUs are too many for an MP table")]
    TooManyVcpus(u8),
    /// Guest memory is too small.
    #[error("writing the MP table: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Writes the table of `vcpus` processors, whose APIC ids count from 0.
///
/// # Errors
/// [`MpTableError`].
pub fn write_mp_table(memory: &GuestMemory, vcpus: u8) -> Result<(), MpTableError> {
    if vcpus > 254 {
        return Err(MpTableError::TooManyVcpus(vcpus));
    }
    let table = configuration_table(vcpus);
    memory.write_slice(&floating_pointer(), GuestAddress(TABLE))?;
    memory.write_slice(&table, GuestAddress(TABLE + 16))?;
    Ok(())
}

fn floating_pointer() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16);
    bytes.extend_from_slice(b"_MP_");
    bytes.extend_from_slice(&(TABLE as u32 + 16).to_le_bytes());
    // Length in units of 16 bytes, revision 1.4, checksum, feature bytes: a table follows, and
    // there is no IMCR.
    bytes.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    bytes[10] = checksum(&bytes);
    bytes
}

fn configuration_table(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut push = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = if id == 0 {
            ENABLED | BOOT_PROCESSOR
        } else {
            ENABLED
        };
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[ENTRY_PROCESSOR, id, APIC_VERSION, flags]);
        // Family 6; on-chip APIC and FPU. Linux looks at CPUID instead.
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        push(&entry);
    }
    push(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let ioapic = vcpus;
    let mut entry = [ENTRY_IOAPIC, ioapic, APIC_VERSION, ENABLED, 0, 0, 0, 0];
    entry[4..].copy_from_slice(&IOAPIC_ADDRESS.to_le_bytes());
    push(&entry);
    // Interrupts as the bus has them (ISA: edge-triggered, active high), pin by pin.
    for pin in 0..IOAPIC_PINS {
        push(&[ENTRY_IO_INTERRUPT, INTERRUPT_INT, 0, 0, 0, pin, ioapic, pin]);
    }
    push(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTINT, 0, 0, 0, 0, 0, 0]);
    push(&[
        ENTRY_LOCAL_INTERRUPT,
        INTERRUPT_NMI,
        0,
        0,
        0,
        0,
        ALL_LAPICS,
        1,
    ]);

    let mut table = Vec::with_capacity(44 + entries.len());
    table.extend_from_slice(b"PCMP");
    // 64 processors make 1,556 bytes.
    table.extend_from_slice(&((44 + entries.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[4, 0]);
    table.extend_from_slice(b"CAISSON MICROVM     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&LAPIC_ADDRESS.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

/// The byte that makes the sum of all bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing;

    #[test]
    fn the_table_can_be_found_and_adds_up() {
        let memory = testing::memory();
        write_mp_table(&memory, 3).unwrap();
        let mut pointer = [0; 16];
        memory
            .read_slice(&mut pointer, GuestAddress(0xf_0000))
            .unwrap();
        assert_eq!(&pointer[..4], b"_MP_");
        assert_eq!(checksum(&pointer), 0);
        let at = u32::from_le_bytes(pointer[4..8].try_into().unwrap());
        let mut header = [0; 44];
        memory
            .read_slice(&mut header, GuestAddress(at.into()))
            .unwrap();
        let length = u16::from_le_bytes(header[4..6].try_into().unwrap());
        let mut table = vec![0; length.into()];
        memory
            .read_slice(&mut table, GuestAddress(at.into()))
            .unwrap();
        assert_eq!(checksum(&table), 0);
        // 3 processors, a bus, an I/O APIC, 24 + 2 interrupts.
        let count = u16::from_le_bytes(header[34..36].try_into().unwrap());
        assert_eq!(count, 31);
        assert_eq!(usize::from(length), 44 + 3 * 20 + 28 * 8);
        assert_eq!(table[44..48], [0, 0, 0x14, 3]);
        assert_eq!(table[64..68], [0, 1, 0x14, 1]);
    }

    #[test]
    fn a_vcpu_too_many_is_refused() {
        let memory = testing::memory();
        assert!(matches!(
            write_mp_table(&memory, 255),
            Err(MpTableError::TooManyVcpus(255))
        ));
    }
}
