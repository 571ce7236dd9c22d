//! Names of docker's user-defined networks, in the guest.
//!
//! A container's resolv.conf, a file of dockerd's, names an address of the loopback at which dockerd
//! itself answers, in the pod's network namespace. What the guest asks at that address of its own
//! loopback comes here by one connection to the agent ([`caisson_protocol::resolver`]), and is asked
//! again in the namespace.

use std::{
    fs::File,
    io::{self, Read},
    net::{Ipv4Addr, UdpSocket as StdUdpSocket},
    path::Path,
    sync::Arc,
    time::Duration,
};

use caisson_protocol::{
    ports,
    resolver::{ADDRESS, Frame, MAX_MESSAGE, MAX_QUERIES, PORT},
};
use rustix::fs::{FileType, Mode, OFlags};
use tokio::{
    io::AsyncWriteExt,
    net::{UdpSocket, UnixStream, unix::OwnedWriteHalf},
    sync::Mutex,
    task::{JoinHandle, JoinSet},
    time::timeout,
};

use super::namespace::{Namespace, inside};
use crate::{deadline::scaled, error::Error, vsock};

/// How long an answer is awaited: clients ask again after five seconds.
const LIMIT: Duration = Duration::from_secs(5);

/// Longest that the agent may take to accept the connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// As much as is read of a resolv.conf, bytes.
const MAX_FILE: u64 = 64 * 1024;

/// Answers the guest's queries, as long as this lives and the connection to the guest does.
pub struct Resolver {
    task: JoinHandle<()>,
}

impl Resolver {
    /// Begins, with a guest whose ports are behind the unix socket `vsock`.
    ///
    /// # Errors
    /// The agent does not take the connection.
    pub async fn start(namespace: &Namespace, vsock: &Path) -> Result<Self, Error> {
        let what = "pass the guest's queries on to docker's name server";
        let limit = scaled(CONNECT_LIMIT);
        let connected = timeout(limit, vsock::connect(vsock, ports::RESOLVER)).await;
        let guest = connected
            .map_err(|_| Error::Late {
                what: what.to_owned(),
                seconds: limit.as_secs(),
            })?
            .map_err(Error::io(what))?;
        Ok(Self {
            task: tokio::spawn(serve(guest, namespace.file())),
        })
    }

    /// Whether the connection has ended.
    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(guest: UnixStream, namespace: Arc<File>) {
    if let Err(error) = relay(guest, &namespace).await {
        log::warn!("the guest's queries to docker's name server are not taken any more: {error}");
    }
}

async fn relay(guest: UnixStream, namespace: &Arc<File>) -> io::Result<()> {
    let (mut queries, answers) = guest.into_split();
    let answers = Arc::new(Mutex::new(answers));
    let mut asked = JoinSet::new();
    while let Some(query) = Frame::read(&mut queries).await? {
        while asked.try_join_next().is_some() {}
        // Of a guest that takes no answers, the queries are not taken either.
        if asked.len() < MAX_QUERIES {
            asked.spawn(answer(query, namespace.clone(), answers.clone()));
        }
    }
    Ok(())
}

/// Nothing is said of what goes wrong: the guest makes as many queries as it likes, and asks again.
async fn answer(query: Frame, namespace: Arc<File>, answers: Arc<Mutex<OwnedWriteHalf>>) {
    let asked = timeout(scaled(LIMIT), ask(namespace, &query.message)).await;
    let Ok(Ok(message)) = asked else {
        return;
    };
    let tag = query.tag;
    if let Ok(bytes) = (Frame { tag, message }).encode() {
        let _ = answers.lock().await.write_all(&bytes).await;
    }
}

/// The answer of the namespace's name server, to a socket of the query's own, so that one which comes
/// late is nobody's.
async fn ask(namespace: Arc<File>, query: &[u8]) -> Result<Vec<u8>, Error> {
    let what = "ask docker's name server";
    let socket = inside(namespace, what.to_owned(), || {
        let socket = StdUdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((ADDRESS, PORT))?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })
    .await?;
    exchange(socket, query).await.map_err(Error::io(what))
}

async fn exchange(socket: StdUdpSocket, query: &[u8]) -> io::Result<Vec<u8>> {
    let socket = UdpSocket::from_std(socket)?;
    socket.send(query).await?;
    // One more than it may be: what is longer is found out, not cut.
    let mut answer = vec![0; MAX_MESSAGE + 1];
    let length = socket.recv(&mut answer).await?;
    answer.truncate(length);
    Ok(answer)
}

/// Whether a resolv.conf of the host names docker's name server.
///
/// # Errors
/// It cannot be read.
pub fn is_dockers(path: &Path) -> io::Result<bool> {
    // What is no file must not hold anybody up.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
        return Ok(false);
    }
    let mut bytes = Vec::new();
    File::from(file).take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(names(&String::from_utf8_lossy(&bytes)))
}

/// resolv.conf(5).
fn names(file: &str) -> bool {
    let address = ADDRESS.to_string();
    file.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next() == Some("nameserver") && words.next() == Some(&address)
    })
}

#[cfg(test)]
mod tests;
