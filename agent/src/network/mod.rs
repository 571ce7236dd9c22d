//! The pod's network as `ConfigureNetwork` describes it: interfaces, routes,
//! neighbours. Everything *sets*, so that asking twice changes nothing.

mod ipv6;
mod netlink;
mod routes;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Mutex, PoisonError},
};

use caisson_protocol::agent::{Neighbour, Network, NetworkInterface, Route};

use crate::{
    device,
    failure::{Failure, Result},
};
use netlink::{Message, SET, Socket, attributes, u32_at};
use routes::{describe, is_ipv6, remove_other_routes, route_message};

// linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/neighbour.h
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
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
/// Among the flags in `struct ifaddrmsg`.
const IFA_F_PERMANENT: u8 = 0x80;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
const RTPROT_STATIC: u8 = 4;
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
    static TOLD: Mutex<ipv6::Told> = Mutex::new(ipv6::Told::new());
    configure_after(
        request,
        &mut TOLD.lock().unwrap_or_else(PoisonError::into_inner),
    )
}

fn configure_after(request: &Network, told: &mut ipv6::Told) -> Result<()> {
    let mut socket = Socket::open()?;
    let mut links = links(&mut socket)?;
    told.retain(|index, _| links.iter().any(|link| link.index == *index));
    for interface in &request.interfaces {
        configure_interface(&mut socket, &mut links, interface, request, told)?;
    }
    // What the pod's own sysctl has turned IPv6 off for goes without, as on the host.
    let possible = |is_ipv6: bool, device: &str| !(is_ipv6 && ipv6::is_off(device));
    let mut routes: Vec<&Route> = request
        .routes
        .iter()
        .filter(|route| possible(is_ipv6(route), &route.device))
        .collect();
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
        if !possible(neighbour.address.contains(':'), &neighbour.device) {
            continue;
        }
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
    request: &Network,
    told: &mut ipv6::Told,
) -> Result<()> {
    check_name(&wanted.name)?;
    let mac = parse_mac(&wanted.mac)?;
    let mut addresses = wanted
        .addresses
        .iter()
        .map(|text| parse_cidr(text))
        .collect::<Result<Vec<_>>>()?;
    let at = device_of(links, wanted, &mac)?;
    if links[at].name != wanted.name {
        if let Some(other) = links.iter().position(|link| link.name == wanted.name) {
            make_way(socket, &mut links[other], &request.interfaces)?;
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
    ipv6::set(wanted, index, told)?;
    if ipv6::is_off(&wanted.name) {
        addresses.retain(|(address, _)| address.is_ipv4());
    }
    let no_arp = libc::IFF_NOARP.cast_unsigned();
    let flags = if wanted.no_arp { no_arp } else { 0 };
    socket.request(&link_message(index, flags, no_arp), || {
        format!("set the flags of {}", wanted.name)
    })?;
    bring_up(socket, index)?;
    remove_other_addresses(socket, index, &addresses, wanted.accept_ra != 0)?;
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
/// With `advertised` what router advertisements have made stays.
fn remove_other_addresses(
    socket: &mut Socket,
    index: u32,
    wanted: &[(IpAddr, u8)],
    advertised: bool,
) -> Result<()> {
    let mut found = Vec::new();
    socket.dump(
        &Message::new(RTM_GETADDR, 0, &[0; 8]),
        || "list addresses".to_owned(),
        |kind, body| {
            let stays = advertised && is_advertised(body);
            if kind == RTM_NEWADDR && u32_at(body, 4) == index && !stays {
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

/// Of a `struct ifaddrmsg`. Those of the host's are given for good, those of an advertisement for a
/// time.
fn is_advertised(body: &[u8]) -> bool {
    matches!(body, [AF_INET6, _, flags, ..] if flags & IFA_F_PERMANENT == 0)
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
