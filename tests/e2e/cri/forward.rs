//! Ports of a pod: `kubectl port-forward`, which containerd serves by dialling the loopback of the
//! pod's network namespace, and probes, which dial the pod's address.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::AsFd,
    sync::Arc,
};

use caisson_tests::{Host, seconds, until};
use k8s_cri::v1::PortForwardRequest;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{
    client::{Cri, container},
    streams::Streams,
};
use crate::containerd::{
    daemon::{Version, kill},
    with_containerd,
};

with_containerd!(
    one: [port_forward],
    two: [port_forward, loopback_and_probes]
);

/// Ports of [`SERVERS`]: an echo, one that tells how much came before the end, and one that sends
/// without listening, on all addresses; a file, on 127.0.0.1 alone.
const ECHO: u16 = 7001;
const COUNT: u16 = 7002;
const TELL: u16 = 7003;
const FILE: u16 = 8080;
/// Nobody listens there.
const NONE: u16 = 9;

const SERVERS: &str = "nc -ll -p 7001 -e cat & nc -ll -p 7002 -e wc -c & nc -ll -p 7003 -e echo told &
    mkdir /www; echo a file >/www/file; httpd -p 127.0.0.1:8080 -h /www
    while ! { nc 127.0.0.1 7001 && nc 127.0.0.1 7002 && nc 127.0.0.1 7003; } </dev/null; do sleep 0.1; done
    echo ready; exec sleep 1000";

/// A pod of which the servers run.
struct Pod {
    id: String,
    ip: String,
    namespace: Arc<File>,
}

impl Pod {
    fn start(cri: &Cri<'_>, name: &str) -> Self {
        let config = cri.pod(name);
        let id = cri.run_pod(&config);
        cri.run(&id, &config, container("servers", SERVERS));
        let ready = until(seconds(20.0), || {
            let log = cri.log(&config, "servers");
            log.iter()
                .any(|line| line.ends_with(" ready"))
                .then_some(())
        });
        assert!(ready.is_some(), "{:?}", cri.log(&config, "servers"));
        let (addresses, path) = cri.network_of(&id);
        Self {
            id,
            ip: addresses[0].clone(),
            namespace: Arc::new(File::open(path).unwrap()),
        }
    }

    /// Runs `work` in the pod's network namespace on the host.
    fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = self.namespace.clone();
        let thread = std::thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        });
        thread.join().unwrap()
    }

    /// As containerd does it.
    fn dial(&self, address: &'static str, port: u16) -> io::Result<TcpStream> {
        let stream = self.inside(move || TcpStream::connect((address, port)))?;
        stream.set_read_timeout(Some(seconds(20.0)))?;
        stream.set_write_timeout(Some(seconds(20.0)))?;
        Ok(stream)
    }
}

/// Sends `bytes` and their end, and gives what comes to the end, at the same time.
fn exchange(stream: TcpStream, bytes: Vec<u8>) -> Vec<u8> {
    let mut writer = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        writer.write_all(&bytes).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut answer = Vec::new();
    (&stream).read_to_end(&mut answer).unwrap();
    sender.join().unwrap();
    answer
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n / 3 + n / 1000) as u8).collect()
}

fn port_forward(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let pod = Pod::start(&cri, "forward");
    let open = |ports: &[u16]| {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: ports.iter().map(|port| i32::from(*port)).collect(),
        };
        let answer = cri.call(async |mut client| client.port_forward(request).await);
        let mut streams = Streams::open(&answer.unwrap().url);
        // Each port has a channel for data and one for errors, which begin with its number.
        for (channel, port) in (0..).zip(ports.iter().flat_map(|port| [port, port])) {
            let mut number = Vec::new();
            while number.len() < 2 {
                assert!(streams.read(), "ended at once");
                number.extend(streams.take(channel));
            }
            assert_eq!(number, port.to_le_bytes());
        }
        streams
    };
    let mut two = open(&[ECHO, FILE]);
    two.send(2, "GET /file HTTP/1.0\r\n\r\n");
    two.expect(2, "\r\n\r\na file\n");
    let bytes = pattern(64 << 10);
    for round in 0..16 {
        two.send(0, &bytes);
        let mut echoed = Vec::new();
        while echoed.len() < bytes.len() {
            assert!(two.read(), "ended in round {round}: {}", two.text(1));
            echoed.extend(two.take(0));
        }
        assert!(echoed == bytes, "round {round}");
    }
    drop(two);
    let mut refused = open(&[NONE]);
    refused.expect(1, "connection reset by peer");
    cri.remove_pod(&pod.id);
}

fn loopback_and_probes(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let pod = Pod::start(&cri, "loopback");
    // Much, both ways at a time; ends of one direction.
    let bytes = pattern(4 << 20);
    let echoed = exchange(pod.dial("127.0.0.1", ECHO).unwrap(), bytes.clone());
    assert!(echoed == bytes, "{} of {}", echoed.len(), bytes.len());
    let counted = exchange(pod.dial("::1", COUNT).unwrap(), pattern(1_234_567));
    assert_eq!(String::from_utf8_lossy(&counted).trim(), "1234567");
    let mut told = String::new();
    let mut stream = pod.dial("127.0.0.1", TELL).unwrap();
    stream.read_to_string(&mut told).unwrap();
    assert_eq!(told, "told\n");
    drop(stream);
    // Nobody is there: told at once, not at the end of a time.
    for address in ["127.0.0.1", "::1"] {
        let refused = pod.dial(address, NONE).and_then(|mut stream| {
            let mut byte = [0];
            stream.read(&mut byte)
        });
        let kind = refused.unwrap_err().kind();
        assert_eq!(kind, ErrorKind::ConnectionReset, "{address}");
    }
    // One after the other, and at the same time.
    let short = |stream: io::Result<TcpStream>, number: usize| {
        let text = format!("number {number}").into_bytes();
        assert_eq!(exchange(stream.unwrap(), text.clone()), text);
    };
    for number in 0..50 {
        short(pod.dial("127.0.0.1", ECHO), number);
    }
    // Not of busybox's `nc`: its backlog of 2 has the guest's kernel send SYN cookies, and with these a
    // connection whose end comes before it is accepted may be reset.
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| {
                let mut stream = pod.dial("127.0.0.1", FILE).unwrap();
                stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                assert!(answer.ends_with("\r\n\r\na file\n"), "{answer:?}");
            });
        }
    });
    // One that breaks off harms no other.
    let kept = pod.dial("127.0.0.1", ECHO).unwrap();
    let broken = pod.dial("127.0.0.1", ECHO).unwrap();
    rustix::net::sockopt::set_socket_linger(&broken, Some(std::time::Duration::ZERO)).unwrap();
    (&broken).write_all(&pattern(100_000)).unwrap();
    drop(broken);
    short(Ok(kept), 1000);

    // A probe dials the pod's address, at which what listens on loopback alone is not.
    let probe = |port| TcpStream::connect((pod.ip.as_str(), port));
    short(probe(ECHO), 2000);
    for port in [FILE, NONE] {
        let kind = probe(port).unwrap_err().kind();
        assert_eq!(kind, ErrorKind::ConnectionRefused, "{port}");
    }

    // Nothing is left when the shim is killed: the namespace is still the pod's.
    let mut open = pod.dial("127.0.0.1", ECHO).unwrap();
    kill(host.processes_of("containerd-shim-caisson-v2")[0]);
    let mut byte = [0];
    let ended = open.read(&mut byte);
    assert!(
        matches!(&ended, Ok(0) | Err(_))
            && !matches!(&ended, Err(error) if error.kind() == ErrorKind::WouldBlock),
        "{ended:?}"
    );
    let gone = until(seconds(5.0), || {
        ["127.0.0.1", "::1"]
            .iter()
            .all(|address| {
                let refused = pod.dial(address, ECHO);
                refused.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
            })
            .then_some(())
    });
    assert!(
        gone.is_some(),
        "the loopback of the namespace still answers"
    );
    assert_eq!(pod.inside(listeners), Vec::<String>::new());
    // A kubelet tries again, too.
    let removed = until(seconds(10.0), || cri.try_remove_pod(&pod.id).ok());
    assert!(removed.is_some());

    // Nor at a pod's orderly end.
    let pod = Pod::start(&cri, "orderly");
    assert_eq!(pod.inside(listeners).len(), 2);
    short(pod.dial("127.0.0.1", ECHO), 3000);
    cri.remove_pod(&pod.id);
    assert_eq!(pod.inside(listeners), Vec::<String>::new());
}

/// Sockets that listen in the thread's network namespace.
fn listeners() -> Vec<String> {
    ["tcp", "tcp6"]
        .iter()
        .flat_map(|table| {
            let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap();
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        })
        .filter(|line| line.split_whitespace().nth(3) == Some("0A"))
        .collect()
}
