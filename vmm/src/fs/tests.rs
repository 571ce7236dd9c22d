//! Tests against a fake file server that speaks vhost-user in a thread.

use std::{
    io::IoSliceMut,
    mem::MaybeUninit,
    os::{fd::AsFd, unix::net::UnixStream},
    sync::Mutex,
    thread::JoinHandle,
    time::Instant,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vm_memory::Bytes;

use super::*;
use crate::{
    memory,
    virtio::testing::{Buffer, MEMORY_BYTES, TestDriver},
};

const DEADLINE: Duration = Duration::from_millis(500);
const FEATURES: u64 = TRANSPORT_FEATURES | 1 << 30;
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 13;
const REQUESTS: usize = 1;
/// FUSE_LOOKUP: any request with an answer.
const LOOKUP: u32 = 1;

/// What the fake does.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    /// Answers all requests.
    Serve,
    /// Dies at the first request, unanswered.
    Die,
    /// Never says anything.
    Silent,
    /// Offers these features only.
    Features(u64),
    /// Has this many queues.
    Queues(u64),
    /// Refuses this vhost-user request.
    Refuse(u32),
    /// Answers with another request's number.
    Nonsense,
}

/// One queue as the fake was told of it.
#[derive(Default)]
struct FakeQueue {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
}

struct Fake {
    stream: UnixStream,
    manner: Manner,
    memory: GuestMemory,
    queues: [FakeQueue; 2],
}

impl Fake {
    fn start(manner: Manner, memory: &GuestMemory) -> (OwnedFd, JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut fake = Self {
            stream: theirs,
            manner,
            memory: memory.clone(),
            queues: Default::default(),
        };
        let thread = std::thread::spawn(move || while fake.turn() {});
        (ours.into(), thread)
    }

    /// False when it is over.
    fn turn(&mut self) -> bool {
        let mut fds = vec![PollFd::new(&self.stream, PollFlags::IN)];
        let kicks: Vec<usize> = (0..2).filter(|index| self.queues[*index].enabled).collect();
        for index in &kicks {
            fds.push(PollFd::new(
                self.queues[*index].kick.as_ref().unwrap(),
                PollFlags::IN,
            ));
        }
        poll(&mut fds, None).unwrap();
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        for (index, ready) in kicks.iter().zip(&ready[1..]) {
            if *ready {
                let kick = self.queues[*index].kick.as_ref().unwrap();
                let _ = rustix::io::read(kick, &mut [0; 8]);
                if !self.serve(*index) {
                    return false;
                }
            }
        }
        !ready[0] || self.message()
    }

    /// Answers the available requests of a queue with success.
    fn serve(&mut self, index: usize) -> bool {
        let Self {
            memory,
            queues,
            manner,
            ..
        } = self;
        let queue = &mut queues[index];
        let address = |base: u64, offset: u64| GuestAddress(base + offset);
        loop {
            let end: u16 = memory.read_obj(address(queue.available, 2)).unwrap();
            if end == queue.next {
                return true;
            }
            if *manner == Manner::Die {
                return false;
            }
            let slot = u64::from(queue.next % queue.size);
            let head: u16 = memory
                .read_obj(address(queue.available, 4 + 2 * slot))
                .unwrap();
            let read = |index: u16| {
                let at = address(queue.descriptors, 16 * u64::from(index));
                let words: [u64; 2] = memory.read_obj(at).unwrap();
                (words[0], (words[1] >> 48) as u16)
            };
            let (request, next) = read(head);
            let (answer, _) = read(next);
            let unique: u64 = memory.read_obj(address(request, 8)).unwrap();
            memory.write_obj(16u64, GuestAddress(answer)).unwrap();
            memory.write_obj(unique, address(answer, 8)).unwrap();
            let element = [u32::from(head), 16];
            memory
                .write_obj(element, address(queue.used, 4 + 8 * slot))
                .unwrap();
            queue.next = queue.next.wrapping_add(1);
            memory
                .store(queue.next, address(queue.used, 2), Ordering::Release)
                .unwrap();
            rustix::io::write(queue.call.as_ref().unwrap(), &1u64.to_ne_bytes()).unwrap();
        }
    }

    fn message(&mut self) -> bool {
        let Some((request, flags, words, fds)) = self.read_message() else {
            return false;
        };
        if self.manner == Manner::Silent {
            return true;
        }
        let index = words.first().map_or(0, |word| (*word & 0xff) as usize);
        let value = words.first().map_or(0, |word| word >> 32);
        let mut fds = fds.into_iter();
        let queue = self.queues.get_mut(index);
        let answer = match (request, queue) {
            (1, _) => Some(match self.manner {
                Manner::Features(features) => features,
                _ => FEATURES,
            }),
            (15, _) => Some(PROTOCOL),
            (17, _) => Some(match self.manner {
                Manner::Queues(count) => count,
                _ => 2,
            }),
            (5, _) => {
                // One region, at guest address 0, of which the fake has the mapping already.
                assert_eq!(words, [1, 0, MEMORY_BYTES as u64, 0, 0]);
                assert_eq!(fds.len(), 1);
                None
            }
            (8, Some(queue)) => {
                queue.size = value as u16;
                None
            }
            (9, Some(queue)) => {
                [queue.descriptors, queue.used, queue.available] = [words[1], words[2], words[3]];
                None
            }
            (10, Some(queue)) => {
                queue.next = value as u16;
                None
            }
            (11, Some(queue)) => {
                queue.enabled = false;
                Some(words[0] | u64::from(queue.next) << 32)
            }
            (12, Some(queue)) => {
                queue.kick = fds.next();
                None
            }
            (13, Some(queue)) => {
                queue.call = fds.next();
                None
            }
            (18, Some(queue)) => {
                queue.enabled = value == 1;
                None
            }
            _ => None,
        };
        let answer = match answer {
            None if flags & 8 == 0 => return true,
            None => u64::from(self.manner == Manner::Refuse(request)),
            Some(answer) => answer,
        };
        let number = if self.manner == Manner::Nonsense {
            request + 1
        } else {
            request
        };
        let mut bytes: Vec<u8> = [number, 1 | 4, 8]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        bytes.extend(answer.to_le_bytes());
        // In two pieces, as a stream may deliver it.
        let (front, back) = bytes.split_at(7);
        rustix::io::write(&self.stream, front).is_ok()
            && rustix::io::write(&self.stream, back).is_ok()
    }

    /// Request, flags, payload, descriptors; `None` at the end.
    fn read_message(&mut self) -> Option<(u32, u32, Vec<u64>, Vec<OwnedFd>)> {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(&mut header)];
        let received = recvmsg(
            self.stream.as_fd(),
            &mut buffers,
            &mut control,
            RecvFlags::WAITALL,
        );
        if received.ok()?.bytes != 12 {
            return None;
        }
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(8) as usize];
        std::io::Read::read_exact(&mut self.stream, &mut payload).ok()?;
        let words = payload
            .chunks_exact(8)
            .map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap()))
            .collect();
        Some((word(0), word(4), words, fds))
    }
}

type Told = Arc<Mutex<Vec<String>>>;

fn shared_memory() -> GuestMemory {
    let region = memory::shared(0, MEMORY_BYTES as u64).unwrap();
    GuestMemory::from_regions(vec![region]).unwrap()
}

fn new(manner: Manner) -> (Result<Fs, DeviceError>, GuestMemory, Told) {
    let memory = shared_memory();
    let (socket, _thread) = Fake::start(manner, &memory);
    let told = Told::default();
    let report = {
        let told = told.clone();
        Box::new(move |reason| told.lock().unwrap().push(reason))
    };
    (
        Fs::new("tag", socket, 1, &memory, DEADLINE, report),
        memory,
        told,
    )
}

fn start(manner: Manner) -> (TestDriver<Fs>, Told) {
    let (device, memory, told) = new(manner);
    let driver = TestDriver::start_with_memory(device.unwrap(), TRANSPORT_FEATURES, memory);
    (driver, told)
}

/// A FUSE request; error and unique number of its answer, if there is one.
fn fuse(driver: &mut TestDriver<Fs>, opcode: u32, unique: u64) -> Option<(i32, u64)> {
    let mut header = vec![40, 0, 0, 0];
    header.extend(opcode.to_le_bytes());
    header.extend(unique.to_le_bytes());
    header.resize(40, 0);
    let buffers = [Buffer::Readable(&header), Buffer::Writable(64)];
    let (length, answer) = driver.request(REQUESTS, &buffers);
    if length == 0 {
        return None;
    }
    assert_eq!(answer[..4], 16u32.to_le_bytes());
    let error = i32::from_le_bytes(answer[4..8].try_into().unwrap());
    Some((error, u64::from_le_bytes(answer[8..16].try_into().unwrap())))
}

fn wait_for_interrupt(driver: &TestDriver<Fs>) {
    let start = Instant::now();
    // By the server itself, as KVM would see it; and the driver is told a reason.
    while driver.interrupt.irqfd().read().is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "no interrupt");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(driver.interrupt.take_status() & 1, 1);
}

#[test]
fn requests_are_answered_by_the_server_over_pauses() {
    let (mut driver, told) = start(Manner::Serve);
    for unique in 1..=3 {
        assert_eq!(fuse(&mut driver, LOOKUP, unique), Some((0, unique)));
        wait_for_interrupt(&driver);
    }
    driver.pause().unwrap();
    assert_eq!(driver.completed.load(Ordering::Relaxed), 3);
    let refused = driver.device().save().unwrap_err().to_string();
    assert!(refused.contains("shared directories"), "{refused}");
    driver.resume();
    assert_eq!(fuse(&mut driver, LOOKUP, 4), Some((0, 4)));
    driver.pause().unwrap();
    driver.device().reset();
    driver.resume();
    assert_eq!(fuse(&mut driver, LOOKUP, 5), Some((0, 5)));
    driver.pause().unwrap();
    assert!(told.lock().unwrap().is_empty());
}

#[test]
fn without_the_server_requests_fail_and_none_hangs() {
    let (mut driver, told) = start(Manner::Die);
    // The one in flight as well as later ones.
    for unique in 7..=9 {
        assert_eq!(
            fuse(&mut driver, LOOKUP, unique),
            Some((-libc::EIO, unique))
        );
    }
    wait_for_interrupt(&driver);
    assert_eq!(fuse(&mut driver, 2, 10), None);
    assert_eq!(fuse(&mut driver, 42, 11), None);
    driver.pause().unwrap();
    driver.device().reset();
    driver.resume();
    assert_eq!(fuse(&mut driver, LOOKUP, 12), Some((-libc::EIO, 12)));
    driver.pause().unwrap();
    let told = told.lock().unwrap();
    assert_eq!(*told, ["the file server closed the connection"]);
}

#[test]
fn a_broken_request_to_a_lost_server_breaks_the_queue() {
    let (mut driver, _told) = start(Manner::Die);
    fuse(&mut driver, LOOKUP, 1);
    driver.push(REQUESTS, &[Buffer::Readable(&[0; 39])]);
    driver.queues[REQUESTS].kick();
    assert!(driver.join().is_err());
}

#[test]
fn a_server_that_fails_at_the_start_is_lost() {
    for (manner, word) in [
        (Manner::Refuse(5), "refused SetMemTable"),
        (Manner::Refuse(18), "refused SetVringEnable"),
    ] {
        let (mut driver, told) = start(manner);
        assert_eq!(fuse(&mut driver, LOOKUP, 1), Some((-libc::EIO, 1)));
        let told = told.lock().unwrap();
        assert!(told.len() == 1 && told[0].contains(word), "{told:?}");
    }
}

#[test]
fn a_reset_is_told_before_the_next_driver_starts() {
    let (mut driver, told) = start(Manner::Refuse(34));
    assert_eq!(fuse(&mut driver, LOOKUP, 1), Some((0, 1)));
    driver.pause().unwrap();
    driver.device().reset();
    assert!(told.lock().unwrap().is_empty());
    driver.resume();
    assert_eq!(fuse(&mut driver, LOOKUP, 2), Some((-libc::EIO, 2)));
    assert_eq!(
        *told.lock().unwrap(),
        ["the file server refused ResetDevice"]
    );
}

#[test]
fn servers_that_will_not_do_are_refused_in_time() {
    let start = Instant::now();
    for (manner, word) in [
        (Manner::Silent, "did not answer"),
        (Manner::Features(1 << 30), "lacks the features"),
        (Manner::Queues(1), "lacks queues"),
        (Manner::Nonsense, "something else"),
    ] {
        let error = new(manner).0.err().unwrap().to_string();
        assert!(error.contains(word), "{error}");
    }
    assert!(start.elapsed() < 4 * DEADLINE);
}

#[test]
fn configurations_that_make_no_device_are_refused() {
    let memory = shared_memory();
    let new = |tag: &str, queues, memory| {
        let (socket, _thread) = Fake::start(Manner::Serve, memory);
        Fs::new(tag, socket, queues, memory, DEADLINE, Box::new(|_| {}))
            .map(drop)
            .unwrap_err()
            .to_string()
    };
    for tag in ["", "a\0b", &"x".repeat(37)] {
        assert!(new(tag, 1, &memory).contains("mount tag"));
    }
    assert!(new("tag", 0, &memory).contains("request queues"));
    assert!(new("tag", 9, &memory).contains("request queues"));
    let region = memory::anonymous(0, MEMORY_BYTES as u64).unwrap();
    let private = GuestMemory::from_regions(vec![region]).unwrap();
    assert!(new("tag", 1, &private).contains("memory.shared"));
}

#[test]
fn the_configuration_is_tag_and_queues() {
    let device = new(Manner::Serve).0.unwrap();
    let mut bytes = [0xff; 40];
    device.config().read(0, &mut bytes);
    assert_eq!(&bytes[..4], b"tag\0");
    assert!(bytes[3..36].iter().all(|byte| *byte == 0));
    assert_eq!(bytes[36..], [1, 0, 0, 0]);
    assert_eq!(device.queue_sizes().len(), 2);
}
