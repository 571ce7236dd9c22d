//! The device behind a fake driver. Every test of data runs over both engines.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::virtio::testing::{Buffer, INDIRECT, NEXT, TestDriver, WRITE};
use vm_memory::{Bytes, GuestAddress};

const EVENT_INDEX: u64 = 1 << 29;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

struct Fixture {
    driver: TestDriver<Block>,
    file: tempfile::NamedTempFile,
    reports: Arc<Mutex<Vec<String>>>,
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&sectors.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}

/// Contents in which every sector is different.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 512 * 7 + at) as u8).collect()
}

fn open(file: &tempfile::NamedTempFile, read_only: bool) -> OwnedFd {
    std::fs::OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(file.path())
        .unwrap()
        .into()
}

fn fixture(length: usize, read_only: bool, uring: bool, limit: Option<RateLimit>) -> Fixture {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&pattern(length)).unwrap();
    let reports = Arc::new(Mutex::new(Vec::new()));
    let sink = reports.clone();
    let report = Box::new(move |message| sink.lock().unwrap().push(message));
    let contents = Contents::File(open(&file, read_only));
    let block = Block::new("disk-1".into(), contents, read_only, limit.as_ref(), report).unwrap();
    let block = if uring { block } else { block.without_uring() };
    Fixture {
        driver: TestDriver::start(block, EVENT_INDEX),
        file,
        reports,
    }
}

/// Runs a test over both engines.
fn both(length: usize, read_only: bool, test: impl Fn(&mut Fixture)) {
    for uring in [true, false] {
        test(&mut fixture(length, read_only, uring, None));
    }
}

impl Fixture {
    /// Reads through the device: data and status.
    fn read(&mut self, sector: u64, length: u32) -> (Vec<u8>, u8) {
        let buffers = [
            Buffer::Readable(&header(IN, sector)),
            Buffer::Writable(length),
            Buffer::Writable(1),
        ];
        let (used, mut bytes) = self.driver.request(0, &buffers);
        assert_eq!(used, length + 1);
        let status = bytes.pop().unwrap();
        (bytes, status)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.status(&[&header(OUT, sector), data])
    }

    /// A request with readable parts and a status byte.
    fn status(&mut self, parts: &[&[u8]]) -> u8 {
        let mut buffers: Vec<_> = parts.iter().map(|part| Buffer::Readable(part)).collect();
        buffers.push(Buffer::Writable(1));
        let (used, bytes) = self.driver.request(0, &buffers);
        assert_eq!(used, 1);
        bytes[0]
    }

    fn contents(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }
}

#[test]
fn reads_and_writes_reach_the_file() {
    both(1 << 20, false, |fixture| {
        let mut expected = pattern(1 << 20);
        assert_eq!(fixture.read(3, 8192), (expected[1536..9728].to_vec(), OK));
        let data: Vec<u8> = (0..4096u32).map(|at| (at * 31) as u8).collect();
        assert_eq!(fixture.write(100, &data), OK);
        expected[51200..55296].copy_from_slice(&data);
        assert_eq!(fixture.status(&[&header(FLUSH, 0)]), OK);
        assert!(fixture.contents() == expected);
        assert_eq!(fixture.read(100, 4096), (data, OK));
        assert_eq!(fixture.write(2047, &[9; 512]), OK);
        assert_eq!(fixture.contents()[(1 << 20) - 512..], [9; 512]);
    });
}

#[test]
fn odd_descriptor_splits_are_the_same_request() {
    both(1 << 16, false, |fixture| {
        let header_bytes = header(OUT, 8);
        let data = [0x5a; 512];
        // Header in three parts, the last joined with data; data in parts of 1, 100 and the rest.
        let joined = [&header_bytes[9..], &data[..1]].concat();
        let parts = [
            &header_bytes[..1],
            &header_bytes[1..9],
            &joined[..],
            &data[1..101],
            &data[101..],
        ];
        assert_eq!(fixture.status(&parts), OK);
        assert_eq!(fixture.contents()[4096..4608], data);
        let buffers = [
            Buffer::Readable(&header(IN, 8)),
            Buffer::Writable(1),
            Buffer::Writable(510),
            // The last byte of data and the status in one buffer.
            Buffer::Writable(2),
        ];
        let (used, bytes) = fixture.driver.request(0, &buffers);
        assert_eq!((used, &bytes[..512], bytes[512]), (513, &data[..], OK));
    });
}

#[test]
fn out_of_range_is_an_error_and_touches_nothing() {
    both(1 << 16, false, |fixture| {
        let last = (1 << 16) / 512;
        for sector in [last, last - 1, u64::MAX, u64::MAX / 512, 1 << 55] {
            assert_eq!(fixture.write(sector, &[1; 1024]), IO_ERROR, "{sector}");
            assert_eq!(fixture.read(sector, 1024).1, IO_ERROR, "{sector}");
        }
        for odd in [1, 511, 513] {
            assert_eq!(fixture.write(0, &vec![1; odd]), IO_ERROR);
            assert_eq!(fixture.read(0, odd as u32).1, IO_ERROR);
        }
        assert!(fixture.contents() == pattern(1 << 16));
        assert!(
            fixture.reports.lock().unwrap().is_empty(),
            "a guest's mistake is no failure"
        );
    });
}

#[test]
fn read_only_disks_are_not_written() {
    both(1 << 16, true, |fixture| {
        assert_eq!(fixture.write(0, &[1; 512]), IO_ERROR);
        assert_eq!(
            fixture.status(&[&header(DISCARD, 0), &range(0, 8, 0)]),
            IO_ERROR
        );
        assert_eq!(
            fixture.status(&[&header(WRITE_ZEROES, 0), &range(0, 8, 0)]),
            IO_ERROR
        );
        assert_eq!(fixture.status(&[&header(FLUSH, 0)]), OK);
        assert_eq!(fixture.read(0, 512), (pattern(512), OK));
        assert!(fixture.contents() == pattern(1 << 16));
        fixture.driver.pause().unwrap();
        assert_eq!(
            fixture.driver.device().features() & (F_RO | F_FLUSH | F_DISCARD),
            F_RO
        );
    });
}

#[test]
fn read_only_holds_even_over_a_writable_descriptor() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&pattern(4096)).unwrap();
    let contents = Contents::File(open(&file, false));
    let block = Block::new(String::new(), contents, true, None, Box::new(|_| {})).unwrap();
    let mut driver = TestDriver::start(block, 0);
    let buffers = [
        Buffer::Readable(&header(OUT, 0)),
        Buffer::Readable(&[0; 512]),
        Buffer::Writable(1),
    ];
    assert_eq!(driver.request(0, &buffers).1, [IO_ERROR]);
    assert!(std::fs::read(file.path()).unwrap() == pattern(4096));
}

#[test]
fn discard_and_write_zeroes() {
    both(1 << 20, false, |fixture| {
        let mut expected = pattern(1 << 20);
        assert_eq!(fixture.status(&[&header(DISCARD, 0), &range(8, 16, 0)]), OK);
        expected[4096..12288].fill(0);
        assert!(fixture.contents() == expected);
        for (flags, sector) in [(0, 101), (1, 203)] {
            assert_eq!(
                fixture.status(&[&header(WRITE_ZEROES, 0), &range(sector, 3, flags)]),
                OK
            );
            expected[sector as usize * 512..][..1536].fill(0);
            assert!(fixture.contents() == expected);
        }
        assert_eq!(fixture.status(&[&header(DISCARD, 0), &range(0, 0, 0)]), OK);
        assert_eq!(
            fixture.status(&[&header(DISCARD, 0), &range(8, 8, 1)]),
            UNSUPPORTED
        );
        assert_eq!(
            fixture.status(&[&header(WRITE_ZEROES, 0), &range(8, 8, 2)]),
            UNSUPPORTED
        );
        assert_eq!(
            fixture.status(&[&header(DISCARD, 0), &range(2047, 2, 0)]),
            IO_ERROR
        );
        assert_eq!(
            fixture.status(&[&header(DISCARD, 0), &range(u64::MAX, 1, 0)]),
            IO_ERROR
        );
        assert_eq!(
            fixture.status(&[&header(DISCARD, 0), &range(0, u32::MAX, 0)]),
            IO_ERROR
        );
        assert_eq!(
            fixture.status(&[&header(DISCARD, 0), &range(0, 8, 0)[..15]]),
            IO_ERROR
        );
        let two = [range(0, 8, 0), range(8, 8, 0)].concat();
        assert_eq!(fixture.status(&[&header(DISCARD, 0), &two]), IO_ERROR);
        assert!(fixture.contents() == expected);
    });
}

#[test]
fn zeros_are_written_where_nothing_else_works() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&pattern(1 << 18)).unwrap();
    engine::write_zeros(std::os::fd::AsFd::as_fd(file.as_file()), 100, 200_000).unwrap();
    let mut expected = pattern(1 << 18);
    expected[100..200_100].fill(0);
    assert!(std::fs::read(file.path()).unwrap() == expected);
}

#[test]
fn identity_and_unknown_requests() {
    both(1 << 16, false, |fixture| {
        let id = [
            Buffer::Readable(&header(GET_ID, 0)),
            Buffer::Writable(20),
            Buffer::Writable(1),
        ];
        assert_eq!(
            fixture.driver.request(0, &id).1,
            b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
        );
        let short = [Buffer::Readable(&header(GET_ID, 0)), Buffer::Writable(5)];
        assert_eq!(fixture.driver.request(0, &short).1, b"disk\0");
        for unknown in [2, 3, 10, 14, u32::MAX] {
            assert_eq!(fixture.status(&[&header(unknown, 0)]), UNSUPPORTED);
        }
    });
}

#[test]
fn broken_requests_are_answered_and_the_queue_goes_on() {
    both(1 << 16, false, |fixture| {
        // No header at all, half a header, nothing writable.
        let (used, bytes) = fixture.driver.request(0, &[Buffer::Writable(1)]);
        assert_eq!((used, &bytes[..]), (1, &[IO_ERROR][..]));
        assert_eq!(fixture.status(&[&header(IN, 0)[..8]]), IO_ERROR);
        assert_eq!(
            fixture
                .driver
                .request(0, &[Buffer::Readable(&header(IN, 0))]),
            (0, vec![])
        );
        assert_eq!(fixture.read(0, 512), (pattern(512), OK));
    });
}

#[test]
fn broken_queues_end_the_device_with_nothing_in_flight() {
    type Break = fn(&mut TestDriver<Block>);
    let breaks: [Break; 4] = [
        |driver| {
            driver.queues[0].write_descriptor(0, u64::MAX - 3, 16, 0, 0);
            driver.queues[0].push_available(0);
        },
        |driver| {
            driver.queues[0].write_descriptor(0, 0x40_0000, 16, NEXT, 0);
            driver.queues[0].push_available(0);
        },
        |driver| {
            driver.queues[0].write_descriptor(0, 0x40_0000, 7, INDIRECT, 0);
            driver.queues[0].push_available(0);
        },
        |driver| {
            // Data that starts in memory and ends outside, behind a good header.
            let end = crate::virtio::testing::MEMORY_BYTES as u64;
            driver.queues[0].write_descriptor(0, 0x40_0000, 16, NEXT, 1);
            driver.queues[0].write_descriptor(1, end - 512, 1024, WRITE, 0);
            driver.queues[0].push_available(0);
        },
    ];
    for uring in [true, false] {
        for break_queue in breaks {
            let mut fixture = fixture(1 << 16, false, uring, None);
            break_queue(&mut fixture.driver);
            fixture.driver.queues[0].kick();
            assert!(matches!(fixture.driver.join(), Err(DeviceError::Queue(_))));
            fixture.driver.device().reset();
        }
    }
}

#[test]
fn a_full_queue_of_requests_in_flight() {
    both(1 << 20, false, |fixture| {
        let expected = pattern(1 << 20);
        for _ in 0..3 {
            let requests: Vec<_> = (0..42u64)
                .map(|number| {
                    let buffers = [
                        Buffer::Readable(&header(IN, number * 3)),
                        Buffer::Writable(4096),
                        Buffer::Writable(1),
                    ];
                    fixture.driver.push(0, &buffers)
                })
                .collect();
            fixture.driver.queues[0].kick();
            for _ in &requests {
                assert_eq!(fixture.driver.wait_used(0).1, 4097);
            }
            for (number, request) in requests.iter().enumerate() {
                let bytes = fixture.driver.read_writable(request);
                assert_eq!(bytes[..4096], expected[number * 1536..][..4096]);
                assert_eq!(bytes[4096], OK);
            }
        }
    });
}

#[test]
fn pause_loses_nothing_and_resume_goes_on() {
    both(1 << 20, false, |fixture| {
        for round in 0..20u64 {
            let data = [round as u8; 512];
            let requests: Vec<_> = (0..10)
                .map(|number| {
                    let header = header(OUT, round * 10 + number);
                    let buffers = [
                        Buffer::Readable(&header),
                        Buffer::Readable(&data),
                        Buffer::Writable(1),
                    ];
                    fixture.driver.push(0, &buffers)
                })
                .collect();
            fixture.driver.queues[0].kick();
            fixture.driver.pause().unwrap();
            let done = std::iter::from_fn(|| fixture.driver.queues[0].pop_used()).count();
            fixture.driver.resume();
            for _ in done..requests.len() {
                fixture.driver.wait_used(0);
            }
            for request in &requests {
                assert_eq!(fixture.driver.read_writable(request), [OK]);
            }
        }
        let expected: Vec<u8> = (0..20u8).flat_map(|round| [round; 5120]).collect();
        assert!(fixture.contents()[..expected.len()] == expected);
    });
}

#[test]
fn a_file_that_shrinks_gives_errors_and_one_report() {
    both(1 << 20, false, |fixture| {
        fixture.file.as_file().set_len(4096).unwrap();
        assert_eq!(fixture.read(0, 4096), (pattern(4096), OK));
        for _ in 0..3 {
            assert_eq!(fixture.read(4, 4096).1, IO_ERROR);
            assert_eq!(fixture.read(100, 4096).1, IO_ERROR);
        }
        let reports = fixture.reports.lock().unwrap();
        assert_eq!(reports.len(), 1, "{reports:?}");
        assert!(
            reports[0].contains("disk-1") && reports[0].contains("Read"),
            "{reports:?}"
        );
    });
}

#[test]
fn partitions_read_as_one_disk() {
    let files: Vec<_> = [700usize, 5000, 1 << 20]
        .iter()
        .map(|length| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&pattern(*length)).unwrap();
            file
        })
        .collect();
    for uring in [true, false] {
        let contents = Contents::Partitions(files.iter().map(|file| open(file, true)).collect());
        let block = Block::new("layers".into(), contents, true, None, Box::new(|_| {})).unwrap();
        let block = if uring { block } else { block.without_uring() };
        let sectors = block.disk.sectors();
        let mut driver = TestDriver::start(block, EVENT_INDEX);
        let mut disk = Vec::new();
        while (disk.len() as u64) < sectors * 512 {
            let sector = disk.len() as u64 / 512;
            // Blocks of 128 KiB, some with a piece of everything.
            let length = (128 * 1024).min(sectors * 512 - disk.len() as u64) as u32;
            let buffers = [
                Buffer::Readable(&header(IN, sector)),
                Buffer::Writable(1000),
                Buffer::Writable(length - 1000),
                Buffer::Writable(1),
            ];
            let request = driver.push(0, &buffers);
            driver.queues[0].kick();
            assert_eq!(driver.wait_used(0).1, length + 1);
            let mut bytes = driver.read_writable(&request);
            assert_eq!(bytes.pop(), Some(OK));
            disk.append(&mut bytes);
        }
        assert_eq!(&disk[512..520], b"EFI PART");
        assert_eq!(&disk[disk.len() - 512..][..8], b"EFI PART");
        for (index, length) in [700usize, 5000, 1 << 20].iter().enumerate() {
            let entry = &disk[1024 + index * 128..];
            let first = u64::from_le_bytes(entry[32..40].try_into().unwrap()) as usize * 512;
            assert!(disk[first..first + length] == pattern(*length)[..]);
            let padding = &disk[first + length..(first + length).next_multiple_of(512)];
            assert!(padding.iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn bad_configurations_are_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let new = |serial: &str, contents, read_only| {
        Block::new(serial.into(), contents, read_only, None, Box::new(|_| {}))
            .err()
            .unwrap()
    };
    let one = || Contents::File(open(&file, true));
    assert!(matches!(new("a b", one(), true), BlockError::Serial(_)));
    assert!(matches!(
        new("123456789012345678901", one(), true),
        BlockError::Serial(_)
    ));
    let partitions = Contents::Partitions(vec![open(&file, true)]);
    let error = new("x", partitions, false);
    assert!(matches!(
        error,
        BlockError::Disk {
            error: DiskError::WritablePartitions,
            ..
        }
    ));
    assert!(
        new("x", one(), false)
            .to_string()
            .contains("reading and writing")
    );
}

#[test]
fn rate_limit_slows_the_guest_down() {
    for uring in [true, false] {
        let limit = RateLimit {
            bytes_per_second: 0,
            burst_bytes: 0,
            operations_per_second: 100,
            burst_operations: 5,
        };
        let mut fixture = fixture(1 << 16, false, uring, Some(limit));
        let start = Instant::now();
        for _ in 0..25 {
            assert_eq!(fixture.read(0, 512).1, OK);
        }
        let elapsed = start.elapsed();
        assert!(elapsed >= Duration::from_millis(180), "{elapsed:?}");
        // Stops at once even while requests wait for tokens.
        for _ in 0..20 {
            let buffers = [
                Buffer::Readable(&header(IN, 0)),
                Buffer::Writable(512),
                Buffer::Writable(1),
            ];
            fixture.driver.push(0, &buffers);
        }
        fixture.driver.queues[0].kick();
        let start = Instant::now();
        fixture.driver.pause().unwrap();
        assert!(start.elapsed() < Duration::from_millis(150));
    }
}

#[test]
fn saved_state_fits_the_same_disk_only() {
    let mut first = fixture(1 << 16, false, true, None);
    first.driver.pause().unwrap();
    let state = first.driver.device().save().unwrap();
    let mut same = fixture(1 << 16, false, false, None);
    same.driver.pause().unwrap();
    same.driver.device().restore(&state).unwrap();
    let mut larger = fixture(1 << 17, false, true, None);
    larger.driver.pause().unwrap();
    assert!(matches!(
        larger.driver.device().restore(&state),
        Err(DeviceError::State(_))
    ));
    let newer = DeviceState {
        version: 2,
        ..state.clone()
    };
    assert!(matches!(
        same.driver.device().restore(&newer),
        Err(DeviceError::State(_))
    ));
    let broken = DeviceState {
        data: serde_json::json!({"serial": 5}),
        ..state
    };
    assert!(matches!(
        same.driver.device().restore(&broken),
        Err(DeviceError::State(_))
    ));
}

#[test]
fn config_space_says_what_is_offered() {
    let mut fixture = fixture(1 << 20, false, true, None);
    fixture.driver.pause().unwrap();
    let config = fixture.driver.device().config();
    let mut bytes = [0xff; 70];
    config.read(0, &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()), 2048);
    assert_eq!(u32::from_le_bytes(bytes[12..16].try_into().unwrap()), 126);
    assert_eq!(u32::from_le_bytes(bytes[20..24].try_into().unwrap()), 512);
    assert_eq!(bytes[60..], [0; 10]);
    config.write(0, &[0; 8]);
    config.read(0, &mut bytes[..8]);
    assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()), 2048);
}

/// Random requests against a model, both engines: contents and answers always agree.
#[test]
fn random_requests_match_a_model() {
    both(1 << 18, false, |fixture| {
        let mut model = pattern(1 << 18);
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for _ in 0..200 {
            let (sector, sectors) = (random(520), random(9));
            let (start, length) = (sector as usize * 512, sectors as usize * 512);
            let inside = start + length <= model.len();
            let status = if random(2) == 0 && length > 0 {
                let data = vec![random(256) as u8; length];
                if inside {
                    model[start..start + length].copy_from_slice(&data);
                }
                fixture.write(sector, &data)
            } else if random(4) == 0 {
                if inside {
                    model[start..start + length].fill(0);
                }
                fixture.status(&[&header(WRITE_ZEROES, 0), &range(sector, sectors as u32, 1)])
            } else if length > 0 {
                let (bytes, status) = fixture.read(sector, length as u32);
                assert!(!inside || bytes == model[start..start + length]);
                status
            } else {
                continue;
            };
            assert_eq!(status, if inside { OK } else { IO_ERROR });
        }
        assert!(fixture.contents() == model);
    });
}

/// Guest memory addresses are the driver's own; a status byte may lie at the very end of memory.
#[test]
fn status_at_the_last_byte_of_memory() {
    both(1 << 16, false, |fixture| {
        let end = crate::virtio::testing::MEMORY_BYTES as u64;
        let at = fixture.driver.allocate(16);
        fixture
            .driver
            .memory
            .write_slice(&header(FLUSH, 0), GuestAddress(at))
            .unwrap();
        fixture
            .driver
            .memory
            .write_obj(0xffu8, GuestAddress(end - 1))
            .unwrap();
        fixture.driver.queues[0].write_descriptor(0, at, 16, NEXT, 1);
        fixture.driver.queues[0].write_descriptor(1, end - 1, 1, WRITE, 0);
        fixture.driver.queues[0].push_available(0);
        fixture.driver.queues[0].kick();
        assert_eq!(fixture.driver.wait_used(0), (0, 1));
        let status: u8 = fixture
            .driver
            .memory
            .read_obj(GuestAddress(end - 1))
            .unwrap();
        assert_eq!(status, OK);
    });
}
