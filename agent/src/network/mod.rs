//! The pod's network as `ConfigureNetwork` describes it: interfaces, routes,
//! neighbours. Everything *sets*, so that asking twice changes nothing.

mod netlink;

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use caisson_protocol::agent::{Neighbour, Network, NetworkInterface, Route};

use crate::{
    device,
    failure::{During, Failure, Result},
};
use netlink::{ADD, Message, SET, Socket, attributes, u32_at};

// linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/neighbour.h
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_GETNEIGH: u16 = 30;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
/// `net/ipv6_route.h`: the metric of an IPv6 route that was given none.
const IP6_RT_PRIO_USER: u32 = 1024;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_VIA: u16 = 18;
const RTNH_F_ONLINK: u32 = 4;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
const RT_SCOPE_LINK: u8 = 253;
const RT_SCOPE_HOST: u8 = 254;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_PROTOCOL: u16 = 12;
const NUD_PERMANENT: u16 = 0x80;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `IFNAMSIZ` less the NUL byte.
const MAX_NAME: usize = 15;

/// A network device of the guest.
#[derive(Debug, Clone)]
struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
    up: bool,
    /// Made by software (a bridge, a VLAN), which may carry the MAC of the device below it.
    software: bool,
}

/// Brings the loopback interface up.
///
/// # Errors
/// The kernel's.
pub fn configure_loopback() -> Result<()> {
    let mut socket = Socket::open()?;
    let links = links(&mut socket)?;
    bring_up(&mut socket, loopback(&links)?)
}

/// Applies interfaces, then routes (those without a gateway first: the others need them), then
/// neighbours.
///
/// # Errors
/// A malformed value, an interface that is not there, whatever the kernel refuses, in its words.
pub fn configure(request: &Network) -> Result<()> {
    let mut socket = Socket::open()?;
    let mut links = links(&mut socket)?;
    for interface in &request.interfaces {
        configure_interface(&mut socket, &mut links, interface, &request.interfaces)?;
    }
    let mut routes: Vec<&Route> = request.routes.iter().collect();
    routes.sort_by_key(|route| !route.gateway.is_empty());
    let messages = routes
        .iter()
        .map(|route| route_message(route, by_name(&links, &route.device)?))
        .collect::<Result<Vec<_>>>()?;
    remove_other_routes(&mut socket, &messages)?;
    for (route, message) in routes.iter().zip(&messages) {
        socket.add(message, || format!("set the route {}", describe(route)))?;
    }
    let mut wanted = Vec::new();
    for neighbour in &request.neighbours {
        let message = neighbour_message(neighbour, by_name(&links, &neighbour.device)?)?;
        socket.request(&message, || {
            format!("set the neighbour {}", neighbour.address)
        })?;
        wanted.push(message);
    }
    remove_other_neighbours(&mut socket, &wanted)
}

fn links(socket: &mut Socket) -> Result<Vec<Link>> {
    let mut links = Vec::new();
    socket.dump(
        &Message::new(RTM_GETLINK, 0, &[0; 16]),
        || "list network interfaces".to_owned(),
        |kind, body| {
            if kind == RTM_NEWLINK {
                links.extend(link_of(body));
            }
        },
    )?;
    Ok(links)
}

/// `struct ifinfomsg` and its attributes.
fn link_of(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(body, 4),
        name: String::new(),
        mac: Vec::new(),
        up: u32_at(body, 8) & libc::IFF_UP.cast_unsigned() != 0,
        software: false,
    };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            IFLA_IFNAME => {
                link.name = String::from_utf8_lossy(value)
                    .trim_end_matches('\0')
                    .to_owned();
            }
            IFLA_ADDRESS => link.mac = value.to_vec(),
            IFLA_LINKINFO => link.software = true,
            _ => {}
        }
    }
    Some(link)
}

fn loopback(links: &[Link]) -> Result<u32> {
    links
        .iter()
        .find(|link| link.name == "lo")
        .map(|link| link.index)
        .ok_or_else(|| Failure::internal("the guest has no loopback interface"))
}

fn by_name(links: &[Link], name: &str) -> Result<u32> {
    links
        .iter()
        .find(|link| link.name == name)
        .map(|link| link.index)
        .ok_or_else(|| Failure::invalid(format!("the guest has no network interface \"{name}\"")))
}

fn configure_interface(
    socket: &mut Socket,
    links: &mut [Link],
    wanted: &NetworkInterface,
    all: &[NetworkInterface],
) -> Result<()> {
    check_name(&wanted.name)?;
    let mac = parse_mac(&wanted.mac)?;
    let addresses = wanted
        .addresses
        .iter()
        .map(|text| parse_cidr(text))
        .collect::<Result<Vec<_>>>()?;
    let at = device_of(links, wanted, &mac)?;
    if links[at].name != wanted.name {
        if let Some(other) = links.iter().position(|link| link.name == wanted.name) {
            make_way(socket, &mut links[other], all)?;
        }
        rename(socket, &mut links[at], &wanted.name)?;
    }
    let index = links[at].index;
    if wanted.mtu != 0 {
        let message = link_message(index, 0, 0).attribute(IFLA_MTU, &wanted.mtu.to_ne_bytes());
        socket.request(&message, || {
            format!("set the MTU of {} to {}", wanted.name, wanted.mtu)
        })?;
    }
    without_own_addresses(&wanted.name)?;
    let no_arp = libc::IFF_NOARP.cast_unsigned();
    let flags = if wanted.no_arp { no_arp } else { 0 };
    socket.request(&link_message(index, flags, no_arp), || {
        format!("set the flags of {}", wanted.name)
    })?;
    bring_up(socket, index)?;
    remove_other_addresses(socket, index, &addresses)?;
    for (address, prefix) in addresses {
        socket.request(
            &address_message(RTM_NEWADDR, SET, index, address, prefix),
            || format!("add {address}/{prefix} to {}", wanted.name),
        )?;
    }
    Ok(())
}

/// The index among `links` of the device that an interface of the request is.
fn device_of(links: &[Link], wanted: &NetworkInterface, mac: &[u8]) -> Result<usize> {
    let in_slot = match wanted.slot {
        None => None,
        Some(slot) => Some(device::network_interface(slot)?),
    };
    links
        .iter()
        .enumerate()
        .filter(|(_, link)| match &in_slot {
            Some(name) => link.name == *name,
            None => link.mac == mac,
        })
        .min_by_key(|(_, link)| (link.software, link.index))
        .map(|(at, _)| at)
        .ok_or_else(|| {
            Failure::invalid(format!(
                "the guest has no network interface with the address {} for \"{}\"",
                wanted.mac, wanted.name
            ))
        })
}

/// Keeps the kernel from making link-local addresses: those of the host's interface need not follow
/// from its MAC.
fn without_own_addresses(name: &str) -> Result<()> {
    /// `IN6_ADDR_GEN_MODE_NONE`
    const NONE: &str = "1";
    let path = format!("/proc/sys/net/ipv6/conf/{name}/addr_gen_mode");
    match fs::write(&path, NONE) {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.during(|| format!("write {path}")),
    }
}

/// Gives up a name that another interface of the request is to have.
fn make_way(socket: &mut Socket, link: &mut Link, all: &[NetworkInterface]) -> Result<()> {
    let has_turn = all
        .iter()
        .any(|interface| parse_mac(&interface.mac).is_ok_and(|mac| mac == link.mac));
    if !has_turn {
        return Err(Failure::invalid(format!(
            "the name {} belongs to another network interface of the guest",
            link.name
        )));
    }
    let name = format!("caisson{}", link.index);
    rename(socket, link, &name)
}

fn rename(socket: &mut Socket, link: &mut Link, name: &str) -> Result<()> {
    let what = || format!("rename the network interface {} to {name}", link.name);
    if link.up {
        // Kernels before 6.2 rename no interface that is up.
        let down = link_message(link.index, 0, libc::IFF_UP.cast_unsigned());
        socket.request(&down, what)?;
    }
    let mut value = name.as_bytes().to_vec();
    value.push(0);
    let message = link_message(link.index, 0, 0).attribute(IFLA_IFNAME, &value);
    socket.request(&message, what)?;
    link.up = false;
    name.clone_into(&mut link.name);
    Ok(())
}

fn bring_up(socket: &mut Socket, index: u32) -> Result<()> {
    let up = libc::IFF_UP.cast_unsigned();
    socket.request(&link_message(index, up, up), || {
        format!("bring the network interface {index} up")
    })
}

/// What the interface has from before (a template's, an older request's) and is not wanted goes.
fn remove_other_addresses(socket: &mut Socket, index: u32, wanted: &[(IpAddr, u8)]) -> Result<()> {
    let mut found = Vec::new();
    socket.dump(
        &Message::new(RTM_GETADDR, 0, &[0; 8]),
        || "list addresses".to_owned(),
        |kind, body| {
            if kind == RTM_NEWADDR && u32_at(body, 4) == index {
                found.extend(address_of(body));
            }
        },
    )?;
    for (address, prefix) in found {
        if !wanted.contains(&(address, prefix)) {
            socket.remove(
                &address_message(RTM_DELADDR, 0, index, address, prefix),
                || format!("remove the address {address}/{prefix}"),
            )?;
        }
    }
    Ok(())
}

/// Routes that an earlier request has set and this one has not go.
fn remove_other_routes(socket: &mut Socket, wanted: &[Message]) -> Result<()> {
    let wanted: Vec<RouteKey> = wanted
        .iter()
        .filter_map(|route| key_of(route.body()))
        .collect();
    let mut others = Vec::new();
    socket.dump(
        &Message::new(RTM_GETROUTE, 0, &[0; 12]),
        || "list routes".to_owned(),
        |kind, body| {
            if kind == RTM_NEWROUTE && key_of(body).is_some_and(|key| !wanted.contains(&key)) {
                others.push(body.to_vec());
            }
        },
    )?;
    for route in others {
        let message = Message::new(RTM_DELROUTE, 0, &route);
        socket.remove(&message, || "remove an old route".to_owned())?;
    }
    Ok(())
}

/// Neighbours that an earlier request has set and this one has not go.
fn remove_other_neighbours(socket: &mut Socket, wanted: &[Message]) -> Result<()> {
    let wanted: Vec<NeighbourKey> = wanted
        .iter()
        .filter_map(|neighbour| neighbour_key(neighbour.body()))
        .collect();
    let mut others = Vec::new();
    socket.dump(
        &Message::new(RTM_GETNEIGH, 0, &[0; 12]),
        || "list neighbours".to_owned(),
        |kind, body| {
            if kind == RTM_NEWNEIGH && neighbour_key(body).is_some_and(|key| !wanted.contains(&key))
            {
                others.push(body.to_vec());
            }
        },
    )?;
    for neighbour in others {
        let message = Message::new(RTM_DELNEIGH, 0, &neighbour);
        socket.remove(&message, || "remove an old neighbour".to_owned())?;
    }
    Ok(())
}

/// Family, interface and address of a neighbour.
type NeighbourKey = (u8, u32, Vec<u8>);

/// Of a `struct ndmsg` and its attributes; None unless this agent has made the neighbour.
fn neighbour_key(body: &[u8]) -> Option<NeighbourKey> {
    let (mut address, mut ours) = (None, false);
    for (kind, value) in attributes(body.get(12..)?) {
        match kind {
            NDA_DST => address = Some(value.to_vec()),
            NDA_PROTOCOL => ours = value == [RTPROT_STATIC],
            _ => {}
        }
    }
    ours.then_some((body[0], u32_at(body, 4), address?))
}

/// What tells one route from another.
#[derive(Debug, PartialEq, Eq)]
struct RouteKey {
    family: u8,
    prefix: u8,
    destination: Vec<u8>,
    device: Vec<u8>,
    gateway: Vec<u8>,
    source: Vec<u8>,
    priority: u32,
}

/// Of a `struct rtmsg` and its attributes; None unless this agent has made the route.
fn key_of(body: &[u8]) -> Option<RouteKey> {
    if body.get(4..6)? != [RT_TABLE_MAIN, RTPROT_STATIC] {
        return None;
    }
    let mut key = RouteKey {
        family: body[0],
        prefix: body[1],
        destination: Vec::new(),
        device: Vec::new(),
        gateway: Vec::new(),
        source: Vec::new(),
        priority: 0,
    };
    for (kind, value) in attributes(body.get(12..)?) {
        match kind {
            RTA_DST => key.destination = value.to_vec(),
            RTA_OIF => key.device = value.to_vec(),
            RTA_GATEWAY | RTA_VIA => key.gateway = value.to_vec(),
            RTA_PREFSRC => key.source = value.to_vec(),
            RTA_PRIORITY => key.priority = u32_at(value, 0),
            _ => {}
        }
    }
    // The kernel's own for IPv6 routes that name none.
    if key.family == AF_INET6 && key.priority == 0 {
        key.priority = IP6_RT_PRIO_USER;
    }
    Some(key)
}

/// `struct ifaddrmsg` and its attributes.
fn address_of(body: &[u8]) -> Option<(IpAddr, u8)> {
    let (mut local, mut address) = (None, None);
    for (kind, value) in attributes(body.get(8..)?) {
        match kind {
            IFA_LOCAL => local = ip_of(value),
            IFA_ADDRESS => address = ip_of(value),
            _ => {}
        }
    }
    Some((local.or(address)?, body[1]))
}

fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(|octets| IpAddr::V4(Ipv4Addr::from(octets)))
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(|octets| IpAddr::V6(Ipv6Addr::from(octets))))
        .ok()
}

/// `struct ifinfomsg`: family, type, index, flags, which of the flags to change.
fn link_message(index: u32, flags: u32, change: u32) -> Message {
    let mut fixed = [0; 16];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
    fixed[12..].copy_from_slice(&change.to_ne_bytes());
    Message::new(RTM_NEWLINK, 0, &fixed)
}

/// `struct ifaddrmsg`: family, prefix length, flags, scope, index. The host has already found
/// that nobody else has an IPv6 address, so it is used at once. Its network gets no route by itself:
/// the host tells them all.
fn address_message(kind: u16, flags: u16, index: u32, address: IpAddr, prefix: u8) -> Message {
    let scope = match address {
        IpAddr::V4(address) if address.is_loopback() => RT_SCOPE_HOST,
        IpAddr::V6(address) if address.is_unicast_link_local() => RT_SCOPE_LINK,
        _ => 0,
    };
    let no_detection = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
    let mut fixed = [family(address), prefix, 0, scope, 0, 0, 0, 0];
    fixed[4..].copy_from_slice(&index.to_ne_bytes());
    let address_flags = no_detection | IFA_F_NOPREFIXROUTE;
    let message = Message::new(kind, flags, &fixed)
        .attribute(IFA_FLAGS, &address_flags.to_ne_bytes())
        .address(IFA_LOCAL, address)
        .address(IFA_ADDRESS, address);
    match address {
        // RFC 3021: networks of two addresses have no broadcast address.
        IpAddr::V4(address) if prefix < 31 => {
            let broadcast = u32::from(address) | u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
            message.address(IFA_BROADCAST, Ipv4Addr::from(broadcast).into())
        }
        _ => message,
    }
}

/// `struct rtmsg`: family, lengths of destination and source, TOS, table, protocol, scope, type,
/// flags.
fn route_message(route: &Route, device: u32) -> Result<Message> {
    let gateway = optional_ip(&route.gateway)?;
    let source = optional_ip(&route.source)?;
    let destination = (!route.destination.is_empty())
        .then(|| parse_cidr(&route.destination))
        .transpose()?
        .map(|(address, prefix)| (network_of(address, prefix), prefix));
    let family = destination
        .map(|(address, _)| family(address))
        .or_else(|| gateway.or(source).map(family))
        .ok_or_else(|| {
            Failure::invalid("a route needs a destination or a gateway to tell IPv4 from IPv6")
        })?;
    if route.flags & !RTNH_F_ONLINK != 0 {
        return Err(Failure::invalid(format!(
            "route {}: of the flags {:#x} only \"onlink\" (4) can be set",
            describe(route),
            route.flags
        )));
    }
    let scope = u8::try_from(route.scope).map_err(|_| {
        Failure::invalid(format!(
            "route {}: {} is no scope",
            describe(route),
            route.scope
        ))
    })?;
    // As ip-route(8): what needs no gateway is on the link. IPv6 has no scopes.
    let scope = match (scope, gateway) {
        (0, None) if family == AF_INET => RT_SCOPE_LINK,
        (scope, _) => scope,
    };
    let prefix = destination.map_or(0, |(_, prefix)| prefix);
    let mut fixed = [0; 12];
    fixed[0] = family;
    fixed[1] = prefix;
    fixed[4..8].copy_from_slice(&[RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST]);
    fixed[8..].copy_from_slice(&route.flags.to_ne_bytes());
    let mut message =
        Message::new(RTM_NEWROUTE, ADD, &fixed).attribute(RTA_OIF, &device.to_ne_bytes());
    if let Some((address, 1..)) = destination {
        message = message.address(RTA_DST, address);
    }
    match gateway {
        Some(gateway) if self::family(gateway) == family => {
            message = message.address(RTA_GATEWAY, gateway);
        }
        // An IPv4 route by an IPv6 router (RFC 5549): `struct rtvia`.
        Some(IpAddr::V6(gateway)) => {
            let mut via = u16::from(AF_INET6).to_ne_bytes().to_vec();
            via.extend_from_slice(&gateway.octets());
            message = message.attribute(RTA_VIA, &via);
        }
        Some(gateway) => {
            return Err(Failure::invalid(format!(
                "route {}: {gateway} cannot be the gateway of an IPv6 route",
                describe(route)
            )));
        }
        None => {}
    }
    if let Some(source) = source {
        message = message.address(RTA_PREFSRC, source);
    }
    if route.metric != 0 {
        message = message.attribute(RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    Ok(message)
}

/// `struct ndmsg`: family, index, state, flags, type.
fn neighbour_message(neighbour: &Neighbour, device: u32) -> Result<Message> {
    let address = parse_ip(&neighbour.address)?;
    let mac = parse_mac(&neighbour.mac)?;
    let state = match neighbour.state {
        0 => NUD_PERMANENT,
        state => u16::try_from(state)
            .map_err(|_| Failure::invalid(format!("{state} is no state of a neighbour")))?,
    };
    let mut fixed = [0; 12];
    fixed[0] = family(address);
    fixed[4..8].copy_from_slice(&device.to_ne_bytes());
    fixed[8..10].copy_from_slice(&state.to_ne_bytes());
    Ok(Message::new(RTM_NEWNEIGH, SET, &fixed)
        .address(NDA_DST, address)
        .attribute(NDA_LLADDR, &mac)
        .attribute(NDA_PROTOCOL, &[RTPROT_STATIC]))
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

/// The kernel takes no destination with bits set beyond its prefix.
fn network_of(address: IpAddr, prefix: u8) -> IpAddr {
    let prefix = u32::from(prefix);
    match address {
        IpAddr::V4(address) => {
            let mask = !u32::MAX.checked_shr(prefix).unwrap_or(0);
            Ipv4Addr::from(u32::from(address) & mask).into()
        }
        IpAddr::V6(address) => {
            let mask = !u128::MAX.checked_shr(prefix).unwrap_or(0);
            Ipv6Addr::from(u128::from(address) & mask).into()
        }
    }
}

fn describe(route: &Route) -> String {
    let mut text = if route.destination.is_empty() {
        "default".to_owned()
    } else {
        route.destination.clone()
    };
    for (word, value) in [("via", &route.gateway), ("dev", &route.device)] {
        if !value.is_empty() {
            text.push_str(&format!(" {word} {value}"));
        }
    }
    text
}

fn check_name(name: &str) -> Result<()> {
    let valid = !name.is_empty()
        && name.len() <= MAX_NAME
        && ![".", "..", "lo"].contains(&name)
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':');
    if valid {
        Ok(())
    } else {
        Err(Failure::invalid(format!(
            "\"{name}\" is no name for a network interface"
        )))
    }
}

fn parse_mac(text: &str) -> Result<Vec<u8>> {
    let octets: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            (part.len() == 2)
                .then(|| u8::from_str_radix(part, 16).ok())
                .flatten()
        })
        .collect();
    octets
        .filter(|octets| octets.len() == 6)
        .ok_or_else(|| Failure::invalid(format!("\"{text}\" is no hardware address")))
}

fn parse_ip(text: &str) -> Result<IpAddr> {
    text.parse()
        .map_err(|_| Failure::invalid(format!("\"{text}\" is no IP address")))
}

fn optional_ip(text: &str) -> Result<Option<IpAddr>> {
    (!text.is_empty()).then(|| parse_ip(text)).transpose()
}

/// "ADDRESS/PREFIX"; without a prefix the one address.
fn parse_cidr(text: &str) -> Result<(IpAddr, u8)> {
    let bad = || Failure::invalid(format!("\"{text}\" is no address in CIDR notation"));
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| bad())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix {
        Some(prefix) => prefix.parse().map_err(|_| bad())?,
        None => longest,
    };
    if prefix > longest {
        return Err(bad());
    }
    Ok((address, prefix))
}

#[cfg(test)]
mod tests;
