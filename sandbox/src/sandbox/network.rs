//! The guest's side of the pod's network.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, Weak},
};

use caisson_protocol::agent::bind_device_request::Expect;
use caisson_vmm_api::{DeviceConfig, Fd, NetConfig};
use tokio::sync::mpsc;

use super::Sandbox;
use crate::{
    error::Error,
    network::{Difference, Link, Network, mac},
};

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
    pub(super) async fn open(&self, vmm: u32) -> Result<Option<Network>, Error> {
        let path = match self {
            Self::None => return Ok(None),
            Self::Path(path) => path.clone(),
            Self::Vmm => format!("/proc/{vmm}/ns/net").into(),
        };
        Network::open(&path).await.map(Some)
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
        let message = layout.to_proto();
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
        let mtu = u16::try_from(link.mtu).map_err(|_| {
            Error::Unsupported(format!(
                "the MTU of {} is {}: a guest's is at most {}",
                link.name,
                link.mtu,
                u16::MAX
            ))
        })?;
        let fds: Vec<_> = taps.iter().map(AsFd::as_fd).collect();
        let indexes = (0..fds.len()).map(|index| Fd(u32::try_from(index).unwrap_or(u32::MAX)));
        let device = DeviceConfig::Net(NetConfig {
            taps: indexes.collect(),
            mac: link.mac,
            mtu,
            rx_rate_limit: None,
            tx_rate_limit: None,
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
        tokio::spawn(follow(Arc::downgrade(self), receiver));
    }
}

async fn follow(sandbox: Weak<Sandbox>, mut changes: mpsc::Receiver<()>) {
    while changes.recv().await.is_some() {
        let Some(sandbox) = sandbox.upgrade() else {
            return;
        };
        if sandbox.gone().is_some() {
            return;
        }
        if let Err(error) = sandbox.sync_network().await {
            log::warn!("the guest's network is not as the pod's: {error}");
        }
    }
}
