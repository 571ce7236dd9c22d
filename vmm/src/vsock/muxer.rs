//! All connections of a guest: who is who, whose turn it is, and what is due.

use std::{
    collections::{HashMap, VecDeque},
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use caisson_vmm_api::VsockIncoming;
use rustix::{
    event::epoll::{self, EventData, EventFlags},
    io::Errno,
};

use super::{
    connection::{Connection, Guest, Ports, State, Verdict},
    packet::{
        HEADER_BYTES, HOST_CID, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST,
        OP_RESPONSE, OP_RST, OP_RW, OP_SHUTDOWN, TYPE_STREAM,
    },
    socket::{self, Line},
};
use crate::{
    memory::GuestMemory,
    virtio::{Chain, ChainError},
};

/// Most connections at a time, in all states.
pub const MAX_CONNECTIONS: usize = 1024;
/// Most RSTs that wait for the guest's buffers before its packets are left where they are.
const MAX_RESETS: usize = 256;
/// First port given to host programs; those below are for services.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// When to try again after the process ran out of descriptors, as a part of the patience.
const RETRY_DIVISOR: u32 = 50;

/// An RST that no connection stands behind any more.
struct Reset {
    ports: Ports,
    kind: u16,
}

/// The connections of one guest.
pub struct Muxer {
    cid: u64,
    listener: OwnedFd,
    acceptor: Option<OwnedFd>,
    epoll: OwnedFd,
    patience: Duration,
    connections: Vec<Option<Connection>>,
    free: Vec<u32>,
    by_ports: HashMap<Ports, u32>,
    /// Connections with something for the guest, in turn.
    turns: VecDeque<u32>,
    resets: VecDeque<Reset>,
    next_port: u32,
    next_generation: u32,
    /// Nothing is due before; None: nothing ever.
    next_deadline: Option<Instant>,
    /// The process had no descriptor for a waiting host program.
    starved: bool,
}

impl Muxer {
    /// Nothing connected yet. Events of connections come from `epoll`, marked by [`Muxer::event`]'s token.
    pub fn new(
        cid: u32,
        listener: OwnedFd,
        acceptor: Option<OwnedFd>,
        epoll: OwnedFd,
        patience: Duration,
    ) -> Self {
        Self {
            cid: cid.into(),
            listener,
            acceptor,
            epoll,
            patience,
            connections: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_HOST_PORT,
            next_generation: 0,
            next_deadline: None,
            starved: false,
        }
    }

    /// Where host programs connect.
    pub fn listener(&self) -> &OwnedFd {
        &self.listener
    }

    /// Where events come from.
    pub fn epoll(&self) -> &OwnedFd {
        &self.epoll
    }

    /// As given at construction.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Number of connections.
    pub fn len(&self) -> usize {
        self.connections.len() - self.free.len()
    }

    /// Packets without and connections with something that waits for the guest.
    #[cfg(test)]
    pub fn waiting(&self) -> (usize, usize) {
        (self.resets.len(), self.turns.len())
    }

    /// Bytes that wait for host programs.
    #[cfg(test)]
    pub fn buffered(&self) -> usize {
        self.connections
            .iter()
            .flatten()
            .map(Connection::buffered)
            .sum()
    }

    /// Closes everything; the guest is not told.
    pub fn clear(&mut self) {
        self.connections.clear();
        self.free.clear();
        self.by_ports.clear();
        self.turns.clear();
        self.resets.clear();
        self.next_deadline = None;
    }

    /// When [`Muxer::expire`] should be called.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.next_deadline
    }

    /// Ends what is overdue.
    pub fn expire(&mut self, now: Instant) {
        if self.next_deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.next_deadline = None;
        for index in 0..self.connections.len() {
            let Some(connection) = &self.connections[index] else {
                continue;
            };
            match connection.deadline {
                Some(deadline) if deadline <= now => {
                    let verdict = match connection.state {
                        State::Greeting => Verdict::Close,
                        _ => Verdict::Reset,
                    };
                    self.conclude(index as u32, verdict);
                }
                Some(deadline) => self.due(deadline),
                None => {}
            }
        }
        if self.starved {
            self.accept(now);
        }
    }

    /// Takes host programs that wait.
    pub fn accept(&mut self, now: Instant) {
        self.starved = false;
        loop {
            match socket::accept(&self.listener) {
                // Full: the host program sees the end of the stream at once.
                Ok(stream) if self.len() >= MAX_CONNECTIONS => {
                    log::warn!("vsock: {MAX_CONNECTIONS} connections are open, one is refused");
                    drop(stream);
                }
                Ok(stream) => {
                    let (deadline, generation) = (now + self.patience, self.generation());
                    let connection = Connection::greeting(stream, generation, deadline);
                    if let Some(index) = self.insert(connection) {
                        self.due(deadline);
                        self.greet(index, now);
                    }
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => {
                    log::warn!("vsock: accept: {errno}");
                    self.starved = true;
                    self.due(now + self.patience / RETRY_DIVISOR);
                    return;
                }
            }
        }
    }

    /// Handles an event of the connection that `token` stands for.
    pub fn event(&mut self, token: u64, flags: EventFlags, now: Instant) {
        let (index, generation) = (token as u32, (token >> 32) as u32);
        let Some(connection) = self.connection(index) else {
            return;
        };
        // The place may have a new owner since the event was raised.
        if connection.generation != generation {
            return;
        }
        let verdict = connection.note_event(
            flags.contains(EventFlags::IN),
            flags.contains(EventFlags::OUT),
            flags.contains(EventFlags::RDHUP),
            flags.intersects(EventFlags::HUP | EventFlags::ERR),
        );
        if connection.state == State::Greeting {
            self.greet(index, now);
        } else {
            self.conclude(index, verdict);
        }
    }

    /// The guest's packets may be taken: their answers have room.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Something waits for a buffer of the guest.
    pub fn wants_to_send(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// Puts the next packet into the guest's buffer. Bytes written; None: nothing was to be sent after all.
    ///
    /// # Errors
    /// [`ChainError`]: the buffer is too small for a packet.
    pub fn fill(
        &mut self,
        chain: &Chain,
        guest: &mut Guest<'_>,
        now: Instant,
    ) -> Result<Option<u32>, ChainError> {
        if let Some(reset) = self.resets.pop_front() {
            let header = Header {
                src_port: reset.ports.host,
                dst_port: reset.ports.guest,
                kind: reset.kind,
                op: OP_RST,
                ..Header::default()
            };
            return self.write_header(header, chain, guest.memory).map(Some);
        }
        while let Some(index) = self.turns.pop_front() {
            let patience = self.patience;
            let Some(connection) = self
                .connections
                .get_mut(index as usize)
                .and_then(Option::as_mut)
            else {
                continue;
            };
            connection.listed = false;
            let header = connection.next_packet(chain, guest)?;
            if connection.deadline.is_none() && connection.awaits_reset() {
                let deadline = now + patience;
                connection.deadline = Some(deadline);
                self.due(deadline);
            }
            self.list(index);
            if let Some(header) = header {
                return self.write_header(header, chain, guest.memory).map(Some);
            }
        }
        Ok(None)
    }

    /// Handles a packet of the guest.
    pub fn packet(&mut self, chain: &Chain, guest: &mut Guest<'_>) {
        let mut bytes = [0; HEADER_BYTES];
        let mut reader = chain.reader(guest.memory);
        if reader.read(&mut bytes).is_err() {
            log::debug!(
                "vsock: the guest sent {} bytes, less than a header",
                reader.remaining()
            );
            return;
        }
        let header = Header::from_bytes(&bytes);
        // There is nobody to answer to if it comes from another context, and nobody to answer if it goes to one.
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        if header.kind != TYPE_STREAM {
            self.refuse(ports, &header);
            return;
        }
        match self.by_ports.get(&ports).copied() {
            Some(index) => self.deliver(index, &header, chain, guest),
            None if header.op == OP_REQUEST => self.incoming(ports, &header),
            None => self.refuse(ports, &header),
        }
    }

    /// A packet for a connection there is.
    fn deliver(&mut self, index: u32, header: &Header, chain: &Chain, guest: &mut Guest<'_>) {
        let Some(connection) = self
            .connections
            .get_mut(index as usize)
            .and_then(Option::as_mut)
        else {
            return;
        };
        connection.note_credit(header);
        let verdict = match (connection.state, header.op) {
            (_, OP_RST) => {
                self.forget(index);
                return;
            }
            (State::Requested, OP_RESPONSE) => connection.opened(),
            (State::Open, OP_RW) => match u64::from(header.len) + HEADER_BYTES as u64 {
                // More than the descriptors hold.
                claimed if claimed > chain.readable_bytes() => Verdict::Reset,
                _ => connection.data(header.len, chain, guest),
            },
            (State::Open, OP_SHUTDOWN) => match connection.shutdown(header.flags) {
                Verdict::Reset => {
                    let ports = connection.ports;
                    self.resets.push_back(Reset {
                        ports,
                        kind: TYPE_STREAM,
                    });
                    self.forget(index);
                    return;
                }
                verdict => verdict,
            },
            (State::Open, OP_CREDIT_UPDATE) => Verdict::Keep,
            (State::Open, OP_CREDIT_REQUEST) => {
                connection.credit_requested();
                Verdict::Keep
            }
            // Duplicates, unknown operations, answers that nobody asked for.
            _ => Verdict::Reset,
        };
        self.conclude(index, verdict);
    }

    /// The guest wants a connection.
    fn incoming(&mut self, ports: Ports, header: &Header) {
        if self.len() >= MAX_CONNECTIONS {
            log::warn!("vsock: {MAX_CONNECTIONS} connections are open, the guest's is refused");
            return self.refuse(ports, header);
        }
        let Some(acceptor) = &self.acceptor else {
            return self.refuse(ports, header);
        };
        let handed = socket::pair().and_then(|(ours, theirs)| {
            let incoming = VsockIncoming {
                port: ports.host,
                peer_port: ports.guest,
            };
            socket::hand_over(acceptor, &theirs, &incoming)?;
            Ok(ours)
        });
        let stream = match handed {
            Ok(stream) => stream,
            Err(errno) => {
                log::warn!(
                    "vsock: a connection to port {} is refused: {errno}",
                    ports.host
                );
                return self.refuse(ports, header);
            }
        };
        let connection = Connection::accepted(stream, self.generation(), ports, header);
        match self.insert(connection) {
            Some(index) => {
                self.by_ports.insert(ports, index);
                self.list(index);
            }
            None => self.refuse(ports, header),
        }
    }

    /// Reads what a host program wants, as far as it has said it.
    fn greet(&mut self, index: u32, now: Instant) {
        let Some(connection) = self.connection(index) else {
            return;
        };
        let guest = match socket::read_line(connection.socket().as_fd()) {
            Line::Partial => return,
            Line::Bad => None,
            Line::Complete(bytes, length) => parse_connect(&bytes[..length]),
        };
        let Some(guest) = guest else {
            log::debug!("vsock: a host program did not say CONNECT and a port");
            return self.conclude(index, Verdict::Close);
        };
        let ports = Ports {
            host: self.host_port(guest),
            guest,
        };
        let deadline = now + self.patience;
        if let Some(connection) = self.connection(index) {
            connection.request(ports, deadline);
            self.by_ports.insert(ports, index);
            self.due(deadline);
            self.list(index);
        }
    }

    /// A host port that makes a new pair with the guest's.
    fn host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            // The last one means "any".
            self.next_port = if host >= u32::MAX - 1 {
                FIRST_HOST_PORT
            } else {
                host + 1
            };
            // There are a million times as many ports as connections.
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    /// RST, unless that is what came.
    fn refuse(&mut self, ports: Ports, header: &Header) {
        if header.op != OP_RST {
            self.resets.push_back(Reset {
                ports,
                kind: header.kind,
            });
        }
    }

    /// Does to a connection what came out for it.
    fn conclude(&mut self, index: u32, verdict: Verdict) {
        match verdict {
            Verdict::Keep => self.list(index),
            Verdict::Close => drop(self.remove(index)),
            Verdict::Reset => {
                if let Some(connection) = self.remove(index) {
                    self.resets.push_back(Reset {
                        ports: connection.ports,
                        kind: TYPE_STREAM,
                    });
                }
            }
        }
    }

    /// The guest has forgotten a connection: its ports are free, its last data still reaches the host program.
    fn forget(&mut self, index: u32) {
        let Some(connection) = self.connection(index) else {
            return;
        };
        let (verdict, ports) = (connection.forgotten(), connection.ports);
        self.by_ports.remove(&ports);
        if verdict == Verdict::Close {
            drop(self.remove(index));
        }
    }

    /// Gives a connection its turn if it has something for the guest.
    fn list(&mut self, index: u32) {
        if let Some(connection) = self.connection(index)
            && !connection.listed
            && connection.wants_to_send()
        {
            connection.listed = true;
            self.turns.push_back(index);
        }
    }

    fn connection(&mut self, index: u32) -> Option<&mut Connection> {
        self.connections.get_mut(index as usize)?.as_mut()
    }

    fn insert(&mut self, connection: Connection) -> Option<u32> {
        let index = self.free.pop().unwrap_or(self.connections.len() as u32);
        let token = u64::from(connection.generation) << 32 | u64::from(index);
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        let added = epoll::add(
            &self.epoll,
            connection.socket(),
            EventData::new_u64(token),
            flags,
        );
        if let Err(errno) = added {
            log::warn!("vsock: epoll_ctl: {errno}");
        }
        let place = added.is_ok().then_some(connection);
        let inserted = place.is_some();
        match self.connections.get_mut(index as usize) {
            Some(empty) => *empty = place,
            None => self.connections.push(place),
        }
        if !inserted {
            self.free.push(index);
        }
        inserted.then_some(index)
    }

    /// Takes a connection out.
    fn remove(&mut self, index: u32) -> Option<Connection> {
        let connection = self.connections.get_mut(index as usize)?.take()?;
        self.free.push(index);
        if connection.listed {
            self.turns.retain(|listed| *listed != index);
        }
        if self.by_ports.get(&connection.ports) == Some(&index) {
            self.by_ports.remove(&connection.ports);
        }
        Some(connection)
    }

    fn generation(&mut self) -> u32 {
        // The upper half is for the thread's own tokens.
        self.next_generation = (self.next_generation + 1) & 0x7fff_ffff;
        self.next_generation
    }

    fn due(&mut self, deadline: Instant) {
        self.next_deadline = Some(
            self.next_deadline
                .map_or(deadline, |next| next.min(deadline)),
        );
    }

    fn write_header(
        &self,
        header: Header,
        chain: &Chain,
        memory: &GuestMemory,
    ) -> Result<u32, ChainError> {
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            ..header
        };
        chain.writer(memory).write(&header.to_bytes())?;
        // At most 64 KiB.
        Ok(HEADER_BYTES as u32 + header.len)
    }
}

/// The port in `CONNECT <port>\n`.
fn parse_connect(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let port = std::str::from_utf8(digits).ok()?.parse().ok()?;
    // The last one means "any" and is no port to connect to.
    (port != u32::MAX).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connect_lines() {
        assert_eq!(parse_connect(b"CONNECT 1024\n"), Some(1024));
        assert_eq!(parse_connect(b"CONNECT 0\n"), Some(0));
        assert_eq!(parse_connect(b"CONNECT 4294967294\n"), Some(u32::MAX - 1));
        for bad in [
            &b"CONNECT 4294967295\n"[..],
            b"CONNECT 4294967296\n",
            b"CONNECT \n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT 1 \n",
            b"CONNECT 1\r\n",
            b"connect 1\n",
            b"\n",
        ] {
            assert_eq!(parse_connect(bad), None, "{bad:?}");
        }
    }
}
