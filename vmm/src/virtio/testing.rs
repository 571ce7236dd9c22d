//! A fake guest for unit tests of devices: memory, a driver that lays out
//! queues and (hostile) chains, and a thread that runs the device.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Active, ActiveQueue, Device, DeviceError, Interrupt, QueueError, QueueSetup, RingAddresses,
};
use crate::memory::GuestMemory;

/// Size of the fake guest's memory, bytes from address 0 on.
pub const MEMORY_BYTES: usize = 32 << 20;
/// Where [`TestDriver::allocate`] starts.
const BUFFERS: u64 = 4 << 20;
/// Distance of queues; queue 0 lies at the first multiple.
const QUEUE_STRIDE: u64 = 0x2_0000;
/// How long to wait for the device.
const PATIENCE: Duration = Duration::from_secs(20);

/// The descriptor has a successor.
pub const NEXT: u16 = 1;
/// The device writes the buffer.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Memory of [`MEMORY_BYTES`].
pub fn memory() -> GuestMemory {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap()
}

/// One buffer of a request.
pub enum Buffer<'a> {
    /// The device reads these bytes.
    Readable(&'a [u8]),
    /// The device may fill this many bytes.
    Writable(u32),
}

/// A request the driver made available.
#[derive(Debug, Clone)]
pub struct Request {
    /// First descriptor.
    pub head: u16,
    /// Address and length of each writable buffer.
    pub writable: Vec<(u64, u32)>,
}

/// The driver's side of one queue.
pub struct TestQueue {
    memory: GuestMemory,
    /// Entries.
    pub size: u16,
    /// Where.
    pub rings: RingAddresses,
    next_descriptor: u16,
    available: u16,
    used: u16,
    kick: EventFd,
}

impl TestQueue {
    /// As [`TestQueue::new`], with rings that read as zero.
    pub fn fresh(memory: &GuestMemory, index: usize, size: u16) -> Self {
        let queue = Self::new(memory, index, size);
        let zeros = vec![0; QUEUE_STRIDE as usize];
        memory
            .write_slice(&zeros, GuestAddress(queue.rings.descriptors))
            .unwrap();
        queue
    }

    /// Goes on from ring index `position`, as after many requests.
    pub fn set_position(&mut self, position: u16) {
        self.available = position;
        self.used = position;
        for ring in [self.rings.available, self.rings.used] {
            self.memory
                .write_obj(position, GuestAddress(ring + 2))
                .unwrap();
        }
    }

    /// Queue `index` of a device with queues of `size` entries.
    pub fn new(memory: &GuestMemory, index: usize, size: u16) -> Self {
        let base = QUEUE_STRIDE * (index as u64 + 1);
        Self {
            memory: memory.clone(),
            size,
            rings: RingAddresses {
                descriptors: base,
                available: base + 0x8000,
                used: base + 0x1_0000,
            },
            next_descriptor: 0,
            available: 0,
            used: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// The device's side, as the transport would set it up.
    pub fn activate(
        &self,
        event_index: bool,
        completed: Arc<AtomicU64>,
    ) -> Result<ActiveQueue, QueueError> {
        let setup = QueueSetup {
            size: self.size,
            rings: self.rings,
            next_available: 0,
            next_used: 0,
            event_index,
            indirect: true,
        };
        ActiveQueue::new(
            &self.memory,
            setup,
            self.kick.try_clone().unwrap(),
            completed,
        )
    }

    /// Writes one descriptor as it stands.
    pub fn write_descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = self.rings.descriptors + 16 * u64::from(index);
        self.write_descriptor_at(at, address, length, flags, next);
    }

    /// Writes one descriptor anywhere (indirect tables).
    pub fn write_descriptor_at(&self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes `head` available, whatever it is, without a kick.
    pub fn push_available(&mut self, head: u16) {
        let slot = u64::from(self.available & (self.size - 1));
        self.memory
            .write_obj(head, GuestAddress(self.rings.available + 4 + 2 * slot))
            .unwrap();
        self.set_available_index(self.available.wrapping_add(1));
    }

    /// Sets the available index, whatever it is.
    pub fn set_available_index(&mut self, index: u16) {
        self.available = index;
        self.memory
            .store(
                index,
                GuestAddress(self.rings.available + 2),
                Ordering::SeqCst,
            )
            .unwrap();
    }

    /// The device sees a notification.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next used entry (head and length), if there is one.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self
            .memory
            .load(GuestAddress(self.rings.used + 2), Ordering::SeqCst)
            .unwrap();
        if index == self.used {
            return None;
        }
        let slot = u64::from(self.used & (self.size - 1));
        let at = self.rings.used + 4 + 8 * slot;
        let id: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        // Ask for an interrupt for the next one (used_event).
        self.memory
            .store(
                self.used,
                GuestAddress(self.rings.available + 4 + 2 * u64::from(self.size)),
                Ordering::SeqCst,
            )
            .unwrap();
        Some((u16::try_from(id).unwrap(), length))
    }
}

/// What the device's thread ends with.
type Outcome<D> = (D, Active, Result<(), DeviceError>);

/// A driver with its guest memory and the thread that runs its device.
pub struct TestDriver<D> {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The queues, all of the device's largest sizes (at most 1024).
    pub queues: Vec<TestQueue>,
    /// The device's interrupt line.
    pub interrupt: Interrupt,
    /// Requests completed.
    pub completed: Arc<AtomicU64>,
    next_buffer: u64,
    stop: EventFd,
    thread: Option<JoinHandle<Outcome<D>>>,
    paused: Option<(D, Active)>,
}

impl<D: Device + 'static> TestDriver<D> {
    /// Runs `device` with `features` accepted, all queues enabled.
    pub fn start(device: D, features: u64) -> Self {
        Self::start_with_memory(device, features, memory())
    }

    /// As [`TestDriver::start`] on a given memory, which must have [`MEMORY_BYTES`] at 0.
    pub fn start_with_memory(device: D, features: u64, memory: GuestMemory) -> Self {
        let completed = Arc::new(AtomicU64::new(0));
        let queues: Vec<_> = device
            .queue_sizes()
            .iter()
            .enumerate()
            .map(|(index, size)| TestQueue::new(&memory, index, (*size).min(1024)))
            .collect();
        let event_index = features & (1 << 29) != 0;
        let active_queues = queues
            .iter()
            .map(|queue| Some(queue.activate(event_index, completed.clone()).unwrap()))
            .collect();
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let active = Active {
            memory: memory.clone(),
            features,
            queues: active_queues,
            interrupt: interrupt.clone(),
            stop: stop.try_clone().unwrap(),
            completed: completed.clone(),
        };
        let mut driver = Self {
            memory,
            queues,
            interrupt,
            completed,
            next_buffer: BUFFERS,
            stop,
            thread: None,
            paused: Some((device, active)),
        };
        driver.resume();
        driver
    }

    /// Lets the device run again after [`TestDriver::pause`].
    pub fn resume(&mut self) {
        let (mut device, mut active) = self.paused.take().unwrap();
        self.thread = Some(std::thread::spawn(move || {
            crate::seccomp::enter_in_test(device.name());
            let result = device.run(&mut active);
            (device, active, result)
        }));
    }

    /// Stops the device's thread as a pause does; what its `run` returned.
    pub fn pause(&mut self) -> Result<(), DeviceError> {
        self.stop.write(1).unwrap();
        self.join()
    }

    /// Waits until the device gives up by itself; what its `run` returned.
    pub fn join(&mut self) -> Result<(), DeviceError> {
        let thread = self.thread.take().unwrap();
        let start = Instant::now();
        while !thread.is_finished() {
            assert!(start.elapsed() < PATIENCE, "the device does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
        let (device, active, result) = thread.join().unwrap();
        let _ = self.stop.read();
        self.paused = Some((device, active));
        result
    }

    /// The stopped device (after [`TestDriver::pause`] or [`TestDriver::join`]).
    pub fn device(&mut self) -> &mut D {
        &mut self.paused.as_mut().unwrap().0
    }

    /// Stops the device and takes it out.
    pub fn stop(mut self) -> (D, Result<(), DeviceError>) {
        let result = if self.thread.is_some() {
            self.pause()
        } else {
            Ok(())
        };
        (self.paused.take().unwrap().0, result)
    }

    /// Fresh guest memory, 4 KiB aligned.
    pub fn allocate(&mut self, length: u32) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += u64::from(length.max(1)).next_multiple_of(4096);
        assert!(
            self.next_buffer <= MEMORY_BYTES as u64,
            "fake guest memory is full"
        );
        address
    }

    /// Makes a request available without a kick.
    pub fn push(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> Request {
        let head = self.queues[queue].next_descriptor;
        let mut writable = Vec::new();
        for (position, buffer) in buffers.iter().enumerate() {
            let (length, mut flags) = match buffer {
                Buffer::Readable(bytes) => (u32::try_from(bytes.len()).unwrap(), 0),
                Buffer::Writable(length) => (*length, WRITE),
            };
            let address = self.allocate(length);
            match buffer {
                Buffer::Readable(bytes) => self
                    .memory
                    .write_slice(bytes, GuestAddress(address))
                    .unwrap(),
                Buffer::Writable(_) => writable.push((address, length)),
            }
            let queue = &mut self.queues[queue];
            let index = queue.next_descriptor;
            let next = (index + 1) % queue.size;
            if position + 1 < buffers.len() {
                flags |= NEXT;
            }
            queue.write_descriptor(index, address, length, flags, next);
            queue.next_descriptor = next;
        }
        self.queues[queue].push_available(head);
        Request { head, writable }
    }

    /// Makes a request available, kicks, and waits until it is used. Returns the used length and
    /// the bytes of all writable buffers.
    pub fn request(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> (u32, Vec<u8>) {
        let request = self.push(queue, buffers);
        self.queues[queue].kick();
        let (head, length) = self.wait_used(queue);
        assert_eq!(head, request.head, "another request was used");
        (length, self.read_writable(&request))
    }

    /// Waits for the next used entry: head and length.
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        self.poll_used(queue, PATIENCE)
            .expect("the device used no buffer in time")
    }

    /// Waits at most `patience` for the next used entry.
    pub fn poll_used(&mut self, queue: usize, patience: Duration) -> Option<(u16, u32)> {
        let start = Instant::now();
        loop {
            if let Some(used) = self.queues[queue].pop_used() {
                return Some(used);
            }
            if start.elapsed() > patience {
                return None;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// The bytes of all writable buffers of a request.
    pub fn read_writable(&self, request: &Request) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (address, length) in &request.writable {
            let start = bytes.len();
            bytes.resize(start + *length as usize, 0);
            self.memory
                .read_slice(&mut bytes[start..], GuestAddress(*address))
                .unwrap();
        }
        bytes
    }
}
