//! virtio-mem.
