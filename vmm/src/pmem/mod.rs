//! virtio-pmem.
