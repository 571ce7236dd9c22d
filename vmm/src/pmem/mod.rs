//! virtio-pmem (virtio 1.2 section 5.19): a file as a range of guest memory, so
//! that the host's page cache is the only copy. The guest flushes explicitly.
//!
//! The range is part of guest memory, whose regions never change: so the
//! device is there from boot. Its file must keep its length; whoever cuts it
//! off ends the guest's access, and the microVM, with an error.
//!
//! System calls of the thread: poll, read and write (eventfds), fdatasync,
//! write (log), and the allocator's and futex.

#[cfg(test)]
mod tests;

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryRegion;

use crate::{
    memory::{self, GuestRegion},
    virtio::{Active, Chain, ConfigSpace, Device, DeviceError, DeviceState},
};

/// Device type.
const ID: u32 = 27;
const QUEUE_SIZES: [u16; 1] = [64];
const STATE_VERSION: u16 = 1;
/// What Linux can map with huge pages and describe with whole sections.
const ALIGNMENT: u64 = 2 << 20;

const REQUEST_FLUSH: u32 = 0;
const RESPONSE_OK: u32 = 0;
const RESPONSE_EIO: u32 = 1;

/// A virtio-pmem device.
pub struct Pmem {
    file: OwnedFd,
    read_only: bool,
    start: u64,
    bytes: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    start: u64,
    bytes: u64,
    read_only: bool,
}

impl Pmem {
    /// Maps `file` whole at the guest address that `allocate` chooses for its length: the region
    /// for guest memory, and the device. Stores of the guest reach the file unless `read_only`;
    /// the region cannot be written then.
    ///
    /// # Errors
    /// [`DeviceError::Backend`]: no regular file, or not a multiple of 2 MiB long;
    /// [`DeviceError::Io`].
    pub fn map(
        file: OwnedFd,
        read_only: bool,
        allocate: impl FnOnce(u64) -> u64,
    ) -> Result<(GuestRegion, Self), DeviceError> {
        let status = rustix::fs::fstat(&file).map_err(DeviceError::io("fstat"))?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
            return Err(DeviceError::Backend(
                "persistent memory needs a regular file".into(),
            ));
        }
        let bytes = u64::try_from(status.st_size).unwrap_or(0);
        if bytes == 0 || !bytes.is_multiple_of(ALIGNMENT) {
            return Err(DeviceError::Backend(format!(
                "a file of {bytes} bytes cannot be persistent memory: pad it to a multiple of {} MiB",
                ALIGNMENT >> 20
            )));
        }
        let mapped = file.try_clone().map_err(DeviceError::io("dup"))?;
        let start = allocate(bytes);
        let region = memory::map_file(start, bytes, mapped, 0, false, !read_only)
            .map_err(|error| DeviceError::Backend(error.to_string()))?;
        let device = Self {
            file,
            read_only,
            start: region.start_addr().0,
            bytes,
        };
        Ok((region, device))
    }

    /// The answer to a request.
    fn perform(&self, kind: u32) -> u32 {
        if kind != REQUEST_FLUSH {
            return RESPONSE_EIO;
        }
        if self.read_only {
            return RESPONSE_OK;
        }
        match rustix::fs::fdatasync(self.file.as_fd()) {
            Ok(()) => RESPONSE_OK,
            Err(error) => {
                log::warn!("flush of persistent memory: {error}");
                RESPONSE_EIO
            }
        }
    }

    fn answer(&self, memory: &memory::GuestMemory, chain: &Chain) -> Result<u32, DeviceError> {
        let mut kind = [0; 4];
        chain.reader(memory).read(&mut kind)?;
        let response = self.perform(u32::from_le_bytes(kind));
        let mut writer = chain.writer(memory);
        writer.write(&response.to_le_bytes())?;
        Ok(writer.written())
    }
}

impl Device for Pmem {
    fn id(&self) -> u32 {
        ID
    }

    fn name(&self) -> &'static str {
        "pmem"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_pmem_config`: start and size.
    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new([self.start.to_le_bytes(), self.bytes.to_le_bytes()].concat())
    }

    fn run(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        let memory = active.memory.clone();
        let interrupt = active.interrupt.clone();
        loop {
            let queue = active.queue(0)?;
            queue.serve(&memory, &interrupt, |chain| self.answer(&memory, chain))?;
            if !active.wait(&[0])? {
                return Ok(());
            }
        }
    }

    fn reset(&mut self) {}

    /// The file holds the contents. For a microVM saved together with it, it is brought up to date.
    fn save(&self) -> Result<DeviceState, DeviceError> {
        if !self.read_only {
            rustix::fs::fdatasync(&self.file).map_err(DeviceError::io("fdatasync"))?;
        }
        let saved = Saved {
            start: self.start,
            bytes: self.bytes,
            read_only: self.read_only,
        };
        Ok(DeviceState {
            version: STATE_VERSION,
            data: serde_json::to_value(saved)
                .map_err(|error| DeviceError::State(error.to_string()))?,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        state.expect_version(STATE_VERSION)?;
        let saved: Saved = serde_json::from_value(state.data.clone())
            .map_err(|error| DeviceError::State(error.to_string()))?;
        let now = (self.start, self.bytes, self.read_only);
        if (saved.start, saved.bytes, saved.read_only) != now {
            return Err(DeviceError::State(format!(
                "persistent memory of {} bytes at {:#x} (read-only: {}) was saved; the file given now makes {} bytes at {:#x} (read-only: {})",
                saved.bytes, saved.start, saved.read_only, self.bytes, self.start, self.read_only
            )));
        }
        Ok(())
    }
}
