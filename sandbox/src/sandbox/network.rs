//! The guest's side of the pod's network.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use caisson_protocol::agent::bind_device_request::Expect;
use caisson_vmm_api::{DeviceConfig, Fd, NetConfig};
use tokio::sync::mpsc;

use super::{Sandbox, trouble::Trouble};
use crate::{
    error::Error,
    network::{Difference, Link, Network, mac},
};

/// Largest MTU of a virtio-net device (`VIRTIO_NET_F_MTU`), bytes.
const MOST_MTU: u16 = u16::MAX;

/// Where the host's kernel offers to move frames.
const VHOST_NET: &str = "/dev/vhost-net";

/// More queue pairs than this bring a guest nothing.
const MOST_QUEUES: u8 = 4;

/// Where the pod's interfaces are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NetworkNamespace {
    /// Nowhere: it has loopback alone, and always will.
    #[default]
    None,
    /// In the namespace at this path, made by whoever manages the pod.
    Path(PathBuf),
    /// In the VMM's own, which is found by the process id of the pod's tasks.
    Vmm,
}

impl NetworkNamespace {
    /// `vsock` is the socket to the guest's ports.
    pub(super) async fn open(&self, vmm: u32, vsock: &Path) -> Result<Option<Network>, Error> {
        let path = match self {
            Self::None => return Ok(None),
            Self::Path(path) => path.clone(),
            Self::Vmm => format!("/proc/{vmm}/ns/net").into(),
        };
        let mut network = Network::open(&path).await?;
        if let Err(error) = network.forward_loopback(vsock.to_owned()).await {
            // Few pods need it.
            log::warn!("{error}");
        }
        Ok(Some(network))
    }
}

impl Sandbox {
    /// Gives the guest the network that the pod's namespace has now. Nothing happens when it has it
    /// already.
    ///
    /// # Errors
    /// An interface cannot be taken over, or the guest does not take it.
    pub async fn sync_network(&self) -> Result<(), Error> {
        let Some(network) = &self.network else {
            return Ok(());
        };
        let mut network = network.lock().await;
        self.resolve_names(&mut network).await;
        let Some(Difference { layout, gone, new }) = network.difference().await? else {
            return Ok(());
        };
        for (index, taken) in gone {
            self.detach(&[taken.slot]).await;
            network.release(index).await;
        }
        for link in &new {
            let slot = self.take(&network, link).await?;
            network.has_taken(link, slot);
        }
        let message = layout.to_proto(|index| network.slot_of(index));
        self.agent
            .call("configure the network", |client, context| async move {
                client.configure_network(context, &message).await
            })
            .await?;
        network.has_told(layout);
        Ok(())
    }

    /// Makes a device of the guest that stands for the interface.
    async fn take(&self, network: &Network, link: &Link) -> Result<u32, Error> {
        let queues = self.vcpus.clamp(1, MOST_QUEUES);
        let taps = network.connect(link, queues).await?;
        let attached = self.attach_tap(link, &taps).await;
        if attached.is_err() {
            // The taps go with their descriptors; what leads to them must not stay.
            network.disconnect(link).await;
        }
        attached
    }

    async fn attach_tap(&self, link: &Link, taps: &[OwnedFd]) -> Result<u32, Error> {
        if link.mtu > MOST_MTU.into() {
            return Err(Error::Unsupported(format!(
                "the MTU of {} is {}: a guest's is at most {MOST_MTU}",
                link.name, link.mtu
            )));
        }
        let [rx_rate_limit, tx_rate_limit] = self.limits.parts();
        let limited = rx_rate_limit.is_some() || tx_rate_limit.is_some();
        let vhosts = if self.config.vhost_net && !limited {
            vhosts(taps.len())
        } else {
            Vec::new()
        };
        let fds: Vec<_> = taps.iter().chain(&vhosts).map(AsFd::as_fd).collect();
        let indexes = (0..).take(fds.len()).map(Fd).collect::<Vec<_>>();
        let (tap_indexes, vhost_indexes) = indexes.split_at(taps.len());
        let device = DeviceConfig::Net(NetConfig {
            taps: tap_indexes.to_vec(),
            vhost_nets: vhost_indexes.to_vec(),
            mac: link.mac,
            // What it may grow to. What it is now the agent sets.
            mtu: MOST_MTU,
            rx_rate_limit,
            tx_rate_limit,
        });
        let slot = self
            .attach("attach a network interface", device, &fds)
            .await?;
        match self.bind(slot, Expect::NetMac(mac(link.mac))).await {
            Ok(_) => Ok(slot),
            Err(error) => {
                self.detach(&[slot]).await;
                Err(error)
            }
        }
    }

    /// Keeps the guest's network as the pod's namespace is, until the sandbox has gone.
    pub async fn watch_network(self: &Arc<Self>) {
        let Some(network) = &self.network else {
            return;
        };
        let Some(changes) = network.lock().await.changes() else {
            return;
        };
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(changes.forward(sender));
        let sandbox = Arc::downgrade(self);
        tokio::spawn(follow(receiver, async move || sync_living(&sandbox).await));
    }
}

/// As many of the kernel's movers of frames, or none: then the VMM moves them.
fn vhosts(count: usize) -> Vec<OwnedFd> {
    let open = || File::options().read(true).write(true).open(VHOST_NET);
    let opened: io::Result<Vec<_>> = (0..count).map(|_| open().map(OwnedFd::from)).collect();
    opened.unwrap_or_else(|error| {
        log::warn!(
            "vhost_net = true, but {VHOST_NET}: {error} (modprobe vhost_net?); the VMM moves the pod's frames"
        );
        Vec::new()
    })
}

/// None: it has gone.
async fn sync_living(sandbox: &Weak<Sandbox>) -> Option<Result<(), Error>> {
    let sandbox = sandbox.upgrade()?;
    if sandbox.gone().is_some() {
        return None;
    }
    Some(sandbox.sync_network().await)
}

/// Has every change be followed by a `sync`, and one that failed by another, until there is nothing
/// to follow.
async fn follow(
    mut changes: mpsc::Receiver<()>,
    mut sync: impl AsyncFnMut() -> Option<Result<(), Error>>,
) {
    let mut trouble = Trouble::default();
    let next = Some(());
    while trouble.wait(changes.recv()).await.unwrap_or(next).is_some() {
        let Some(synced) = sync().await else {
            return;
        };
        trouble.note(synced, |error| {
            format!("the guest's network is not as the pod's for now: {error}")
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_failed_is_tried_again_without_a_change() {
        let (sender, changes) = mpsc::channel(1);
        let (attempts, mut attempted) = mpsc::unbounded_channel();
        let mut results = vec![Ok(()), Err(Error::Invalid("no".to_owned()))];
        tokio::spawn(follow(changes, async move || {
            attempts.send(()).ok()?;
            results.pop()
        }));
        sender.send(()).await.unwrap();
        for _ in 0..2 {
            attempted.recv().await.unwrap();
        }
        // The guest has it: nothing more is done until the next change, at which it has gone.
        let quiet = tokio::time::timeout(Duration::from_secs(3600), attempted.recv()).await;
        assert!(quiet.is_err());
        sender.send(()).await.unwrap();
        attempted.recv().await.unwrap();
        assert_eq!(attempted.recv().await, None);
    }
}
