//! What goes over a connection to [`crate::ports::RESOLVER`]: DNS messages, queries of the guest to
//! the host and answers back, each in a [`Frame`].
//!
//! The agent takes queries at a name server's address of the guest's loopback; the host asks the one
//! that has this address in the pod's network namespace. A query without an answer stays without: as
//! with UDP, whoever has asked asks again.

use std::{io, net::Ipv4Addr};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Where dockerd answers for names of containers, in the namespace of each.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// Its UDP port.
pub const PORT: u16 = 53;

/// Longest message, bytes.
pub const MAX_MESSAGE: usize = 4096;

/// Queries that wait for an answer at a time.
pub const MAX_QUERIES: usize = 64;

/// Shortest message: a header (RFC 1035, section 4.1.1).
const MIN_MESSAGE: usize = 12;

/// Tag and length.
const HEADER_LEN: usize = 4;

/// A DNS message, and the number by which an answer is told from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The agent's; an answer has its query's. The message's own number is whoever has asked's.
    pub tag: u16,
    /// As it was or will be in a datagram.
    pub message: Vec<u8>,
}

/// A message that no frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a DNS message has {MIN_MESSAGE} to {MAX_MESSAGE} bytes here, not {0}")]
pub struct LengthError(pub usize);

/// Whether a frame holds a message of this length.
///
/// # Errors
/// It does not.
pub fn check(length: usize) -> Result<(), LengthError> {
    if (MIN_MESSAGE..=MAX_MESSAGE).contains(&length) {
        Ok(())
    } else {
        Err(LengthError(length))
    }
}

impl Frame {
    /// The frame as it goes over the wire.
    ///
    /// # Errors
    /// Its message is too short or too long.
    pub fn encode(&self) -> Result<Vec<u8>, LengthError> {
        let error = LengthError(self.message.len());
        check(self.message.len())?;
        let length = u16::try_from(self.message.len()).map_err(|_| error)?;
        Ok([
            &self.tag.to_be_bytes()[..],
            &length.to_be_bytes()[..],
            &self.message,
        ]
        .concat())
    }

    /// Reads a frame off the wire; none at the connection's end. What has been read is lost when this
    /// is given up.
    ///
    /// # Errors
    /// The connection is broken, or a message is too short or too long (`InvalidData`).
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER_LEN];
        if from.read(&mut header[..1]).await? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut header[1..]).await?;
        let [tag_high, tag_low, high, low] = header;
        let length = usize::from(u16::from_be_bytes([high, low]));
        check(length).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let mut message = vec![0; length];
        from.read_exact(&mut message).await?;
        Ok(Some(Self {
            tag: u16::from_be_bytes([tag_high, tag_low]),
            message,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: usize) -> Frame {
        Frame {
            tag: 0x0102,
            message: vec![7; length],
        }
    }

    #[tokio::test]
    async fn frames_come_back_one_by_one() {
        let sent = [frame(MIN_MESSAGE), frame(MAX_MESSAGE)];
        let bytes = sent.clone().map(|frame| frame.encode().unwrap()).concat();
        assert_eq!(bytes[..5], [1, 2, 0, 12, 7]);
        let mut wire = &bytes[..];
        for frame in sent {
            assert_eq!(Frame::read(&mut wire).await.unwrap(), Some(frame));
        }
        assert_eq!(Frame::read(&mut wire).await.unwrap(), None);
    }

    #[tokio::test]
    async fn lengths_of_no_message_and_halves_of_frames_are_refused() {
        for length in [0, MIN_MESSAGE - 1, MAX_MESSAGE + 1, 70_000] {
            assert_eq!(frame(length).encode(), Err(LengthError(length)));
        }
        for length in [0, 11, 4097, u16::MAX] {
            let header = [[0; 2], length.to_be_bytes()].concat();
            let error = Frame::read(&mut &header[..]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{length}");
        }
        let bytes = frame(20).encode().unwrap();
        for end in [1, 3, HEADER_LEN, bytes.len() - 1] {
            let error = Frame::read(&mut &bytes[..end]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{end}");
        }
    }
}
