//! Where guest memory lies.

use caisson_vmm_api::MemoryConfig;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// First address that is never RAM.
pub const MMIO_GAP_START: u64 = 3 * GIB;
/// First address of RAM above the gap.
pub const MMIO_GAP_END: u64 = 4 * GIB;
/// Smallest guest: the kernel is loaded at 16 MiB.
const MIN_BOOT: u64 = 64 * MIB;
/// Largest sum of boot and hotpluggable memory.
const MAX_TOTAL: u64 = 4096 * GIB;
/// Linux' largest memory block, which hotplugged memory must start at a multiple of.
const HOTPLUG_ALIGNMENT: u64 = 2 * GIB;

/// Sizes that make no guest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// Too little for a kernel.
    #[error("boot memory of {0} MiB is too small: at least 64 MiB are needed")]
    TooSmall(u32),
    /// More than supported.
    #[error("{0} MiB of memory are too much: at most 4 TiB can be addressed")]
    TooLarge(u64),
}

/// Where the parts of guest memory lie: start and length in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLayout {
    /// RAM the guest boots with.
    pub ram: Vec<(u64, u64)>,
    /// RAM that virtio-mem can plug.
    pub hotplug: Option<(u64, u64)>,
    /// First address free for pmem.
    free: u64,
}

impl MemoryLayout {
    /// The layout for `config`.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn new(config: &MemoryConfig) -> Result<Self, LayoutError> {
        let boot = u64::from(config.boot_mib) * MIB;
        let hotplug = u64::from(config.hotplug_mib) * MIB;
        if boot < MIN_BOOT {
            return Err(LayoutError::TooSmall(config.boot_mib));
        }
        if boot + hotplug > MAX_TOTAL {
            return Err(LayoutError::TooLarge((boot + hotplug) / MIB));
        }
        let low = boot.min(MMIO_GAP_START);
        let mut ram = vec![(0, low)];
        if boot > low {
            ram.push((MMIO_GAP_END, boot - low));
        }
        let end = (MMIO_GAP_END + boot - low).next_multiple_of(HOTPLUG_ALIGNMENT);
        let region = (hotplug > 0).then_some((end, hotplug));
        Ok(Self {
            ram,
            hotplug: region,
            free: (end + hotplug).next_multiple_of(HOTPLUG_ALIGNMENT),
        })
    }

    /// Takes guest-physical space for `bytes` of pmem.
    pub fn allocate_pmem(&mut self, bytes: u64) -> u64 {
        let start = self.free;
        self.free = (start + bytes).next_multiple_of(HOTPLUG_ALIGNMENT);
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(boot_mib: u32, hotplug_mib: u32) -> Result<MemoryLayout, LayoutError> {
        MemoryLayout::new(&MemoryConfig {
            boot_mib,
            hotplug_mib,
            shared: false,
        })
    }

    #[test]
    fn small_guests_have_one_region_below_the_gap() {
        let layout = layout(128, 0).unwrap();
        assert_eq!(layout.ram, [(0, 128 * MIB)]);
        assert_eq!(layout.hotplug, None);
    }

    #[test]
    fn large_guests_continue_above_the_gap() {
        let mut layout = layout(5 * 1024, 1024).unwrap();
        assert_eq!(layout.ram, [(0, 3 * GIB), (4 * GIB, 2 * GIB)]);
        assert_eq!(layout.hotplug, Some((6 * GIB, GIB)));
        assert_eq!(layout.allocate_pmem(3 * MIB), 8 * GIB);
        assert_eq!(layout.allocate_pmem(2 * GIB), 10 * GIB);
        assert_eq!(layout.allocate_pmem(1), 12 * GIB);
    }

    #[test]
    fn sizes_that_make_no_guest_are_refused() {
        assert_eq!(layout(63, 0), Err(LayoutError::TooSmall(63)));
        assert_eq!(
            layout(4 << 20, 1),
            Err(LayoutError::TooLarge((4 << 20) + 1))
        );
        assert!(layout(u32::MAX, u32::MAX).is_err());
    }
}
