//! Pause, reset, restore, and configurations.

use super::*;

#[test]
fn connections_survive_a_pause_but_not_a_reset() {
    let mut guest = Guest::new(PATIENCE);
    let (mut stream, ports) = guest.open(1);
    guest.driver.pause().unwrap();
    stream.write_all(b"while paused").unwrap();
    guest.driver.resume();
    assert_eq!(guest.expect(OP_RW).1, b"while paused");
    guest.send(ports, OP_RW, b"ok\n");
    assert_eq!(line(&mut stream), "ok\n");
    guest.driver.pause().unwrap();
    guest.driver.device().reset();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_restored_guest_is_told_before_anything_new() {
    for answers in [true, false] {
        let patience = if answers {
            PATIENCE
        } else {
            Duration::from_millis(300)
        };
        let mut guest = Guest::build(true, patience, 16);
        guest.driver.pause().unwrap();
        let state = guest.driver.device().save().unwrap();
        guest.driver.device().restore(&state).unwrap();
        guest.driver.resume();
        let mut stream = guest.connect_host();
        writeln!(stream, "CONNECT 7").unwrap();
        guest.expect_nothing();
        let buffers: Vec<_> = (0..4)
            .map(|_| guest.driver.push(EVENTS, &[Buffer::Writable(8)]))
            .collect();
        guest.driver.queues[EVENTS].kick();
        assert_eq!(guest.driver.wait_used(EVENTS), (buffers[0].head, 4));
        assert_eq!(guest.driver.read_writable(&buffers[0])[..4], [0; 4]);
        assert_ne!(guest.driver.interrupt.status(), 0);
        if answers {
            guest.expect_nothing();
            guest.driver.queues[EVENTS].push_available(buffers[0].head);
            guest.driver.queues[EVENTS].kick();
        }
        guest.expect(OP_REQUEST);
        // The event queue is whole: nothing held, nothing lost.
        guest.driver.pause().unwrap();
        guest.driver.device().restore(&state).unwrap();
        guest.driver.resume();
        assert_eq!(guest.driver.wait_used(EVENTS), (buffers[1].head, 4));
        guest.driver.pause().unwrap();
        guest.driver.resume();
        let newer = DeviceState {
            version: 2,
            ..state
        };
        guest.driver.pause().unwrap();
        assert!(matches!(
            guest.driver.device().restore(&newer),
            Err(DeviceError::State(_))
        ));
        guest.driver.resume();
    }
}

#[test]
fn bad_configurations_are_refused() {
    let pair = |kind| {
        rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
            .unwrap()
            .0
    };
    let directory = tempfile::tempdir().unwrap();
    let listener = || -> OwnedFd {
        let _ = std::fs::remove_file(directory.path().join("s"));
        UnixListener::bind(directory.path().join("s"))
            .unwrap()
            .into()
    };
    for cid in [0, 1, 2, u32::MAX] {
        assert!(matches!(
            Vsock::new(cid, listener(), None, PATIENCE),
            Err(VsockError::Cid(_))
        ));
    }
    let stream = pair(SocketType::STREAM);
    assert!(matches!(
        Vsock::new(3, stream, None, PATIENCE),
        Err(VsockError::Socket(_))
    ));
    let stream = Some(pair(SocketType::STREAM));
    assert!(matches!(
        Vsock::new(3, listener(), stream, PATIENCE),
        Err(VsockError::Socket(_))
    ));
    let file = std::fs::File::open("/dev/null").unwrap().into();
    assert!(matches!(
        Vsock::new(3, file, None, PATIENCE),
        Err(VsockError::Socket(_))
    ));
    assert!(Vsock::new(3, listener(), Some(pair(SocketType::SEQPACKET)), PATIENCE).is_ok());
}
