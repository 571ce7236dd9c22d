//! Connections to the guest: streams over the VMM's unix socket.

use std::{io, path::Path, time::Duration};

use caisson_protocol::{
    forward, ports,
    stdio::{ACCEPTED, Header, Stream, TOKEN_LEN},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::{deadline::scaled, error::Error, socket};

/// Longest answer to `CONNECT`: "OK " and a 32-bit number.
const MAX_ANSWER: usize = 32;

/// Connects to `port` of the guest.
///
/// # Errors
/// Nobody listens there, or not yet (`ConnectionRefused`).
pub async fn connect(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = socket::connect(path).await?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    let mut answer = Vec::new();
    // Byte by byte: what follows the line belongs to the stream.
    while answer.last() != Some(&b'\n') {
        match stream.read_u8().await {
            Ok(byte) if answer.len() < MAX_ANSWER => answer.push(byte),
            Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            Err(error) => return Err(error),
        }
    }
    if answer.starts_with(b"OK ") {
        Ok(stream)
    } else {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// Connects to one stream of a process.
///
/// # Errors
/// The agent refuses or does not answer in time.
pub async fn stdio(
    socket: &Path,
    token: [u8; TOKEN_LEN],
    stream: Stream,
) -> Result<UnixStream, Error> {
    let limit = scaled(Duration::from_secs(10));
    let connected = tokio::time::timeout(limit, async {
        let mut connection = connect(socket, ports::STDIO).await?;
        connection
            .write_all(&Header { token, stream }.encode())
            .await?;
        match connection.read_u8().await? {
            ACCEPTED => Ok(connection),
            _ => Err(io::Error::other("the agent does not know the stream")),
        }
    });
    match connected.await {
        Ok(result) => result.map_err(Error::io(format!("connect to the process's {stream:?}"))),
        Err(_) => Err(Error::Late {
            what: format!("connect {stream:?}"),
            seconds: limit.as_secs(),
        }),
    }
}

/// Connects to a TCP port of the guest's loopback.
///
/// # Errors
/// Nobody takes the connection there (`ConnectionRefused`), or the agent does not answer in time.
pub async fn forward(socket: &Path, port: u16) -> io::Result<UnixStream> {
    let connected = tokio::time::timeout(scaled(Duration::from_secs(10)), async {
        let mut connection = connect(socket, ports::FORWARD).await?;
        connection
            .write_all(&forward::Header { port }.encode())
            .await?;
        match connection.read_u8().await? {
            forward::ACCEPTED => Ok(connection),
            _ => Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
        }
    });
    connected.await?
}
