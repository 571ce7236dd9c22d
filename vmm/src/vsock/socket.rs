//! System calls on host sockets. None of them blocks or raises SIGPIPE.

use std::{
    io::IoSlice,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use caisson_vmm_api::VsockIncoming;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
        SocketFlags, SocketType, sockopt,
    },
};

/// Longest first line of a host program, with its line feed.
pub const MAX_LINE: usize = 32;

/// A unix socket is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Wrong kind.
    #[error("the vsock {role} is not a {wanted} unix socket")]
    Kind {
        /// "listener" or "acceptor".
        role: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// A system call failed.
    #[error("{call} on the vsock {role}: {error}")]
    Io {
        /// "listener" or "acceptor".
        role: &'static str,
        /// Which.
        call: &'static str,
        /// Why.
        error: Errno,
    },
}

/// Checks a listener and makes it non-blocking.
pub fn check_listener(socket: &OwnedFd) -> Result<(), SocketError> {
    let role = "listener";
    let io = |call| move |error| SocketError::Io { role, call, error };
    let listens = sockopt::socket_acceptconn(socket).map_err(io("getsockopt(SO_ACCEPTCONN)"))?;
    if !listens || !is_unix(socket, SocketType::STREAM).map_err(io("getsockopt"))? {
        return Err(SocketError::Kind {
            role,
            wanted: "listening SOCK_STREAM",
        });
    }
    rustix::io::ioctl_fionbio(socket, true).map_err(io("ioctl(FIONBIO)"))
}

/// Checks an acceptor.
pub fn check_acceptor(socket: &OwnedFd) -> Result<(), SocketError> {
    let role = "acceptor";
    let unix = is_unix(socket, SocketType::SEQPACKET);
    match unix.map_err(|error| SocketError::Io {
        role,
        call: "getsockopt",
        error,
    })? {
        true => Ok(()),
        false => Err(SocketError::Kind {
            role,
            wanted: "connected SOCK_SEQPACKET",
        }),
    }
}

fn is_unix(socket: &OwnedFd, kind: SocketType) -> Result<bool, Errno> {
    Ok(sockopt::socket_domain(socket)? == AddressFamily::UNIX
        && sockopt::socket_type(socket)? == kind)
}

/// The next waiting connection.
pub fn accept(listener: &OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
}

/// A pair of connected streams: ours and the host program's.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
}

/// Sends a stream on the acceptor.
pub fn hand_over(
    acceptor: &OwnedFd,
    stream: &OwnedFd,
    incoming: &VsockIncoming,
) -> Result<(), Errno> {
    // Two numbers of at most ten digits and their names.
    let mut text = [0u8; 64];
    let mut rest = &mut text[..];
    serde_json::to_writer(&mut rest, incoming).map_err(|_| Errno::MSGSIZE)?;
    let length = 64 - rest.len();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [stream.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let message = [IoSlice::new(&text[..length])];
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    rustix::net::sendmsg(acceptor, &message, &mut control, flags).map(|_| ())
}

/// Sends what `iovecs` (at most 1,024) point to, or a first part of it.
///
/// # Safety
/// Each iovec must point to readable memory of its length.
pub unsafe fn send(socket: BorrowedFd<'_>, iovecs: &[libc::iovec]) -> Result<usize, Errno> {
    let message = message(iovecs);
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the message refers to a list that outlives the call, and the caller vouches for what that points to.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    usize::try_from(sent).map_err(|_| last_errno())
}

/// Fills what `iovecs` (at most 1,024) point to, or a first part of it; 0 = end of the stream.
///
/// # Safety
/// Each iovec must point to memory of its length that may be written and that Rust holds no reference to.
pub unsafe fn receive(socket: BorrowedFd<'_>, iovecs: &[libc::iovec]) -> Result<usize, Errno> {
    let mut message = message(iovecs);
    // SAFETY: as in `send`; no name and no control data are asked for.
    let received =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    usize::try_from(received).map_err(|_| last_errno())
}

/// Sends bytes of our own, or a first part of them.
pub fn send_bytes(socket: BorrowedFd<'_>, parts: [&[u8]; 2]) -> Result<usize, Errno> {
    let iovecs = parts.map(|part| libc::iovec {
        iov_base: part.as_ptr().cast_mut().cast(),
        iov_len: part.len(),
    });
    // SAFETY: the iovecs cover slices that are borrowed during the call, which only reads them.
    unsafe { send(socket, &iovecs) }
}

/// The first line of a stream.
pub enum Line {
    /// It is not complete yet.
    Partial,
    /// The stream ended, or the line is too long.
    Bad,
    /// Complete, with its line feed: bytes and length. Nothing behind it was taken.
    Complete([u8; MAX_LINE], usize),
}

/// Reads the first line, leaving what follows.
pub fn read_line(socket: BorrowedFd<'_>) -> Line {
    let mut bytes = [0u8; MAX_LINE];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let count = match rustix::net::recv(socket, &mut bytes[..], flags) {
        Ok((_, count)) => count,
        Err(Errno::AGAIN | Errno::INTR) => return Line::Partial,
        Err(_) => return Line::Bad,
    };
    match bytes[..count].iter().position(|byte| *byte == b'\n') {
        Some(end) => {
            let line = rustix::net::recv(socket, &mut bytes[..=end], RecvFlags::DONTWAIT);
            match line {
                Ok((_, taken)) if taken == end + 1 => Line::Complete(bytes, end + 1),
                _ => Line::Bad,
            }
        }
        None if count == 0 || count == MAX_LINE => Line::Bad,
        None => Line::Partial,
    }
}

fn message(iovecs: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: a msghdr of zeros is a valid one: no name, no buffers, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len();
    message
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
