//! A hostile driver of each device: any queues over any memory. The device must come back, with an
//! error at worst.

#![no_main]

use std::{
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use arbitrary::Arbitrary;
use caisson_vmm::{
    balloon::Balloon,
    block::{Block, Contents},
    console::{Console, Tail},
    mem::Mem,
    memory::GuestMemory,
    net::Net,
    rng::Rng,
    virtio::{Active, ActiveQueue, Device, Interrupt, QueueSetup, RingAddresses},
    vsock::Vsock,
};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MIB: u64 = 1 << 20;
/// Ordinary memory, and after a gap what virtio-mem may plug.
const RAM: u64 = 2 * MIB;
const HOTPLUG: (u64, u64) = (128 * MIB, 128 * MIB);
/// Where each queue's rings and each buffer lie, as far as the driver is not lying.
const QUEUE_BYTES: u64 = 0x4000;
const BUFFERS: u64 = MIB;
const QUEUE_SIZE: u16 = 16;

#[derive(Debug, Arbitrary)]
struct Descriptor {
    /// Of what follows: an address of a buffer, or any address at all.
    honest: bool,
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

#[derive(Debug, Arbitrary)]
struct Queue {
    enabled: bool,
    descriptors: Vec<Descriptor>,
    available: Vec<u8>,
    /// How many are said to be available, if not all.
    count: Option<u16>,
    next_available: u16,
}

#[derive(Debug, Arbitrary)]
enum Kind {
    Balloon,
    Block { read_only: bool },
    Console,
    Mem,
    Net,
    Rng,
    Vsock,
}

#[derive(Debug, Arbitrary)]
struct Input {
    kind: Kind,
    features: u64,
    queues: [Queue; 5],
    /// Contents of the buffers, over and over.
    data: Vec<u8>,
    /// The driver resets the device and starts it again.
    again: bool,
}

fn device(kind: &Kind) -> Box<dyn Device> {
    let memory_file = || rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    match kind {
        Kind::Balloon => Box::new(Balloon::new(vec![(0, RAM)]).unwrap()),
        Kind::Block { read_only } => {
            let file = memory_file();
            rustix::fs::ftruncate(&file, 64 * 1024).unwrap();
            let contents = Contents::File(file);
            let report = Box::new(|_| {});
            Box::new(Block::new("disk".into(), contents, *read_only, None, report).unwrap())
        }
        Kind::Console => Box::new(Console::new(Tail::default(), Some(memory_file()))),
        Kind::Mem => Box::new(Mem::new(HOTPLUG.0, HOTPLUG.1).unwrap()),
        Kind::Net => {
            let mac = [2, 0, 0, 0, 0, 1];
            let report = Box::new(|_| {});
            let net = Net::new(vec![tap()], Vec::new(), mac, 1500, None, None, report);
            Box::new(net.unwrap())
        }
        Kind::Rng => Box::new(Rng),
        Kind::Vsock => {
            let directory = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
            Box::new(Vsock::new(3, listener.into(), None, Duration::from_secs(1)).unwrap())
        }
    }
}

/// A tap in this process's own network namespace.
fn tap() -> OwnedFd {
    static NAMESPACE: std::sync::Once = std::sync::Once::new();
    // SAFETY: NEWNET leaves descriptors shared; that is what the function's contract is about.
    NAMESPACE.call_once(|| unsafe {
        rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET).unwrap();
    });
    let tun = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF takes an ifreq, which lives over the call.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), 0x4004_54ca, &raw mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    tun.into()
}

/// Lays a queue out and takes it into use, unless it is refused.
fn queue(memory: &GuestMemory, index: usize, input: &Queue) -> Option<ActiveQueue> {
    if !input.enabled {
        return None;
    }
    let base = index as u64 * QUEUE_BYTES;
    let rings = RingAddresses {
        descriptors: base,
        available: base + 0x1000,
        used: base + 0x2000,
    };
    for (entry, descriptor) in (0..u64::from(QUEUE_SIZE)).zip(&input.descriptors) {
        let address = if descriptor.honest {
            BUFFERS + descriptor.address % (RAM - BUFFERS)
        } else {
            descriptor.address
        };
        let length = if descriptor.honest {
            descriptor.length % 0x2_0000
        } else {
            descriptor.length
        };
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(descriptor.flags.to_le_bytes());
        bytes.extend(descriptor.next.to_le_bytes());
        let place = GuestAddress(rings.descriptors + 16 * entry);
        memory.write_slice(&bytes, place).unwrap();
    }
    for (entry, head) in (0..u64::from(QUEUE_SIZE)).zip(&input.available) {
        let place = GuestAddress(rings.available + 4 + 2 * entry);
        memory.write_obj(u16::from(*head), place).unwrap();
    }
    let honest = input.available.len().min(QUEUE_SIZE.into()) as u16;
    let count = input
        .count
        .unwrap_or(input.next_available.wrapping_add(honest));
    memory
        .write_obj(count, GuestAddress(rings.available + 2))
        .unwrap();
    let setup = QueueSetup {
        size: QUEUE_SIZE,
        rings,
        next_available: input.next_available,
        next_used: input.next_available,
        event_index: true,
        indirect: true,
    };
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    ActiveQueue::new(memory, setup, kick, Arc::new(AtomicU64::new(0))).ok()
}

fuzz_target!(|input: Input| {
    let memory = GuestMemory::from_ranges(&[
        (GuestAddress(0), RAM as usize),
        (GuestAddress(HOTPLUG.0), HOTPLUG.1 as usize),
    ])
    .unwrap();
    if !input.data.is_empty() {
        let data: Vec<u8> = input.data.iter().copied().cycle().take(0x8000).collect();
        for at in (BUFFERS..RAM).step_by(data.len()) {
            memory.write_slice(&data, GuestAddress(at)).unwrap();
        }
    }
    let mut device = device(&input.kind);
    for _ in 0..1 + u8::from(input.again) {
        let count = device.queue_sizes().len();
        let mut active = Active {
            memory: memory.clone(),
            features: input.features & device.features(),
            queues: (0..count)
                .map(|index| queue(&memory, index, &input.queues[index % input.queues.len()]))
                .collect(),
            interrupt: Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            // It must stop as soon as it has looked at everything.
            stop: EventFd::new(EFD_NONBLOCK).unwrap(),
            completed: Arc::new(AtomicU64::new(0)),
        };
        active.stop.write(1).unwrap();
        let _ = device.run(&mut active);
        drop(active);
        device.reset();
    }
});
