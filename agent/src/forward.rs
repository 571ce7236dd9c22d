//! Connections of the host to loopback ports of the pod ([`caisson_protocol::forward`]).

use std::{io, net::Ipv4Addr, net::Ipv6Addr, sync::Arc, time::Duration};

use caisson_protocol::{
    forward::{ACCEPTED, HEADER_LEN, Header, REFUSED},
    limits::MAX_FORWARDS,
    ports,
    relay::{Connection, relay},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Semaphore,
    time::timeout,
};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use crate::failure::{During, Result};

/// For the header, and then for the port's answer.
const LIMIT: Duration = Duration::from_secs(5);

/// How often a host that has sent all is asked whether it still receives.
const CHECK: Duration = Duration::from_secs(15);

/// Some may be over for the host and not yet here.
const MOST: usize = MAX_FORWARDS + 64;

/// Serves the port for ever.
///
/// # Errors
/// The port cannot be listened on.
pub async fn serve() -> Result<()> {
    let address = VsockAddr::new(VMADDR_CID_ANY, ports::FORWARD);
    let listener = VsockListener::bind(address)
        .during(|| format!("listen on vsock port {}", ports::FORWARD))?;
    let room = Arc::new(Semaphore::new(MOST));
    loop {
        match listener.accept().await {
            Ok((mut connection, peer)) if crate::rpc::is_host(peer.cid()) => {
                let Ok(permit) = room.clone().try_acquire_owned() else {
                    log::warn!("forward: {MOST} connections are open, no more are taken");
                    continue;
                };
                tokio::spawn(async move {
                    // One that breaks off is told by the end of the other.
                    let _ = serve_one(&mut connection).await;
                    drop(permit);
                });
            }
            Ok((_, peer)) => log::warn!("forward: refused a connection from CID {}", peer.cid()),
            Err(error) => {
                log::warn!("forward: cannot accept: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_one(host: &mut impl Connection) -> io::Result<()> {
    let mut header = [0; HEADER_LEN];
    timeout(LIMIT, host.read_exact(&mut header)).await??;
    let header = Header::decode(&header).map_err(io::Error::other)?;
    match timeout(LIMIT, connect(header.port)).await {
        Ok(Ok(mut server)) => {
            host.write_all(&[ACCEPTED]).await?;
            relay(host, &mut server, CHECK).await
        }
        _ => host.write_all(&[REFUSED]).await,
    }
}

/// As whoever says "localhost".
async fn connect(port: u16) -> io::Result<TcpStream> {
    let server = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(server) => server,
        Err(_) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await?,
    };
    // Packets are as the client sent them.
    server.set_nodelay(true)?;
    Ok(server)
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, UnixStream};

    use super::*;

    async fn ask(bytes: &[u8]) -> (UnixStream, tokio::task::JoinHandle<io::Result<()>>) {
        let (mut host, mut agent) = UnixStream::pair().unwrap();
        let task = tokio::spawn(async move { serve_one(&mut agent).await });
        host.write_all(bytes).await.unwrap();
        (host, task)
    }

    #[tokio::test]
    async fn either_loopback_is_reached() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let (mut host, task) = ask(&Header { port }.encode()).await;
            let (mut server, _) = listener.accept().await.unwrap();
            assert_eq!(host.read_u8().await.unwrap(), ACCEPTED, "{address}");
            server.write_all(b"hello").await.unwrap();
            drop(server);
            let mut text = String::new();
            host.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "hello");
            drop(host);
            task.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_port_without_a_server_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let (mut host, _task) = ask(&Header { port }.encode()).await;
        let mut answer = Vec::new();
        host.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, [REFUSED]);
    }

    #[tokio::test]
    async fn foreign_bytes_get_no_answer() {
        let (mut host, task) = ask(b"GET / ").await;
        assert!(task.await.unwrap().is_err());
        let mut answer = Vec::new();
        host.read_to_end(&mut answer).await.unwrap();
        assert!(answer.is_empty(), "{answer:?}");
    }
}
