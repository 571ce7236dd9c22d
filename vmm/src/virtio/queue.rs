//! Split virtqueues (virtio 1.2 section 2.7), device side.
//!
//! Everything here is read from memory the guest can change at any time: each
//! value is read once, checked, and then used from the copy.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering, fence},
};

use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Interrupt,
    chain::{Chain, Head, Segment},
};
use crate::memory::GuestMemory;

/// Most segments of one chain: what one vectored system call takes (`IOV_MAX`).
pub const MAX_CHAIN_SEGMENTS: usize = 1024;
/// Most bytes of one chain.
pub const MAX_CHAIN_BYTES: u64 = 1 << 30;

const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;
const DESCRIPTOR_INDIRECT: u16 = 4;
const AVAILABLE_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;
const DESCRIPTOR_BYTES: u64 = 16;

/// How the driver broke a queue.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QueueError {
    /// A size that is no power of two or exceeds the device's.
    #[error("queue size {0} is not allowed")]
    Size(u16),
    /// A ring that is misaligned or not wholly in one region of guest memory.
    #[error("the {ring} ring at {address:#x} is misaligned or not in guest memory")]
    Ring {
        /// Which.
        ring: &'static str,
        /// Where the driver put it.
        address: u64,
    },
    /// The available index ran ahead of the queue.
    #[error("available index {index} is more than a queue ahead of {next}")]
    AvailableIndex {
        /// As read.
        index: u16,
        /// The next the device would take.
        next: u16,
    },
    /// A descriptor index beyond its table.
    #[error("descriptor {index} of a table of {size}")]
    DescriptorIndex {
        /// As read.
        index: u32,
        /// Entries of the table.
        size: u32,
    },
    /// A chain that is still in flight was made available again.
    #[error("descriptor {0} is in flight already")]
    InFlight(u16),
    /// A chain that is longer than its table: it loops.
    #[error("the chain at descriptor {0} loops")]
    Loop(u16),
    /// More segments or bytes than a device handles.
    #[error("the chain at descriptor {0} is too long")]
    TooLong(u16),
    /// A readable buffer behind a writable one.
    #[error("a readable buffer follows a writable one in the chain at descriptor {0}")]
    Order(u16),
    /// An indirect descriptor within an indirect table, followed by another, unnegotiated, or of a bad length.
    #[error("bad indirect descriptor in the chain at descriptor {0}")]
    Indirect(u16),
    /// A buffer outside guest memory, of no length, or writable where guest memory is read-only.
    #[error("buffer of {length} bytes at {address:#x} is not in guest memory")]
    Buffer {
        /// Guest address.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// A ring could not be accessed after all.
    #[error("ring access failed: {0}")]
    Access(String),
}

impl From<GuestMemoryError> for QueueError {
    fn from(error: GuestMemoryError) -> Self {
        Self::Access(error.to_string())
    }
}

/// Where the parts of a queue lie in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available (driver) ring.
    pub available: u64,
    /// Used (device) ring.
    pub used: u64,
}

/// What the driver set a queue up with; consumed into an [`ActiveQueue`] at `DRIVER_OK`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueSetup {
    /// Entries.
    pub size: u16,
    /// Where.
    pub rings: RingAddresses,
    /// Next available entry to take (0 but after a restore).
    pub next_available: u16,
    /// Next used entry to fill (0 but after a restore).
    pub next_used: u16,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_index: bool,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
}

/// A queue in use. Its configuration cannot change any more.
pub struct ActiveQueue {
    setup: QueueSetup,
    kick: EventFd,
    completed: Arc<AtomicU64>,
    next_available: u16,
    next_used: u16,
    /// `next_used` when the driver was last told.
    signalled: u16,
    /// The driver kicks for the next entry it adds.
    armed: bool,
    in_flight: Vec<u64>,
    /// Storage of completed chains, for new ones.
    spare: Vec<Vec<Segment>>,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

// SAFETY: plain integers without padding (8 + 4 + 2 + 2 bytes).
unsafe impl ByteValued for Descriptor {}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct UsedElement {
    id: u32,
    length: u32,
}

// SAFETY: plain integers without padding.
unsafe impl ByteValued for UsedElement {}

impl ActiveQueue {
    /// Checks `setup` and starts the queue. `kick` is what the driver's notifications write to;
    /// `completed` counts requests.
    ///
    /// # Errors
    /// [`QueueError::Size`] (zero, no power of two) or [`QueueError::Ring`].
    pub fn new(
        memory: &GuestMemory,
        setup: QueueSetup,
        kick: EventFd,
        completed: Arc<AtomicU64>,
    ) -> Result<Self, QueueError> {
        let size = u64::from(setup.size);
        if !setup.size.is_power_of_two() || size > 32768 {
            return Err(QueueError::Size(setup.size));
        }
        let rings = setup.rings;
        for (ring, address, bytes, alignment) in [
            ("descriptor", rings.descriptors, DESCRIPTOR_BYTES * size, 16),
            ("available", rings.available, 6 + 2 * size, 2),
            ("used", rings.used, 6 + 8 * size, 4),
        ] {
            // A size of at most 32768 entries fits.
            let whole = memory.get_slice(GuestAddress(address), bytes as usize);
            if address % alignment != 0 || whole.is_err() || !writable(memory, address) {
                return Err(QueueError::Ring { ring, address });
            }
        }
        Ok(Self {
            next_available: setup.next_available,
            next_used: setup.next_used,
            signalled: setup.next_used,
            armed: false,
            in_flight: vec![0; usize::from(setup.size).div_ceil(64)],
            spare: Vec::new(),
            setup,
            kick,
            completed,
        })
    }

    /// Readable when the driver has notified.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.setup.size
    }

    /// Where the rings lie, for a back end in another process.
    pub fn rings(&self) -> RingAddresses {
        self.setup.rings
    }

    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub fn event_index(&self) -> bool {
        self.setup.event_index
    }

    /// Next available entry to take and next used entry to fill.
    pub fn position(&self) -> (u16, u16) {
        (self.next_available, self.next_used)
    }

    /// Takes over where a back end in another process has stopped, nothing being in flight.
    pub fn set_position(&mut self, next_available: u16, next_used: u16) {
        self.next_available = next_available;
        self.next_used = next_used;
        self.signalled = next_used;
        self.armed = false;
    }

    /// The setup with which an equal queue goes on from here. Nothing may be in flight.
    pub fn save(&self) -> QueueSetup {
        QueueSetup {
            next_available: self.next_available,
            next_used: self.next_used,
            ..self.setup
        }
    }

    /// The next request. `None`: the queue is empty, and the driver will kick for the next entry.
    ///
    /// # Errors
    /// [`QueueError`]: the driver broke the queue; the device has to give up.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        loop {
            let index: u16 = memory.load(self.available_at(2), Ordering::Acquire)?;
            let pending = index.wrapping_sub(self.next_available);
            if pending > self.setup.size {
                return Err(QueueError::AvailableIndex {
                    index,
                    next: self.next_available,
                });
            }
            if pending > 0 {
                break;
            }
            if self.armed {
                return Ok(None);
            }
            self.arm(memory)?;
        }
        self.disarm(memory)?;
        let slot = self.next_available & (self.setup.size - 1);
        let head: u16 = memory.read_obj(self.available_at(4 + 2 * u64::from(slot)))?;
        let chain = self.walk(memory, head)?;
        self.set_in_flight(head, true);
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    /// Puts back the request popped last: it will be popped again. For devices that lack what
    /// the request needs (credit, room); the driver does not kick for it again.
    pub fn undo_pop(&mut self, chain: Chain) {
        self.set_in_flight(chain.head.index, false);
        self.next_available = self.next_available.wrapping_sub(1);
        self.recycle(chain.head);
    }

    /// Whether a request waits. Does not arm notifications.
    ///
    /// # Errors
    /// [`QueueError::Access`].
    pub fn has_available(&self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let index: u16 = memory.load(self.available_at(2), Ordering::Acquire)?;
        Ok(index != self.next_available)
    }

    /// Hands a request back with `written` bytes of its writable part filled. The driver is not
    /// told before [`ActiveQueue::signal`].
    ///
    /// # Errors
    /// [`QueueError::Access`].
    pub fn complete(
        &mut self,
        memory: &GuestMemory,
        head: Head,
        written: u32,
    ) -> Result<(), QueueError> {
        let slot = u64::from(self.next_used & (self.setup.size - 1));
        let element = UsedElement {
            id: u32::from(head.index).to_le(),
            length: written.to_le(),
        };
        memory.write_obj(element, self.used_at(4 + 8 * slot))?;
        self.next_used = self.next_used.wrapping_add(1);
        memory.store(self.next_used.to_le(), self.used_at(2), Ordering::Release)?;
        self.set_in_flight(head.index, false);
        self.recycle(head);
        self.completed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Interrupts the driver if there are completions it was not told of and it wants to be.
    ///
    /// # Errors
    /// [`QueueError::Access`].
    pub fn signal(
        &mut self,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), QueueError> {
        if self.signalled == self.next_used {
            return Ok(());
        }
        // The used index must be visible before the driver's wish is read: it re-reads the index
        // after it changes its wish (virtio 1.2 section 2.7.7.2).
        fence(Ordering::SeqCst);
        let wanted = if self.setup.event_index {
            let event: u16 = memory.load(
                self.available_at(4 + 2 * u64::from(self.setup.size)),
                Ordering::Relaxed,
            )?;
            let since = self.next_used.wrapping_sub(event).wrapping_sub(1);
            since < self.next_used.wrapping_sub(self.signalled)
        } else {
            let flags: u16 = memory.load(self.available_at(0), Ordering::Relaxed)?;
            flags & AVAILABLE_NO_INTERRUPT == 0
        };
        self.signalled = self.next_used;
        if wanted {
            interrupt.used();
        }
        Ok(())
    }

    fn arm(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        if self.setup.event_index {
            let event = self.used_at(4 + 8 * u64::from(self.setup.size));
            memory.store(self.next_available.to_le(), event, Ordering::Relaxed)?;
        } else {
            memory.store(0u16, self.used_at(0), Ordering::Relaxed)?;
        }
        // The driver must see the wish, or we its entry.
        fence(Ordering::SeqCst);
        self.armed = true;
        Ok(())
    }

    fn disarm(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        // With event indexes the driver passes the event at most once by itself.
        if self.armed && !self.setup.event_index {
            memory.store(USED_NO_NOTIFY.to_le(), self.used_at(0), Ordering::Relaxed)?;
        }
        self.armed = false;
        Ok(())
    }

    /// Walks and checks the chain at `head`.
    fn walk(&mut self, memory: &GuestMemory, head: u16) -> Result<Chain, QueueError> {
        if head >= self.setup.size {
            return Err(QueueError::DescriptorIndex {
                index: head.into(),
                size: self.setup.size.into(),
            });
        }
        if self.is_in_flight(head) {
            return Err(QueueError::InFlight(head));
        }
        let mut chain = Chain {
            head: Head {
                index: head,
                segments: self.spare.pop().unwrap_or_default(),
            },
            readable: 0,
            readable_bytes: 0,
            writable_bytes: 0,
        };
        let mut table = Table {
            address: self.setup.rings.descriptors,
            size: self.setup.size.into(),
            indirect: false,
        };
        let mut index = u32::from(head);
        let mut steps = 0;
        loop {
            steps += 1;
            if steps > table.size {
                return Err(QueueError::Loop(head));
            }
            let descriptor = table.read(memory, index)?;
            if descriptor.flags & DESCRIPTOR_INDIRECT != 0 {
                table = table.enter(&descriptor, self.setup.indirect, head)?;
                index = 0;
                steps = 0;
                continue;
            }
            chain.push(memory, &descriptor)?;
            if descriptor.flags & DESCRIPTOR_NEXT == 0 {
                return Ok(chain);
            }
            index = descriptor.next.into();
        }
    }

    fn recycle(&mut self, head: Head) {
        let mut segments = head.segments;
        segments.clear();
        // As many as ever were in flight at once, so at most one per entry.
        if self.spare.len() < usize::from(self.setup.size) {
            self.spare.push(segments);
        }
    }

    fn is_in_flight(&self, head: u16) -> bool {
        self.in_flight[usize::from(head) / 64] & (1 << (head % 64)) != 0
    }

    fn set_in_flight(&mut self, head: u16, value: bool) {
        let word = &mut self.in_flight[usize::from(head) / 64];
        if value {
            *word |= 1 << (head % 64);
        } else {
            *word &= !(1 << (head % 64));
        }
    }

    // Offsets within rings that `new` checked: the sums cannot overflow.
    fn available_at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.setup.rings.available + offset)
    }

    fn used_at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.setup.rings.used + offset)
    }
}

/// A table of descriptors: the queue's, or an indirect one.
struct Table {
    address: u64,
    size: u32,
    indirect: bool,
}

impl Table {
    fn read(&self, memory: &GuestMemory, index: u32) -> Result<Descriptor, QueueError> {
        if index >= self.size {
            return Err(QueueError::DescriptorIndex {
                index,
                size: self.size,
            });
        }
        let address = self
            .address
            .checked_add(u64::from(index) * DESCRIPTOR_BYTES)
            .ok_or(QueueError::Buffer {
                address: self.address,
                length: DESCRIPTOR_BYTES as u32,
            })?;
        Ok(memory.read_obj(GuestAddress(address))?)
    }

    /// The indirect table that `descriptor` refers to (virtio 1.2 section 2.7.5.3).
    fn enter(
        &self,
        descriptor: &Descriptor,
        negotiated: bool,
        head: u16,
    ) -> Result<Self, QueueError> {
        let entries = descriptor.length / DESCRIPTOR_BYTES as u32;
        let sound = negotiated
            && !self.indirect
            && descriptor.flags & DESCRIPTOR_NEXT == 0
            && descriptor.length.is_multiple_of(DESCRIPTOR_BYTES as u32)
            && (1..=MAX_CHAIN_SEGMENTS as u32).contains(&entries);
        if !sound {
            return Err(QueueError::Indirect(head));
        }
        Ok(Self {
            address: descriptor.address,
            size: entries,
            indirect: true,
        })
    }
}

impl Chain {
    /// Adds a descriptor's buffer, cut at the borders of regions.
    fn push(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), QueueError> {
        let head = self.head.index;
        let write = descriptor.flags & DESCRIPTOR_WRITE != 0;
        if !write && self.writable_bytes > 0 {
            return Err(QueueError::Order(head));
        }
        let bad = || QueueError::Buffer {
            address: descriptor.address,
            length: descriptor.length,
        };
        let length = u64::from(descriptor.length);
        if length == 0 {
            return Err(bad());
        }
        if self.readable_bytes + self.writable_bytes + length > MAX_CHAIN_BYTES {
            return Err(QueueError::TooLong(head));
        }
        let mut address = descriptor.address;
        let mut left = descriptor.length;
        while left > 0 {
            let region = memory.find_region(GuestAddress(address)).ok_or_else(bad)?;
            if write && region.prot() & libc::PROT_WRITE == 0 {
                return Err(bad());
            }
            let room = region.last_addr().0 - address;
            // At most `left`, which is a u32.
            let count = u64::from(left).min(room.saturating_add(1)) as u32;
            if self.head.segments.len() == MAX_CHAIN_SEGMENTS {
                return Err(QueueError::TooLong(head));
            }
            self.head.segments.push(Segment {
                address: GuestAddress(address),
                length: count,
            });
            left -= count;
            if left > 0 {
                address = address.checked_add(count.into()).ok_or_else(bad)?;
            }
            if !write {
                self.readable += 1;
            }
        }
        if write {
            self.writable_bytes += length;
        } else {
            self.readable_bytes += length;
        }
        Ok(())
    }
}

fn writable(memory: &GuestMemory, address: u64) -> bool {
    memory
        .find_region(GuestAddress(address))
        .is_some_and(|region| region.prot() & libc::PROT_WRITE != 0)
}
