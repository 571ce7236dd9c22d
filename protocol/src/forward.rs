//! The first bytes of a connection to [`crate::ports::FORWARD`].
//!
//! The host writes a [`Header`] that names a TCP port; the agent connects to that port of the
//! guest's loopback (IPv4, then IPv6) and answers one byte: [`ACCEPTED`], or [`REFUSED`] and
//! closes. After that the connection is that to the port, as [`crate::relay`] passes it on.

/// Bytes of an encoded [`Header`].
pub const HEADER_LEN: usize = 6;

/// The agent's answer when it is connected.
pub const ACCEPTED: u8 = 1;

/// The agent's answer when nobody takes the connection.
pub const REFUSED: u8 = 0;

const MAGIC: [u8; 4] = *b"CSFW";

/// Names the port that a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// TCP port of the guest's loopback.
    pub port: u16,
}

/// The first four bytes are not the magic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("forwarded connection does not begin with the magic bytes")]
pub struct HeaderError;

impl Header {
    /// The header as it goes over the wire.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..].copy_from_slice(&self.port.to_be_bytes());
        bytes
    }

    /// Reads a header off the wire.
    ///
    /// # Errors
    /// A wrong magic.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let [a, b, c, d, high, low] = *bytes;
        if [a, b, c, d] == MAGIC {
            Ok(Self {
                port: u16::from_be_bytes([high, low]),
            })
        } else {
            Err(HeaderError)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trips_and_foreign_bytes_are_refused() {
        let header = Header { port: 0x1234 };
        let mut bytes = header.encode();
        assert_eq!(bytes, *b"CSFW\x12\x34");
        assert_eq!(Header::decode(&bytes), Ok(header));
        bytes[3] = b'X';
        assert_eq!(Header::decode(&bytes), Err(HeaderError));
    }
}
