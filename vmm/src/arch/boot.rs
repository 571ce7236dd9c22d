//! Loading Linux: the uncompressed ELF image and the zero page
//! (Documentation/arch/x86/boot.rst and zero-page.rst).

use std::fs::File;

use linux_loader::loader::bootparam::boot_params;
use vm_memory::{Bytes, GuestAddress};

use super::kernel;
use crate::memory::{GuestMemory, MemoryLayout};

/// Where the GDT lies.
pub(super) const GDT: u64 = 0x500;
/// Where the zero page lies.
pub(super) const BOOT_PARAMETERS: u64 = 0x7000;
/// Top of the stack the kernel starts with.
pub(super) const STACK: u64 = 0x8ff0;
/// Six pages of page tables.
pub(super) const PAGE_TABLES: u64 = 0x9000;
const CMDLINE: u64 = 0x2_0000;
/// Longest command line, bytes without the final zero (`COMMAND_LINE_SIZE` of x86 is 2048).
pub const CMDLINE_MAX: usize = 2047;
/// End of usable conventional memory; above lie what would be the EBDA, video memory and BIOS.
const LOW_END: u64 = 0x9_fc00;
const HIGH_START: u64 = 0x10_0000;

const E820_RAM: u32 = 1;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// A loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_PROTOCOL: u16 = 0x20c;

/// Why a kernel could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Not an ELF image that can be loaded.
    #[error(
        "the kernel is not a loadable uncompressed x86_64 ELF image (vmlinux) or does not fit the guest's memory: {0}"
    )]
    Kernel(String),
    /// Too long a command line.
    #[error("the kernel command line has {0} bytes, but at most {CMDLINE_MAX} are possible")]
    Cmdline(usize),
    /// Guest memory is too small for the boot tables.
    #[error("writing boot tables: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// A KVM ioctl failed.
    #[error("{ioctl}: {source}")]
    Kvm {
        /// Which.
        ioctl: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
}

impl BootError {
    pub(super) fn kvm(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { ioctl, source }
    }
}

/// Loads `kernel_file` with its command line and the zero page. Returns the 64-bit entry.
///
/// # Errors
/// [`BootError`].
pub fn load_kernel(
    memory: &GuestMemory,
    layout: &MemoryLayout,
    kernel_file: &File,
    cmdline: &str,
) -> Result<u64, BootError> {
    if cmdline.len() > CMDLINE_MAX || cmdline.contains('\0') {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    let entry = kernel::load(memory, kernel_file, HIGH_START)?;
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(CMDLINE + cmdline.len() as u64))?;
    memory.write_obj(
        zero_page(layout, cmdline.len()),
        GuestAddress(BOOT_PARAMETERS),
    )?;
    Ok(entry)
}

fn zero_page(layout: &MemoryLayout, cmdline_length: usize) -> boot_params {
    let mut parameters = boot_params::default();
    let header = &mut parameters.hdr;
    header.boot_flag = BOOT_FLAG;
    header.header = HEADER_MAGIC;
    header.version = BOOT_PROTOCOL;
    header.type_of_loader = LOADER_UNDEFINED;
    header.kernel_alignment = 0x100_0000;
    header.cmd_line_ptr = CMDLINE as u32;
    header.cmdline_size = cmdline_length as u32;
    for (start, length) in usable_ram(layout) {
        let entry = &mut parameters.e820_table[usize::from(parameters.e820_entries)];
        entry.addr = start;
        entry.size = length;
        entry.r#type = E820_RAM;
        parameters.e820_entries += 1;
    }
    parameters
}

/// RAM without the hole below 1 MiB. At most three ranges.
fn usable_ram(layout: &MemoryLayout) -> Vec<(u64, u64)> {
    let mut ranges = vec![(0, LOW_END)];
    for &(start, length) in &layout.ram {
        let usable = start.max(HIGH_START);
        ranges.push((usable, start + length - usable));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use caisson_vmm_api::MemoryConfig;

    use super::*;
    use crate::virtio::testing;

    fn layout() -> MemoryLayout {
        MemoryLayout::new(&MemoryConfig {
            boot_mib: 4096,
            hotplug_mib: 0,
            shared: false,
        })
        .unwrap()
    }

    #[test]
    fn the_zero_page_lists_ram_around_the_holes() {
        let parameters = zero_page(&layout(), 5);
        assert_eq!({ parameters.e820_entries }, 3);
        let ranges: Vec<_> = parameters.e820_table[..3]
            .iter()
            .map(|entry| (entry.addr, entry.size))
            .collect();
        let gib = 1 << 30;
        assert_eq!(
            ranges,
            [
                (0, 0x9_fc00),
                (0x10_0000, 3 * gib - 0x10_0000),
                (4 * gib, gib)
            ]
        );
        assert_eq!({ parameters.hdr.cmdline_size }, 5);
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let memory = testing::memory();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0x7f; 4096]).unwrap();
        assert!(matches!(
            load_kernel(&memory, &layout(), &file, "quiet"),
            Err(BootError::Kernel(_))
        ));
        let long = "x".repeat(CMDLINE_MAX + 1);
        assert!(matches!(
            load_kernel(&memory, &layout(), &file, &long),
            Err(BootError::Cmdline(2048))
        ));
    }
}
