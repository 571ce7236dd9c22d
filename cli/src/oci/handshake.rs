//! Between a verb and the process it leaves behind: one socket, lines of JSON, and the descriptors
//! of the streams with the first.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::arguments::STAY;
use crate::error::{Error, ShimCode};

/// Longest line.
const MAX_LINE: u64 = 64 << 10;

/// What the process shall do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Of the container.
    pub directory: PathBuf,
    /// An exec, by its id; None = the container itself.
    pub exec: Option<String>,
    /// The streams are one terminal.
    pub terminal: bool,
    /// The shim's log says more.
    pub debug: bool,
    /// It goes into this cgroup first.
    pub cgroup: Option<super::cgroup::Place>,
}

/// What the process answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum News {
    /// It has its namespaces; waits for [`Go`].
    Ready,
    /// The container (or the exec's program) is there.
    Done,
    /// It could not be done.
    Failed {
        /// A program that is not there, or may not be run.
        code: u8,
        /// Why.
        message: String,
    },
}

/// Hooks have run: go on.
#[derive(Debug, Serialize, Deserialize)]
pub struct Go;

/// The verb's end.
pub struct Link {
    /// The process.
    pub pid: u32,
    socket: UnixStream,
    child: Child,
}

impl Link {
    /// Starts the process and gives it its order.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(order: &Order, streams: &[BorrowedFd<'_>]) -> Result<Self, Error> {
        let program = std::env::current_exe().map_err(Error::io("find this program"))?;
        let (socket, other) = UnixStream::pair().map_err(Error::io("make a socket"))?;
        let log_path = order.directory.join("monitor.log");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(Error::file("create", &log_path))?;
        let child = Command::new(&program)
            .arg(STAY)
            // For those who look at a list of processes.
            .arg(&order.directory)
            .args(&order.exec)
            .stdin(Stdio::from(OwnedFd::from(other)))
            .stdout(Stdio::null())
            .stderr(log)
            .current_dir("/")
            .spawn()
            .map_err(Error::file("run", program))?;
        let link = Self {
            pid: child.id(),
            socket,
            child,
        };
        send_with(&link.socket, order, streams)?;
        Ok(link)
    }

    /// The next news.
    ///
    /// # Errors
    /// None within `limit`, or the process has died. [`News::Failed`] as an error.
    pub fn next(&mut self, limit: Duration) -> Result<News, Error> {
        self.socket
            .set_read_timeout(Some(limit))
            .map_err(Error::io("prepare a socket"))?;
        match receive(&self.socket) {
            Ok(News::Failed { code, message }) => Err(match code {
                127 => Error::Shim {
                    code: ShimCode::NotFound,
                    message,
                },
                126 => Error::Shim {
                    code: ShimCode::PermissionDenied,
                    message,
                },
                _ => Error::State(message),
            }),
            Ok(news) => Ok(news),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Error::State(format!(
                "process {} has not answered within {} s",
                self.pid,
                limit.as_secs()
            ))),
            Err(_) => Err(Error::State(format!(
                "process {} died while it made the container",
                self.pid
            ))),
        }
    }

    /// Lets the process go on after [`News::Ready`].
    ///
    /// # Errors
    /// It is gone.
    pub fn go(&self) -> Result<(), Error> {
        send(&self.socket, &Go)
    }

    /// Waits for the process's end; its exit code.
    ///
    /// # Errors
    /// Those of waitpid(2).
    pub fn wait(mut self) -> Result<u8, Error> {
        let status = self
            .child
            .wait()
            .map_err(Error::io("wait for the program"))?;
        let killed = || 128 + status.signal().unwrap_or(9);
        let code = status.code().unwrap_or_else(killed);
        Ok(u8::try_from(code).unwrap_or(u8::MAX))
    }

    /// Ends the process after a failure: it hears that nobody listens any more, cleans up and
    /// ends; one that does not is killed.
    pub fn give_up(&mut self, limit: Duration) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        let end = std::time::Instant::now() + limit;
        while std::time::Instant::now() < end {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process's end: its standard input.
pub struct Verb {
    socket: UnixStream,
}

impl Verb {
    /// Takes the order and the streams.
    ///
    /// # Errors
    /// Standard input is no such socket.
    pub fn take() -> Result<(Self, Order, Vec<OwnedFd>), Error> {
        let not_ours = |_| {
            Error::Usage(format!(
                "{STAY} is started by `caisson create` and `caisson exec`"
            ))
        };
        let fd = io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .map_err(Error::io("take the socket"))?;
        let socket = UnixStream::from(fd);
        socket.peer_addr().map_err(not_ours)?;
        let (order, streams) = receive_with(&socket).map_err(not_ours)?;
        Ok((Self { socket }, order, streams))
    }

    /// Tells the verb; it may have gone.
    pub fn tell(&self, news: &News) -> Result<(), Error> {
        send(&self.socket, news)
    }

    /// Waits for the verb's [`Go`].
    ///
    /// # Errors
    /// It has given up.
    pub fn wait_for_go(&self) -> Result<(), Error> {
        receive::<Go>(&self.socket)
            .map(drop)
            .map_err(Error::io("hear from the command"))
    }

    /// The socket, to see whether the verb still waits.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }
}

fn line(message: &impl Serialize) -> Result<Vec<u8>, Error> {
    let mut line = serde_json::to_vec(message)
        .map_err(|error| Error::io("encode a message")(io::Error::other(error)))?;
    line.push(b'\n');
    Ok(line)
}

/// Sends a line.
///
/// # Errors
/// Nobody is there any more.
pub fn send(mut socket: &UnixStream, message: &impl Serialize) -> Result<(), Error> {
    socket
        .write_all(&line(message)?)
        .map_err(Error::io("talk to the container's process"))
}

/// A message with descriptors; the kernel attaches them to its first byte.
fn send_with(
    socket: &UnixStream,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), Error> {
    let line = line(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Error::Usage("too many descriptors".to_owned()));
    }
    let sent = sendmsg(
        socket,
        &[IoSlice::new(&line)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
    .map_err(Error::io("talk to the container's process"))?;
    let rest = line.get(sent..).unwrap_or_default();
    (&mut &*socket)
        .write_all(rest)
        .map_err(Error::io("talk to the container's process"))
}

/// Receives a line.
///
/// # Errors
/// None comes, or it is no such message.
pub fn receive<T: DeserializeOwned>(socket: &UnixStream) -> io::Result<T> {
    // Byte by byte: what follows the line is for the next reader.
    let mut line = Vec::new();
    BufReader::with_capacity(1, socket)
        .take(MAX_LINE)
        .read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&line).map_err(io::Error::other)
}

fn receive_with(socket: &UnixStream) -> io::Result<(Order, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut first = [0; 1];
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut first)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes != 1 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let descriptors = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    let mut line = first.to_vec();
    BufReader::with_capacity(1, socket)
        .take(MAX_LINE)
        .read_until(b'\n', &mut line)?;
    let order = serde_json::from_slice(&line).map_err(io::Error::other)?;
    Ok((order, descriptors))
}

/// Sends a terminal's master to `socket`, as callers of runc expect it: with its name.
///
/// # Errors
/// Nobody listens there.
pub fn send_terminal(socket: &Path, master: BorrowedFd<'_>, name: &[u8]) -> Result<(), Error> {
    let failed = || Error::file::<io::Error>("hand the terminal to", socket);
    let stream = UnixStream::connect(socket).map_err(failed())?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [master];
    if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(failed()(io::ErrorKind::OutOfMemory.into()));
    }
    sendmsg(
        &stream,
        &[IoSlice::new(name)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
    .map_err(|error| failed()(error.into()))
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_carry_descriptors_and_news_follow() {
        let (verb, process) = UnixStream::pair().unwrap();
        let order = Order {
            directory: "/x".into(),
            exec: None,
            terminal: true,
            debug: false,
            cgroup: None,
        };
        let (mut reader, writer) = io::pipe().unwrap();
        send_with(&verb, &order, &[writer.as_fd()]).unwrap();
        drop(writer);
        send(&verb, &Go).unwrap();
        let (received, descriptors) = receive_with(&process).unwrap();
        assert_eq!(received, order);
        let [writer] = <[OwnedFd; 1]>::try_from(descriptors).unwrap();
        File::from(writer).write_all(b"hello").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        receive::<Go>(&process).unwrap();
        drop(verb);
        assert!(receive::<Go>(&process).is_err());
    }
}
