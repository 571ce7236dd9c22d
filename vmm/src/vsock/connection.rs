//! One connection: a stream of a host program on one side, packets of the guest on the other.
//!
//! ```text
//! Greeting ──"CONNECT <port>\n"──> Requested ──RESPONSE──> Open ──RST or both SHUTDOWNs of the guest──> Lingering
//!                 (guest's REQUEST) ─────────────────────> Open
//! ```
//! A connection never waits for another: what its host program does not take stays in its own buffer, and the guest's
//! credit for it runs out.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::Instant,
};

use rustix::{io::Errno, net::Shutdown};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{
    buffer::Buffer,
    packet::{
        HEADER_BYTES, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RW,
        OP_SHUTDOWN, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
    },
    socket,
};
use crate::{
    memory::GuestMemory,
    virtio::{Chain, ChainError, append_iovecs},
};

/// Bytes that a connection buffers of what the guest sent: the credit the guest gets.
pub const BUFFER_BYTES: u32 = 128 * 1024;
/// Most payload of one packet to the guest.
const MAX_PAYLOAD: u64 = 64 * 1024;

/// Guest memory, and storage for lists of its pieces.
pub struct Guest<'a> {
    /// Holds all chains.
    pub memory: &'a GuestMemory,
    /// Of use during one system call only.
    pub iovecs: Vec<libc::iovec>,
}

/// What identifies a connection of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Ports {
    /// Ours.
    pub host: u32,
    /// The guest's.
    pub guest: u32,
}

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The host program has not said which port it wants.
    Greeting,
    /// The guest has not answered our REQUEST.
    Requested,
    /// Data flows.
    Open,
    /// The guest is done with it; the host program still gets what is buffered.
    Lingering,
}

/// What is to become of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Keep,
    /// It is over, and the guest knows.
    Close,
    /// It is over; the guest has to be told.
    Reset,
}

/// Control packets that wait for room.
#[derive(Debug, Clone, Copy, Default)]
struct Pending {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    /// All 0 while greeting.
    pub ports: Ports,
    /// Where it is in its life.
    pub state: State,
    /// When the other side must have done its next step.
    pub deadline: Option<Instant>,
    /// It is in the list of those that have something for the guest.
    pub listed: bool,
    /// Distinguishes it from others that had its place.
    pub generation: u32,

    pending: Pending,
    /// Flags of the last SHUTDOWN that was sent.
    shutdown_sent: u32,

    // From the guest to the host.
    buffer: Buffer,
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest knows it.
    announced: u32,
    writable: bool,
    /// The guest sends no more.
    guest_done: bool,
    /// The host program takes no more.
    host_deaf: bool,

    // From the host to the guest.
    sent: u32,
    guest_buffer: u32,
    guest_forwarded: u32,
    readable: bool,
    /// No edge will follow the next end of data: read until the end.
    ending: bool,
    /// The host program sends no more.
    host_done: bool,
    /// The guest takes no more.
    guest_deaf: bool,
}

impl Connection {
    /// A host program that has yet to say what it wants.
    pub fn greeting(socket: OwnedFd, generation: u32, deadline: Instant) -> Self {
        Self {
            socket,
            ports: Ports::default(),
            state: State::Greeting,
            deadline: Some(deadline),
            listed: false,
            generation,
            pending: Pending::default(),
            shutdown_sent: 0,
            buffer: Buffer::default(),
            received: 0,
            forwarded: 0,
            announced: 0,
            writable: true,
            guest_done: false,
            host_deaf: false,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            readable: true,
            ending: false,
            host_done: false,
            guest_deaf: false,
        }
    }

    /// A connection that the guest opened; `socket` is our end.
    pub fn accepted(socket: OwnedFd, generation: u32, ports: Ports, header: &Header) -> Self {
        let mut connection = Self {
            state: State::Open,
            ports,
            deadline: None,
            ..Self::greeting(socket, generation, Instant::now())
        };
        connection.pending.response = true;
        connection.note_credit(header);
        connection
    }

    /// The host program's stream.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Bytes that wait for the host program.
    #[cfg(test)]
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Asks the guest for a connection.
    pub fn request(&mut self, ports: Ports, deadline: Instant) {
        self.ports = ports;
        self.state = State::Requested;
        self.deadline = Some(deadline);
        self.pending.request = true;
    }

    /// Notes what an event said; `hung_up`: the host program closed its end.
    pub fn note_event(
        &mut self,
        readable: bool,
        writable: bool,
        ending: bool,
        hung_up: bool,
    ) -> Verdict {
        self.readable |= readable || ending;
        self.ending |= ending || hung_up;
        if hung_up {
            if self.state == State::Requested {
                return Verdict::Reset;
            }
            self.give_up_writing();
        }
        if writable {
            self.writable = true;
        }
        if self.state == State::Greeting {
            Verdict::Keep
        } else {
            self.flush()
        }
    }

    /// There is something to send to the guest.
    pub fn wants_to_send(&self) -> bool {
        let Pending {
            request,
            response,
            credit_update,
            credit_request,
        } = self.pending;
        match self.state {
            State::Greeting | State::Lingering => false,
            State::Requested => request,
            State::Open => {
                response
                    || credit_update
                    || credit_request
                    || self.shutdown_flags() != self.shutdown_sent
                    || self.wants_to_read() && self.credit() > 0
            }
        }
    }

    /// Makes the next packet to the guest in `chain`: its header; the payload is in place. None: there is nothing to
    /// send after all.
    ///
    /// # Errors
    /// [`ChainError`]: the guest's buffer holds no packet.
    pub fn next_packet(
        &mut self,
        chain: &Chain,
        guest: &mut Guest<'_>,
    ) -> Result<Option<Header>, ChainError> {
        if self.state == State::Requested {
            return Ok(std::mem::take(&mut self.pending.request).then(|| self.header(OP_REQUEST)));
        }
        if self.state != State::Open {
            return Ok(None);
        }
        if std::mem::take(&mut self.pending.response) {
            return Ok(Some(self.header(OP_RESPONSE)));
        }
        if self.wants_to_read() && self.credit() > 0 {
            let length = self.read_to_guest(chain, guest)?;
            if length > 0 {
                return Ok(Some(Header {
                    len: length,
                    ..self.header(OP_RW)
                }));
            }
        }
        let flags = self.shutdown_flags();
        if flags != self.shutdown_sent {
            self.shutdown_sent = flags;
            return Ok(Some(Header {
                flags,
                ..self.header(OP_SHUTDOWN)
            }));
        }
        if std::mem::take(&mut self.pending.credit_request) {
            return Ok(Some(self.header(OP_CREDIT_REQUEST)));
        }
        Ok(self
            .pending
            .credit_update
            .then(|| self.header(OP_CREDIT_UPDATE)))
    }

    /// Both directions are shut on our side: the guest has until a deadline to say RST.
    pub fn awaits_reset(&self) -> bool {
        self.state == State::Open && self.shutdown_sent == SHUTDOWN_BOTH
    }

    /// The guest accepted our request: the host program is told.
    pub fn opened(&mut self) -> Verdict {
        self.state = State::Open;
        self.deadline = None;
        let mut text = [0u8; 16];
        let mut rest = &mut text[..];
        // "OK ", at most ten digits, a line feed: it fits.
        let _ = std::io::Write::write_fmt(&mut rest, format_args!("OK {}\n", self.ports.host));
        let length = 16 - rest.len();
        // The stream is fresh, so a line fits, or the host program is gone.
        match socket::send_bytes(self.socket.as_fd(), [&text[..length], &[]]) {
            Ok(sent) if sent == length => Verdict::Keep,
            _ => Verdict::Reset,
        }
    }

    /// Takes the credit that every packet of the guest bears.
    pub fn note_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        self.pending.credit_request &= self.credit() == 0;
    }

    /// The guest asks for our credit.
    pub fn credit_requested(&mut self) {
        self.pending.credit_update = true;
    }

    /// Data of the guest: `length` bytes behind the header of `chain`.
    pub fn data(&mut self, length: u32, chain: &Chain, guest: &mut Guest<'_>) -> Verdict {
        let waiting = self.received.wrapping_sub(self.forwarded);
        if self.guest_done || u64::from(waiting) + u64::from(length) > BUFFER_BYTES.into() {
            return Verdict::Reset;
        }
        self.received = self.received.wrapping_add(length);
        let mut done = 0;
        if self.host_deaf {
            done = length;
        } else if self.buffer.is_empty() && self.writable {
            done = self.send_from_guest(length, chain, guest);
        }
        self.forward(done);
        if done == length {
            return Verdict::Keep;
        }
        if !self.buffer_from_guest(done, length, chain, guest.memory) {
            return Verdict::Reset;
        }
        // Until the socket says that it is full: the next edge comes only after that.
        self.flush()
    }

    /// SHUTDOWN of the guest. Reset: it is over on the guest's side, RST is the answer, and the connection lingers.
    pub fn shutdown(&mut self, flags: u32) -> Verdict {
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            // The host program's next write fails, as it would with a local reader gone.
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_done = true;
        }
        match (self.guest_done && self.guest_deaf, self.flush()) {
            (true, _) => Verdict::Reset,
            (false, verdict) => verdict,
        }
    }

    /// The guest has forgotten the connection. Keep: data is left for the host program.
    pub fn forgotten(&mut self) -> Verdict {
        let orderly = self.guest_done;
        self.state = State::Lingering;
        self.deadline = None;
        self.guest_done = true;
        if orderly {
            self.flush()
        } else {
            Verdict::Close
        }
    }

    /// Gives the host program what is buffered.
    fn flush(&mut self) -> Verdict {
        while self.writable && !self.buffer.is_empty() {
            match socket::send_bytes(self.socket.as_fd(), self.buffer.parts()) {
                Ok(sent) => {
                    self.buffer.consume(sent);
                    // At most the buffer's length.
                    self.forward(sent as u32);
                }
                Err(errno) => self.note_send_error(errno),
            }
        }
        if !self.buffer.is_empty() {
            return Verdict::Keep;
        }
        if self.state == State::Lingering {
            return Verdict::Close;
        }
        if self.guest_done && !self.host_deaf {
            // Data first, then the end: the buffer is empty. The guest need not be told that nobody listens any more.
            self.host_deaf = true;
            self.shutdown_sent |= SHUTDOWN_RECEIVE;
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
        Verdict::Keep
    }

    fn forward(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count);
        // A guest that waits for room has used half of it at least.
        if self.forwarded.wrapping_sub(self.announced) >= BUFFER_BYTES / 2 {
            self.pending.credit_update = true;
        }
    }

    /// Sends payload straight from guest memory. Bytes sent.
    fn send_from_guest(&mut self, length: u32, chain: &Chain, guest: &mut Guest<'_>) -> u32 {
        let Guest { memory, iovecs } = guest;
        iovecs.clear();
        let header = HEADER_BYTES as u64;
        if append_iovecs(memory, chain.readable(), header, length.into(), iovecs).is_err() {
            return 0;
        }
        // SAFETY: the iovecs lie in guest memory, which `memory` keeps mapped.
        match unsafe { socket::send(self.socket.as_fd(), iovecs) } {
            // At most `length`.
            Ok(sent) => sent as u32,
            Err(errno) => {
                self.note_send_error(errno);
                if self.host_deaf { length } else { 0 }
            }
        }
    }

    /// Buffers payload from byte `skip` to `length`. False if it does not fit.
    fn buffer_from_guest(
        &mut self,
        skip: u32,
        length: u32,
        chain: &Chain,
        memory: &GuestMemory,
    ) -> bool {
        let mut skip = u64::from(skip) + HEADER_BYTES as u64;
        let mut left = u64::from(length) + HEADER_BYTES as u64 - skip;
        for segment in chain.readable() {
            let bytes = u64::from(segment.length);
            if skip >= bytes {
                skip -= bytes;
                continue;
            }
            let take = left.min(bytes - skip);
            let address = GuestAddress(segment.address.0 + skip);
            let Ok(slice) = memory.get_slice(address, take as usize) else {
                return false;
            };
            if !self.buffer.push(&slice, BUFFER_BYTES as usize) {
                return false;
            }
            skip = 0;
            left -= take;
            if left == 0 {
                break;
            }
        }
        true
    }

    fn note_send_error(&mut self, errno: Errno) {
        match errno {
            Errno::AGAIN => self.writable = false,
            Errno::INTR => {}
            _ => self.give_up_writing(),
        }
    }

    /// The host program takes no more: what it did not take is gone.
    fn give_up_writing(&mut self) {
        self.host_deaf = true;
        self.forward(self.buffer.len() as u32);
        self.buffer.clear();
    }

    fn wants_to_read(&self) -> bool {
        self.readable && !self.host_done && !self.guest_deaf
    }

    /// Bytes that the guest has room for; 0 as well when it claims nonsense.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(in_flight)
    }

    /// Reads into the guest's buffer. Bytes read; 0: nothing is there now, or ever again.
    fn read_to_guest(&mut self, chain: &Chain, guest: &mut Guest<'_>) -> Result<u32, ChainError> {
        let header = HEADER_BYTES as u64;
        let room = chain.writable_bytes().saturating_sub(header);
        if room == 0 {
            return Err(ChainError::TooShort {
                wanted: header + 1,
                left: chain.writable_bytes(),
            });
        }
        let wanted = room.min(self.credit().into()).min(MAX_PAYLOAD);
        let Guest { memory, iovecs } = guest;
        iovecs.clear();
        append_iovecs(memory, chain.writable(), header, wanted, iovecs)?;
        // SAFETY: the iovecs lie in guest memory, which `memory` keeps mapped and which is only ever reached through
        // volatile accesses.
        let count = match unsafe { socket::receive(self.socket.as_fd(), iovecs) } {
            Ok(count) => count as u32,
            Err(Errno::INTR) => return Ok(0),
            Err(Errno::AGAIN) => {
                self.readable = false;
                return Ok(0);
            }
            Err(_) => {
                self.give_up_writing();
                0
            }
        };
        if count == 0 {
            self.host_done = true;
        } else if u64::from(count) < wanted && !self.ending {
            // Drained; an edge announces what comes next.
            self.readable = false;
        }
        self.sent = self.sent.wrapping_add(count);
        // Out of credit with data waiting: the guest is asked for news, once.
        self.pending.credit_request = self.wants_to_read() && self.credit() == 0;
        Ok(count)
    }

    /// What our SHUTDOWN has to say.
    fn shutdown_flags(&self) -> u32 {
        let receive = if self.host_deaf { SHUTDOWN_RECEIVE } else { 0 };
        let send = if self.host_done { SHUTDOWN_SEND } else { 0 };
        self.shutdown_sent | receive | send
    }

    /// A header, with our credit in it.
    fn header(&mut self, op: u16) -> Header {
        self.announced = self.forwarded;
        self.pending.credit_update = false;
        Header {
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            kind: TYPE_STREAM,
            op,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }
}
