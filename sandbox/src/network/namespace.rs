//! Threads and netlink sockets in a network namespace (network_namespaces(7)).

use std::{fs::File, io, os::fd::AsFd, path::Path, sync::Arc, time::Duration};

use futures_util::StreamExt;
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection, packet_core::NetlinkMessage,
    packet_route::RouteNetlinkMessage, sys::SocketAddr,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::mpsc;

use crate::{error::Error, sandbox::blocking};

/// The plugins of a pod make several changes at a time.
const QUIET: Duration = Duration::from_millis(100);

type Messages =
    futures_channel::mpsc::UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// An open network namespace.
pub struct Namespace {
    file: Arc<File>,
    handle: Handle,
    changes: Option<Changes>,
    connection: tokio::task::JoinHandle<()>,
}

impl Namespace {
    pub async fn open(path: &Path) -> Result<Self, Error> {
        let what = format!("enter the network namespace {}", path.display());
        let file = Arc::new(File::open(path).map_err(Error::io(&what))?);
        let runtime = tokio::runtime::Handle::current();
        // A netlink socket belongs to the namespace in which it was made.
        let (connection, handle, messages) = inside(file.clone(), what, move || {
            let _context = runtime.enter();
            new_multicast_connection(&[
                MulticastGroup::Link,
                MulticastGroup::Neigh,
                MulticastGroup::Ipv4Ifaddr,
                MulticastGroup::Ipv6Ifaddr,
                MulticastGroup::Ipv4Route,
                MulticastGroup::Ipv6Route,
            ])
        })
        .await?;
        Ok(Self {
            file,
            handle,
            changes: Some(Changes { messages }),
            connection: tokio::spawn(connection),
        })
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    pub fn file(&self) -> Arc<File> {
        self.file.clone()
    }

    pub fn take_changes(&mut self) -> Option<Changes> {
        self.changes.take()
    }

    /// Runs `work` in the namespace, on a thread of its own.
    pub async fn run<T: Send + 'static>(
        &self,
        what: String,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        inside(self.file.clone(), what, work).await
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Runs `work` in a namespace, on a thread of its own.
pub async fn inside<T: Send + 'static>(
    namespace: Arc<File>,
    what: String,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Error> {
    blocking(move || {
        // Not a thread that others use afterwards: it stays in the namespace.
        let thread = std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn(move || {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                work()
            })
            .map_err(Error::io("start a thread"))?;
        let result = thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")));
        result.map_err(Error::io(what))
    })
    .await
}

/// News from a namespace.
pub struct Changes {
    messages: Messages,
}

impl Changes {
    /// Sends a word for every change, many at once for one, until either side has gone.
    pub async fn forward(mut self, sender: mpsc::Sender<()>) {
        while self.messages.next().await.is_some() {
            while let Ok(Some(_)) = tokio::time::timeout(QUIET, self.messages.next()).await {}
            // One word that waits is enough.
            if let Err(mpsc::error::TrySendError::Closed(())) = sender.try_send(()) {
                return;
            }
        }
    }
}
