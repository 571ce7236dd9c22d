//! The front end's side of vhost-user (QEMU's `docs/interop/vhost-user.rst`),
//! as far as virtio-fs needs it.
//!
//! Our own against the `vhost` crate's front end, which waits for ever for a
//! back end that is silent: here every exchange has a deadline.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, send, sendmsg},
};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    memory::GuestMemory,
    virtio::{ActiveQueue, event_fd},
};

/// Feature bit of the connection, beside the device's: protocol features can be negotiated.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol feature: more than one queue.
const PROTOCOL_MQ: u64 = 1 << 0;
/// Protocol feature: an answer to any request on demand.
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
/// Protocol feature: RESET_DEVICE.
const PROTOCOL_RESET_DEVICE: u64 = 1 << 13;
/// Needed, all of them.
const PROTOCOL_NEEDED: u64 = PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_RESET_DEVICE;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;
const HEADER_BYTES: usize = 12;
/// Most regions of one SET_MEM_TABLE.
pub(super) const MAX_REGIONS: usize = 8;
/// Longest payload, in words of eight bytes: a full memory table.
const MAX_WORDS: usize = 1 + 4 * MAX_REGIONS;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    ResetDevice = 34,
}

/// What went wrong with a back end. It is of no use then.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("the file server closed the connection")]
    Closed,
    #[error("the file server did not answer {request:?} within {} ms", deadline.as_millis())]
    Deadline { request: String, deadline: Duration },
    #[error("the file server refused {0}")]
    Refused(String),
    #[error("the file server answered {0} with something else")]
    Nonsense(String),
    #[error("the file server lacks {0}")]
    Lacks(String),
    #[error("connection to the file server: {0}")]
    Io(#[from] Errno),
    #[error("{0}")]
    Memory(&'static str),
}

/// A connected back end.
pub(super) struct Backend {
    socket: OwnedFd,
    deadline: Duration,
    features: u64,
}

impl Backend {
    /// Negotiates on a connected stream. `needed` are device features that must be offered.
    pub(super) fn connect(
        socket: OwnedFd,
        deadline: Duration,
        needed: u64,
        queues: u64,
    ) -> Result<Self, Error> {
        let mut backend = Self {
            socket,
            deadline,
            features: 0,
        };
        backend.send(Request::SetOwner, 0, &[], &[])?;
        backend.features = backend.get(Request::GetFeatures)?;
        let missing = (needed | PROTOCOL_FEATURES) & !backend.features;
        if missing != 0 {
            return Err(Error::Lacks(format!("the features {missing:#x}")));
        }
        let missing = PROTOCOL_NEEDED & !backend.get(Request::GetProtocolFeatures)?;
        if missing != 0 {
            return Err(Error::Lacks(format!("the protocol features {missing:#x}")));
        }
        backend.send(Request::SetProtocolFeatures, 0, &[PROTOCOL_NEEDED], &[])?;
        let offered = backend.get(Request::GetQueueNum)?;
        if offered < queues {
            return Err(Error::Lacks(format!(
                "queues: it has {offered}, and {queues} are configured (one of them for priority requests)"
            )));
        }
        Ok(backend)
    }

    /// Hands over the features the driver accepted, and guest memory.
    ///
    /// Guest-physical addresses stand for the addresses in this process: the back end need not know those.
    pub(super) fn start(&mut self, features: u64, memory: &GuestMemory) -> Result<(), Error> {
        let features = (features & self.features) | PROTOCOL_FEATURES;
        self.set(Request::SetFeatures, &[features], &[])?;
        let regions = shared_regions(memory).collect::<Result<Vec<_>, _>>()?;
        let mut words = vec![regions.len() as u64];
        for region in &regions {
            words.extend([region.start, region.bytes, region.start, region.offset]);
        }
        let files: Vec<_> = regions.iter().map(|region| region.fd).collect();
        self.set(Request::SetMemTable, &words, &files)
    }

    /// Lets the back end work on a queue from where the queue is.
    pub(super) fn start_queue(
        &mut self,
        index: u32,
        queue: &ActiveQueue,
        call: &EventFd,
    ) -> Result<(), Error> {
        let rings = queue.rings();
        let number = u64::from(index);
        // A vring state: index in the low half, a number in the high one.
        let state = |value: u16| [number | u64::from(value) << 32];
        self.set(Request::SetVringNum, &state(queue.size()), &[])?;
        let addresses = [number, rings.descriptors, rings.used, rings.available, 0];
        self.set(Request::SetVringAddr, &addresses, &[])?;
        let (next_available, _) = queue.position();
        self.set(Request::SetVringBase, &state(next_available), &[])?;
        self.set(Request::SetVringCall, &[number], &[event_fd(call)])?;
        self.set(Request::SetVringKick, &[number], &[event_fd(queue.kick())])?;
        self.set(Request::SetVringEnable, &state(1), &[])
    }

    /// Stops a queue; nothing of it is in flight then. The next available entry.
    pub(super) fn stop_queue(&mut self, index: u32) -> Result<u16, Error> {
        let request = Request::GetVringBase;
        self.send(request, 0, &[u64::from(index)], &[])?;
        let answer = self.receive(request)?;
        if answer as u32 != index {
            return Err(Error::Nonsense(format!("{request:?}")));
        }
        u16::try_from(answer >> 32).map_err(|_| Error::Nonsense(format!("{request:?}")))
    }

    /// Forgets the driver's session.
    pub(super) fn reset(&mut self) -> Result<(), Error> {
        self.set(Request::ResetDevice, &[], &[])
    }

    fn get(&mut self, request: Request) -> Result<u64, Error> {
        self.send(request, 0, &[], &[])?;
        self.receive(request)
    }

    fn set(
        &mut self,
        request: Request,
        words: &[u64],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        self.send(request, FLAG_NEED_REPLY, words, fds)?;
        match self.receive(request)? {
            0 => Ok(()),
            _ => Err(Error::Refused(format!("{request:?}"))),
        }
    }

    fn send(
        &mut self,
        request: Request,
        flags: u32,
        words: &[u64],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        if words.len() > MAX_WORDS {
            return Err(Error::Memory("too many regions of guest memory"));
        }
        let bytes = 8 * words.len();
        let mut message = [0; HEADER_BYTES + 8 * MAX_WORDS];
        message[..4].copy_from_slice(&(request as u32).to_le_bytes());
        message[4..8].copy_from_slice(&(VERSION | flags).to_le_bytes());
        message[8..12].copy_from_slice(&(bytes as u32).to_le_bytes());
        for (chunk, word) in message[HEADER_BYTES..].chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        let mut rest = &message[..HEADER_BYTES + bytes];
        let end = Instant::now() + self.deadline;
        let mut first = true;
        while !rest.is_empty() {
            self.wait(PollFlags::OUT, end, request)?;
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let sent = if first && !fds.is_empty() {
                let mut space =
                    [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_REGIONS))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !control.push(SendAncillaryMessage::ScmRights(fds)) {
                    return Err(Error::Memory("too many regions of guest memory"));
                }
                sendmsg(&self.socket, &[io::IoSlice::new(rest)], &mut control, flags)
            } else {
                send(&self.socket, rest, flags)
            };
            match sent {
                Ok(count) => {
                    rest = &rest[count..];
                    first = false;
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Error::Closed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// An answer of eight bytes.
    fn receive(&mut self, request: Request) -> Result<u64, Error> {
        let end = Instant::now() + self.deadline;
        let mut message = [0; HEADER_BYTES + 8];
        let mut filled = 0;
        while filled < message.len() {
            self.wait(PollFlags::IN, end, request)?;
            match recv(&self.socket, &mut message[filled..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Error::Closed),
                Ok((count, _)) => filled += count,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(Error::Closed),
                Err(error) => return Err(error.into()),
            }
        }
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| message[at + byte]));
        let sound = word(0) == request as u32
            && word(4) & VERSION_MASK == VERSION
            && word(4) & FLAG_REPLY != 0
            && word(8) == 8;
        if !sound {
            return Err(Error::Nonsense(format!("{request:?}")));
        }
        Ok(u64::from(word(12)) | u64::from(word(16)) << 32)
    }

    fn wait(&self, events: PollFlags, end: Instant, request: Request) -> Result<(), Error> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Deadline {
                    request: format!("{request:?}"),
                    deadline: self.deadline,
                });
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(&self.socket, events)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Backend {
    /// Readable when the back end has gone (it never speaks first).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// One region of guest memory as another process maps it.
pub(super) struct SharedRegion<'a> {
    start: u64,
    bytes: u64,
    offset: u64,
    fd: BorrowedFd<'a>,
}

/// The guest's RAM. Memory that only the guest can read (read-only pmem) is left out: a back end
/// could not map it.
pub(super) fn shared_regions(
    memory: &GuestMemory,
) -> impl Iterator<Item = Result<SharedRegion<'_>, Error>> {
    memory
        .iter()
        .filter(|region| region.prot() & libc::PROT_WRITE != 0)
        .map(|region| {
            let file = region
                .file_offset()
                .filter(|_| region.flags() & libc::MAP_SHARED != 0)
                .ok_or(Error::Memory(
                    "guest memory is private to the VMM: shared directories need \
                     `memory.shared` in the boot configuration",
                ))?;
            Ok(SharedRegion {
                start: region.start_addr().0,
                bytes: region.len(),
                offset: file.start(),
                fd: file.file().as_fd(),
            })
        })
}
