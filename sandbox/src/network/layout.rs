//! What is in a network namespace.

use std::net::IpAddr;

use caisson_protocol::agent;
use futures_util::TryStreamExt;
use rtnetlink::{
    Handle, IpVersion, RouteMessageBuilder,
    packet_core::Nla,
    packet_route::{
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressProtocol},
        link::{
            AfSpecInet6, AfSpecUnspec, InfoData, InfoIpVlan, InfoKind, IpVlanMode, LinkAttribute,
            LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
        },
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol,
            RouteType, RouteVia,
        },
    },
};

use super::{redirect::failed, tap};
use crate::error::Error;

/// `RT_TABLE_MAIN`.
const MAIN_TABLE: u32 = 254;

/// Interfaces and what hangs on them, in the order of their indexes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    /// The guest's interfaces-to-be.
    pub links: Vec<Link>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

/// An interface of the namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// In the namespace.
    pub index: u32,
    /// Such as "eth0".
    pub name: String,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u32,
    /// It resolves no addresses (`IFF_NOARP`).
    no_arp: bool,
    ipv6: Ipv6,
    /// Why its frames cannot be had, if so.
    pub unusable: Option<&'static str>,
    addresses: Vec<(IpAddr, u8)>,
}

/// An interface's settings of IPv6 (`net.ipv6.conf`). By default, and when the kernel does not tell
/// them, it takes no router advertisements: a neighbour could send them (CVE-2020-10749).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Ipv6 {
    disabled: bool,
    accept_ra: u32,
    autoconf: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Route {
    destination: Option<(IpAddr, u8)>,
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    device: u32,
    scope: u8,
    onlink: bool,
    metric: u32,
    /// `RTAX_*` with their values.
    metrics: Vec<(u16, u32)>,
    ipv6: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Neighbour {
    address: IpAddr,
    mac: [u8; 6],
    device: u32,
}

/// Reads the namespace of the handle's socket.
pub async fn read(handle: &Handle) -> Result<Layout, Error> {
    let mut layout = Layout::default();
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed("list the pod's network interfaces".to_owned()))?;
    layout.links = links.iter().filter_map(link).collect();
    layout.links.sort_by_key(|link| link.index);
    read_addresses(handle, &mut layout).await?;
    for version in [IpVersion::V4, IpVersion::V6] {
        read_routes(handle, version, &mut layout).await?;
    }
    layout.routes.sort();
    read_neighbours(handle, &mut layout).await?;
    layout.neighbours.sort();
    Ok(layout)
}

/// An interface that a guest can stand for: Ethernet, up, and neither made by Caisson nor one that
/// only carries others.
fn link(message: &LinkMessage) -> Option<Link> {
    let header = &message.header;
    if header.link_layer_type != LinkLayerType::Ether
        || !header.flags.contains(LinkFlags::Up)
        || header.flags.contains(LinkFlags::Loopback)
    {
        return None;
    }
    let mut link = Link {
        index: header.index,
        name: String::new(),
        mac: [0; 6],
        mtu: 1500,
        no_arp: header.flags.contains(LinkFlags::Noarp),
        ipv6: Ipv6::default(),
        unusable: None,
        addresses: Vec::new(),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(address) => link.mac = address.as_slice().try_into().ok()?,
            LinkAttribute::LinkInfo(infos) if !infos.iter().all(can_be_taken) => return None,
            LinkAttribute::LinkInfo(infos) => link.unusable = infos.iter().find_map(unusable),
            LinkAttribute::AfSpecUnspec(families) => {
                link.ipv6 = families.iter().find_map(ipv6_settings).unwrap_or_default();
            }
            _ => {}
        }
    }
    (!tap::is_ours(&link.name)).then_some(link)
}

fn can_be_taken(info: &LinkInfo) -> bool {
    !matches!(
        info,
        LinkInfo::Kind(InfoKind::Bridge | InfoKind::Dummy | InfoKind::Ifb)
    )
}

fn ipv6_settings(family: &AfSpecUnspec) -> Option<Ipv6> {
    let AfSpecUnspec::Inet6(settings) = family else {
        return None;
    };
    settings.iter().find_map(|one| match one {
        AfSpecInet6::DevConf(settings) => Some(Ipv6 {
            disabled: settings.disable_ipv6 != 0,
            accept_ra: match settings.accept_ra {
                0 => 0,
                2 => 2,
                // One that forwards takes none; the guest need not forward.
                _ if settings.forwarding != 0 => 0,
                _ => 1,
            },
            autoconf: settings.autoconf != 0,
        }),
        _ => None,
    })
}

fn unusable(info: &LinkInfo) -> Option<&'static str> {
    let LinkInfo::Data(InfoData::IpVlan(data)) = info else {
        return None;
    };
    let l3s = data
        .iter()
        .any(|one| matches!(one, InfoIpVlan::Mode(IpVlanMode::L3S)));
    l3s.then_some(
        "is an ipvlan of the mode l3s, whose packets come to it without frames: \
         use the mode l2 or l3",
    )
}

async fn read_addresses(handle: &Handle, layout: &mut Layout) -> Result<(), Error> {
    let mut addresses = handle.address().get().execute();
    while let Some(message) = addresses
        .try_next()
        .await
        .map_err(failed("list the pod's addresses".to_owned()))?
    {
        let index = message.header.index;
        let Some(link) = layout.links.iter_mut().find(|link| link.index == index) else {
            continue;
        };
        // On a link with a peer the local address is the pod's.
        let find = |local: bool| {
            message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    AddressAttribute::Local(address) if local => Some(*address),
                    AddressAttribute::Address(address) if !local => Some(*address),
                    _ => None,
                })
        };
        let taken = message.attributes.iter().any(|attribute| {
            matches!(attribute, AddressAttribute::Flags(flags)
                if flags.contains(AddressFlags::Dadfailed))
        });
        if taken {
            // Somebody else has it, and the namespace does not use it.
            continue;
        }
        let Some(address) = find(true).or_else(|| find(false)) else {
            continue;
        };
        if link.ipv6.accept_ra != 0 && link.ipv6.autoconf && is_advertised_address(&message) {
            continue;
        }
        link.addresses.push((address, message.header.prefix_len));
    }
    Ok(())
}

/// Whether a router's advertisement has made it. The guest takes them itself, and the namespace, which
/// gets no more of them, will lose it.
fn is_advertised_address(message: &AddressMessage) -> bool {
    message.attributes.contains(&AddressAttribute::Protocol(
        AddressProtocol::RouterAnnouncement,
    ))
}

async fn read_routes(
    handle: &Handle,
    version: IpVersion,
    layout: &mut Layout,
) -> Result<(), Error> {
    let ipv6 = version == IpVersion::V6;
    let filter = match version {
        IpVersion::V4 => RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        IpVersion::V6 => RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    };
    let mut routes = handle.route().get(filter).execute();
    while let Some(message) = routes
        .try_next()
        .await
        .map_err(failed("list the pod's routes".to_owned()))?
    {
        let Some(route) = route(&message, ipv6) else {
            continue;
        };
        let Some(link) = layout.links.iter().find(|link| link.index == route.device) else {
            continue;
        };
        if link.ipv6.accept_ra == 0 || !is_advertised_route(&message) {
            layout.routes.push(route);
        }
    }
    Ok(())
}

/// As [`is_advertised_address`]. That of an advertised network is the kernel's, and expires.
fn is_advertised_route(message: &RouteMessage) -> bool {
    let expires = || {
        message.attributes.iter().any(
            |attribute| matches!(attribute, RouteAttribute::CacheInfo(info) if info.expires != 0),
        )
    };
    match message.header.protocol {
        RouteProtocol::Ra => true,
        RouteProtocol::Kernel => expires(),
        _ => false,
    }
}

fn route(message: &RouteMessage, ipv6: bool) -> Option<Route> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut route = Route {
        destination: None,
        gateway: None,
        source: None,
        device: 0,
        scope: header.scope.into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
        metric: 0,
        metrics: Vec::new(),
        ipv6,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(address) => {
                route.destination = Some((ip(address)?, header.destination_prefix_length));
            }
            RouteAttribute::Gateway(address) => route.gateway = Some(ip(address)?),
            RouteAttribute::Via(RouteVia::Inet6(address)) => {
                route.gateway = Some((*address).into());
            }
            RouteAttribute::PrefSource(address) => route.source = Some(ip(address)?),
            RouteAttribute::Oif(index) => route.device = *index,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                route.metrics = metrics.iter().filter_map(metric).collect();
            }
            RouteAttribute::MultiPath(_) => {
                log::warn!("a route of the pod by several routers is not passed on to the guest");
                return None;
            }
            _ => {}
        }
    }
    // The guest's kernel makes those of multicast.
    let own = matches!(route.destination, Some((IpAddr::V6(address), _)) if address.is_multicast());
    (table == MAIN_TABLE && header.kind == RouteType::Unicast && !own).then_some(route)
}

/// None: a guest's kernel may not have it (an algorithm, a feature), and would refuse the route.
fn metric(metric: &RouteMetric) -> Option<(u16, u32)> {
    match metric {
        RouteMetric::Lock(value)
        | RouteMetric::Mtu(value)
        | RouteMetric::Window(value)
        | RouteMetric::Advmss(value)
        | RouteMetric::Hoplimit(value)
        | RouteMetric::InitCwnd(value)
        | RouteMetric::InitRwnd(value) => Some((metric.kind(), *value)),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

async fn read_neighbours(handle: &Handle, layout: &mut Layout) -> Result<(), Error> {
    let mut neighbours = handle.neighbours().get().execute();
    while let Some(message) = neighbours
        .try_next()
        .await
        .map_err(failed("list the pod's neighbours".to_owned()))?
    {
        let device = message.header.ifindex;
        if message.header.state != NeighbourState::Permanent
            || !layout.links.iter().any(|link| link.index == device)
        {
            continue;
        }
        let (mut address, mut mac) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                    address = Some(IpAddr::from(*ip));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                    address = Some(IpAddr::from(*ip));
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => {
                    mac = bytes.as_slice().try_into().ok();
                }
                _ => {}
            }
        }
        if let (Some(address), Some(mac)) = (address, mac) {
            layout.neighbours.push(Neighbour {
                address,
                mac,
                device,
            });
        }
    }
    Ok(())
}

fn metric_to_proto(&(kind, value): &(u16, u32)) -> agent::RouteMetric {
    agent::RouteMetric {
        kind: kind.into(),
        value,
        ..Default::default()
    }
}

/// As text.
pub fn mac(octets: [u8; 6]) -> String {
    octets.map(|octet| format!("{octet:02x}")).join(":")
}

impl Layout {
    /// For the agent. `slots` are those of the interfaces' devices, by their indexes.
    pub fn to_proto(&self, slots: impl Fn(u32) -> Option<u32>) -> agent::Network {
        let name = |index: u32| {
            let link = self.links.iter().find(|link| link.index == index);
            link.map(|link| link.name.clone()).unwrap_or_default()
        };
        let cidr = |(address, prefix): &(IpAddr, u8)| format!("{address}/{prefix}");
        let text = |address: &Option<IpAddr>| address.map(|ip| ip.to_string()).unwrap_or_default();
        let interfaces = self.links.iter().map(|link| agent::NetworkInterface {
            name: link.name.clone(),
            mac: mac(link.mac),
            mtu: link.mtu,
            addresses: link.addresses.iter().map(cidr).collect(),
            slot: slots(link.index),
            no_arp: link.no_arp,
            disable_ipv6: link.ipv6.disabled,
            accept_ra: link.ipv6.accept_ra,
            autoconf: link.ipv6.autoconf,
            ..Default::default()
        });
        let routes = self.routes.iter().map(|route| agent::Route {
            destination: match &route.destination {
                Some(destination) => cidr(destination),
                // A default route on the link has no gateway to tell its family.
                None if route.gateway.is_none() && route.ipv6 => "::/0".to_owned(),
                None if route.gateway.is_none() => "0.0.0.0/0".to_owned(),
                None => String::new(),
            },
            gateway: text(&route.gateway),
            source: text(&route.source),
            device: name(route.device),
            scope: route.scope.into(),
            flags: if route.onlink {
                RouteFlags::Onlink.bits()
            } else {
                0
            },
            metric: route.metric,
            metrics: route.metrics.iter().map(metric_to_proto).collect(),
            ..Default::default()
        });
        let neighbours = self.neighbours.iter().map(|neighbour| agent::Neighbour {
            address: neighbour.address.to_string(),
            mac: mac(neighbour.mac),
            device: name(neighbour.device),
            ..Default::default()
        });
        agent::Network {
            interfaces: interfaces.collect(),
            routes: routes.collect(),
            neighbours: neighbours.collect(),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests;
