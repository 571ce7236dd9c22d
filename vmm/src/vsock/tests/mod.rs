//! The device between a fake guest and real host programs on unix sockets.

use std::{
    collections::{HashMap, VecDeque},
    io::{Read, Write},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    time::{Duration, Instant},
};

use caisson_vmm_api::VsockIncoming;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use vm_memory::{Bytes, GuestAddress};

mod hostile;
mod life;
mod limits;
mod snapshot;
mod streams;

use super::{connection::BUFFER_BYTES, packet::*, *};
use crate::virtio::testing::{Buffer, Request, TestDriver};

const EVENT_INDEX: u64 = 1 << 29;
const CID: u32 = 42;
const PATIENCE: Duration = Duration::from_secs(10);
const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;
/// As Linux: a page with the header in it.
const RX_BYTES: u32 = 4096;

/// A guest's driver that keeps receive buffers posted and remembers packets not asked for yet.
struct Guest {
    driver: TestDriver<Vsock>,
    posted: HashMap<u16, Request>,
    packets: VecDeque<(Header, Vec<u8>)>,
    directory: tempfile::TempDir,
    acceptor: Option<OwnedFd>,
    tx_address: u64,
}

fn device(
    directory: &std::path::Path,
    acceptor: bool,
    patience: Duration,
) -> (Vsock, Option<OwnedFd>) {
    let path = directory.join("socket");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(path).unwrap();
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let device = Vsock::new(CID, listener.into(), acceptor.then_some(ours), patience).unwrap();
    (device, acceptor.then_some(theirs))
}

impl Guest {
    fn new(patience: Duration) -> Self {
        Self::build(true, patience, 64)
    }

    fn build(acceptor: bool, patience: Duration, buffers: u16) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (device, acceptor) = device(directory.path(), acceptor, patience);
        let mut guest = Self {
            driver: TestDriver::start(device, EVENT_INDEX),
            posted: HashMap::new(),
            packets: VecDeque::new(),
            directory,
            acceptor,
            tx_address: 0,
        };
        guest.tx_address = guest.driver.allocate(128 * 1024);
        for _ in 0..buffers {
            let request = guest.driver.push(RX, &[Buffer::Writable(RX_BYTES)]);
            guest.posted.insert(request.head, request);
        }
        guest.driver.queues[RX].kick();
        guest
    }

    /// Takes what the device has sent and posts the buffers again.
    fn collect(&mut self) -> bool {
        let mut any = false;
        while let Some((head, length)) = self.driver.queues[RX].pop_used() {
            any = true;
            let mut bytes = self.driver.read_writable(&self.posted[&head]);
            bytes.truncate(length as usize);
            let header = Header::from_bytes(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
            self.packets
                .push_back((header, bytes.split_off(HEADER_BYTES)));
            self.driver.queues[RX].push_available(head);
        }
        if any {
            self.driver.queues[RX].kick();
        }
        any
    }

    fn poll(&mut self, patience: Duration) -> Option<(Header, Vec<u8>)> {
        let start = Instant::now();
        loop {
            self.collect();
            if let Some(packet) = self.packets.pop_front() {
                return Some(packet);
            }
            if start.elapsed() > patience {
                return None;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn next(&mut self) -> (Header, Vec<u8>) {
        self.poll(PATIENCE).expect("the device sent nothing")
    }

    /// The next packet, which must be of this kind.
    fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let packet = self.next();
        assert_eq!(packet.0.op, op, "{:?}", packet.0);
        packet
    }

    /// Nothing comes: an echo of ours is the next thing.
    fn expect_nothing(&mut self) {
        assert_eq!(self.poll(Duration::from_millis(50)), None);
    }

    fn send_raw(&mut self, header: Header, payload: &[u8]) {
        let bytes = [&header.to_bytes()[..], payload].concat();
        self.send_bytes(&bytes);
    }

    /// Sends a packet out of one buffer, reusing memory.
    fn send_bytes(&mut self, bytes: &[u8]) {
        let address = self.tx_address;
        self.driver
            .memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
        let queue = &mut self.driver.queues[TX];
        queue.write_descriptor(0, address, bytes.len() as u32, 0, 0);
        queue.push_available(0);
        queue.kick();
        self.driver.wait_used(TX);
    }

    fn send(&mut self, ports: (u32, u32), op: u16, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            ..header(ports, op)
        };
        self.send_raw(header, payload);
    }

    fn connect_host(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("socket")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A connection opened by the host: its stream and ports (host, guest).
    fn open(&mut self, port: u32) -> (UnixStream, (u32, u32)) {
        self.open_with(port, 1 << 20)
    }

    /// As [`Guest::open`] by a guest that buffers this many bytes.
    fn open_with(&mut self, port: u32, buf_alloc: u32) -> (UnixStream, (u32, u32)) {
        let mut stream = self.connect_host();
        writeln!(stream, "CONNECT {port}").unwrap();
        let (request, _) = self.expect(OP_REQUEST);
        assert_eq!((request.dst_port, request.kind), (port, TYPE_STREAM));
        assert_eq!((request.buf_alloc, request.fwd_cnt), (BUFFER_BYTES, 0));
        let ports = (request.src_port, port);
        self.send_raw(
            Header {
                buf_alloc,
                ..header(ports, OP_RESPONSE)
            },
            b"",
        );
        assert_eq!(line(&mut stream), format!("OK {}\n", ports.0));
        (stream, ports)
    }

    /// What came on the acceptor.
    fn accept(&self) -> (UnixStream, VsockIncoming) {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut text = [0; 256];
        let mut parts = [std::io::IoSliceMut::new(&mut text)];
        let acceptor = self.acceptor.as_ref().unwrap();
        let got =
            rustix::net::recvmsg(acceptor, &mut parts, &mut control, RecvFlags::empty()).unwrap();
        let mut fds = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => vec![],
        });
        let stream = UnixStream::from(fds.next().unwrap());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        (stream, serde_json::from_slice(&text[..got.bytes]).unwrap())
    }

    fn connections(&mut self) -> usize {
        self.driver.pause().unwrap();
        let count = self.driver.device().muxer.len();
        self.driver.resume();
        count
    }
}

fn header((host, guest): (u32, u32), op: u16) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        kind: TYPE_STREAM,
        op,
        buf_alloc: 1 << 20,
        ..Header::default()
    }
}

fn line(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\n") && stream.read(&mut byte).unwrap() == 1 {
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}
