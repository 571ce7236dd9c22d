//! Guest memory.

/// The guest's memory as devices see it: RAM, hotpluggable RAM and pmem regions.
///
/// A clone is cheap (regions are reference-counted) and keeps the mappings
/// alive. The set of regions never changes while the microVM exists.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
