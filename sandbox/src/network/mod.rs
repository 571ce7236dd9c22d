//! The pod's network: what a CNI plugin (or docker, or podman) has put into the pod's network
//! namespace is taken over by the guest.
//!
//! Each interface gets a tap beside it in the namespace, and traffic control redirects every frame
//! that arrives at the one to the other (ingress qdisc, u32, mirred), without a bridge. The guest's
//! interface has the name, MAC, MTU, addresses, routes and permanent neighbours of the one it
//! stands for. The host's own stack in the namespace sees no frame any more, but for answers of name
//! servers where dockerd asks them there.
//!
//! [`layout`] reads the namespace, [`namespace`] enters it, [`redirect`] and [`tap`] change it,
//! [`forward`] takes connections to its loopback, which [`steering`] leads there, [`resolver`] asks
//! docker's name server there. [`interface`] puts one there for a program that has none of its own.

mod forward;
mod interface;
mod layout;
mod limits;
mod namespace;
mod redirect;
mod resolver;
mod steering;
mod tap;

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use forward::Forward;
pub use interface::Interface;
pub use layout::{Layout, Link, mac};
pub use limits::InterfaceLimits;
use namespace::Namespace;
use resolver::Resolver;
pub use resolver::is_dockers;

use crate::error::Error;

/// The network namespace of a pod and what the guest has of it.
pub struct Network {
    namespace: Namespace,
    taken: BTreeMap<u32, Taken>,
    /// As the guest was last told.
    told: Layout,
    forward: Option<Forward>,
    resolver: Option<Resolver>,
}

/// An interface that the guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// Slot of its device.
    pub slot: u32,
    mac: [u8; 6],
}

/// What differs between the namespace and the guest.
#[derive(Debug, PartialEq, Eq)]
pub struct Difference {
    /// The namespace as it is now.
    pub layout: Layout,
    /// Interfaces of the guest that are to go, by their index in the namespace.
    pub gone: Vec<(u32, Taken)>,
    /// Interfaces that the guest lacks.
    pub new: Vec<Link>,
}

/// Two microVMs cannot stand for one interface.
fn in_use(error: Error, interface: &str) -> Error {
    match error {
        Error::Io { source, .. } if source.kind() == io::ErrorKind::ResourceBusy => {
            Error::Unsupported(format!(
                "another microVM has the interface {interface} of this network namespace: \
                 containers that share a network belong into one pod"
            ))
        }
        other => other,
    }
}

impl Network {
    /// Enters the namespace at `path`. It stays alive as long as this does.
    ///
    /// # Errors
    /// It is not there or is none.
    pub async fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self {
            namespace: Namespace::open(path).await?,
            taken: BTreeMap::new(),
            // A guest starts with nothing.
            told: Layout::default(),
            forward: None,
            resolver: None,
        })
    }

    /// Takes connections to the namespace's loopback to that of the guest whose ports are behind the
    /// unix socket `vsock`.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn forward_loopback(&mut self, vsock: PathBuf) -> Result<(), Error> {
        self.forward = Some(Forward::start(&self.namespace, vsock).await?);
        Ok(())
    }

    /// Whether the guest's queries are passed on to docker's name server.
    pub fn resolves_names(&self) -> bool {
        let resolver = self.resolver.as_ref();
        resolver.is_some_and(|resolver| !resolver.is_over())
    }

    /// Passes queries of the guest whose ports are behind the unix socket `vsock` on to docker's name
    /// server in the namespace, which asks others there.
    ///
    /// # Errors
    /// The agent does not take the connection; the kernel's.
    pub async fn resolve_names(&mut self, vsock: &Path) -> Result<(), Error> {
        let is_first = self.resolver.is_none();
        self.resolver = Some(Resolver::start(&self.namespace, vsock).await?);
        if is_first {
            for index in self.taken.keys().copied() {
                let name = tap::name_beside(index);
                let what = format!("find the tap {name}");
                let tap = self.namespace.run(what, move || tap::index_of(&name));
                redirect::share_answers(self.namespace.handle(), index, tap.await?).await?;
            }
        }
        Ok(())
    }

    /// News of the namespace; once.
    pub fn changes(&mut self) -> Option<namespace::Changes> {
        self.namespace.take_changes()
    }

    /// Compares the namespace with what the guest has. `None`: they are the same.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn difference(&self) -> Result<Option<Difference>, Error> {
        let layout = layout::read(self.namespace.handle()).await?;
        if self.told == layout {
            return Ok(None);
        }
        let stays = |index: u32, taken: &Taken| {
            let link = layout.links.iter().find(|link| link.index == index);
            link.is_some_and(|link| link.mac == taken.mac)
        };
        let gone = self
            .taken
            .iter()
            .filter(|(index, taken)| !stays(**index, taken))
            .map(|(index, taken)| (*index, *taken))
            .collect::<Vec<_>>();
        let new = layout
            .links
            .iter()
            .filter(|link| {
                !self.taken.contains_key(&link.index)
                    || gone.iter().any(|(index, _)| *index == link.index)
            })
            .cloned()
            .collect();
        Ok(Some(Difference { layout, gone, new }))
    }

    /// Puts a tap of `queues` queues beside an interface, and returns its descriptors.
    ///
    /// # Errors
    /// The interface's frames cannot be had, or the kernel's.
    pub async fn connect(&self, link: &Link, queues: u8) -> Result<Vec<OwnedFd>, Error> {
        if let Some(why) = link.unusable {
            return Err(Error::Unsupported(format!(
                "the network interface {} {why}",
                link.name
            )));
        }
        let name = tap::name_beside(link.index);
        let made = name.clone();
        let (taps, index) = self
            .namespace
            .run(format!("make the tap {name}"), move || {
                tap::create(&made, queues)
            })
            .await
            .map_err(|error| in_use(error, &link.name))?;
        let handle = self.namespace.handle();
        tap::bring_up(handle, index, &name, link.mtu).await?;
        redirect::both(handle, link, index).await?;
        if self.resolver.is_some() {
            redirect::share_answers(handle, link.index, index).await?;
        }
        Ok(taps)
    }

    /// Undoes [`Network::connect`].
    pub async fn disconnect(&self, link: &Link) {
        redirect::undo(self.namespace.handle(), link.index).await;
    }

    /// Remembers that the guest has an interface.
    pub fn has_taken(&mut self, link: &Link, slot: u32) {
        let mac = link.mac;
        self.taken.insert(link.index, Taken { slot, mac });
    }

    /// Gives an interface back: its frames go to the namespace's own stack again. Its tap has gone
    /// with the device.
    pub async fn release(&mut self, index: u32) {
        if self.taken.remove(&index).is_some() {
            redirect::undo(self.namespace.handle(), index).await;
        }
    }

    /// Gives all interfaces, and the loopback, back.
    pub async fn release_all(&mut self) {
        self.forward = None;
        self.resolver = None;
        for index in self.taken.keys().copied().collect::<Vec<_>>() {
            self.release(index).await;
        }
        self.told = Layout::default();
    }

    /// Slot of the device that stands for the interface of this index.
    pub fn slot_of(&self, index: u32) -> Option<u32> {
        self.taken.get(&index).map(|taken| taken.slot)
    }

    /// Remembers what the guest has been told.
    pub fn has_told(&mut self, layout: Layout) {
        self.told = layout;
    }
}
