//! Routes: those that the agent makes, and which of them go.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use caisson_protocol::agent::{Route, RouteMetric};

use super::{
    AF_INET, AF_INET6, RT_SCOPE_LINK, RTPROT_STATIC, family,
    netlink::{ADD, Message, Socket, attributes, u32_at},
    optional_ip, parse_cidr,
};
use crate::failure::{Failure, Result};

// linux/rtnetlink.h
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
pub const RTA_DST: u16 = 1;
pub const RTA_OIF: u16 = 4;
pub const RTA_GATEWAY: u16 = 5;
pub const RTA_PRIORITY: u16 = 6;
pub const RTA_PREFSRC: u16 = 7;
pub const RTA_METRICS: u16 = 8;
pub const RTA_VIA: u16 = 18;
pub const RTNH_F_ONLINK: u32 = 4;
const RT_TABLE_MAIN: u8 = 254;
const RTN_UNICAST: u8 = 1;
/// `net/ipv6_route.h`: the metric of an IPv6 route that was given none.
const IP6_RT_PRIO_USER: u32 = 1024;

/// Whether it is a route of IPv6.
pub fn is_ipv6(route: &Route) -> bool {
    let parts = [&route.destination, &route.gateway, &route.source];
    let first = parts.into_iter().find(|part| !part.is_empty());
    first.is_some_and(|part| part.contains(':'))
}

/// `struct rtmsg`: family, lengths of destination and source, TOS, table, protocol, scope, type,
/// flags.
pub fn route_message(route: &Route, device: u32) -> Result<Message> {
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
    if !route.metrics.is_empty() {
        message = message.attribute(RTA_METRICS, &metrics(&route.metrics)?);
    }
    Ok(message)
}

/// Attributes of their own within that of the route.
fn metrics(metrics: &[RouteMetric]) -> Result<Vec<u8>> {
    let mut nested = Message::new(0, 0, &[]);
    for metric in metrics {
        let kind = u16::try_from(metric.kind).map_err(|_| {
            Failure::invalid(format!("{} is no kind of a route's metric", metric.kind))
        })?;
        nested = nested.attribute(kind, &metric.value.to_ne_bytes());
    }
    Ok(nested.body().to_vec())
}

/// The kernel takes no destination with bits set beyond its prefix.
pub fn network_of(address: IpAddr, prefix: u8) -> IpAddr {
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

/// For people.
pub fn describe(route: &Route) -> String {
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

/// Routes that an earlier request has set and this one has not go.
pub fn remove_other_routes(socket: &mut Socket, wanted: &[Message]) -> Result<()> {
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

/// What tells one route from another.
#[derive(Debug, PartialEq, Eq)]
pub struct RouteKey {
    family: u8,
    prefix: u8,
    destination: Vec<u8>,
    device: Vec<u8>,
    gateway: Vec<u8>,
    source: Vec<u8>,
    priority: u32,
    /// `RTAX_*` with their values, sorted.
    metrics: Vec<(u16, u32)>,
}

/// Of a `struct rtmsg` and its attributes; None unless this agent has made the route.
pub fn key_of(body: &[u8]) -> Option<RouteKey> {
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
        metrics: Vec::new(),
    };
    for (kind, value) in attributes(body.get(12..)?) {
        match kind {
            RTA_DST => key.destination = value.to_vec(),
            RTA_OIF => key.device = value.to_vec(),
            RTA_GATEWAY | RTA_VIA => key.gateway = value.to_vec(),
            RTA_PREFSRC => key.source = value.to_vec(),
            RTA_PRIORITY => key.priority = u32_at(value, 0),
            RTA_METRICS => {
                key.metrics = attributes(value)
                    .map(|(kind, value)| (kind, u32_at(value, 0)))
                    .collect();
                key.metrics.sort_unstable();
            }
            _ => {}
        }
    }
    // The kernel's own for IPv6 routes that name none.
    if key.family == AF_INET6 && key.priority == 0 {
        key.priority = IP6_RT_PRIO_USER;
    }
    Some(key)
}
