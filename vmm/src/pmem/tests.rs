//! Tests of virtio-pmem on a file.

use std::{fs::File, os::unix::fs::FileExt};

use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};

use super::*;
use crate::{
    memory::GuestMemory,
    virtio::testing::{self, Buffer, TestDriver},
};

const START: u64 = 2 << 30;

fn file(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

fn map(file: &File, read_only: bool) -> Result<(GuestRegion, Pmem), DeviceError> {
    let fd = OwnedFd::from(file.try_clone().unwrap());
    Pmem::map(fd, read_only, |bytes| {
        assert_eq!(bytes, ALIGNMENT);
        START
    })
}

/// The test guest's memory with the file behind it.
fn start(read_only: bool) -> (TestDriver<Pmem>, File) {
    let file = file(ALIGNMENT);
    let (region, device) = map(&file, read_only).unwrap();
    let ram = GuestRegionMmap::from_range(GuestAddress(0), testing::MEMORY_BYTES, None).unwrap();
    let memory = GuestMemory::from_regions(vec![ram, region]).unwrap();
    (TestDriver::start_with_memory(device, 0, memory), file)
}

fn request(driver: &mut TestDriver<Pmem>, kind: u32) -> u32 {
    let (written, answer) = driver.request(
        0,
        &[Buffer::Readable(&kind.to_le_bytes()), Buffer::Writable(4)],
    );
    assert_eq!(written, 4);
    u32::from_le_bytes(answer.try_into().unwrap())
}

#[test]
fn stores_reach_the_file_and_flushes_succeed() {
    let (mut driver, file) = start(false);
    let address = GuestAddress(START + 5000);
    driver.memory.write_obj(0x1234u16, address).unwrap();
    assert_eq!(request(&mut driver, REQUEST_FLUSH), RESPONSE_OK);
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, 5000).unwrap();
    assert_eq!(u16::from_le_bytes(bytes), 0x1234);
    assert_eq!(request(&mut driver, 1), RESPONSE_EIO);
    assert_eq!(request(&mut driver, u32::MAX), RESPONSE_EIO);
}

#[test]
fn read_only_memory_is_no_target() {
    let (mut driver, file) = start(true);
    file.write_all_at(b"on disk", 0).unwrap();
    let mut bytes = [0; 7];
    let start = GuestAddress(START);
    driver.memory.read_slice(&mut bytes, start).unwrap();
    assert_eq!(&bytes, b"on disk");
    assert_eq!(request(&mut driver, REQUEST_FLUSH), RESPONSE_OK);
    // A queue neither writes its answers nor lies there.
    let queue = &mut driver.queues[0];
    queue.write_descriptor(9, 0x40_0000, 4, testing::NEXT, 10);
    queue.write_descriptor(10, START, 4, testing::WRITE, 0);
    queue.push_available(9);
    queue.kick();
    assert!(driver.join().is_err());
    driver.memory.read_slice(&mut bytes, start).unwrap();
    assert_eq!(&bytes, b"on disk");
}

#[test]
fn short_requests_break_the_queue() {
    for buffers in [
        [Buffer::Readable(&[0; 3]), Buffer::Writable(4)],
        [Buffer::Readable(&[0; 4]), Buffer::Writable(3)],
    ] {
        let (mut driver, _file) = start(false);
        driver.push(0, &buffers);
        driver.queues[0].kick();
        assert!(driver.join().is_err());
    }
}

#[test]
fn files_that_make_no_memory_are_refused() {
    for bytes in [0, 4096, ALIGNMENT - 1] {
        let fd = OwnedFd::from(file(bytes));
        let error = Pmem::map(fd, false, |_| START).err().unwrap();
        assert!(error.to_string().contains("pad it"), "{error}");
    }
    let (pipe, _writer) = std::io::pipe().unwrap();
    let error = Pmem::map(pipe.into(), false, |_| START).err().unwrap();
    assert!(error.to_string().contains("regular file"), "{error}");
}

#[test]
fn the_configuration_and_the_state_say_where_it_lies() {
    let file = file(ALIGNMENT);
    let (region, device) = map(&file, false).unwrap();
    assert_eq!(region.len(), ALIGNMENT);
    let mut config = [0; 16];
    device.config().read(0, &mut config);
    assert_eq!(config[..8], START.to_le_bytes());
    assert_eq!(config[8..], ALIGNMENT.to_le_bytes());
    let state = device.save().unwrap();
    let (_region, mut same) = map(&file, false).unwrap();
    same.restore(&state).unwrap();
    let (_region, mut read_only) = map(&file, true).unwrap();
    assert!(read_only.restore(&state).is_err());
}
