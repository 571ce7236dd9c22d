//! Guest memory: where it lies and how it is mapped.
//!
//! | guest-physical | what |
//! |---|---|
//! | 0 .. 3 GiB | RAM |
//! | 3 GiB .. 4 GiB | devices: virtio-mmio slots, APICs, KVM's own pages; never RAM |
//! | 4 GiB .. | the rest of RAM |
//! | next multiple of 2 GiB | hotpluggable RAM (virtio-mem) |
//! | next multiples of 2 GiB | virtio-pmem, one after the other |

mod build;
mod discard;
mod layout;

pub use build::{MemoryError, anonymous, map_file, shared};
pub use discard::{DiscardError, discard};
pub use layout::{LayoutError, MMIO_GAP_END, MMIO_GAP_START, MemoryLayout};

/// The guest's memory as devices see it: RAM, hotpluggable RAM and pmem regions.
///
/// A clone is cheap (regions are reference-counted) and keeps the mappings
/// alive. The set of regions never changes while the microVM exists.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// One region of [`GuestMemory`].
pub type GuestRegion = vm_memory::GuestRegionMmap<()>;
