//! The transport as a driver sees it, register by register.

use std::{
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use vmm_sys_util::eventfd::EventFd;

use super::{
    Active, ConfigSpace, Device, DeviceError, DeviceState, F_EVENT_IDX, F_INDIRECT_DESC,
    F_VERSION_1, INTERRUPT_ACK, Transport,
    testing::{INDIRECT, TestQueue, memory},
};
use crate::memory::GuestMemory;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 0x40;
const OWN_FEATURE: u64 = 1 << 5;
const SIZE: u16 = 16;

/// Completes every request with as many bytes as it has seen requests; remembers resets.
#[derive(Default)]
struct Counter {
    seen: u32,
    features: u64,
}

impl Device for Counter {
    fn id(&self) -> u32 {
        42
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn features(&self) -> u64 {
        OWN_FEATURE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[SIZE, SIZE]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(vec![1, 2, 3, 4, 5, 6, 7, 8])
    }

    fn run(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        self.features = active.features;
        let memory = active.memory.clone();
        let interrupt = active.interrupt.clone();
        loop {
            let queue = active.queue(0)?;
            while let Some(chain) = queue.pop(&memory)? {
                self.seen += 1;
                queue.complete(&memory, chain.into_head(), self.seen)?;
            }
            queue.signal(&memory, &interrupt)?;
            if !active.wait(&[0])? {
                return Ok(());
            }
        }
    }

    fn reset(&mut self) {
        self.seen = 0;
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        Ok(DeviceState {
            version: 1,
            data: self.seen.into(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        state.expect_version(1)?;
        self.seen = serde_json::from_value(state.data.clone())
            .map_err(|error| DeviceError::State(error.to_string()))?;
        Ok(())
    }
}

struct Guest {
    memory: GuestMemory,
    queue: TestQueue,
    transport: Transport,
    failures: mpsc::Receiver<String>,
}

impl Guest {
    fn new() -> Self {
        Self::with_memory(memory())
    }

    fn with_memory(memory: GuestMemory) -> Self {
        let (sender, failures) = mpsc::channel();
        let sender = Mutex::new(sender);
        let on_failure = Box::new(move |error: &DeviceError| {
            sender.lock().unwrap().send(error.to_string()).unwrap();
        });
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let transport =
            Transport::new(Box::<Counter>::default(), memory.clone(), line, on_failure).unwrap();
        Self {
            queue: TestQueue::new(&memory, 0, SIZE),
            memory,
            transport,
            failures,
        }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        self.read(0x70)
    }

    fn accept(&mut self, features: u64) {
        self.write(0x70, ACKNOWLEDGE);
        self.write(0x70, ACKNOWLEDGE | DRIVER);
        for word in 0..2 {
            self.write(0x24, word);
            self.write(0x20, (features >> (32 * word)) as u32);
        }
        self.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_up_queue(&mut self, size: u32) {
        let rings = self.queue.rings;
        self.write(0x30, 0);
        self.write(0x38, size);
        for (offset, address) in [
            (0x80, rings.descriptors),
            (0x90, rings.available),
            (0xa0, rings.used),
        ] {
            self.write(offset, address as u32);
            self.write(offset + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    fn go(&mut self) {
        self.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn start(&mut self) {
        self.accept(F_VERSION_1 | OWN_FEATURE);
        self.set_up_queue(SIZE.into());
        self.go();
    }

    fn push(&mut self, head: u16) {
        self.queue.write_descriptor(head, 0x1000, 8, 2, 0);
        self.queue.push_available(head);
        self.write(0x50, 0);
    }

    fn wait_used(&mut self) -> (u16, u32) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.queue.pop_used() {
                return used;
            }
            assert!(start.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn failure(&self) -> String {
        self.failures.recv_timeout(Duration::from_secs(20)).unwrap()
    }
}

#[test]
fn identity_features_and_configuration_can_be_read() {
    let mut guest = Guest::new();
    assert_eq!(guest.read(0), 0x7472_6976);
    assert_eq!((guest.read(4), guest.read(8)), (2, 42));
    assert_eq!(
        guest.read(0x10) as u64,
        OWN_FEATURE | F_EVENT_IDX | F_INDIRECT_DESC
    );
    guest.write(0x14, 1);
    assert_eq!(u64::from(guest.read(0x10)) << 32, F_VERSION_1);
    guest.write(0x14, 2);
    assert_eq!(guest.read(0x10), 0);
    assert_eq!(guest.read(0x34), u32::from(SIZE));
    guest.write(0x30, 2);
    assert_eq!(guest.read(0x34), 0);
    let mut wide = [0; 8];
    guest.transport.read(0x104, &mut wide);
    assert_eq!(wide, [5, 6, 7, 8, 0, 0, 0, 0]);
    guest.transport.read(u64::MAX, &mut wide);
    assert_eq!(wide, [0; 8]);
    // Registers are 32 bits wide and nothing else.
    let mut byte = [0xff];
    guest.transport.read(0, &mut byte);
    assert_eq!(byte, [0]);
    // No shared memory.
    assert_eq!(guest.read(0xb0), u32::MAX);
}

#[test]
fn requests_are_served_and_interrupts_acknowledged() {
    let mut guest = Guest::new();
    guest.start();
    assert!(guest.transport.view().is_active() && !guest.transport.view().is_unbound());
    guest.push(0);
    assert_eq!(guest.wait_used(), (0, 1));
    let start = Instant::now();
    let status = loop {
        match guest.read(0x60) {
            0 => assert!(start.elapsed() < Duration::from_secs(20)),
            status => break status,
        }
    };
    assert_eq!(status, 1);
    // Where KVM swallows it, it does not come at all.
    guest.write(INTERRUPT_ACK, 1);
    assert_eq!(guest.read(0x60), 0);
    assert_eq!(guest.transport.view().completed(), 1);
}

#[test]
fn features_must_be_offered_and_modern() {
    for features in [F_VERSION_1 | 1, OWN_FEATURE, 0] {
        let mut guest = Guest::new();
        guest.accept(features);
        assert_eq!(guest.status() & FEATURES_OK, 0, "{features:#x}");
        guest.set_up_queue(SIZE.into());
        guest.write(0x70, ACKNOWLEDGE | DRIVER | DRIVER_OK);
        assert!(!guest.transport.view().is_active());
    }
}

#[test]
fn configuration_is_frozen_at_driver_ok() {
    let mut guest = Guest::new();
    guest.start();
    // All of this is too late (CVE-2026-5747).
    guest.write(0x30, 0);
    guest.write(0x38, 1);
    guest.write(0x80, 0xdead_0000);
    guest.write(0xa0, 0xdead_0000);
    guest.write(0x44, 0);
    guest.write(0x24, 0);
    guest.write(0x20, u32::MAX);
    assert_eq!(guest.read(0x44), 1);
    guest.push(3);
    assert_eq!(guest.wait_used(), (3, 1));
    guest.transport.pause();
    guest.transport.resume();
    guest.push(4);
    assert_eq!(guest.wait_used(), (4, 2));
}

#[test]
fn a_bad_queue_needs_a_reset_and_gets_it() {
    for size in [0, 3, 32, 0x1_0010] {
        let mut guest = Guest::new();
        guest.accept(F_VERSION_1);
        guest.set_up_queue(size);
        guest.go();
        assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
        assert_eq!(guest.read(0x60), 2);
        assert!(guest.failure().contains("size"));
        guest.write(0x70, 0);
        assert_eq!((guest.status(), guest.read(0x60)), (0, 0));
        guest.start();
        guest.push(0);
        assert_eq!(guest.wait_used(), (0, 1));
    }
}

#[test]
fn a_broken_request_needs_a_reset_and_gets_it() {
    let mut guest = Guest::new();
    guest.start();
    guest.queue.write_descriptor(0, 0x1000, 7, INDIRECT, 0);
    guest.queue.push_available(0);
    guest.write(0x50, 0);
    assert!(guest.failure().contains("broken queue"));
    assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
    // A pause and a resume do not revive it.
    guest.transport.pause();
    guest.transport.resume();
    guest.write(0x70, 0);
    assert!(guest.transport.view().is_unbound());
    guest.queue = TestQueue::fresh(&guest.memory, 0, SIZE);
    guest.start();
    guest.push(1);
    // The device was reset: it counts from 1 again.
    assert_eq!(guest.wait_used(), (1, 1));
}

#[test]
fn drivers_cannot_fake_the_devices_bit() {
    let mut guest = Guest::new();
    guest.write(0x70, NEEDS_RESET | ACKNOWLEDGE);
    assert_eq!(guest.status(), ACKNOWLEDGE);
    // Bits cannot be taken back but by a reset.
    guest.write(0x70, DRIVER);
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn a_queue_that_the_device_needs_must_be_enabled() {
    let mut guest = Guest::new();
    guest.accept(F_VERSION_1);
    guest.go();
    assert!(guest.failure().contains("queue 0 is not enabled"));
    assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
}

#[test]
fn saved_transports_go_on_elsewhere() {
    let mut guest = Guest::new();
    guest.start();
    guest.push(0);
    guest.wait_used();
    assert!(guest.transport.save().is_err(), "saved while running");
    guest.transport.pause();
    let state = guest.transport.save().unwrap();
    let text = serde_json::to_string(&state).unwrap();
    let state = serde_json::from_str(&text).unwrap();
    // A request that came while it was paused must not be lost.
    guest.queue.write_descriptor(1, 0x1000, 8, 2, 0);
    guest.queue.push_available(1);

    let mut second = Guest::with_memory(guest.memory.clone());
    second.transport.restore(&state).unwrap();
    second.queue = guest.queue;
    assert!(second.transport.view().is_active());
    second.transport.resume();
    assert_eq!(second.wait_used(), (1, 2));
    assert_eq!(second.transport.view().completed(), 2);
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let mut guest = Guest::new();
    guest.start();
    guest.transport.pause();
    let state = guest.transport.save().unwrap();
    let good = serde_json::to_value(&state).unwrap();
    let mut other = good.clone();
    other["device"] = "net".into();
    let mut features = good.clone();
    features["registers"]["driver_features"] = u64::MAX.into();
    let mut queues = good.clone();
    queues["registers"]["queues"] = serde_json::json!([]);
    let mut version = good.clone();
    version["device_state"]["version"] = 9.into();
    let mut rings = good;
    rings["registers"]["queues"][0]["rings"]["used"] = u64::MAX.into();
    for bad in [other, features, queues, version, rings] {
        let bad = serde_json::from_value(bad).unwrap();
        assert!(Guest::new().transport.restore(&bad).is_err());
    }
}
