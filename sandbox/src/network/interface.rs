//! An interface whose other end is a program: frames written to it come to the pod, and what the pod
//! sends can be read from it.

use std::{net::Ipv4Addr, os::fd::OwnedFd, path::Path};

use rtnetlink::{LinkUnspec, RouteMessageBuilder};

use super::{namespace::Namespace, redirect::failed, tap};
use crate::error::Error;

/// An Ethernet interface with a way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Such as "eth0".
    pub name: String,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u32,
    /// Its address, and the length of its network's prefix.
    pub address: (Ipv4Addr, u8),
    /// Router for all that is not in its network.
    pub gateway: Ipv4Addr,
}

impl Interface {
    /// Makes the interface in a network namespace. It lives as long as the descriptor, from which
    /// each read(2) takes one frame, and to which each write(2) gives one.
    ///
    /// # Errors
    /// It is there already; the kernel's.
    pub async fn make(&self, namespace: &Path) -> Result<OwnedFd, Error> {
        let namespace = Namespace::open(namespace).await?;
        let name = self.name.clone();
        let (tap, index) = namespace
            .run(format!("make the interface {name}"), move || {
                tap::create_plain(&name)
            })
            .await?;
        let handle = namespace.handle();
        let name = &self.name;
        let message = LinkUnspec::new_with_index(index)
            .address(self.mac.to_vec())
            .mtu(self.mtu)
            .up()
            .build();
        let brought_up = handle.link().change(message).execute().await;
        brought_up.map_err(failed(format!("bring up the interface {name}")))?;
        let (address, prefix) = self.address;
        let added = handle.address().add(index, address.into(), prefix);
        let added = added.execute().await;
        added.map_err(failed(format!("give {name} the address {address}")))?;
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .output_interface(index)
            .gateway(self.gateway)
            .build();
        let routed = handle.route().add(route).execute().await;
        routed.map_err(failed(format!("route by {} on {name}", self.gateway)))?;
        Ok(tap)
    }
}
