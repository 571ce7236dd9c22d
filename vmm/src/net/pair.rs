//! One receive and one transmit queue over one queue of the tap. Frames go
//! from and to guest memory without a copy here.

use std::{collections::VecDeque, io};

use crate::{
    memory::GuestMemory,
    rate_limit::RateLimiter,
    virtio::{ActiveQueue, Chain, ChainError, DeviceError, append_iovecs},
};

use super::tap::{HEADER_BYTES, Tap};

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: u64 = 10;
/// Longest frame: 64 KiB of IP packet behind an Ethernet header with a VLAN tag.
pub(super) const MAX_FRAME_BYTES: u64 = 65535 + ETHERNET_BYTES;
/// Ethernet header with a VLAN tag.
pub(super) const ETHERNET_BYTES: u64 = 18;
/// Shortest frame: an Ethernet header.
const MIN_FRAME_BYTES: u64 = 14;
/// Frames per turn, so that the directions and queues take turns.
const BUDGET: usize = 64;
/// Most iovecs of one system call (IOV_MAX).
const MAX_IOVECS: usize = 1024;

/// Why a direction has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    /// Its turn is over; there may be more to do.
    No,
    /// The driver has to make buffers available.
    Driver,
    /// The tap has no frame, or no room for one.
    Tap,
    /// The rate limit.
    Limit,
    /// The tap is gone.
    Gone,
}

/// What a turn works with.
pub(super) struct Direction<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) queue: &'a mut ActiveQueue,
    pub(super) limiter: Option<&'a mut RateLimiter>,
}

impl Direction<'_> {
    fn admitted(&mut self) -> Result<bool, DeviceError> {
        match &mut self.limiter {
            None => Ok(true),
            Some(limiter) => limiter.admit().map_err(DeviceError::io("rate limit")),
        }
    }

    fn charge(&mut self, bytes: u64) {
        if let Some(limiter) = &mut self.limiter {
            limiter.charge(bytes);
        }
    }
}

/// A queue pair.
pub(super) struct Pair {
    pub(super) tap: Tap,
    /// Receive buffers taken from the queue and not yet filled.
    pending: VecDeque<Chain>,
    /// Bytes of `pending`.
    room: u64,
    /// All segments of `pending` in their order, so that a small frame does not cost a walk over
    /// the buffers that the longest one would need. They point into the memory of the run that
    /// took the buffers; `put_back` forgets both at its end.
    receiving: Vec<libc::iovec>,
    /// Segments of the frame that is being sent.
    sending: Vec<libc::iovec>,
}

// SAFETY: the pointers in `receiving` and `sending` are of guest memory, which is mapped for all threads alike and
// which nobody holds references to; the rest is Send.
unsafe impl Send for Pair {}

impl Pair {
    pub(super) fn new(tap: Tap) -> Self {
        Self {
            tap,
            pending: VecDeque::new(),
            room: 0,
            receiving: Vec::new(),
            sending: Vec::new(),
        }
    }

    /// A turn of receiving. `needed` is the room for the longest frame that can come, header
    /// included; with `merge` several buffers may make it up.
    pub(super) fn receive(
        &mut self,
        mut direction: Direction<'_>,
        needed: u64,
        merge: bool,
    ) -> Result<Waiting, DeviceError> {
        for _ in 0..BUDGET {
            if !direction.admitted()? {
                return Ok(Waiting::Limit);
            }
            if !self.take_buffers(&mut direction, needed, merge)? {
                return Ok(Waiting::Driver);
            }
            // Without merging, `pending` is one buffer.
            let iovecs = &self.receiving[..self.receiving.len().min(MAX_IOVECS)];
            // SAFETY: the iovecs are of checked segments of guest memory, which is only reached
            // through volatile accesses. That memory is still mapped: all of `receiving` was added
            // in this run of the device, whose `Active` holds the memory until the run is over.
            let received = match unsafe { self.tap.receive(iovecs) } {
                Ok(count) => count as u64,
                Err(error) => match failure(&error) {
                    Some(waiting) => return Ok(waiting),
                    None => return Err(DeviceError::io("receiving from the tap")(error)),
                },
            };
            if received <= HEADER_BYTES as u64 {
                continue;
            }
            self.hand_over(&mut direction, received)?;
            direction.charge(received - HEADER_BYTES as u64);
        }
        Ok(Waiting::No)
    }

    /// A turn of transmitting.
    pub(super) fn transmit(
        &mut self,
        mut direction: Direction<'_>,
    ) -> Result<Waiting, DeviceError> {
        for _ in 0..BUDGET {
            if !direction.admitted()? {
                return Ok(Waiting::Limit);
            }
            let Some(chain) = direction.queue.pop(direction.memory)? else {
                return Ok(Waiting::Driver);
            };
            let frame = chain.readable_bytes().saturating_sub(HEADER_BYTES as u64);
            if (MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&frame) {
                self.sending.clear();
                let segments = chain.readable();
                append_iovecs(direction.memory, segments, 0, u64::MAX, &mut self.sending)
                    .map_err(ChainError::from)?;
                // SAFETY: the iovecs are of checked segments of `direction.memory`, which is only
                // reached through volatile accesses.
                if let Err(error) = unsafe { self.tap.send(&self.sending) } {
                    match failure(&error) {
                        Some(Waiting::Tap) => {
                            direction.queue.undo_pop(chain);
                            return Ok(Waiting::Tap);
                        }
                        Some(Waiting::Gone) => {
                            drop_frame(&mut direction, chain)?;
                            return Ok(Waiting::Gone);
                        }
                        // The interface is down, or the header is nonsense: frames get lost on a
                        // network.
                        _ => log::debug!("frame of {frame} bytes dropped: {error}"),
                    }
                }
                direction.charge(frame);
            }
            drop_frame(&mut direction, chain)?;
        }
        Ok(Waiting::No)
    }

    /// Puts unused receive buffers back, last first.
    pub(super) fn put_back(&mut self, queue: Option<&mut ActiveQueue>) {
        if let Some(queue) = queue {
            while let Some(chain) = self.pending.pop_back() {
                queue.undo_pop(chain);
            }
        }
        self.pending.clear();
        self.receiving.clear();
        self.room = 0;
    }

    /// Whether there is room for a frame, after taking buffers for it.
    fn take_buffers(
        &mut self,
        direction: &mut Direction<'_>,
        needed: u64,
        merge: bool,
    ) -> Result<bool, DeviceError> {
        let enough = |pair: &Self| {
            if merge {
                pair.room >= needed
            } else {
                !pair.pending.is_empty()
            }
        };
        while !enough(self) {
            let Some(chain) = direction.queue.pop(direction.memory)? else {
                // A queue that is too small for the longest frame gets what fits.
                return Ok(self.pending.len() == usize::from(direction.queue.size()));
            };
            let bytes = chain.writable_bytes();
            if bytes < HEADER_BYTES as u64 {
                return Err(DeviceError::Chain(ChainError::TooShort {
                    wanted: HEADER_BYTES as u64,
                    left: bytes,
                }));
            }
            let (memory, segments) = (direction.memory, chain.writable());
            append_iovecs(memory, segments, 0, u64::MAX, &mut self.receiving)
                .map_err(ChainError::from)?;
            self.room += bytes;
            self.pending.push_back(chain);
        }
        Ok(true)
    }

    /// Completes the buffers that a frame of `received` bytes, with its header, fills.
    fn hand_over(
        &mut self,
        direction: &mut Direction<'_>,
        received: u64,
    ) -> Result<(), DeviceError> {
        let mut left = received;
        let mut buffers = 0u16;
        for chain in &self.pending {
            buffers += 1;
            left = left.saturating_sub(chain.writable_bytes());
            if left == 0 {
                break;
            }
        }
        if let Some(first) = self.pending.front() {
            let mut writer = first.writer(direction.memory);
            writer.skip(NUM_BUFFERS)?;
            writer.write(&buffers.to_le_bytes())?;
        }
        let mut left = received;
        let mut segments = 0;
        for _ in 0..buffers {
            let Some(chain) = self.pending.pop_front() else {
                break;
            };
            segments += chain.writable().len();
            self.room -= chain.writable_bytes();
            let filled = chain.writable_bytes().min(left);
            left -= filled;
            // At most MAX_CHAIN_BYTES.
            direction
                .queue
                .complete(direction.memory, chain.into_head(), filled as u32)?;
        }
        self.receiving.drain(..segments);
        Ok(())
    }
}

fn drop_frame(direction: &mut Direction<'_>, chain: Chain) -> Result<(), DeviceError> {
    Ok(direction
        .queue
        .complete(direction.memory, chain.into_head(), 0)?)
}

/// Failures of a tap that are no error of the device.
fn failure(error: &io::Error) -> Option<Waiting> {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR) => Some(Waiting::Tap),
        Some(libc::EBADFD) => Some(Waiting::Gone),
        _ => None,
    }
}
