//! Packets and buffers that no sound driver makes.

use super::*;

#[test]
fn packets_that_fit_nothing_are_reset_or_dropped() {
    let mut guest = Guest::new(PATIENCE);
    for op in [
        OP_RESPONSE,
        OP_SHUTDOWN,
        OP_RW,
        OP_CREDIT_UPDATE,
        OP_CREDIT_REQUEST,
        0,
        8,
        0xffff,
    ] {
        guest.send((9, 9), op, b"");
        guest.expect(OP_RST);
    }
    guest.send((9, 9), OP_RST, b"");
    for kind in [0, 2, 3, 0xffff] {
        guest.send_raw(
            Header {
                kind,
                ..header((9, 9), OP_REQUEST)
            },
            b"",
        );
        assert_eq!(guest.expect(OP_RST).0.kind, kind);
        guest.send_raw(
            Header {
                kind,
                ..header((9, 9), OP_RST)
            },
            b"",
        );
    }
    for (src_cid, dst_cid) in [
        (3, 2),
        (42, 3),
        (42, 42),
        (2, 2),
        (u64::MAX, u64::MAX),
        (1 << 32 | 42, 2),
    ] {
        guest.send_raw(
            Header {
                src_cid,
                dst_cid,
                ..header((9, 9), OP_REQUEST)
            },
            b"",
        );
    }
    for length in [1, 43] {
        guest.send_bytes(&vec![0; length]);
    }
    guest.expect_nothing();
    assert_eq!(guest.connections(), 0);
}

#[test]
fn operations_that_do_not_fit_a_connection_reset_it() {
    let mut guest = Guest::new(PATIENCE);
    for op in [OP_REQUEST, OP_RESPONSE, 0, 8, 0xffff] {
        let (mut stream, ports) = guest.open(5);
        guest.send(ports, op, b"");
        guest.expect(OP_RST);
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "{op}");
    }
    // Data before the answer to a REQUEST.
    let mut stream = guest.connect_host();
    writeln!(stream, "CONNECT 7").unwrap();
    let (request, _) = guest.expect(OP_REQUEST);
    guest.send((request.src_port, 7), OP_RW, b"early");
    guest.expect(OP_RST);
    // A length beyond the descriptors.
    let (_stream, ports) = guest.open(5);
    guest.send_raw(
        Header {
            len: 100,
            ..header(ports, OP_RW)
        },
        b"short",
    );
    guest.expect(OP_RST);
    let (_stream, ports) = guest.open(5);
    guest.send_raw(
        Header {
            len: u32::MAX,
            ..header(ports, OP_RW)
        },
        b"short",
    );
    guest.expect(OP_RST);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn headers_in_odd_descriptors() {
    let mut guest = Guest::new(PATIENCE);
    let (mut stream, ports) = guest.open(5);
    let bytes = [
        &Header {
            len: 6,
            ..header(ports, OP_RW)
        }
        .to_bytes()[..],
        b"split\n",
    ]
    .concat();
    for cuts in [[1, 20, 43], [10, 44, 47], [43, 45, 49]] {
        let [a, b, c] = cuts;
        let parts = [&bytes[..a], &bytes[a..b], &bytes[b..c], &bytes[c..]];
        let parts: Vec<_> = parts.iter().map(|part| Buffer::Readable(part)).collect();
        guest.driver.push(TX, &parts);
        guest.driver.queues[TX].kick();
        guest.driver.wait_used(TX);
        assert_eq!(line(&mut stream), "split\n");
    }
}

#[test]
fn receive_buffers_in_odd_descriptors() {
    let mut guest = Guest::build(true, PATIENCE, 0);
    let parts = [1, 3, 39, 2, 1, 100].map(Buffer::Writable);
    let first = guest.driver.push(RX, &parts);
    let second = guest.driver.push(RX, &parts);
    let mut stream = guest.connect_host();
    writeln!(stream, "CONNECT 7").unwrap();
    guest.driver.queues[RX].kick();
    assert_eq!(guest.driver.wait_used(RX), (first.head, 44));
    let bytes = guest.driver.read_writable(&first);
    let request = Header::from_bytes(bytes[..44].try_into().unwrap());
    guest.send((request.src_port, 7), OP_RESPONSE, b"");
    stream.write_all(b"payload").unwrap();
    assert_eq!(guest.driver.wait_used(RX), (second.head, 51));
    assert_eq!(guest.driver.read_writable(&second)[44..51], *b"payload");
}

#[test]
fn a_receive_buffer_without_room_breaks_the_device_only() {
    let mut guest = Guest::build(true, PATIENCE, 0);
    guest.driver.push(RX, &[Buffer::Writable(43)]);
    guest.driver.queues[RX].kick();
    guest.send((80, 1), OP_REQUEST, b"");
    assert!(matches!(guest.driver.join(), Err(DeviceError::Chain(_))));
    guest.driver.device().reset();
    assert_eq!(guest.driver.device().muxer.len(), 0);
}
