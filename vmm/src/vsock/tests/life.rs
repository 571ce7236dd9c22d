//! Connections open, talk and end.

use super::*;

#[test]
fn a_host_program_connects_and_talks() {
    let mut guest = Guest::new(PATIENCE);
    let (mut stream, ports) = guest.open(1024);
    stream.write_all(b"to the guest").unwrap();
    let (header, payload) = guest.expect(OP_RW);
    assert_eq!((header.src_port, header.dst_port), ports);
    assert_eq!(payload, b"to the guest");
    guest.send(ports, OP_RW, b"to the host\n");
    assert_eq!(line(&mut stream), "to the host\n");
}

#[test]
fn the_guest_connects_and_talks() {
    let mut guest = Guest::new(PATIENCE);
    guest.send((80, 5000), OP_REQUEST, b"");
    guest.expect(OP_RESPONSE);
    let (mut stream, incoming) = guest.accept();
    assert_eq!(
        incoming,
        VsockIncoming {
            port: 80,
            peer_port: 5000
        }
    );
    guest.send((80, 5000), OP_RW, b"hello\n");
    assert_eq!(line(&mut stream), "hello\n");
    stream.write_all(b"yes").unwrap();
    assert_eq!(guest.expect(OP_RW).1, b"yes");
}

#[test]
fn without_an_acceptor_the_guest_is_refused() {
    let mut guest = Guest::build(false, PATIENCE, 8);
    guest.send((80, 5000), OP_REQUEST, b"");
    let (header, _) = guest.expect(OP_RST);
    assert_eq!((header.src_port, header.dst_port), (80, 5000));
    assert_eq!(guest.connections(), 0);
}

#[test]
fn with_the_acceptor_gone_the_guest_is_refused() {
    let mut guest = Guest::new(PATIENCE);
    guest.acceptor = None;
    guest.send((80, 5000), OP_REQUEST, b"");
    guest.expect(OP_RST);
}

#[test]
fn data_right_behind_the_first_line_is_kept() {
    let mut guest = Guest::new(PATIENCE);
    let mut stream = guest.connect_host();
    for part in ["CON", "NECT 9", "9\nearly"] {
        stream.write_all(part.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let (request, _) = guest.expect(OP_REQUEST);
    guest.expect_nothing();
    guest.send((request.src_port, 99), OP_RESPONSE, b"");
    assert_eq!(guest.expect(OP_RW).1, b"early");
}

#[test]
fn bad_first_lines_end_the_stream() {
    let mut guest = Guest::new(PATIENCE);
    for bad in [&b"GET / HTTP/1.0\n"[..], b"CONNECT x\n", b"\n", &[b'1'; 40]] {
        let mut stream = guest.connect_host();
        stream.write_all(bad).unwrap();
        // The end, or a reset when something was left unread.
        assert!(matches!(stream.read(&mut [0; 8]), Ok(0) | Err(_)));
    }
    guest.expect_nothing();
    assert_eq!(guest.connections(), 0);
}

#[test]
fn silent_host_programs_and_guests_are_given_up() {
    let mut guest = Guest::new(Duration::from_millis(100));
    let mut silent = guest.connect_host();
    assert_eq!(silent.read(&mut [0; 8]).unwrap(), 0);
    // The guest never answers a REQUEST.
    let mut stream = guest.connect_host();
    writeln!(stream, "CONNECT 7").unwrap();
    guest.expect(OP_REQUEST);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    guest.expect(OP_RST);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_refusal_of_the_guest_ends_the_stream_without_ok() {
    let mut guest = Guest::new(PATIENCE);
    let mut stream = guest.connect_host();
    writeln!(stream, "CONNECT 7").unwrap();
    let (request, _) = guest.expect(OP_REQUEST);
    guest.send((request.src_port, 7), OP_RST, b"");
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_host_program_that_leaves_before_the_answer() {
    let mut guest = Guest::new(PATIENCE);
    let mut stream = guest.connect_host();
    writeln!(stream, "CONNECT 7").unwrap();
    guest.expect(OP_REQUEST);
    drop(stream);
    guest.expect(OP_RST);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn the_host_closes_data_first() {
    let mut guest = Guest::new(PATIENCE);
    let (mut stream, ports) = guest.open(1);
    stream.write_all(&[7; 10_000]).unwrap();
    drop(stream);
    let (mut got, mut flags) = (0, 0);
    while flags & SHUTDOWN_SEND == 0 {
        let (header, payload) = guest.next();
        match header.op {
            OP_RW => got += payload.len(),
            OP_SHUTDOWN => flags |= header.flags,
            op => panic!("{op}"),
        }
    }
    assert_eq!((got, flags), (10_000, SHUTDOWN_BOTH));
    guest.send(ports, OP_RST, b"");
    guest.expect_nothing();
    assert_eq!(guest.connections(), 0);
}

#[test]
fn half_close_by_the_host() {
    let mut guest = Guest::new(PATIENCE);
    let (mut stream, ports) = guest.open(1);
    stream.write_all(b"question").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(OP_RW).1, b"question");
    assert_eq!(guest.expect(OP_SHUTDOWN).0.flags, SHUTDOWN_SEND);
    guest.send(ports, OP_RW, b"answer\n");
    assert_eq!(line(&mut stream), "answer\n");
    guest.send(ports, OP_SHUTDOWN, b"");
    let both = Header {
        flags: SHUTDOWN_BOTH,
        ..header(ports, OP_SHUTDOWN)
    };
    guest.send_raw(both, b"");
    guest.expect(OP_RST);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn half_close_by_the_guest() {
    let mut guest = Guest::new(PATIENCE);
    let (mut stream, ports) = guest.open(1);
    guest.send(ports, OP_RW, b"question");
    guest.send_raw(
        Header {
            flags: SHUTDOWN_SEND,
            ..header(ports, OP_SHUTDOWN)
        },
        b"",
    );
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"question");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(OP_RW).1, b"answer");
    drop(stream);
    assert_eq!(guest.expect(OP_SHUTDOWN).0.flags, SHUTDOWN_BOTH);
    guest.send(ports, OP_RST, b"");
    assert_eq!(guest.connections(), 0);
    // Data after its own end is a broken guest.
    let (_stream, ports) = guest.open(2);
    guest.send_raw(
        Header {
            flags: SHUTDOWN_SEND,
            ..header(ports, OP_SHUTDOWN)
        },
        b"",
    );
    guest.send(ports, OP_RW, b"more");
    guest.expect(OP_RST);
}

#[test]
fn a_guest_that_reads_no_more_breaks_the_hosts_pipe() {
    let mut guest = Guest::new(PATIENCE);
    let (mut stream, ports) = guest.open(1);
    guest.send_raw(
        Header {
            flags: SHUTDOWN_RECEIVE,
            ..header(ports, OP_SHUTDOWN)
        },
        b"",
    );
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        std::io::ErrorKind::BrokenPipe
    );
    guest.send(ports, OP_RW, b"still\n");
    assert_eq!(line(&mut stream), "still\n");
}

#[test]
fn a_closed_guest_leaves_its_last_data_to_a_slow_host() {
    let mut guest = Guest::new(Duration::from_millis(200));
    let (mut stream, ports) = guest.open(1);
    // More than the socket takes at once: the rest is in the connection's buffer.
    let mut sent = Vec::new();
    loop {
        let chunk: Vec<u8> = (0..8192u32)
            .map(|at| (at + sent.len() as u32 / 7) as u8)
            .collect();
        guest.send(ports, OP_RW, &chunk);
        sent.extend(chunk);
        guest.driver.pause().unwrap();
        let waiting = guest.driver.device().muxer.buffered();
        guest.driver.resume();
        if waiting > 20_000 {
            break;
        }
    }
    guest.send_raw(
        Header {
            flags: SHUTDOWN_BOTH,
            ..header(ports, OP_SHUTDOWN)
        },
        b"",
    );
    while guest.next().0.op != OP_RST {}
    // Ports are free at once; the data waits longer than any deadline.
    std::thread::sleep(Duration::from_millis(400));
    guest.send(ports, OP_RW, b"x");
    guest.expect(OP_RST);
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert!(got == sent, "{} of {}", got.len(), sent.len());
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_guest_that_ignores_the_end_is_reset() {
    let mut guest = Guest::new(Duration::from_millis(100));
    let (stream, _) = guest.open(1);
    drop(stream);
    let (mut header, _) = guest.expect(OP_SHUTDOWN);
    while header.op == OP_SHUTDOWN {
        header = guest.next().0;
    }
    assert_eq!(header.op, OP_RST);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn the_guests_reset_ends_the_stream() {
    let mut guest = Guest::new(PATIENCE);
    let (mut stream, ports) = guest.open(1);
    guest.send(ports, OP_RST, b"");
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    guest.expect_nothing();
    assert_eq!(guest.connections(), 0);
}
