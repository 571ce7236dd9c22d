//! Saved state of a microVM: a versioned JSON document for processors, interrupt
//! controllers, clock and devices, and a sparse file for guest memory.

mod memory;
mod state;
mod vcpu;
mod vm;

pub use memory::{load_memory, map_memory, save_memory};
pub use state::{SavedDevice, SavedMachine, SavedVcpu, SavedVm, SnapshotError};
pub use vcpu::{restore_vcpu, save_vcpu};
pub use vm::{restore_vm, save_vm};
