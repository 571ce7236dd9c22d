//! The microVM monitor of Caisson: everything between `/dev/kvm` and a guest.
//!
//! One process runs one microVM. It is unprivileged and jailed, opens nothing
//! after its start, and works only on descriptors that its parent sent through
//! the control API ([`caisson_vmm_api`]).
//!
//! The guest is the attacker: whatever it can write (memory, registers,
//! queues) is checked before use and never reaches a panic, an unbounded loop
//! or an unbounded allocation.

pub mod api;
pub mod arch;
pub mod balloon;
pub mod block;
pub mod console;
pub mod deadline;
pub mod fs;
pub mod jail;
pub mod logging;
pub mod machine;
pub mod mem;
pub mod memory;
pub mod net;
pub mod pmem;
pub mod rate_limit;
pub mod rng;
pub mod seccomp;
pub mod snapshot;
pub mod vcpu;
pub mod virtio;
pub mod vsock;
