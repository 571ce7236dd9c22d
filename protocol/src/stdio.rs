//! The first bytes of a connection to [`crate::ports::STDIO`].
//!
//! `CreateContainer` and `CreateExec` answer a random token that names the
//! process. Before `Start…` the host opens one connection for each stream it
//! asked for and writes a [`Header`] on it; the agent answers one byte
//! ([`ACCEPTED`] or [`REFUSED`], then closes). After that the connection is the
//! stream itself: the host half-closes stdin to end it; the agent half-closes
//! stdout and stderr once the last writer is gone and all was sent.
//!
//! With a terminal there is one connection, [`Stream::Terminal`], both ways.

/// Bytes of a process's token.
pub const TOKEN_LEN: usize = 16;

/// Bytes of an encoded [`Header`].
pub const HEADER_LEN: usize = 4 + TOKEN_LEN + 1;

/// The agent's answer to a header that names a waiting stream.
pub const ACCEPTED: u8 = 1;

/// The agent's answer to any other header; the connection then closes.
pub const REFUSED: u8 = 0;

const MAGIC: [u8; 4] = *b"CSIO";

/// Which of a process's streams a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Host to process.
    Stdin,
    /// Process to host.
    Stdout,
    /// Process to host.
    Stderr,
    /// Both directions of a pseudo-terminal.
    Terminal,
}

/// Names the stream that a connection will carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// As `CreateProcessResponse.stdio_token`.
    pub token: [u8; TOKEN_LEN],
    /// One connection per stream; a second one is refused.
    pub stream: Stream,
}

/// A header that this version does not understand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The first four bytes are not the magic.
    #[error("stdio connection does not begin with the magic bytes")]
    Magic,
    /// No such stream kind.
    #[error("unknown stdio stream kind {0}")]
    Stream(u8),
}

impl Header {
    /// The header as it goes over the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..4 + TOKEN_LEN].copy_from_slice(&self.token);
        bytes[HEADER_LEN - 1] = match self.stream {
            Stream::Stdin => 0,
            Stream::Stdout => 1,
            Stream::Stderr => 2,
            Stream::Terminal => 3,
        };
        bytes
    }

    /// Reads a header off the wire.
    ///
    /// # Errors
    /// A wrong magic or an unknown stream kind.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        if bytes[..4] != MAGIC {
            return Err(HeaderError::Magic);
        }
        let mut token = [0; TOKEN_LEN];
        token.copy_from_slice(&bytes[4..4 + TOKEN_LEN]);
        let stream = match bytes[HEADER_LEN - 1] {
            0 => Stream::Stdin,
            1 => Stream::Stdout,
            2 => Stream::Stderr,
            3 => Stream::Terminal,
            other => return Err(HeaderError::Stream(other)),
        };
        Ok(Self { token, stream })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trips() {
        for stream in [
            Stream::Stdin,
            Stream::Stdout,
            Stream::Stderr,
            Stream::Terminal,
        ] {
            let header = Header {
                token: [7; TOKEN_LEN],
                stream,
            };
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn foreign_bytes_are_refused() {
        let mut bytes = Header {
            token: [0; TOKEN_LEN],
            stream: Stream::Stdin,
        }
        .encode();
        bytes[HEADER_LEN - 1] = 9;
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Stream(9)));
        bytes[0] = b'X';
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Magic));
    }
}
