//! virtio-mem (virtio 1.2 section 5.15): RAM that the guest plugs and unplugs
//! in blocks, as much as the host asks for.
//!
//! The whole region is mapped from the start and costs nothing until it is
//! touched; unplugged blocks go back to the host. A guest that touches blocks
//! which are not plugged gets memory there nevertheless, at most the region:
//! the host bounds it by the pod's cgroup.
//!
//! System calls of the thread: poll, read and write (eventfds), madvise,
//! write (log), and the allocator's and futex.

mod blocks;
#[cfg(test)]
mod tests;

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    memory::{GuestMemory, discard},
    virtio::{Active, Chain, ConfigSpace, Device, DeviceError, DeviceState},
};
use blocks::Blocks;

/// Device type.
const ID: u32 = 24;
/// The driver must not touch unplugged memory.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
const QUEUE_SIZES: [u16; 1] = [64];
const STATE_VERSION: u16 = 1;

/// Bytes that are plugged or unplugged at once: a huge page.
pub const BLOCK_BYTES: u64 = 2 << 20;
const MIB: u64 = 1 << 20;

/// Bytes of `struct virtio_mem_req`.
const REQUEST_BYTES: usize = 24;
const REQUEST_PLUG: u16 = 0;
const REQUEST_UNPLUG: u16 = 1;
const REQUEST_UNPLUG_ALL: u16 = 2;
const REQUEST_STATE: u16 = 3;

/// Bytes of `struct virtio_mem_resp`.
const RESPONSE_BYTES: usize = 10;
const RESPONSE_ACK: u16 = 0;
const RESPONSE_NACK: u16 = 1;
const RESPONSE_BUSY: u16 = 2;
const RESPONSE_ERROR: u16 = 3;

const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

/// Sets how much memory the guest shall plug, from any thread.
#[derive(Clone)]
pub struct MemHandle(Arc<Shared>);

struct Shared {
    start: u64,
    bytes: u64,
    requested: AtomicU64,
    plugged: AtomicU64,
    generation: AtomicU32,
    changed: EventFd,
}

impl MemHandle {
    /// Asks the guest to have `mib` MiB plugged. It does so as far and as fast as it can.
    ///
    /// # Errors
    /// [`DeviceError::Backend`] for more than the region, or no multiple of the block size.
    pub fn set_mib(&self, mib: u32) -> Result<(), DeviceError> {
        let bytes = u64::from(mib) * MIB;
        if bytes > self.0.bytes || !bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(DeviceError::Backend(format!(
                "{mib} MiB of hotplugged memory: at most {} MiB in steps of {} MiB are possible",
                self.0.bytes / MIB,
                BLOCK_BYTES / MIB
            )));
        }
        self.0.requested.store(bytes, Ordering::Release);
        self.0.generation.fetch_add(1, Ordering::AcqRel);
        // A counter that is full is readable as well.
        let _ = self.0.changed.write(1);
        Ok(())
    }

    /// What the guest has plugged, MiB.
    pub fn plugged_mib(&self) -> u32 {
        // The region is smaller than 4 TiB.
        (self.0.plugged.load(Ordering::Acquire) / MIB) as u32
    }
}

/// `struct virtio_mem_config`.
impl ConfigSpace for Shared {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let node_and_padding = 0;
        let fields = [
            BLOCK_BYTES,
            node_and_padding,
            self.start,
            self.bytes,
            // All of the region is usable.
            self.bytes,
            self.plugged.load(Ordering::Acquire),
            self.requested.load(Ordering::Acquire),
        ];
        let bytes: Vec<u8> = fields
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect();
        bytes.read(offset, data);
    }

    fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }
}

/// A virtio-mem device.
pub struct Mem {
    shared: Arc<Shared>,
    blocks: Blocks,
    /// Generation of the configuration that the driver was last told of.
    told: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    requested_bytes: u64,
    region_bytes: u64,
    plugged: Vec<u64>,
}

/// A request of the driver.
enum Request {
    Plug(Range<u64>),
    Unplug(Range<u64>),
    UnplugAll,
    State(Range<u64>),
    /// Of an unknown type, or of blocks that do not exist.
    Bad,
}

impl Mem {
    /// A device over the region of `bytes` at `start`, with nothing plugged.
    ///
    /// # Errors
    /// [`DeviceError::Backend`] when the region does not consist of whole blocks,
    /// [`DeviceError::Io`] without an eventfd.
    pub fn new(start: u64, bytes: u64) -> Result<Self, DeviceError> {
        if bytes == 0 || !(start | bytes).is_multiple_of(BLOCK_BYTES) {
            return Err(DeviceError::Backend(format!(
                "{} MiB of hotpluggable memory are not whole blocks of {} MiB",
                bytes / MIB,
                BLOCK_BYTES / MIB
            )));
        }
        let changed =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::io("eventfd"))?;
        Ok(Self {
            shared: Arc::new(Shared {
                start,
                bytes,
                requested: AtomicU64::new(0),
                plugged: AtomicU64::new(0),
                generation: AtomicU32::new(0),
                changed,
            }),
            blocks: Blocks::new(bytes / BLOCK_BYTES),
            told: 0,
        })
    }

    /// For changing its size.
    pub fn handle(&self) -> MemHandle {
        MemHandle(self.shared.clone())
    }

    fn parse(&self, bytes: &[u8; REQUEST_BYTES]) -> Request {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let kind = half(0);
        if kind == REQUEST_UNPLUG_ALL {
            return Request::UnplugAll;
        }
        let address = (8..16)
            .rev()
            .fold(0, |word, at| word << 8 | u64::from(bytes[at]));
        let count = u64::from(half(16));
        let blocks = address
            .checked_sub(self.shared.start)
            .filter(|offset| offset.is_multiple_of(BLOCK_BYTES))
            .map(|offset| offset / BLOCK_BYTES)
            .filter(|first| *first < self.blocks.count() && count <= self.blocks.count() - first)
            .map(|first| first..first + count)
            .filter(|blocks| !blocks.is_empty());
        match (kind, blocks) {
            (REQUEST_PLUG, Some(blocks)) => Request::Plug(blocks),
            (REQUEST_UNPLUG, Some(blocks)) => Request::Unplug(blocks),
            (REQUEST_STATE, Some(blocks)) => Request::State(blocks),
            _ => Request::Bad,
        }
    }

    /// Does what is asked: type of the response, and its state.
    fn perform(&mut self, memory: &GuestMemory, request: Request) -> (u16, u16) {
        let response = match request {
            Request::Plug(blocks) => self.plug(blocks),
            Request::Unplug(blocks) => {
                if self.blocks.plugged_within(blocks.clone()) == blocks.end - blocks.start {
                    self.unplug(memory, blocks)
                } else {
                    RESPONSE_ERROR
                }
            }
            Request::UnplugAll => self.unplug_all(memory),
            Request::State(blocks) => return (RESPONSE_ACK, self.state(blocks)),
            Request::Bad => RESPONSE_ERROR,
        };
        let plugged = self.blocks.plugged() * BLOCK_BYTES;
        self.shared.plugged.store(plugged, Ordering::Release);
        (response, 0)
    }

    fn plug(&mut self, blocks: Range<u64>) -> u16 {
        if self.blocks.plugged_within(blocks.clone()) > 0 {
            return RESPONSE_ERROR;
        }
        let wanted = (self.blocks.plugged() + blocks.end - blocks.start) * BLOCK_BYTES;
        if wanted > self.shared.requested.load(Ordering::Acquire) {
            return RESPONSE_NACK;
        }
        self.blocks.set(blocks, true);
        RESPONSE_ACK
    }

    fn unplug(&mut self, memory: &GuestMemory, blocks: Range<u64>) -> u16 {
        let start = self.shared.start + blocks.start * BLOCK_BYTES;
        let bytes = (blocks.end - blocks.start) * BLOCK_BYTES;
        match discard(memory, start, bytes) {
            Ok(()) => {
                self.blocks.set(blocks, false);
                RESPONSE_ACK
            }
            Err(error) => {
                log::warn!("unplugging {bytes} bytes at {start:#x}: {error}");
                RESPONSE_BUSY
            }
        }
    }

    fn unplug_all(&mut self, memory: &GuestMemory) -> u16 {
        while let Some(blocks) = self.blocks.first_run() {
            let response = self.unplug(memory, blocks);
            if response != RESPONSE_ACK {
                return response;
            }
        }
        RESPONSE_ACK
    }

    fn state(&self, blocks: Range<u64>) -> u16 {
        let plugged = self.blocks.plugged_within(blocks.clone());
        if plugged == 0 {
            STATE_UNPLUGGED
        } else if plugged == blocks.end - blocks.start {
            STATE_PLUGGED
        } else {
            STATE_MIXED
        }
    }

    fn answer(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<u32, DeviceError> {
        let mut bytes = [0; REQUEST_BYTES];
        chain.reader(memory).read(&mut bytes)?;
        let request = self.parse(&bytes);
        let mut writer = chain.writer(memory);
        if writer.remaining() < RESPONSE_BYTES as u64 {
            // Nothing is done that could not be told.
            writer.skip(RESPONSE_BYTES as u64)?;
        }
        let (kind, state) = self.perform(memory, request);
        let mut response = [0; RESPONSE_BYTES];
        response[..2].copy_from_slice(&kind.to_le_bytes());
        response[8..].copy_from_slice(&state.to_le_bytes());
        writer.write(&response)?;
        Ok(writer.written())
    }
}

impl Device for Mem {
    fn id(&self) -> u32 {
        ID
    }

    fn name(&self) -> &'static str {
        "mem"
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        self.shared.clone()
    }

    fn run(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        let shared = self.shared.clone();
        let memory = active.memory.clone();
        let interrupt = active.interrupt.clone();
        loop {
            let queue = active.queue(0)?;
            queue.serve(&memory, &interrupt, |chain| self.answer(&memory, chain))?;
            let generation = shared.generation();
            if generation != self.told {
                self.told = generation;
                interrupt.config_changed();
            }
            if !active.wait_or(&[0], Some(&shared.changed))? {
                return Ok(());
            }
        }
    }

    /// Plugged memory stays: it is RAM that the guest may be using (virtio 1.2 section 5.15.6.1).
    fn reset(&mut self) {}

    fn save(&self) -> Result<DeviceState, DeviceError> {
        let saved = Saved {
            requested_bytes: self.shared.requested.load(Ordering::Acquire),
            region_bytes: self.shared.bytes,
            plugged: self.blocks.words().to_vec(),
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
        let sound = saved.region_bytes == self.shared.bytes
            && saved.requested_bytes <= self.shared.bytes
            && saved.requested_bytes.is_multiple_of(BLOCK_BYTES);
        let blocks = Blocks::from_words(self.blocks.count(), saved.plugged)
            .filter(|_| sound)
            .ok_or_else(|| {
                DeviceError::State(format!(
                    "the memory was saved as {} MiB of hotpluggable memory, {} MiB of it asked for; now there are {} MiB",
                    saved.region_bytes / MIB,
                    saved.requested_bytes / MIB,
                    self.shared.bytes / MIB
                ))
            })?;
        let plugged = blocks.plugged() * BLOCK_BYTES;
        self.shared.plugged.store(plugged, Ordering::Release);
        self.shared
            .requested
            .store(saved.requested_bytes, Ordering::Release);
        // The driver may not have been told of the size yet.
        self.shared.generation.fetch_add(1, Ordering::AcqRel);
        self.blocks = blocks;
        Ok(())
    }
}
