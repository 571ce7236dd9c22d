//! Tests on real taps in a network namespace of their own; a packet socket
//! plays the host. They need root and /dev/net/tun, as a host with networking has.

use std::{
    collections::VecDeque,
    fs::OpenOptions,
    os::fd::{AsRawFd, FromRawFd},
    sync::Mutex,
    time::{Duration, Instant},
};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::{
    DeviceState,
    testing::{Buffer, TestDriver},
};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const MTU: u16 = 1500;
const RX: usize = 0;
const TX: usize = 1;

/// A tap and the host's side of it. The network namespace lives as long as both.
struct Link {
    taps: Vec<OwnedFd>,
    host: OwnedFd,
}

/// Makes a tap in a new network namespace.
fn link(queues: usize) -> Link {
    std::thread::spawn(move || {
        // SAFETY: NEWNET leaves descriptors shared; that is what the function's contract is about.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let taps: Vec<OwnedFd> = (0..queues)
            .map(|_| {
                let tun = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open("/dev/net/tun")
                    .unwrap();
                let mut request = request("t0");
                request.ifr_ifru.ifru_flags = flags as libc::c_short;
                // SAFETY: TUNSETIFF takes an ifreq.
                let result = unsafe { libc::ioctl(tun.as_raw_fd(), 0x4004_54ca, &raw mut request) };
                assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
                tun.into()
            })
            .collect();
        Link {
            taps,
            host: packet_socket(),
        }
    })
    .join()
    .unwrap()
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// A packet socket on the interface, which it brings up.
fn packet_socket() -> OwnedFd {
    let all = i32::from((libc::ETH_P_ALL as u16).to_be());
    // SAFETY: plain system call.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, all) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: just made.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut up = request("t0");
    up.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS takes an ifreq.
    assert_eq!(0, unsafe {
        libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw mut up)
    });
    let mut index = request("t0");
    // SAFETY: SIOCGIFINDEX takes an ifreq.
    assert_eq!(0, unsafe {
        libc::ioctl(fd, libc::SIOCGIFINDEX, &raw mut index)
    });
    // SAFETY: all-zero bytes are a valid address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: SIOCGIFINDEX has stored it.
    address.sll_ifindex = unsafe { index.ifr_ifru.ifru_ifindex };
    // SAFETY: the address lives over the call and has the size that is told.
    let bound = unsafe {
        libc::bind(
            fd,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    assert_eq!(bound, 0);
    socket
}

/// A broadcast frame of a local experimental type.
fn frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend([0x88, 0xb5]);
    frame.extend(payload);
    frame
}

fn is_ours(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[0x88, 0xb5])
}

fn host_send(link: &OwnedFd, frame: &[u8]) {
    assert_eq!(rustix::io::write(link, frame).unwrap(), frame.len());
}

/// The next of our frames that reaches the host.
fn host_receive(host: &OwnedFd, patience: Duration) -> Option<Vec<u8>> {
    let start = Instant::now();
    let mut buffer = vec![0; 70000];
    while start.elapsed() < patience {
        match rustix::io::read(host, &mut buffer) {
            Ok(count) if is_ours(&buffer[..count]) => return Some(buffer[..count].to_vec()),
            Ok(_) => {}
            Err(Errno::AGAIN) => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => panic!("{error}"),
        }
    }
    None
}

const PATIENCE: Duration = Duration::from_secs(10);

fn start(features: u64) -> (TestDriver<Net>, OwnedFd) {
    let Link { taps, host } = link(1);
    let net = Net::new(taps, Vec::new(), MAC, MTU, None, None, Box::new(|_| {})).unwrap();
    (TestDriver::start(net, features), host)
}

/// Receives buffers until one of our frames comes: the header and the frame.
fn guest_receive(
    driver: &mut TestDriver<Net>,
    requests: &mut Vec<crate::virtio::testing::Request>,
) -> (Vec<u8>, Vec<u8>) {
    loop {
        let mut bytes = Vec::new();
        let mut buffers = 1;
        while buffers > 0 {
            let (head, length) = driver.wait_used(RX);
            let position = requests
                .iter()
                .position(|request| request.head == head)
                .unwrap();
            let request = requests.remove(position);
            let part = driver.read_writable(&request);
            // As drivers do: a small queue has to be full again.
            requests.extend(give_buffers(driver, 1, part.len() as u32));
            if bytes.is_empty() {
                buffers = u16::from_le_bytes([part[10], part[11]]);
            }
            bytes.extend(&part[..length as usize]);
            buffers -= 1;
        }
        let frame = bytes.split_off(HEADER_BYTES);
        if is_ours(&frame) {
            return (bytes, frame);
        }
    }
}

fn give_buffers(
    driver: &mut TestDriver<Net>,
    count: usize,
    bytes: u32,
) -> Vec<crate::virtio::testing::Request> {
    let requests = (0..count)
        .map(|_| driver.push(RX, &[Buffer::Writable(bytes)]))
        .collect();
    driver.queues[RX].kick();
    requests
}

#[test]
fn frames_reach_the_host_as_they_are() {
    let (mut driver, host) = start(0);
    let sent = frame(b"from the guest, in pieces");
    let header = [0; HEADER_BYTES];
    let (written, _) = driver.request(
        TX,
        &[
            Buffer::Readable(&header[..5]),
            Buffer::Readable(&header[5..]),
            Buffer::Readable(&sent[..20]),
            Buffer::Readable(&sent[20..]),
        ],
    );
    assert_eq!(written, 0);
    assert_eq!(host_receive(&host, PATIENCE).unwrap(), sent);
}

#[test]
fn nonsense_is_dropped_and_the_next_frame_goes_through() {
    let (mut driver, host) = start(0);
    let good = frame(b"good");
    let header = [0; HEADER_BYTES];
    // No header, no frame, a frame that is too long, a header that the kernel refuses.
    driver.request(TX, &[Buffer::Readable(&[0; 4])]);
    driver.request(TX, &[Buffer::Readable(&header)]);
    driver.request(TX, &[Buffer::Readable(&vec![0; 70000])]);
    driver.request(TX, &[Buffer::Readable(&[0xff; 100])]);
    driver.request(TX, &[Buffer::Writable(100)]);
    driver.request(TX, &[Buffer::Readable(&header), Buffer::Readable(&good)]);
    assert_eq!(host_receive(&host, PATIENCE).unwrap(), good);
    driver.pause().unwrap();
}

#[test]
fn frames_reach_the_guest() {
    let (mut driver, host) = start(0);
    let mut requests = give_buffers(&mut driver, 64, 1600);
    for payload in [b"one".as_slice(), &[7; 1400]] {
        host_send(&host, &frame(payload));
        let (header, received) = guest_receive(&mut driver, &mut requests);
        assert_eq!(header[10..], [1, 0]);
        assert_eq!(received, frame(payload));
    }
    // Buffers go back at a pause and serve after it.
    driver.pause().unwrap();
    driver.resume();
    host_send(&host, &frame(b"after"));
    let (_, received) = guest_receive(&mut driver, &mut requests);
    assert_eq!(received, frame(b"after"));
}

#[test]
fn a_frame_is_merged_from_small_buffers() {
    let (mut driver, host) = start(F_MRG_RXBUF);
    let mut requests = give_buffers(&mut driver, 64, 200);
    let sent = frame(&(0..1000).map(|index| index as u8).collect::<Vec<_>>());
    host_send(&host, &sent);
    let (header, received) = guest_receive(&mut driver, &mut requests);
    assert_eq!(received, sent);
    let filled = HEADER_BYTES + sent.len();
    assert_eq!(header[10..], (filled.div_ceil(200) as u16).to_le_bytes());
}

#[test]
fn frames_of_all_lengths_find_the_buffers_in_their_order() {
    const PARTS: [u32; 3] = [50, 100, 50];
    let (mut driver, host) = start(F_MRG_RXBUF);
    let mut requests = VecDeque::new();
    for round in 0..100u16 {
        while requests.len() < 32 {
            requests.push_back(driver.push(RX, &PARTS.map(Buffer::Writable)));
        }
        driver.queues[RX].kick();
        if round % 10 == 9 {
            // Buffers go back and are taken anew.
            driver.pause().unwrap();
            driver.resume();
        }
        let length = usize::from(round) * 37 % 1400;
        let sent = frame(&(0..length).map(|index| index as u8).collect::<Vec<_>>());
        host_send(&host, &sent);
        // What else there is on the link comes before it.
        loop {
            let mut bytes = Vec::new();
            let mut buffers = 1;
            while buffers > 0 {
                let (head, filled) = driver.wait_used(RX);
                let request = requests.pop_front().unwrap();
                assert_eq!(head, request.head);
                let part = driver.read_writable(&request);
                if bytes.is_empty() {
                    buffers = u16::from_le_bytes([part[10], part[11]]);
                }
                bytes.extend(&part[..filled as usize]);
                buffers -= 1;
            }
            let received = bytes.split_off(HEADER_BYTES);
            if is_ours(&received) {
                assert_eq!(received, sent);
                break;
            }
        }
    }
}

#[test]
fn a_receive_buffer_without_room_for_the_header_breaks_the_queue() {
    for buffer in [Buffer::Writable(11), Buffer::Readable(&[0; 2000])] {
        let (mut driver, _host) = start(F_MRG_RXBUF);
        driver.push(RX, &[buffer]);
        driver.queues[RX].kick();
        let error = driver.join().unwrap_err().to_string();
        assert!(error.contains("12 bytes wanted"), "{error}");
    }
}

#[test]
fn the_rate_limit_holds() {
    let Link { taps, host } = link(1);
    let limit = RateLimit {
        operations_per_second: 20,
        burst_operations: 1,
        ..RateLimit::default()
    };
    let net = Net::new(
        taps,
        Vec::new(),
        MAC,
        MTU,
        None,
        Some(&limit),
        Box::new(|_| {}),
    )
    .unwrap();
    let mut driver = TestDriver::start(net, 0);
    let start = Instant::now();
    for count in 0..5u8 {
        let sent = frame(&[count]);
        driver.request(
            TX,
            &[
                Buffer::Readable(&[0; HEADER_BYTES]),
                Buffer::Readable(&sent),
            ],
        );
        assert_eq!(host_receive(&host, PATIENCE).unwrap(), sent);
    }
    assert!(start.elapsed() >= Duration::from_millis(190));
}

#[test]
fn a_tap_that_goes_away_takes_the_link_down() {
    let Link { taps, host } = link(1);
    let told = Arc::new(Mutex::new(Vec::new()));
    let report = {
        let told = told.clone();
        Box::new(move |message| told.lock().unwrap().push(message))
    };
    let net = Net::new(taps, Vec::new(), MAC, MTU, None, None, report).unwrap();
    let config = net.config();
    let mut driver = TestDriver::start(net, 0);
    give_buffers(&mut driver, 8, 1600);
    let mut request = request("t0");
    // SAFETY: SIOCGIFINDEX takes an ifreq.
    let found = unsafe { libc::ioctl(host.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut request) };
    assert_eq!(found, 0);
    // SAFETY: SIOCGIFINDEX has stored it.
    delete_link(&host, unsafe { request.ifr_ifru.ifru_ifindex });
    let start = Instant::now();
    let mut status = [0; 2];
    loop {
        config.read(6, &mut status);
        if status == [0, 0] {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "the link stays up");
        std::thread::sleep(Duration::from_millis(1));
    }
    // What the guest sends goes nowhere, without an error.
    let sent = frame(b"lost");
    driver.request(
        TX,
        &[
            Buffer::Readable(&[0; HEADER_BYTES]),
            Buffer::Readable(&sent),
        ],
    );
    driver.pause().unwrap();
    assert_eq!(told.lock().unwrap().len(), 1);
    assert_ne!(driver.interrupt.status() & 2, 0);
    assert_eq!(config.generation(), 1);
}

#[test]
fn the_driver_chooses_how_many_pairs_it_uses() {
    let Link { taps, host: _host } = link(2);
    let net = Net::new(taps, Vec::new(), MAC, MTU, None, None, Box::new(|_| {})).unwrap();
    assert_eq!(net.queue_sizes(), [256, 256, 256, 256, 64]);
    let mut driver = TestDriver::start(net, F_MQ | F_CTRL_VQ);
    let mut command = |bytes: &[u8]| {
        let (_, answer) = driver.request(4, &[Buffer::Readable(bytes), Buffer::Writable(1)]);
        answer[0]
    };
    assert_eq!(command(&[4, 0, 2, 0]), 0);
    for refused in [[4, 0, 0, 0], [4, 0, 3, 0], [4, 1, 1, 0], [0, 0, 1, 0]] {
        assert_eq!(command(&refused), 1, "{refused:?}");
    }
    driver.pause().unwrap();
    let state = driver.device().save().unwrap();
    assert_eq!(state.data["used_pairs"], 2);
    driver.device().reset();
    assert_eq!(driver.device().save().unwrap().data["used_pairs"], 1);
    driver.device().restore(&state).unwrap();
    assert_eq!(driver.device().save().unwrap(), state);
    let newer = DeviceState {
        version: STATE_VERSION + 1,
        ..state
    };
    assert!(driver.device().restore(&newer).is_err());
    // A command without room for the answer breaks the queue.
    driver.resume();
    driver.push(4, &[Buffer::Readable(&[4, 0, 1, 0])]);
    driver.queues[4].kick();
    assert!(driver.join().is_err());
}

#[test]
fn configurations_that_make_no_interface_are_refused() {
    let new = |taps, mac, mtu| Net::new(taps, Vec::new(), mac, mtu, None, None, Box::new(|_| {}));
    let message = |result: Result<Net, DeviceError>| result.map(drop).unwrap_err().to_string();
    assert!(message(new(Vec::new(), MAC, MTU)).contains("0 tap queues"));
    let vhost = |count, limit: Option<&RateLimit>| {
        let vhosts = (0..count).map(|_| link(1).taps.remove(0)).collect();
        message(Net::new(
            link(1).taps,
            vhosts,
            MAC,
            MTU,
            None,
            limit,
            Box::new(|_| {}),
        ))
    };
    assert!(vhost(2, None).contains("2 vhost-nets for 1 tap"));
    assert!(vhost(1, Some(&RateLimit::default())).contains("knows no limits"));
    assert!(vhost(1, None).starts_with("vhost-net: VHOST_SET_OWNER: "));
    assert!(message(new(link(1).taps, [1; 6], MTU)).contains("address"));
    assert!(message(new(link(1).taps, MAC, 67)).contains("MTU"));
    let (pipe, _writer) = std::io::pipe().unwrap();
    assert!(message(new(vec![pipe.into()], MAC, MTU)).contains("not a tap"));
}

#[test]
fn the_configuration_is_as_the_driver_reads_it() {
    let net = Net::new(
        link(1).taps,
        Vec::new(),
        MAC,
        1400,
        None,
        None,
        Box::new(|_| {}),
    )
    .unwrap();
    let mut bytes = [0xff; 14];
    net.config().read(0, &mut bytes);
    assert_eq!(bytes[..6], MAC);
    assert_eq!(bytes[6..12], [1, 0, 1, 0, 0x78, 5]);
    assert_eq!(bytes[12..], [0, 0]);
    assert_eq!(net.features() & (F_MQ | F_CTRL_VQ), 0);
}

/// Without GUEST_CSUM nothing may come that needs it, whatever else was accepted.
#[test]
fn offloads_follow_the_features() {
    let net = Net::new(
        link(1).taps,
        Vec::new(),
        MAC,
        MTU,
        None,
        None,
        Box::new(|_| {}),
    )
    .unwrap();
    assert_eq!(net.mode(F_GUEST_TSO4 | F_GUEST_TSO6).offload, 0);
    assert_eq!(net.mode(0).needed, 12 + 18 + 1500);
    let mode = net.mode(F_GUEST_CSUM | F_GUEST_TSO4);
    assert_eq!(mode.offload, OFFLOAD_CSUM | OFFLOAD_TSO4);
    assert_eq!(mode.needed, 12 + MAX_FRAME_BYTES);
}

#[test]
fn a_small_queue_gets_what_fits() {
    // The test driver's queues are as large as the device's, so the room is never enough.
    let (mut driver, host) = start(F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4);
    let mut requests = give_buffers(&mut driver, 256, 100);
    host_send(&host, &frame(b"small"));
    let (_, received) = guest_receive(&mut driver, &mut requests);
    assert_eq!(received, frame(b"small"));
    let byte: u8 = driver.memory.read_obj(GuestAddress(0)).unwrap();
    assert_eq!(byte, 0);
}

/// Deletes an interface of the namespace of `host` by rtnetlink.
fn delete_link(host: &OwnedFd, index: i32) {
    const SIOCGSKNS: libc::Ioctl = 0x894c;
    // SAFETY: SIOCGSKNS takes no argument and gives a descriptor of the socket's namespace.
    let namespace = unsafe { libc::ioctl(host.as_raw_fd(), SIOCGSKNS) };
    assert!(namespace >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: just made.
    let namespace = unsafe { OwnedFd::from_raw_fd(namespace) };
    std::thread::spawn(move || {
        rustix::thread::move_into_link_name_space(namespace.as_fd(), None).unwrap();
        // SAFETY: plain system call.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE) };
        assert!(fd >= 0);
        // SAFETY: just made.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // nlmsghdr { len, type RTM_DELLINK, flags REQUEST|ACK, seq, pid }, ifinfomsg { index }.
        let mut message = Vec::new();
        message.extend(32u32.to_ne_bytes());
        message.extend(17u16.to_ne_bytes());
        message.extend(5u16.to_ne_bytes());
        message.extend([0; 8]);
        message.extend([0; 4]);
        message.extend(index.to_ne_bytes());
        message.extend([0; 8]);
        rustix::io::write(&socket, &message).unwrap();
        let mut answer = [0; 64];
        rustix::io::read(&socket, &mut answer).unwrap();
        assert_eq!(i32::from_ne_bytes(answer[16..20].try_into().unwrap()), 0);
    })
    .join()
    .unwrap();
}
