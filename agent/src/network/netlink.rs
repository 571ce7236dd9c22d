//! A small blocking rtnetlink client (rtnetlink(7), kernel documentation
//! "Introduction to Netlink"): one request at a time, each with its answer.
//!
//! The kernel answers within the call that sends, so that blocking costs nothing.

use std::{
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink::SocketAddrNetlink,
        recvfrom, send, socket_with, sockopt,
    },
};

use crate::failure::{During, Failure, Result};

const HEADER: usize = 16;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
/// Replace what is there (`NLM_F_REPLACE`), make it when nothing is (`NLM_F_CREATE`).
pub const SET: u16 = 0x100 | 0x400;
/// Add beside what is there (`NLM_F_CREATE`, `NLM_F_APPEND`): to replace a route would be to replace
/// that of another interface to the same destination, too.
pub const ADD: u16 = 0x400 | 0x800;
/// Answer with all there are (`NLM_F_ROOT | NLM_F_MATCH`).
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Nested and byte-order bits of an attribute's type.
const TYPE_MASK: u16 = 0x3FFF;
/// Longest datagram that the kernel sends for a dump.
const BUFFER: usize = 64 * 1024;
/// Far more than the kernel ever needs.
const PATIENCE: Duration = Duration::from_secs(5);

/// One request under construction.
#[derive(Debug, Clone)]
pub struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    /// A request of `kind` (`RTM_*`) with `flags` and the fixed part of its body.
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        Self {
            kind,
            flags,
            body: fixed.to_vec(),
        }
    }

    /// Appends an attribute. Values are of this crate's making and short.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.body.extend_from_slice(&length.to_ne_bytes());
        self.body.extend_from_slice(&kind.to_ne_bytes());
        self.body.extend_from_slice(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
        self
    }

    /// Appends an attribute that is an address.
    pub fn address(self, kind: u16, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.attribute(kind, &address.octets()),
            IpAddr::V6(address) => self.attribute(kind, &address.octets()),
        }
    }

    /// The fixed part and the attributes.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The datagram (`struct nlmsghdr` and what follows it).
    pub fn encode(&self, sequence: u32, more_flags: u16) -> Vec<u8> {
        let length = u32::try_from(HEADER + self.body.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&self.kind.to_ne_bytes());
        bytes.extend_from_slice(&(self.flags | NLM_F_REQUEST | more_flags).to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// Number at `offset`, 0 beyond the end.
fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    bytes
        .get(offset..offset + 2)
        .map_or(0, |b| u16::from_ne_bytes([b[0], b[1]]))
}

/// Number at `offset`, 0 beyond the end.
pub fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes
        .get(offset..offset + 4)
        .map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

/// Pairs of type and value in `bytes`; ends at the first malformed one.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0));
        let value = rest.get(4..length)?;
        let kind = u16_at(rest, 2) & TYPE_MASK;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// One message of an answer.
#[derive(Debug, PartialEq, Eq)]
enum Answer<'a> {
    /// An object of a dump: its type and body.
    Object(u16, &'a [u8]),
    /// The end of a dump, or success.
    Done,
    /// What the kernel refused, with its explanation when it gave one.
    Refused(Errno, String),
}

/// Messages in `bytes` that answer `sequence`.
fn answers(bytes: &[u8], sequence: u32) -> impl Iterator<Item = Answer<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        loop {
            let length = usize::try_from(u32_at(rest, 0)).ok()?;
            let body = rest.get(HEADER..length)?;
            let (kind, flags, of) = (u16_at(rest, 4), u16_at(rest, 6), u32_at(rest, 8));
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            if of != sequence {
                continue;
            }
            let code = u32_at(body, 0).cast_signed();
            return Some(match kind {
                NLMSG_ERROR | NLMSG_DONE if code < 0 => {
                    let explanation = if kind == NLMSG_ERROR && flags & NLM_F_ACK_TLVS != 0 {
                        // The capped request's header stands between the code and the attributes.
                        explanation(body.get(4 + HEADER..).unwrap_or_default())
                    } else {
                        String::new()
                    };
                    Answer::Refused(Errno::from_raw_os_error(code.saturating_neg()), explanation)
                }
                NLMSG_ERROR | NLMSG_DONE => Answer::Done,
                _ => Answer::Object(kind, body),
            });
        }
    })
}

fn explanation(bytes: &[u8]) -> String {
    attributes(bytes)
        .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
        .map(|(_, text)| {
            String::from_utf8_lossy(text)
                .trim_end_matches('\0')
                .to_owned()
        })
        .unwrap_or_default()
}

/// A socket to the kernel's network configuration of the current network namespace.
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens one.
    ///
    /// # Errors
    /// Those of socket(2).
    pub fn open() -> Result<Self> {
        let during = || "open a route netlink socket".to_owned();
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is protocol 0.
            None,
        )
        .during(during)?;
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(PATIENCE)).during(during)?;
        // Explanations of errors, and no copy of the request before them.
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            let one: libc::c_int = 1;
            // SAFETY: the kernel reads one int, which lives through the call. Failure only
            // costs the explanation (NETLINK_EXT_ACK) and is seen by `answers` as none.
            unsafe {
                libc::setsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_NETLINK,
                    option,
                    (&raw const one).cast(),
                    size_of::<libc::c_int>() as libc::socklen_t,
                );
            }
        }
        Ok(Self { fd, sequence: 0 })
    }

    /// Sends `message` and waits until the kernel has done it.
    ///
    /// # Errors
    /// What the kernel refuses, as "cannot `what`: …".
    pub fn request(&mut self, message: &Message, what: impl Fn() -> String) -> Result<()> {
        self.exchange(message, NLM_F_ACK, |_, _| {})
            .map_err(|refusal| refusal.failure(&what()))
    }

    /// As [`Socket::request`], but an object that is there already is no error.
    ///
    /// # Errors
    /// What the kernel refuses otherwise.
    pub fn add(&mut self, message: &Message, what: impl Fn() -> String) -> Result<()> {
        match self.exchange(message, NLM_F_ACK, |_, _| {}) {
            Err(Refusal {
                errno: Errno::EXIST,
                ..
            }) => Ok(()),
            result => result.map_err(|refusal| refusal.failure(&what())),
        }
    }

    /// As [`Socket::request`], but an object that is not there is no error.
    ///
    /// # Errors
    /// What the kernel refuses otherwise.
    pub fn remove(&mut self, message: &Message, what: impl Fn() -> String) -> Result<()> {
        match self.exchange(message, NLM_F_ACK, |_, _| {}) {
            Err(Refusal {
                errno: Errno::ADDRNOTAVAIL | Errno::SRCH | Errno::NOENT,
                ..
            }) => Ok(()),
            result => result.map_err(|refusal| refusal.failure(&what())),
        }
    }

    /// Sends `message` and hands every object of the answer (`RTM_*`, body) to `each`.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn dump(
        &mut self,
        message: &Message,
        what: impl Fn() -> String,
        each: impl FnMut(u16, &[u8]),
    ) -> Result<()> {
        self.exchange(message, NLM_F_DUMP, each)
            .map_err(|refusal| refusal.failure(&what()))
    }

    fn exchange(
        &mut self,
        message: &Message,
        flags: u16,
        mut each: impl FnMut(u16, &[u8]),
    ) -> std::result::Result<(), Refusal> {
        self.sequence += 1;
        // Without a destination the kernel is meant.
        send(
            &self.fd,
            &message.encode(self.sequence, flags),
            SendFlags::empty(),
        )?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let (received, length, from) =
                match recvfrom(&self.fd, &mut buffer[..], RecvFlags::TRUNC) {
                    Err(Errno::INTR) => continue,
                    result => result?,
                };
            // A container that may configure the pod's network could forge an answer.
            let from_kernel = from
                .and_then(|address| SocketAddrNetlink::try_from(address).ok())
                .is_some_and(|address| address.pid() == 0);
            if !from_kernel {
                continue;
            }
            if length > received {
                return Err(Errno::MSGSIZE.into());
            }
            for answer in answers(&buffer[..received], self.sequence) {
                match answer {
                    Answer::Object(kind, body) => each(kind, body),
                    Answer::Done => return Ok(()),
                    Answer::Refused(errno, text) => return Err(Refusal { errno, text }),
                }
            }
        }
    }
}

struct Refusal {
    errno: Errno,
    text: String,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self {
            errno,
            text: String::new(),
        }
    }
}

impl Refusal {
    fn failure(self, what: &str) -> Failure {
        let Self { errno, text } = self;
        if text.is_empty() {
            Failure::internal(format!("cannot {what}: {errno}"))
        } else {
            Failure::internal(format!("cannot {what}: {text} ({errno})"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_laid_out_as_the_kernel_reads_it() {
        let message = Message::new(20, SET, &[2, 24, 0, 0, 7, 0, 0, 0])
            .address(2, "10.1.2.3".parse().unwrap())
            .attribute(3, b"eth0\0");
        let bytes = message.encode(9, NLM_F_ACK);
        let mut expected = 44u32.to_ne_bytes().to_vec();
        expected.extend(20u16.to_ne_bytes());
        expected.extend(0x505u16.to_ne_bytes());
        expected.extend(9u32.to_ne_bytes());
        expected.extend([0; 4]);
        expected.extend([2, 24, 0, 0, 7, 0, 0, 0]);
        expected.extend(8u16.to_ne_bytes());
        expected.extend(2u16.to_ne_bytes());
        expected.extend([10, 1, 2, 3]);
        // Nine bytes long, padded to twelve.
        expected.extend(9u16.to_ne_bytes());
        expected.extend(3u16.to_ne_bytes());
        expected.extend(*b"eth0\0\0\0\0");
        assert_eq!(bytes, expected);
    }

    #[test]
    fn attributes_are_read_back_and_malformed_ones_end_them() {
        let message = Message::new(0, 0, &[])
            .attribute(1, b"abcde")
            .attribute(0x8002, &[1]);
        let read: Vec<_> = attributes(&message.body).collect();
        assert_eq!(read, [(1, &b"abcde"[..]), (2, &[1][..])]);
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[200, 0, 1, 0, 5]).count(), 0);
        assert_eq!(attributes(&[]).count(), 0);
    }

    #[test]
    fn a_refusal_carries_the_kernels_words() {
        let error = -libc::EINVAL;
        let mut body = error.to_ne_bytes().to_vec();
        body.extend([0; HEADER]);
        let answer = Message::new(NLMSG_ERROR, NLM_F_ACK_TLVS, &body)
            .attribute(NLMSGERR_ATTR_MSG, b"Nexthop has invalid gateway\0");
        // An answer to somebody else's request goes before it.
        let mut bytes = Message::new(NLMSG_DONE, 0, &[0; 4]).encode(1, 0);
        bytes.extend(answer.encode(2, 0));
        let read: Vec<_> = answers(&bytes, 2).collect();
        assert_eq!(
            read,
            [Answer::Refused(
                Errno::INVAL,
                "Nexthop has invalid gateway".to_owned()
            )]
        );
    }

    #[test]
    fn a_success_is_an_error_message_with_code_zero() {
        let bytes = Message::new(NLMSG_ERROR, 0, &[0; 20]).encode(5, 0);
        assert_eq!(answers(&bytes, 5).next(), Some(Answer::Done));
        assert_eq!(answers(&bytes[..20], 5).next(), None);
    }
}
