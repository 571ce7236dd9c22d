//! Credit, numbers of connections, fairness, starvation.

use super::*;

#[test]
fn the_guests_credit_is_kept_to() {
    let mut guest = Guest::new(PATIENCE);
    let (mut stream, ports) = guest.open(1);
    let small = |fwd_cnt| Header {
        buf_alloc: 1000,
        fwd_cnt,
        ..header(ports, OP_CREDIT_UPDATE)
    };
    guest.send_raw(small(0), b"");
    stream.write_all(&[5; 5000]).unwrap();
    assert_eq!(guest.expect(OP_RW).1.len(), 1000);
    guest.expect(OP_CREDIT_REQUEST);
    guest.expect_nothing();
    guest.send_raw(small(600), b"");
    assert_eq!(guest.expect(OP_RW).1.len(), 600);
    guest.expect(OP_CREDIT_REQUEST);
    // Nonsense is no credit: more forwarded than was sent, a buffer smaller than what is under way.
    guest.send_raw(small(5_000_000), b"");
    guest.send_raw(
        Header {
            buf_alloc: 10,
            ..small(1000)
        },
        b"",
    );
    guest.expect_nothing();
    guest.send_raw(
        Header {
            buf_alloc: u32::MAX,
            ..small(1600)
        },
        b"",
    );
    assert_eq!(guest.expect(OP_RW).1.len(), 3400);
}

#[test]
fn a_guest_beyond_its_credit_is_reset() {
    let mut guest = Guest::new(PATIENCE);
    let (stream, ports) = guest.open(1);
    let (_other, other_ports) = guest.open(2);
    let chunk = vec![1; 64 * 1024];
    let mut sent = 0u64;
    // Nobody reads: what the socket takes is forwarded, the rest fills the buffer, then it is over.
    let reset = loop {
        guest.send(ports, OP_RW, &chunk);
        sent += chunk.len() as u64;
        assert!(sent < 8 << 20);
        if let Some((header, _)) = guest.poll(Duration::from_millis(20))
            && header.op == OP_RST
        {
            break header;
        }
    };
    assert_eq!((reset.src_port, reset.dst_port), ports);
    assert!(sent > BUFFER_BYTES.into());
    drop(stream);
    // Only its own connection suffers.
    guest.send(other_ports, OP_CREDIT_REQUEST, b"");
    assert_eq!(guest.expect(OP_CREDIT_UPDATE).0.src_port, other_ports.0);
}

#[test]
fn credit_requests_are_answered() {
    let mut guest = Guest::new(PATIENCE);
    let (mut stream, ports) = guest.open(1);
    guest.send(ports, OP_RW, b"12345\n");
    line(&mut stream);
    guest.send(ports, OP_CREDIT_REQUEST, b"");
    let (header, _) = guest.expect(OP_CREDIT_UPDATE);
    assert_eq!((header.buf_alloc, header.fwd_cnt), (BUFFER_BYTES, 6));
}

#[test]
fn many_connections_at_a_time_and_a_limit() {
    // Two descriptors a connection, both ends being ours.
    let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limits.maximum,
        ..limits
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let mut guest = Guest::new(PATIENCE);
    let mut streams = Vec::new();
    for port in 0..1000 {
        streams.push(guest.open(port));
    }
    for (number, (stream, ports)) in streams.iter_mut().enumerate() {
        write!(stream, "{number}").unwrap();
        guest.send(*ports, OP_RW, format!("{number}\n").as_bytes());
        assert_eq!(line(stream), format!("{number}\n"));
    }
    let mut seen = HashMap::new();
    while seen.len() < 1000 {
        let (header, payload) = guest.expect(OP_RW);
        seen.insert(header.dst_port, String::from_utf8(payload).unwrap());
    }
    assert!(seen.iter().all(|(port, text)| port.to_string() == *text));
    // The rest, then both sides are refused; a closed one makes room.
    for port in 1000..1024 {
        streams.push(guest.open(port));
    }
    guest.send((80, 1), OP_REQUEST, b"");
    guest.expect(OP_RST);
    assert!(matches!(
        guest.connect_host().read(&mut [0; 8]),
        Ok(0) | Err(_)
    ));
    let (_, ports) = streams.remove(500);
    guest.expect(OP_SHUTDOWN);
    guest.send(ports, OP_RST, b"");
    guest.open(77_777);
    drop(streams);
    let (_, result) = guest.driver.stop();
    result.unwrap();
}

#[test]
fn turns_are_fair() {
    let mut guest = Guest::build(true, PATIENCE, 4);
    let mut greedy = guest.open(1);
    let mut modest = guest.open(2);
    greedy.0.set_nonblocking(true).unwrap();
    while greedy.0.write(&[1; 65536]).is_ok() {}
    modest.0.write_all(b"me too").unwrap();
    // A few buffers later than the greedy one's, not behind all of its data.
    let position = (0..)
        .position(|_| guest.expect(OP_RW).1 == b"me too")
        .unwrap();
    assert!(position < 20, "{position}");
}

#[test]
fn a_slow_host_stalls_only_its_own_connection() {
    let mut guest = Guest::new(PATIENCE);
    let (_slow, slow_ports) = guest.open(1);
    let (mut quick, quick_ports) = guest.open(2);
    // As much as the guest may send without news.
    guest.send(slow_ports, OP_RW, &[0; 100_000]);
    for _ in 0..100 {
        guest.send(quick_ports, OP_RW, b"quick\n");
        assert_eq!(line(&mut quick), "quick\n");
    }
}

#[test]
fn without_receive_buffers_nothing_grows_without_bounds() {
    let mut guest = Guest::build(true, PATIENCE, 0);
    let address = guest.tx_address;
    let memory = guest.driver.memory.clone();
    let bytes = header((9, 9), OP_REQUEST).to_bytes();
    memory.write_slice(&bytes, GuestAddress(address)).unwrap();
    memory
        .write_slice(
            &header((9, 9), OP_RST).to_bytes(),
            GuestAddress(address + 64),
        )
        .unwrap();
    memory
        .write_slice(
            &header((9, 8), OP_RW).to_bytes(),
            GuestAddress(address + 128),
        )
        .unwrap();
    let drain = std::thread::spawn({
        let acceptor = guest.acceptor.as_ref().unwrap().try_clone().unwrap();
        move || {
            while rustix::net::recv(&acceptor, &mut [0u8; 256][..], RecvFlags::empty())
                .is_ok_and(|got| got.1 > 0)
            {}
        }
    });
    // Opened and forgotten over and over, which needs no answer but the RESPONSE that never gets out.
    for round in 0..2000 {
        let queue = &mut guest.driver.queues[TX];
        queue.write_descriptor(0, address + 64 * (round % 2), 44, 0, 0);
        queue.push_available(0);
        queue.kick();
        guest.driver.wait_used(TX);
    }
    guest.driver.pause().unwrap();
    assert_eq!(guest.driver.device().muxer.waiting(), (0, 0));
    guest.driver.resume();
    // Answers that do need room: taken up to a bound, the rest stays on the queue.
    let mut taken = 0;
    loop {
        let queue = &mut guest.driver.queues[TX];
        queue.write_descriptor(0, address + 128, 44, 0, 0);
        queue.push_available(0);
        queue.kick();
        if guest
            .driver
            .poll_used(TX, Duration::from_millis(300))
            .is_none()
        {
            break;
        }
        taken += 1;
        assert!(taken < 1000);
    }
    // Room for one answer lets the next packet through.
    guest.driver.push(RX, &[Buffer::Writable(RX_BYTES)]);
    guest.driver.queues[RX].kick();
    guest.driver.wait_used(RX);
    guest.driver.wait_used(TX);
    let (device, result) = guest.driver.stop();
    result.unwrap();
    drop(device);
    drain.join().unwrap();
}
