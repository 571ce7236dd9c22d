//! virtio-console and the tail of the guest's output.

mod device;
mod serial;
mod tail;

pub use device::Console;
pub use serial::EarlySerial;
pub use tail::{TAIL_BYTES, Tail};
