//! What is particular to x86_64: processor identification, start state, and
//! the tables and boot protocol through which Linux learns of its machine.

mod boot;
mod cpuid;
mod kernel;
mod mptable;
mod registers;

pub use boot::{BootError, CMDLINE_MAX, load_kernel};
pub use cpuid::guest_cpuid;
pub use mptable::{MpTableError, write_mp_table};
pub use registers::{set_boot_msrs, set_boot_registers, set_lapic_lines};
