//! What is dialled on the namespace's loopback reaches the guest's, as it would reach the pod's
//! processes if they were in the namespace: containerd serves `kubectl port-forward` by dialling
//! there.
//!
//! One listener for each family takes connections to all ports ([`steering`]); for each, the agent
//! is asked to connect to that port ([`caisson_protocol::forward`]). Only the host asks.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use caisson_protocol::{limits::MAX_FORWARDS, relay::relay};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt},
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};

use super::{namespace::Namespace, steering};
use crate::{error::Error, vsock};

/// Connections that wait to be taken.
const BACKLOG: i32 = 64;

/// Silence after which a client is asked whether it is still there, and for how long it is.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(10), 3);

/// How often a client that has sent all is looked at: [`relay`].
const CHECK: Duration = Duration::from_secs(15);

/// The loopback of a namespace, as long as this lives.
pub struct Forward {
    /// Steers connections to the listeners.
    _link: OwnedFd,
    /// Owns the listeners and all connections.
    task: JoinHandle<()>,
}

impl Forward {
    /// Begins, with a guest whose ports are behind the unix socket `vsock`.
    ///
    /// # Errors
    /// The kernel has no such BPF programs (before Linux 5.9), or forbids them.
    pub async fn start(namespace: &Namespace, vsock: PathBuf) -> Result<Self, Error> {
        let target = namespace.file();
        let what = "forward connections to the pod's loopback (kubectl port-forward)";
        let (link, sockets) = namespace
            .run(what.to_owned(), move || {
                let ipv4 = listener(Ipv4Addr::LOCALHOST.into())?;
                let ipv6 = match listener(Ipv6Addr::LOCALHOST.into()) {
                    Ok(listener) => Some(listener),
                    // Not every kernel has IPv6.
                    Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => None,
                    Err(error) => return Err(error.into()),
                };
                let numbers = [
                    Some(ipv4.as_raw_fd()),
                    ipv6.as_ref().map(AsRawFd::as_raw_fd),
                ];
                let link = steering::steer(target.as_fd(), numbers)?;
                Ok((link, (ipv4, ipv6)))
            })
            .await?;
        let listener = |socket: OwnedFd| TcpListener::from_std(socket.into());
        let ipv4 = listener(sockets.0).map_err(Error::io(what))?;
        let ipv6 = sockets.1.map(listener).transpose();
        let listeners = Listeners {
            ipv4,
            ipv6: ipv6.map_err(Error::io(what))?,
        };
        Ok(Self {
            _link: link,
            task: tokio::spawn(serve(listeners, vsock.into())),
        })
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Listens in the calling thread's namespace, also when its loopback interface is not up (yet).
fn listener(address: IpAddr) -> rustix::io::Result<OwnedFd> {
    let family = match address {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
        sockopt::set_ipv6_freebind(&socket, true)?;
    } else {
        sockopt::set_ip_freebind(&socket, true)?;
    }
    bind(&socket, &SocketAddr::new(address, 0))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

struct Listeners {
    ipv4: TcpListener,
    ipv6: Option<TcpListener>,
}

impl Listeners {
    async fn accept(&self) -> io::Result<TcpStream> {
        let accepted = match &self.ipv6 {
            None => self.ipv4.accept().await,
            Some(ipv6) => tokio::select! {
                accepted = self.ipv4.accept() => accepted,
                accepted = ipv6.accept() => accepted,
            },
        };
        accepted.map(|(client, _)| client)
    }
}

async fn serve(listeners: Listeners, vsock: Arc<Path>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listeners.accept() => match accepted {
                Ok(client) if connections.len() < MAX_FORWARDS => {
                    connections.spawn(connection(client, vsock.clone()));
                }
                Ok(client) => {
                    log::warn!("{MAX_FORWARDS} connections to the pod's loopback are open: one more is refused");
                    reset(client);
                }
                Err(error) => {
                    log::warn!("cannot accept a connection to the pod's loopback: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(mut client: TcpStream, vsock: Arc<Path>) {
    if let Err(error) = forward(&mut client, &vsock).await {
        log::debug!("a connection to the pod's loopback: {error}");
        reset(client);
    }
}

async fn forward(client: &mut TcpStream, vsock: &Path) -> io::Result<()> {
    // Nothing has changed the address that was dialled.
    let port = client.local_addr()?.port();
    client.set_nodelay(true)?;
    let (idle, interval, count) = KEEPALIVE;
    sockopt::set_tcp_keepidle(&*client, idle)?;
    sockopt::set_tcp_keepintvl(&*client, interval)?;
    sockopt::set_tcp_keepcnt(&*client, count)?;
    sockopt::set_socket_keepalive(&*client, true)?;
    let mut guest = vsock::forward(vsock, port).await?;
    relay(client, &mut guest, CHECK).await
}

/// Closes it as a port does at which nobody listens: the client's next read or write fails.
fn reset(client: TcpStream) {
    // Without it the client sees an orderly end.
    let _ = sockopt::set_socket_linger(&client, Some(Duration::ZERO));
}

#[cfg(test)]
mod tests;
