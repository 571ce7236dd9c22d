//! Standard streams: pipes and terminals on the process's side, one vsock
//! connection each on the host's ([`caisson_protocol::stdio`]).

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use caisson_protocol::{
    agent::StdioRequest,
    ports,
    stdio::{ACCEPTED, HEADER_LEN, Header, REFUSED, Stream, TOKEN_LEN},
};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, unix::AsyncFd},
    net::unix::pipe::{Receiver, Sender},
    sync::Notify,
};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::failure::{During, Failure, Kind, Result};

/// Name of a process's streams.
pub type Token = [u8; TOKEN_LEN];

/// A connection that has not said what it is for is dropped after this.
const HEADER_LIMIT: Duration = Duration::from_secs(10);

/// Bytes copied at a time, and so the most that is held for a reader that does not read.
const CHUNK: usize = 32 * 1024;

enum Waiting {
    Stdin(Sender, Arc<Notify>),
    Output(Receiver),
    /// The process's terminal does not exist yet.
    TerminalToCome,
    /// The host has connected before there was a terminal.
    Connected(VsockStream),
    Terminal(OwnedFd),
}

/// Streams that wait for the host to connect to them.
#[derive(Default)]
pub struct Streams {
    waiting: Mutex<HashMap<(Token, u8), Waiting>>,
    changed: Notify,
}

/// A process's ends of its streams, and what the agent keeps.
pub struct Prepared {
    /// Names the streams to the host.
    pub token: Token,
    /// For the process.
    pub stdin: Stdio,
    /// For the process.
    pub stdout: Stdio,
    /// For the process.
    pub stderr: Stdio,
    /// Told when stdin shall end once what was sent is read.
    pub close_stdin: Arc<Notify>,
}

fn index(stream: Stream) -> u8 {
    match stream {
        Stream::Stdin => 0,
        Stream::Stdout => 1,
        Stream::Stderr => 2,
        Stream::Terminal => 3,
    }
}

impl Streams {
    fn waiting(&self) -> MutexGuard<'_, HashMap<(Token, u8), Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the pipes that `wanted` asks for; a stream that is not wanted is /dev/null.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn prepare(&self, wanted: &StdioRequest) -> Result<Prepared> {
        let mut token = [0; TOKEN_LEN];
        rustix::rand::getrandom(&mut token[..], rustix::rand::GetRandomFlags::empty())
            .during(|| "make a token".to_owned())?;
        let close_stdin = Arc::new(Notify::new());
        let (mut stdin, mut stdout, mut stderr) = (Stdio::null(), Stdio::null(), Stdio::null());
        // With a terminal the init process replaces all three by its slave.
        if wanted.terminal {
            self.waiting().insert((token, 3), Waiting::TerminalToCome);
        } else {
            let pipe = || pipe_with(PipeFlags::CLOEXEC).during(|| "make a pipe".to_owned());
            let agents = |fd: OwnedFd| {
                rustix::io::ioctl_fionbio(&fd, true)
                    .map(|()| fd)
                    .during(|| "prepare a pipe".to_owned())
            };
            if wanted.stdin {
                let (read, write) = pipe()?;
                let write =
                    Sender::from_owned_fd(agents(write)?).during(|| "watch a pipe".to_owned())?;
                self.waiting()
                    .insert((token, 0), Waiting::Stdin(write, close_stdin.clone()));
                stdin = read.into();
            }
            for (asked, number, end) in [
                (wanted.stdout, 1, &mut stdout),
                (wanted.stderr, 2, &mut stderr),
            ] {
                if asked {
                    let (read, write) = pipe()?;
                    let read = Receiver::from_owned_fd(agents(read)?)
                        .during(|| "watch a pipe".to_owned())?;
                    self.waiting()
                        .insert((token, number), Waiting::Output(read));
                    *end = write.into();
                }
            }
        }
        Ok(Prepared {
            token,
            stdin,
            stdout,
            stderr,
            close_stdin,
        })
    }

    /// Offers the master of a process's terminal.
    pub fn offer_terminal(&self, token: Token, master: OwnedFd) {
        let mut waiting = self.waiting();
        match waiting.remove(&(token, 3)) {
            Some(Waiting::Connected(connection)) => {
                tokio::spawn(terminal(connection, master));
            }
            _ => {
                waiting.insert((token, 3), Waiting::Terminal(master));
            }
        }
    }

    /// Drops what nobody connected to.
    pub fn forget(&self, token: &Token) {
        self.waiting().retain(|(other, _), _| other != token);
        self.changed.notify_waiters();
    }

    /// Waits until the host has connected to all streams of `token`.
    ///
    /// # Errors
    /// It has not after 10 s.
    pub async fn connected(&self, token: &Token) -> Result<()> {
        let deadline = tokio::time::Instant::now() + HEADER_LIMIT;
        loop {
            let changed = self.changed.notified();
            let missing = self.waiting().iter().any(|((other, _), stream)| {
                other == token && !matches!(stream, Waiting::Connected(_))
            });
            if !missing {
                return Ok(());
            }
            tokio::time::timeout_at(deadline, changed)
                .await
                .map_err(|_| {
                    Failure::new(
                        Kind::FailedPrecondition,
                        "the host has not connected to the process's streams",
                    )
                })?;
        }
    }

    /// Serves the stdio port for ever.
    ///
    /// # Errors
    /// The port cannot be listened on.
    pub async fn serve(self: Arc<Self>) -> Result<()> {
        let address = VsockAddr::new(VMADDR_CID_ANY, ports::STDIO);
        let listener = VsockListener::bind(address)
            .during(|| format!("listen on vsock port {}", ports::STDIO))?;
        loop {
            match listener.accept().await {
                Ok((connection, peer)) if crate::rpc::is_host(peer.cid()) => {
                    tokio::spawn(self.clone().connection(connection));
                }
                Ok((_, peer)) => log::warn!("stdio: refused a connection from CID {}", peer.cid()),
                Err(error) => {
                    log::warn!("stdio: cannot accept: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Takes what waits under `key`; a second connection for a stream gets nothing.
    fn take(&self, key: (Token, u8)) -> Option<Waiting> {
        let mut waiting = self.waiting();
        if matches!(waiting.get(&key), Some(Waiting::Connected(_))) {
            return None;
        }
        waiting.remove(&key)
    }

    async fn connection(self: Arc<Self>, mut connection: VsockStream) {
        let mut header = [0; HEADER_LEN];
        let read = tokio::time::timeout(HEADER_LIMIT, connection.read_exact(&mut header)).await;
        let Ok(Ok(_)) = read else { return };
        let key = Header::decode(&header)
            .ok()
            .map(|header| (header.token, index(header.stream)));
        let found = key.and_then(|key| self.take(key));
        let (Some(key), Some(stream)) = (key, found) else {
            let _ = connection.write_all(&[REFUSED]).await;
            return;
        };
        if connection.write_all(&[ACCEPTED]).await.is_err() {
            return;
        }
        if matches!(stream, Waiting::TerminalToCome) {
            let mut waiting = self.waiting();
            match waiting.remove(&key) {
                // It came while the answer was being written.
                Some(Waiting::Terminal(master)) => {
                    tokio::spawn(terminal(connection, master));
                }
                _ => {
                    waiting.insert(key, Waiting::Connected(connection));
                }
            }
            drop(waiting);
            self.changed.notify_waiters();
            return;
        }
        self.changed.notify_waiters();
        match stream {
            Waiting::Stdin(pipe, close) => stdin(connection, pipe, &close).await,
            Waiting::Output(pipe) => output(pipe, connection).await,
            Waiting::Terminal(master) => terminal(connection, master).await,
            Waiting::TerminalToCome | Waiting::Connected(_) => {}
        }
    }
}

async fn stdin(mut connection: VsockStream, mut pipe: Sender, close: &Notify) {
    let mut buffer = vec![0; CHUNK];
    let mut closing = false;
    loop {
        let read = if closing {
            // What was sent before the request is here already or just behind it.
            tokio::time::timeout(Duration::from_millis(50), connection.read(&mut buffer))
                .await
                .unwrap_or(Ok(0))
        } else {
            tokio::select! {
                read = connection.read(&mut buffer) => read,
                () = close.notified() => { closing = true; continue }
            }
        };
        match read {
            Ok(length @ 1..) if pipe.write_all(&buffer[..length]).await.is_ok() => {}
            _ => return,
        }
    }
}

async fn output(mut pipe: Receiver, mut connection: VsockStream) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
        if connection.write_all(&buffer[..length]).await.is_err() {
            return; // The host has no use for it: the process gets SIGPIPE.
        }
    }
    let _ = connection.shutdown(std::net::Shutdown::Write);
}

async fn terminal(connection: VsockStream, master: OwnedFd) {
    let Ok(master) = Master::new(master) else {
        return;
    };
    let master = Arc::new(master);
    let (mut from_host, mut to_host) = connection.into_split();
    let input = tokio::spawn({
        let mut master = Shared(master.clone());
        async move {
            let mut buffer = vec![0; 4096];
            while let Ok(length @ 1..) = from_host.read(&mut buffer).await {
                if master.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
            }
        }
    });
    let mut buffer = vec![0; CHUNK];
    let mut reader = Shared(master);
    // The read fails (EIO) once the last process has closed the slave.
    while let Ok(length @ 1..) = reader.read(&mut buffer).await {
        if to_host.write_all(&buffer[..length]).await.is_err() {
            break;
        }
    }
    let _ = to_host.shutdown().await;
    input.abort();
}

struct Master(AsyncFd<OwnedFd>);

impl Master {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self(crate::readiness::watch(fd)?))
    }
}

/// Reads and writes one master from two tasks.
struct Shared(Arc<Master>);

impl AsyncRead for Shared {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.0.poll_read_ready(context))?;
            let space = buffer.initialize_unfilled();
            match guard.try_io(|fd| Ok(rustix::io::read(fd.as_fd(), &mut *space)?)) {
                Ok(result) => {
                    return Poll::Ready(result.map(|length| buffer.advance(length)));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Shared {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.0.poll_write_ready(context))?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd.as_fd(), bytes)?)) {
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
