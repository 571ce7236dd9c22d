//! One end of the control socket: whole documents with their descriptors.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::{Serialize, de::DeserializeOwned};

/// Longest document, bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// Most descriptors in one packet (`SCM_MAX_FD` of Linux is 253).
pub const MAX_FDS: usize = 250;

/// Why a document could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other end is closed.
    #[error("the control socket is closed by its other end")]
    Closed,
    /// No packet within the socket's time-out.
    #[error("no packet on the control socket in time")]
    TimedOut,
    /// The document or its descriptors exceed [`MAX_PACKET`] or [`MAX_FDS`].
    #[error("control packet of {bytes} bytes with {fds} descriptors is too large")]
    TooLarge {
        /// Length of the document.
        bytes: usize,
        /// Number of descriptors.
        fds: usize,
    },
    /// A packet that is not the expected JSON.
    #[error("malformed control packet: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A system call failed.
    #[error("control socket: {0}")]
    Io(#[from] rustix::io::Errno),
}

/// One end of a `SOCK_SEQPACKET` unix socket pair.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    /// Takes a connected `SOCK_SEQPACKET` unix socket.
    fn from(socket: OwnedFd) -> Self {
        Self { socket }
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

impl Channel {
    /// Two connected ends, both close-on-exec.
    ///
    /// # Errors
    /// Those of socketpair(2).
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (a, b) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((a.into(), b.into()))
    }

    /// Sends `document` with `fds` as one packet.
    ///
    /// # Errors
    /// [`ChannelError::TooLarge`], [`ChannelError::Closed`], or the error of sendmsg(2).
    pub fn send<T: Serialize>(
        &self,
        document: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(document)?;
        if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
            return Err(ChannelError::TooLarge {
                bytes: bytes.len(),
                fds: fds.len(),
            });
        }
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ChannelError::TooLarge {
                bytes: bytes.len(),
                fds: fds.len(),
            });
        }
        let sent = rustix::io::retry_on_intr(|| {
            sendmsg(
                &self.socket,
                &[IoSlice::new(&bytes)],
                &mut control,
                SendFlags::NOSIGNAL,
            )
        });
        match sent {
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                Err(ChannelError::Closed)
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for the next packet.
    ///
    /// # Errors
    /// [`ChannelError::Closed`] at the end of the stream, [`ChannelError::TimedOut`] when the socket
    /// has a receive time-out (or is non-blocking), [`ChannelError::TooLarge`] for a truncated packet.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let mut bytes = vec![0; MAX_PACKET];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )
        });
        let received = match received {
            Ok(received) => received,
            Err(rustix::io::Errno::AGAIN) => return Err(ChannelError::TimedOut),
            Err(rustix::io::Errno::CONNRESET) => return Err(ChannelError::Closed),
            Err(errno) => return Err(errno.into()),
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(ChannelError::TooLarge {
                bytes: received.bytes,
                fds: fds.len(),
            });
        }
        if received.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        Ok((serde_json::from_slice(&bytes[..received.bytes])?, fds))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::{Call, Request};

    #[test]
    fn documents_and_descriptors_arrive_whole() {
        let (a, b) = Channel::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let call = Call {
            id: 7,
            request: Request::Describe,
        };
        a.send(&call, &[writer.as_fd()]).unwrap();
        drop(writer);
        let (received, mut fds): (Call, _) = b.receive().unwrap();
        assert_eq!(received, call);
        let mut file = std::fs::File::from(fds.remove(0));
        file.write_all(b"x").unwrap();
        drop(file);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn the_end_is_told_from_rubbish() {
        let (a, b) = Channel::pair().unwrap();
        a.send(&"no call", &[]).unwrap();
        assert!(matches!(
            b.receive::<Call>(),
            Err(ChannelError::Malformed(_))
        ));
        drop(a);
        assert!(matches!(b.receive::<Call>(), Err(ChannelError::Closed)));
        let call = Call {
            id: 1,
            request: Request::Stop,
        };
        assert!(matches!(b.send(&call, &[]), Err(ChannelError::Closed)));
    }

    #[test]
    fn oversized_documents_are_refused_before_sending() {
        let (a, _b) = Channel::pair().unwrap();
        let long = "x".repeat(MAX_PACKET);
        assert!(matches!(
            a.send(&long, &[]),
            Err(ChannelError::TooLarge { .. })
        ));
    }
}
