//! Tests of the balloon on fake guest memory.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{Buffer, MEMORY_BYTES, TestDriver, WRITE};

const PAGE: u64 = 8 << 20;

fn start() -> (TestDriver<Balloon>, BalloonHandle) {
    let balloon = Balloon::new(vec![(0, MEMORY_BYTES as u64)]).unwrap();
    let handle = balloon.handle();
    (TestDriver::start(balloon, 0), handle)
}

fn fill(driver: &TestDriver<Balloon>, pages: u64) {
    for page in 0..pages {
        driver
            .memory
            .write_obj(0xaau8, GuestAddress(PAGE + page * FRAME_BYTES))
            .unwrap();
    }
}

fn contents(driver: &TestDriver<Balloon>, pages: u64) -> Vec<u8> {
    (0..pages)
        .map(|page| {
            driver
                .memory
                .read_obj(GuestAddress(PAGE + page * FRAME_BYTES))
                .unwrap()
        })
        .collect()
}

fn frames(offsets: &[i64]) -> Vec<u8> {
    offsets
        .iter()
        .flat_map(|offset| {
            let frame = i64::try_from(PAGE / FRAME_BYTES).unwrap() + offset;
            u32::try_from(frame).unwrap().to_le_bytes()
        })
        .collect()
}

/// Until the driver is told that the configuration has changed.
fn wait_for_announcement(driver: &TestDriver<Balloon>) {
    let start = Instant::now();
    while driver.interrupt.status() & 2 == 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "no interrupt");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn inflated_pages_go_back_and_no_others() {
    let (mut driver, _) = start();
    fill(&driver, 8);
    // Upwards, downwards, single, and twice the same.
    let list = frames(&[1, 2, 6, 5, 4, 6]);
    let (length, _) = driver.request(INFLATE, &[Buffer::Readable(&list)]);
    assert_eq!(length, 0);
    assert_eq!(contents(&driver, 8), [0xaa, 0, 0, 0xaa, 0, 0, 0, 0xaa]);
    let (_, _) = driver.request(DEFLATE, &[Buffer::Readable(&list)]);
    driver.pause().unwrap();
}

#[test]
fn frame_numbers_may_be_split_anywhere() {
    let (mut driver, _) = start();
    fill(&driver, 4);
    let list = frames(&[0, 2]);
    driver.request(
        INFLATE,
        &[Buffer::Readable(&list[..3]), Buffer::Readable(&list[3..])],
    );
    assert_eq!(contents(&driver, 4), [0, 0xaa, 0, 0xaa]);
    // A rest of less than a number is no number.
    driver.request(INFLATE, &[Buffer::Readable(&list[..3])]);
    assert_eq!(contents(&driver, 4), [0, 0xaa, 0, 0xaa]);
}

#[test]
fn frames_outside_ram_are_refused() {
    for frame in [u32::MAX, (MEMORY_BYTES as u64 / FRAME_BYTES) as u32] {
        let (mut driver, _) = start();
        fill(&driver, 1);
        driver.push(INFLATE, &[Buffer::Readable(&frame.to_le_bytes())]);
        driver.queues[INFLATE].kick();
        let error = driver.join().unwrap_err().to_string();
        assert!(error.contains("not RAM"), "{error}");
        assert_eq!(contents(&driver, 1), [0xaa]);
    }
}

#[test]
fn a_run_may_cross_to_an_adjacent_range() {
    let border = PAGE + 2 * FRAME_BYTES;
    let ranges = vec![(border, MEMORY_BYTES as u64 - border), (0, border)];
    let mut driver = TestDriver::start(Balloon::new(ranges).unwrap(), 0);
    fill(&driver, 4);
    driver.request(INFLATE, &[Buffer::Readable(&frames(&[1, 2]))]);
    assert_eq!(contents(&driver, 4), [0xaa, 0, 0, 0xaa]);
    // A hole is one.
    assert_eq!(join(vec![(0, 2), (3, 1)]), [(0, 2), (3, 1)]);
}

#[test]
fn long_lists_are_refused() {
    let (mut driver, _) = start();
    fill(&driver, 1);
    driver.request(INFLATE, &[Buffer::Readable(&frames(&[1; 1024]))]);
    driver.push(INFLATE, &[Buffer::Readable(&frames(&[0; 1025]))]);
    driver.queues[INFLATE].kick();
    let error = driver.join().unwrap_err().to_string();
    assert!(error.contains("list of 4100 bytes"), "{error}");
    assert_eq!(contents(&driver, 1), [0xaa]);
}

#[test]
fn reported_pages_go_back() {
    let (mut driver, _) = start();
    fill(&driver, 4);
    let queue = &mut driver.queues[REPORTING];
    queue.write_descriptor(0, PAGE + FRAME_BYTES, 2 * FRAME_BYTES as u32, WRITE, 0);
    queue.push_available(0);
    queue.kick();
    assert_eq!(driver.wait_used(REPORTING), (0, 0));
    assert_eq!(contents(&driver, 4), [0xaa, 0, 0, 0xaa]);
}

#[test]
fn parts_of_pages_are_not_reported() {
    let (mut driver, _) = start();
    fill(&driver, 2);
    let queue = &mut driver.queues[REPORTING];
    queue.write_descriptor(0, PAGE + 512, 4096, WRITE, 0);
    queue.push_available(0);
    queue.kick();
    assert!(driver.join().is_err());
    assert_eq!(contents(&driver, 2), [0xaa, 0xaa]);
}

#[test]
fn a_new_size_is_announced() {
    let (mut driver, handle) = start();
    handle.set_mib(64).unwrap();
    wait_for_announcement(&driver);
    driver.pause().unwrap();
    let config = driver.device().config();
    let mut bytes = [0; 8];
    config.read(0, &mut bytes);
    assert_eq!(bytes[..4], (64 * 256u32).to_le_bytes());
    assert_eq!(config.generation(), 1);
    config.write(CONFIG_ACTUAL, &(63 * 256u32).to_le_bytes());
    // Neither the host's part nor odd sizes can be written.
    config.write(0, &[0; 4]);
    config.write(CONFIG_ACTUAL, &[0; 8]);
    config.read(0, &mut bytes);
    assert_eq!(bytes[..4], (64 * 256u32).to_le_bytes());
    assert_eq!(handle.actual_mib(), 63);
    assert!(handle.set_mib(u32::MAX).is_err());
}

#[test]
fn the_state_travels() {
    let balloon = Balloon::new(Vec::new()).unwrap();
    balloon.handle().set_mib(5).unwrap();
    balloon
        .config()
        .write(CONFIG_ACTUAL, &(4 * 256u32).to_le_bytes());
    let state = balloon.save().unwrap();
    let mut other = Balloon::new(Vec::new()).unwrap();
    other.restore(&state).unwrap();
    assert_eq!(other.handle().actual_mib(), 4);
    assert_eq!(other.save().unwrap(), state);
    let newer = DeviceState {
        version: 2,
        ..state
    };
    assert!(other.restore(&newer).is_err());
    // The size may have changed while it was paused.
    let mut driver = TestDriver::start(other, 0);
    wait_for_announcement(&driver);
    driver.pause().unwrap();
}
