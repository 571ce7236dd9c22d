//! Random streams stay whole.

use super::*;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Streams in both directions over several connections, with random chunks, small changing credits, slow readers and
/// half-closes: every byte arrives once and in order, and the end after it.
#[test]
fn streams_stay_whole() {
    for seed in 1..=6u64 {
        stream_integrity(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
}

fn byte(connection: usize, at: usize) -> u8 {
    ((at * 31) ^ (at >> 8) ^ connection) as u8
}

struct Peer {
    ports: (u32, u32),
    sent: usize,
    credit_seen: u32,
    received: usize,
    advertised: u32,
    ended: bool,
    done: bool,
}

fn stream_integrity(seed: u64) {
    const TOTAL: usize = 300_000;
    let mut random = Random(seed);
    let mut guest = Guest::new(PATIENCE);
    let mut peers = Vec::new();
    let mut threads = Vec::new();
    let opened: Vec<_> = (0..3).map(|port| guest.open_with(port, 0)).collect();
    for (connection, (stream, ports)) in opened.into_iter().enumerate() {
        let seed = random.below(u64::MAX) | 1;
        let mut writer = stream.try_clone().unwrap();
        threads.push(std::thread::spawn(move || {
            let mut random = Random(seed);
            let mut at = 0;
            while at < TOTAL {
                let count = (random.below(20_000) as usize + 1).min(TOTAL - at);
                let bytes: Vec<u8> = (at..at + count).map(|at| byte(connection, at)).collect();
                writer.write_all(&bytes).unwrap();
                at += count;
            }
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        }));
        let mut reader = stream;
        threads.push(std::thread::spawn(move || {
            let mut random = Random(seed ^ 0xffff);
            let mut at = 0;
            let mut bytes = vec![0; 30_000];
            loop {
                let limit = random.below(30_000) as usize + 1;
                let count = reader.read(&mut bytes[..limit]).unwrap();
                if count == 0 {
                    break;
                }
                for value in &bytes[..count] {
                    assert_eq!(*value, byte(connection, at), "at {at}");
                    at += 1;
                }
                if random.below(20) == 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            assert_eq!(at, TOTAL);
        }));
        peers.push(Peer {
            ports,
            sent: 0,
            credit_seen: 0,
            received: 0,
            advertised: 0,
            ended: false,
            done: false,
        });
    }
    let start = Instant::now();
    while !peers.iter().all(|peer| peer.done && peer.ended) {
        assert!(start.elapsed() < Duration::from_secs(60), "stuck");
        guest.collect();
        while let Some((header, payload)) = guest.packets.pop_front() {
            let connection = peers
                .iter()
                .position(|peer| peer.ports.0 == header.src_port)
                .unwrap();
            let peer = &mut peers[connection];
            peer.credit_seen = header.fwd_cnt;
            match header.op {
                OP_RW => {
                    assert!(!peer.ended, "data after the end");
                    for value in payload {
                        assert_eq!(value, byte(connection, peer.received));
                        peer.received += 1;
                    }
                    assert!(
                        peer.received <= peer.advertised as usize,
                        "beyond the credit"
                    );
                }
                OP_SHUTDOWN if header.flags & SHUTDOWN_SEND != 0 => {
                    assert_eq!(peer.received, TOTAL);
                    peer.ended = true;
                }
                OP_SHUTDOWN | OP_CREDIT_UPDATE | OP_CREDIT_REQUEST => {}
                op => panic!("{op}"),
            }
        }
        let connection = random.below(3) as usize;
        let peer = &mut peers[connection];
        if peer.done && peer.ended {
            continue;
        }
        // The guest's reader takes all at once, into a buffer of changing size that never shrinks below a promise.
        let buffer = random.below(30_000) as u32 + 1;
        let fwd_cnt = peer.received as u32;
        let buf_alloc = buffer.max(peer.advertised - fwd_cnt);
        peer.advertised = fwd_cnt + buf_alloc;
        let mut next = Header {
            fwd_cnt,
            buf_alloc,
            ..header(peer.ports, OP_CREDIT_UPDATE)
        };
        let room = (BUFFER_BYTES - (peer.sent as u32 - peer.credit_seen)) as usize;
        let count = (random.below(65_536) as usize)
            .min(room)
            .min(TOTAL - peer.sent);
        let mut payload = Vec::new();
        if count > 0 {
            next.op = OP_RW;
            next.len = count as u32;
            payload = (peer.sent..peer.sent + count)
                .map(|at| byte(connection, at))
                .collect();
            peer.sent += count;
        } else if peer.sent == TOTAL && !peer.done {
            next.op = OP_SHUTDOWN;
            next.flags = SHUTDOWN_SEND;
            peer.done = true;
        }
        guest.send_raw(next, &payload);
    }
    for thread in threads {
        thread.join().unwrap();
    }
}
