//! Tests of virtio-mem on fake guest memory.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{Buffer, TestDriver};

const START: u64 = 16 << 20;
const BYTES: u64 = 8 << 20;

fn start(requested_mib: u32) -> (TestDriver<Mem>, MemHandle) {
    let mem = Mem::new(START, BYTES).unwrap();
    let handle = mem.handle();
    handle.set_mib(requested_mib).unwrap();
    (TestDriver::start(mem, F_UNPLUGGED_INACCESSIBLE), handle)
}

/// Type of the response, and its state.
fn request(driver: &mut TestDriver<Mem>, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    let (written, response) = driver.request(0, &[Buffer::Readable(&bytes), Buffer::Writable(10)]);
    assert_eq!(written, 10);
    let half = |at: usize| u16::from_le_bytes([response[at], response[at + 1]]);
    (half(0), half(8))
}

fn block(index: u64) -> u64 {
    START + index * BLOCK_BYTES
}

/// Until the driver is told that the configuration has changed.
fn wait_for_announcement(driver: &TestDriver<Mem>) {
    let start = Instant::now();
    while driver.interrupt.status() & 2 == 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "no interrupt");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn blocks_are_plugged_as_far_as_asked_for() {
    let (mut driver, handle) = start(4);
    assert_eq!(
        request(&mut driver, REQUEST_PLUG, block(1), 2).0,
        RESPONSE_ACK
    );
    assert_eq!(handle.plugged_mib(), 4);
    // More than asked for, and plugged already.
    assert_eq!(
        request(&mut driver, REQUEST_PLUG, block(3), 1).0,
        RESPONSE_NACK
    );
    assert_eq!(
        request(&mut driver, REQUEST_PLUG, block(0), 2).0,
        RESPONSE_ERROR
    );
    handle.set_mib(8).unwrap();
    assert_eq!(
        request(&mut driver, REQUEST_PLUG, block(3), 1).0,
        RESPONSE_ACK
    );
    let state = |driver: &mut _, first, count| request(driver, REQUEST_STATE, block(first), count);
    assert_eq!(state(&mut driver, 1, 3), (RESPONSE_ACK, STATE_PLUGGED));
    assert_eq!(state(&mut driver, 0, 1), (RESPONSE_ACK, STATE_UNPLUGGED));
    assert_eq!(state(&mut driver, 0, 4), (RESPONSE_ACK, STATE_MIXED));
}

#[test]
fn unplugged_memory_goes_back() {
    let (mut driver, handle) = start(8);
    assert_eq!(
        request(&mut driver, REQUEST_PLUG, block(0), 4).0,
        RESPONSE_ACK
    );
    for index in 0..4 {
        let address = GuestAddress(block(index) + 4096);
        driver.memory.write_obj(0x77u8, address).unwrap();
    }
    assert_eq!(
        request(&mut driver, REQUEST_UNPLUG, block(1), 2).0,
        RESPONSE_ACK
    );
    let bytes: Vec<u8> = (0..4)
        .map(|index| {
            let address = GuestAddress(block(index) + 4096);
            driver.memory.read_obj(address).unwrap()
        })
        .collect();
    assert_eq!(bytes, [0x77, 0, 0, 0x77]);
    assert_eq!(
        request(&mut driver, REQUEST_UNPLUG, block(0), 2).0,
        RESPONSE_ERROR
    );
    assert_eq!(handle.plugged_mib(), 4);
    assert_eq!(
        request(&mut driver, REQUEST_UNPLUG_ALL, 0, 0).0,
        RESPONSE_ACK
    );
    assert_eq!(handle.plugged_mib(), 0);
    let byte: u8 = driver
        .memory
        .read_obj(GuestAddress(block(3) + 4096))
        .unwrap();
    assert_eq!(byte, 0);
}

#[test]
fn nonsense_is_answered_with_an_error() {
    let (mut driver, handle) = start(8);
    for (kind, address, blocks) in [
        (REQUEST_PLUG, START - BLOCK_BYTES, 1),
        (REQUEST_PLUG, 0, 1),
        (REQUEST_PLUG, u64::MAX, 1),
        (REQUEST_PLUG, START + 4096, 1),
        (REQUEST_PLUG, START, 0),
        (REQUEST_PLUG, START, 5),
        (REQUEST_PLUG, START, u16::MAX),
        (REQUEST_PLUG, block(4), 1),
        (REQUEST_UNPLUG, START, 5),
        (REQUEST_STATE, block(3), 2),
        (77, START, 1),
    ] {
        let (response, _) = request(&mut driver, kind, address, blocks);
        assert_eq!(response, RESPONSE_ERROR, "{kind} {address:#x} {blocks}");
    }
    assert_eq!(handle.plugged_mib(), 0);
}

#[test]
fn requests_that_are_too_short_break_the_queue_and_do_nothing() {
    let mut whole = [0; REQUEST_BYTES];
    whole[8..16].copy_from_slice(&START.to_le_bytes());
    whole[16] = 1;
    for (readable, writable) in [(REQUEST_BYTES - 1, 10), (REQUEST_BYTES, 9)] {
        let (mut driver, handle) = start(8);
        driver.push(
            0,
            &[
                Buffer::Readable(&whole[..readable]),
                Buffer::Writable(writable),
            ],
        );
        driver.queues[0].kick();
        assert!(driver.join().is_err());
        assert_eq!(handle.plugged_mib(), 0);
    }
}

#[test]
fn a_new_size_is_announced() {
    let (mut driver, handle) = start(0);
    handle.set_mib(6).unwrap();
    wait_for_announcement(&driver);
    driver.pause().unwrap();
    let mut bytes = [0; 56];
    driver.device().config().read(0, &mut bytes);
    let field = |index: usize| u64::from_le_bytes(bytes[8 * index..][..8].try_into().unwrap());
    let fields: Vec<u64> = (0..7).map(field).collect();
    assert_eq!(fields, [BLOCK_BYTES, 0, START, BYTES, BYTES, 0, 6 << 20]);
    assert!(handle.set_mib(7).is_err());
    assert!(handle.set_mib(10).is_err());
}

#[test]
fn plugged_memory_survives_reset_and_saving() {
    let (mut driver, handle) = start(8);
    assert_eq!(
        request(&mut driver, REQUEST_PLUG, block(2), 2).0,
        RESPONSE_ACK
    );
    driver.pause().unwrap();
    driver.device().reset();
    assert_eq!(handle.plugged_mib(), 4);
    let state = driver.device().save().unwrap();
    let mut other = Mem::new(START, BYTES).unwrap();
    other.restore(&state).unwrap();
    assert_eq!(other.handle().plugged_mib(), 4);
    assert_eq!(other.save().unwrap(), state);
    // The size may have changed while it was paused.
    let mut restored = TestDriver::start(other, F_UNPLUGGED_INACCESSIBLE);
    wait_for_announcement(&restored);
    restored.pause().unwrap();
    let mut smaller = Mem::new(START, BYTES / 2).unwrap();
    assert!(smaller.restore(&state).is_err());
    assert!(Mem::new(START, BYTES - 4096).is_err());
    assert!(Mem::new(START, 0).is_err());
}
