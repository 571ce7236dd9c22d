//! virtio devices (OASIS virtio 1.2): the contract between devices and their
//! transport, virtqueues, and the virtio-mmio transport.

mod chain;
mod device;
mod interrupt;
mod queue;
#[cfg(test)]
pub mod testing;

pub use chain::{Chain, ChainError, Head, Reader, Segment, Writer};
pub use device::{Active, ConfigSpace, Device, DeviceError, DeviceState, EmptyConfig};
pub use interrupt::Interrupt;
pub use queue::{ActiveQueue, QueueError, QueueSetup, RingAddresses};
