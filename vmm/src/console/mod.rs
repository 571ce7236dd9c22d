//! virtio-console and the tail of the guest's output.
