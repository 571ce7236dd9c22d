//! virtio devices (OASIS virtio 1.2): the contract between devices and their
//! transport, virtqueues, and the virtio-mmio transport.

mod chain;
mod device;
mod interrupt;
mod iovec;
mod mmio;
#[cfg(test)]
mod mmio_tests;
mod queue;
#[cfg(test)]
mod queue_tests;
#[cfg(test)]
pub mod testing;
mod turn;
mod view;
mod worker;

pub use chain::{Chain, ChainError, Head, Reader, Segment, Writer};
pub use device::{Active, ConfigSpace, Device, DeviceError, DeviceState, EmptyConfig, event_fd};
pub use interrupt::Interrupt;
pub use iovec::append_iovecs;
pub use mmio::{
    F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, INTERRUPT_ACK, QUEUE_NOTIFY, SLOT_BYTES, Transport,
    TransportState, read_empty,
};
pub use queue::{ActiveQueue, QueueError, QueueSetup, RingAddresses};
pub use view::View;
pub use worker::OnFailure;
