//! What hostile drivers do to queues.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    ActiveQueue, Interrupt, QueueError, QueueSetup, RingAddresses,
    testing::{INDIRECT, MEMORY_BYTES, NEXT, TestQueue, WRITE, memory},
};
use crate::memory::GuestMemory;

const SIZE: u16 = 16;
const TABLE: u64 = 0x60_0000;

struct Bench {
    memory: GuestMemory,
    driver: TestQueue,
    device: ActiveQueue,
    interrupt: Interrupt,
    completed: Arc<AtomicU64>,
}

fn bench_in(memory: GuestMemory, event_index: bool) -> Bench {
    let driver = TestQueue::new(&memory, 0, SIZE);
    let completed = Arc::new(AtomicU64::new(0));
    let device = driver.activate(event_index, completed.clone()).unwrap();
    Bench {
        memory,
        driver,
        device,
        interrupt: Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        completed,
    }
}

fn bench() -> Bench {
    bench_in(memory(), false)
}

impl Bench {
    fn pop_error(&mut self) -> QueueError {
        self.device.pop(&self.memory).unwrap_err()
    }

    fn complete_one(&mut self) {
        let chain = self.device.pop(&self.memory).unwrap().unwrap();
        self.device
            .complete(&self.memory, chain.into_head(), 0)
            .unwrap();
    }

    fn interrupts(&self) -> u64 {
        self.interrupt.irqfd().read().unwrap_or(0)
    }
}

#[test]
fn chains_arrive_with_readable_before_writable_parts() {
    let mut bench = bench();
    bench.driver.write_descriptor(3, 0x1000, 16, NEXT, 5);
    bench.driver.write_descriptor(5, 0x2000, 8, NEXT, 4);
    bench.driver.write_descriptor(4, 0x3000, 32, WRITE, 0);
    bench.driver.push_available(3);
    let chain = bench.device.pop(&bench.memory).unwrap().unwrap();
    assert_eq!(chain.index(), 3);
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (24, 32));
    assert_eq!((chain.readable().len(), chain.writable().len()), (2, 1));
    assert_eq!(chain.writable()[0].address, GuestAddress(0x3000));
    let mut writer = chain.writer(&bench.memory);
    writer.write(b"answer").unwrap();
    let written = writer.written();
    bench
        .device
        .complete(&bench.memory, chain.into_head(), written)
        .unwrap();
    assert_eq!(bench.driver.pop_used(), Some((3, 6)));
    assert_eq!(bench.completed.load(Ordering::Relaxed), 1);
    assert!(bench.device.pop(&bench.memory).unwrap().is_none());
}

#[test]
fn a_chain_in_flight_cannot_be_made_available_again() {
    let mut bench = bench();
    bench.driver.write_descriptor(0, 0x1000, 16, 0, 0);
    bench.driver.push_available(0);
    bench.driver.push_available(0);
    let first = bench.device.pop(&bench.memory).unwrap().unwrap();
    assert_eq!(bench.pop_error(), QueueError::InFlight(0));
    bench
        .device
        .complete(&bench.memory, first.into_head(), 0)
        .unwrap();
    // Completed, it may come again.
    bench.complete_one();
}

#[test]
fn loops_end() {
    let mut bench = bench();
    bench.driver.write_descriptor(0, 0x1000, 16, NEXT, 1);
    bench.driver.write_descriptor(1, 0x1000, 16, NEXT, 0);
    bench.driver.push_available(0);
    assert_eq!(bench.pop_error(), QueueError::Loop(0));
}

#[test]
fn indexes_beyond_their_tables_are_refused() {
    let mut bench = bench();
    bench.driver.push_available(SIZE);
    let error = QueueError::DescriptorIndex {
        index: SIZE.into(),
        size: SIZE.into(),
    };
    assert_eq!(bench.pop_error(), error);
    let mut bench = self::bench();
    bench.driver.write_descriptor(0, 0x1000, 16, NEXT, 0xffff);
    bench.driver.push_available(0);
    let error = QueueError::DescriptorIndex {
        index: 0xffff,
        size: SIZE.into(),
    };
    assert_eq!(bench.pop_error(), error);
}

#[test]
fn the_available_index_cannot_run_ahead() {
    let mut bench = bench();
    bench.driver.set_available_index(SIZE + 1);
    let error = QueueError::AvailableIndex {
        index: SIZE + 1,
        next: 0,
    };
    assert_eq!(bench.pop_error(), error);
    // Nor back.
    bench.driver.set_available_index(u16::MAX);
    assert!(matches!(
        bench.pop_error(),
        QueueError::AvailableIndex { .. }
    ));
}

#[test]
fn buffers_outside_guest_memory_are_refused() {
    let end = MEMORY_BYTES as u64;
    for (address, length) in [
        (end, 1),
        (end - 1, 2),
        (0x1000, 0),
        (u64::MAX, 1),
        (u64::MAX - 3, 8),
        (end - 4096, u32::MAX),
    ] {
        for flags in [0, WRITE] {
            let mut bench = bench();
            bench.driver.write_descriptor(0, address, length, flags, 0);
            bench.driver.push_available(0);
            let error = bench.pop_error();
            let expected = match length {
                u32::MAX => QueueError::TooLong(0),
                _ => QueueError::Buffer { address, length },
            };
            assert_eq!(error, expected);
        }
    }
}

#[test]
fn a_buffer_may_span_adjacent_regions_only() {
    let first = MEMORY_BYTES as u64;
    let regions = [
        (GuestAddress(0), MEMORY_BYTES),
        (GuestAddress(first), 0x1000),
        (GuestAddress(first + 0x2000), 0x1000),
    ];
    let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
    let mut bench = bench_in(memory, false);
    bench.driver.write_descriptor(0, first - 16, 32, WRITE, 0);
    bench
        .driver
        .write_descriptor(1, first + 0xff0, 32, WRITE, 0);
    bench.driver.push_available(0);
    bench.driver.push_available(1);
    let chain = bench.device.pop(&bench.memory).unwrap().unwrap();
    let lengths: Vec<_> = chain.writable().iter().map(|part| part.length).collect();
    assert_eq!(lengths, [16, 16]);
    assert!(matches!(bench.pop_error(), QueueError::Buffer { .. }));
}

#[test]
fn read_only_memory_is_not_written() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x1000).unwrap();
    let base = MEMORY_BYTES as u64;
    let region = crate::memory::map_file(base, 0x1000, file.into(), 0, false, false).unwrap();
    let memory = memory().insert_region(Arc::new(region)).unwrap();
    let mut bench = bench_in(memory, false);
    bench.driver.write_descriptor(0, base, 16, 0, 0);
    bench.driver.write_descriptor(1, base, 16, WRITE, 0);
    bench.driver.push_available(0);
    bench.driver.push_available(1);
    assert!(bench.device.pop(&bench.memory).unwrap().is_some());
    assert!(matches!(bench.pop_error(), QueueError::Buffer { .. }));
    // Nor can a ring lie there.
    let rings = RingAddresses {
        used: base,
        ..bench.driver.rings
    };
    assert!(matches!(
        activate(&bench.memory, SIZE, rings),
        Err(QueueError::Ring { ring: "used", .. })
    ));
}

#[test]
fn readable_buffers_come_first() {
    let mut bench = bench();
    bench
        .driver
        .write_descriptor(0, 0x1000, 16, WRITE | NEXT, 1);
    bench.driver.write_descriptor(1, 0x2000, 16, 0, 0);
    bench.driver.push_available(0);
    assert_eq!(bench.pop_error(), QueueError::Order(0));
}

#[test]
fn chains_are_bounded() {
    let mut bench = bench();
    // 16 buffers of 30 MiB are one chain of 480 MiB; with indirect tables more is possible.
    for index in 0..64 {
        let at = TABLE + 16 * index;
        let next = (index as u16) + 1;
        bench
            .driver
            .write_descriptor_at(at, 0, 30 << 20, WRITE | NEXT, next);
    }
    bench
        .driver
        .write_descriptor(0, TABLE, 64 * 16, INDIRECT, 0);
    bench.driver.push_available(0);
    assert_eq!(bench.pop_error(), QueueError::TooLong(0));
}

#[test]
fn indirect_tables_are_followed_once() {
    let mut bench = bench();
    bench.driver.write_descriptor(0, 0x1000, 4, NEXT, 1);
    bench.driver.write_descriptor(1, TABLE, 32, INDIRECT, 0);
    bench.driver.write_descriptor_at(TABLE, 0x2000, 8, NEXT, 1);
    bench
        .driver
        .write_descriptor_at(TABLE + 16, 0x3000, 16, WRITE, 0);
    bench.driver.push_available(0);
    let chain = bench.device.pop(&bench.memory).unwrap().unwrap();
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (12, 16));
}

#[test]
fn bad_indirect_tables_are_refused() {
    // Nested, followed by another, of a length that is no table, empty, endless.
    for (length, flags, inner) in [
        (32, INDIRECT, INDIRECT),
        (32, INDIRECT | NEXT, 0),
        (17, INDIRECT, 0),
        (0, INDIRECT, 0),
        (16 * 1025, INDIRECT, 0),
    ] {
        let mut bench = bench();
        bench.driver.write_descriptor(0, TABLE, length, flags, 1);
        bench.driver.write_descriptor_at(TABLE, TABLE, 32, inner, 0);
        bench.driver.push_available(0);
        assert_eq!(bench.pop_error(), QueueError::Indirect(0));
    }
    // A loop, and an index beyond the indirect table.
    for (next, error) in [
        (0, QueueError::Loop(0)),
        (2, QueueError::DescriptorIndex { index: 2, size: 2 }),
    ] {
        let mut bench = bench();
        bench.driver.write_descriptor(0, TABLE, 32, INDIRECT, 0);
        bench
            .driver
            .write_descriptor_at(TABLE, 0x1000, 8, NEXT, next);
        bench.driver.push_available(0);
        assert_eq!(bench.pop_error(), error);
    }
    // A table that wraps the address space.
    let mut bench = bench();
    bench
        .driver
        .write_descriptor(0, u64::MAX - 8, 32, INDIRECT, 0);
    bench.driver.push_available(0);
    assert!(matches!(bench.pop_error(), QueueError::Access(_)));
}

#[test]
fn indexes_wrap() {
    let memory = memory();
    let mut driver = TestQueue::new(&memory, 0, SIZE);
    let start = u16::MAX - 2;
    driver.set_position(start);
    let setup = QueueSetup {
        next_available: start,
        next_used: start,
        ..setup(SIZE, driver.rings)
    };
    let completed = Arc::new(AtomicU64::new(0));
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut device = ActiveQueue::new(&memory, setup, kick, completed).unwrap();
    for round in 0..100u16 {
        let head = round % SIZE;
        driver.write_descriptor(head, 0x1000, 1, 0, 0);
        driver.push_available(head);
        let chain = device.pop(&memory).unwrap().unwrap();
        assert_eq!(chain.index(), head);
        device.complete(&memory, chain.into_head(), 0).unwrap();
        assert_eq!(driver.pop_used(), Some((head, 0)));
    }
    assert!(device.pop(&memory).unwrap().is_none());
    assert_eq!(device.position(), (97, 97));
}

#[test]
fn a_request_can_be_put_back() {
    let mut bench = bench();
    bench.driver.write_descriptor(7, 0x1000, 16, 0, 0);
    bench.driver.push_available(7);
    let chain = bench.device.pop(&bench.memory).unwrap().unwrap();
    bench.device.undo_pop(chain);
    assert!(bench.device.has_available(&bench.memory).unwrap());
    bench.complete_one();
    assert!(!bench.device.has_available(&bench.memory).unwrap());
}

#[test]
fn interrupts_follow_the_drivers_wish() {
    let mut bench = bench();
    for head in 0..4 {
        bench.driver.write_descriptor(head, 0x1000, 1, 0, 0);
        bench.driver.push_available(head);
    }
    bench.complete_one();
    bench
        .device
        .signal(&bench.memory, &bench.interrupt)
        .unwrap();
    assert_eq!(bench.interrupts(), 1);
    // Nothing new, no interrupt.
    bench
        .device
        .signal(&bench.memory, &bench.interrupt)
        .unwrap();
    assert_eq!(bench.interrupts(), 0);
    // VIRTQ_AVAIL_F_NO_INTERRUPT.
    let flags = GuestAddress(bench.driver.rings.available);
    bench.memory.write_obj(1u16, flags).unwrap();
    bench.complete_one();
    bench
        .device
        .signal(&bench.memory, &bench.interrupt)
        .unwrap();
    assert_eq!(bench.interrupts(), 0);
}

#[test]
fn event_indexes_suppress_both_ways() {
    let mut bench = bench_in(memory(), true);
    let used_event = GuestAddress(bench.driver.rings.available + 4 + 2 * u64::from(SIZE));
    let available_event = GuestAddress(bench.driver.rings.used + 4 + 8 * u64::from(SIZE));
    for head in 0..4 {
        bench.driver.write_descriptor(head, 0x1000, 1, 0, 0);
        bench.driver.push_available(head);
    }
    // "Tell me when the third is done."
    bench.memory.write_obj(2u16, used_event).unwrap();
    for expected in [0, 0, 1, 0] {
        bench.complete_one();
        bench
            .device
            .signal(&bench.memory, &bench.interrupt)
            .unwrap();
        assert_eq!(bench.interrupts(), expected);
    }
    // Only an empty queue asks for a kick.
    let event: u16 = bench.memory.read_obj(available_event).unwrap();
    assert_eq!(event, 0);
    assert!(bench.device.pop(&bench.memory).unwrap().is_none());
    let event: u16 = bench.memory.read_obj(available_event).unwrap();
    assert_eq!(event, 4);
}

#[test]
fn rings_must_lie_in_guest_memory() {
    let memory = memory();
    let good = RingAddresses {
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
    };
    let end = MEMORY_BYTES as u64;
    assert!(activate(&memory, SIZE, good).is_ok());
    for size in [0, 3, 100, u16::MAX] {
        let error = activate(&memory, size, good).err();
        assert_eq!(error, Some(QueueError::Size(size)));
    }
    for bad in [
        RingAddresses {
            descriptors: 0x1008,
            ..good
        },
        RingAddresses {
            descriptors: end - 16,
            ..good
        },
        RingAddresses {
            available: 0x2001,
            ..good
        },
        RingAddresses {
            available: end,
            ..good
        },
        RingAddresses {
            used: 0x3002,
            ..good
        },
        RingAddresses {
            used: u64::MAX - 3,
            ..good
        },
    ] {
        let error = activate(&memory, SIZE, bad).err();
        assert!(matches!(error, Some(QueueError::Ring { .. })), "{bad:?}");
    }
}

fn setup(size: u16, rings: RingAddresses) -> QueueSetup {
    QueueSetup {
        size,
        rings,
        next_available: 0,
        next_used: 0,
        event_index: false,
        indirect: true,
    }
}

fn activate(
    memory: &GuestMemory,
    size: u16,
    rings: RingAddresses,
) -> Result<ActiveQueue, QueueError> {
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    ActiveQueue::new(memory, setup(size, rings), kick, Arc::default())
}
