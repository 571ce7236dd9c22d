//! Takes queries at the address of docker's name server and has the host ask it
//! ([`caisson_protocol::resolver`]): it is in the pod's network namespace, and what a container asks
//! here stays in the guest.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use caisson_protocol::{
    ports,
    resolver::{ADDRESS, Frame, MAX_MESSAGE, MAX_QUERIES, PORT, check},
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::UdpSocket,
    task::JoinHandle,
};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::failure::{During, Result};

/// Serves the port for ever, one connection at a time: a new one takes the place of the one before.
///
/// # Errors
/// The port cannot be listened on.
pub async fn serve() -> Result<()> {
    let address = VsockAddr::new(VMADDR_CID_ANY, ports::RESOLVER);
    let listener = VsockListener::bind(address)
        .during(|| format!("listen on vsock port {}", ports::RESOLVER))?;
    let mut served = Served::default();
    loop {
        match listener.accept().await {
            Ok((host, peer)) if crate::rpc::is_host(peer.cid()) => served.replace(host).await,
            Ok((_, peer)) => log::warn!("resolver: refused a connection from CID {}", peer.cid()),
            Err(error) => {
                log::warn!("resolver: cannot accept: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// The connection that is served.
#[derive(Default)]
struct Served {
    task: Option<JoinHandle<()>>,
    warned: bool,
}

impl Served {
    async fn replace(&mut self, host: VsockStream) {
        if let Some(task) = self.task.take() {
            task.abort();
            // Its socket has to go: of two at one address each would get some of the queries.
            let _ = task.await;
        }
        match listen((ADDRESS, PORT).into()) {
            Ok(socket) => {
                self.task = Some(tokio::spawn(async move {
                    // The host begins anew if there is a reason to.
                    let _ = relay(host, &socket).await;
                }));
            }
            Err(error) if !self.warned => {
                self.warned = true;
                log::warn!(
                    "cannot take queries at {ADDRESS}:{PORT}, so docker's names are not found: {error}; \
                     does a name server in a container use that port of all addresses?"
                );
            }
            Err(_) => {}
        }
    }
}

/// A socket at the address that leaves its port of all addresses to name servers in containers, if
/// they would share it: the kernel lets those that have set one of the two.
fn listen(address: SocketAddr) -> io::Result<UdpSocket> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    bind(&socket, &address)?;
    UdpSocket::from_std(socket.into())
}

/// Passes queries to the host and answers to those who have asked, until the host ends it.
async fn relay(host: impl AsyncRead + AsyncWrite, socket: &UdpSocket) -> io::Result<()> {
    let (mut answers, mut queries) = tokio::io::split(host);
    let asked = Mutex::new(Asked::default());
    let ask = async {
        // One more than it may be, so that what is longer is told from what is not.
        let mut buffer = [0; MAX_MESSAGE + 1];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await?;
            if !from.ip().is_loopback() || check(length).is_err() {
                continue;
            }
            let tag = lock(&asked).add(from);
            let message = buffer[..length].to_vec();
            let bytes = Frame { tag, message }.encode().map_err(io::Error::other)?;
            queries.write_all(&bytes).await?;
        }
    };
    let answer = async {
        while let Some(Frame { tag, message }) = Frame::read(&mut answers).await? {
            let to = lock(&asked).take(tag);
            if let Some(to) = to {
                // One that has gone needs no answer.
                let _ = socket.send_to(&message, to).await;
            }
        }
        Ok(())
    };
    tokio::select! {
        ended = ask => ended,
        ended = answer => ended,
    }
}

fn lock(asked: &Mutex<Asked>) -> MutexGuard<'_, Asked> {
    asked.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who has asked and waits for an answer, the oldest first.
#[derive(Default)]
struct Asked {
    waiting: VecDeque<(u16, SocketAddr)>,
    last: u16,
}

impl Asked {
    /// The tag of a query; nobody else who waits has it.
    fn add(&mut self, from: SocketAddr) -> u16 {
        self.last = self.last.wrapping_add(1);
        // Of a query that has waited while all tags were used once.
        self.take(self.last);
        if self.waiting.len() == MAX_QUERIES {
            self.waiting.pop_front();
        }
        self.waiting.push_back((self.last, from));
        self.last
    }

    /// Who waits for the answer with this tag, for the last time.
    fn take(&mut self, tag: u16) -> Option<SocketAddr> {
        let position = self.waiting.iter().position(|(other, _)| *other == tag)?;
        self.waiting.remove(position).map(|(_, from)| from)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    fn asker(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    #[test]
    fn each_answer_finds_its_asker_once() {
        let mut asked = Asked::default();
        let tags = [1, 2, 3].map(|port| asked.add(asker(port)));
        assert_eq!(asked.take(tags[1]), Some(asker(2)));
        assert_eq!(asked.take(tags[1]), None);
        assert_eq!(asked.take(tags[2]), Some(asker(3)));
        assert_eq!(asked.take(tags[0]), Some(asker(1)));
        assert_eq!(asked.take(9), None);
    }

    #[test]
    fn the_oldest_makes_room_and_tags_come_round() {
        let mut asked = Asked::default();
        let first = asked.add(asker(1));
        let second = asked.add(asker(2));
        for _ in 0..MAX_QUERIES - 1 {
            asked.add(asker(3));
        }
        assert_eq!(asked.waiting.len(), MAX_QUERIES);
        assert_eq!(asked.take(first), None);
        // All tags once more, each answered but for the second.
        while asked.last != second {
            let tag = asked.add(asker(4));
            if tag != second {
                asked.take(tag);
            }
        }
        assert_eq!(asked.take(second), Some(asker(4)));
        assert_eq!(asked.take(second), None);
    }

    /// A client with its query sent, which has the number that others' queries have, too.
    async fn client(server: SocketAddr, text: &[u8]) -> UdpSocket {
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.connect(server).await.unwrap();
        client.send(&query(text)).await.unwrap();
        client
    }

    fn query(text: &[u8]) -> Vec<u8> {
        [b"\x12\x34 a header.", text].concat()
    }

    async fn heard(client: &UdpSocket) -> Vec<u8> {
        let mut buffer = [0; MAX_MESSAGE];
        let length = client.recv(&mut buffer).await.unwrap();
        buffer[..length].to_vec()
    }

    #[tokio::test]
    async fn answers_go_to_whoever_asked_until_the_host_ends_it() {
        let socket = listen((ADDRESS, 0).into()).unwrap();
        let server = socket.local_addr().unwrap();
        let (mut host, agent) = UnixStream::pair().unwrap();
        let task = tokio::spawn(async move { relay(agent, &socket).await });
        // What is no message does not reach the host, which would end the connection.
        let rude = client(server, &[0; MAX_MESSAGE]).await;
        rude.send(b"short").await.unwrap();
        let one = client(server, b"one").await;
        let first = Frame::read(&mut host).await.unwrap().unwrap();
        assert_eq!(first.message, query(b"one"));
        let two = client(server, b"two").await;
        let second = Frame::read(&mut host).await.unwrap().unwrap();
        assert_eq!(second.message, query(b"two"));
        // In the other order, and one to nobody's query before.
        for (tag, text) in [
            (second.tag.wrapping_add(1), &b"nobody"[..]),
            (second.tag, b"for two"),
            (first.tag, b"for one"),
        ] {
            let message = query(text);
            let bytes = Frame { tag, message }.encode().unwrap();
            host.write_all(&bytes).await.unwrap();
        }
        assert_eq!(heard(&two).await, query(b"for two"));
        assert_eq!(heard(&one).await, query(b"for one"));
        drop(host);
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn name_servers_that_share_have_the_port_of_all_addresses() {
        let socket = listen((ADDRESS, 0).into()).unwrap();
        let port = socket.local_addr().unwrap().port();
        for by_address in [true, false] {
            let server = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
            sockopt::set_socket_reuseaddr(&server, by_address).unwrap();
            sockopt::set_socket_reuseport(&server, !by_address).unwrap();
            bind(&server, &SocketAddr::from(([0, 0, 0, 0], port))).unwrap();
            // Queries to the one address go to its own socket.
            let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            client.send_to(b"hello", (ADDRESS, port)).await.unwrap();
            let mut buffer = [0; 8];
            let (length, _) = socket.recv_from(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], b"hello");
        }
    }
}
