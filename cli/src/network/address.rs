//! Subnets and addresses: which are free.

use std::{
    collections::HashSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::store::Subnet;
use crate::error::Error;

/// Most addresses that are looked through for a free one: more than a bridge has ports (1024).
const MOST_TRIED: usize = 1 << 16;

/// Networks that the host has routes to. A default route is none: it leads to whatever nobody else
/// has. What cannot be read is not known, and the kernel refuses a clash by itself.
pub fn of_host() -> Vec<IpNet> {
    let v4 = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let v6 = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    routes_v4(&v4).chain(routes_v6(&v6)).collect()
}

/// Columns 1 and 7 of /proc/net/route: destination and mask, as the machine has them in memory.
fn routes_v4(table: &str) -> impl Iterator<Item = IpNet> {
    table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let number = |index: usize| {
            let text = fields.get(index)?;
            Some(Ipv4Addr::from(
                u32::from_str_radix(text, 16).ok()?.to_ne_bytes(),
            ))
        };
        let net = Ipv4Net::with_netmask(number(1)?, number(7)?).ok()?;
        (net.prefix_len() > 0).then_some(net.into())
    })
}

/// Columns 0 and 1 of /proc/net/ipv6_route: destination and length of its prefix. Those of one
/// address (local ones) and multicast are no networks.
fn routes_v6(table: &str) -> impl Iterator<Item = IpNet> {
    table.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let address = Ipv6Addr::from(u128::from_str_radix(fields.next()?, 16).ok()?);
        let length = u8::from_str_radix(fields.next()?, 16).ok()?;
        let net = Ipv6Net::new(address, length).ok()?;
        (1..128)
            .contains(&length)
            .then_some(net)
            .filter(|net| !net.addr().is_multicast() && !net.addr().is_unicast_link_local())
            .map(IpNet::from)
    })
}

/// Whether two networks have an address in common.
pub fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

/// A private network of the given size that overlaps none of `taken`.
///
/// # Errors
/// All are taken.
pub fn free_v4(prefix: u8, taken: &[IpNet]) -> Result<IpNet, Error> {
    // Away from what docker (172.17 to 172.31), podman (10.88, 10.89) and Kubernetes (10.42 to
    // 10.44, 10.96, 10.244) take by themselves; those come last.
    let pools: [(Ipv4Addr, u8); 3] = [
        (Ipv4Addr::new(10, 208, 0, 0), 12),
        (Ipv4Addr::new(172, 16, 0, 0), 12),
        (Ipv4Addr::new(192, 168, 0, 0), 16),
    ];
    pools
        .iter()
        .filter_map(|(address, length)| Ipv4Net::new(*address, *length).ok())
        .filter_map(|pool| pool.subnets(prefix).ok())
        .flatten()
        .map(IpNet::from)
        .find(|net| !taken.iter().any(|other| overlap(net, other)))
        .ok_or_else(|| {
            Error::State("no private network is free on this host: give one by --subnet".to_owned())
        })
}

/// A unique local network (RFC 4193) of 64 bits by chance that overlaps none of `taken`.
///
/// # Errors
/// No entropy.
pub fn free_v6(taken: &[IpNet], random: impl Fn() -> Result<u64, Error>) -> Result<IpNet, Error> {
    loop {
        let chance = random()? & 0x00ff_ffff_ffff_ffff | 0xfd << 56;
        let address = Ipv6Addr::from(u128::from(chance) << 64);
        if let Ok(net) = Ipv6Net::new(address, 64)
            && !taken.iter().any(|other| overlap(&net.into(), other))
        {
            return Ok(net.into());
        }
    }
}

/// Whether a container of the subnet can have the address: one of its hosts', and not the gateway's.
pub fn can_have(subnet: &Subnet, address: IpAddr) -> bool {
    let net = &subnet.subnet;
    let ends = match net {
        IpNet::V4(net) if net.prefix_len() < 31 => {
            address == IpAddr::V4(net.network()) || address == IpAddr::V4(net.broadcast())
        }
        IpNet::V4(_) => false,
        // The first is every router's (RFC 4291, 2.6.1).
        IpNet::V6(net) => address == IpAddr::V6(net.network()),
    };
    net.contains(&address) && !ends && subnet.gateway != address
}

/// The first address that is free: of the range that the network gives out, or of all of it.
pub fn lease(subnet: &Subnet, taken: &HashSet<IpAddr>) -> Option<IpAddr> {
    let range = subnet.range.unwrap_or(subnet.subnet);
    let first = range.network();
    (0..MOST_TRIED)
        .map_while(|offset| {
            let address = match first {
                IpAddr::V4(first) => IpAddr::V4(Ipv4Addr::from(
                    u32::from(first).checked_add(u32::try_from(offset).ok()?)?,
                )),
                IpAddr::V6(first) => IpAddr::V6(Ipv6Addr::from(u128::from(first) + offset as u128)),
            };
            range.contains(&address).then_some(address)
        })
        .find(|address| can_have(subnet, *address) && !taken.contains(address))
}

/// A hardware address that goes with an address, so that neighbours who remember the one of an
/// earlier container are right.
pub fn mac_of(address: IpAddr) -> String {
    let [a, b, c, d] = match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(address) => (u128::from(address) as u32).to_be_bytes(),
    };
    // Locally administered, unicast.
    format!("0e:ca:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(net: &str, gateway: &str, range: Option<&str>) -> Subnet {
        Subnet {
            subnet: net.parse().unwrap(),
            gateway: gateway.parse().unwrap(),
            range: range.map(|range| range.parse().unwrap()),
        }
    }

    #[test]
    fn routes_of_the_host_are_read() {
        let v4 = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n\
            eth0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            eth0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let nets: Vec<_> = routes_v4(v4).map(|net| net.to_string()).collect();
        assert_eq!(nets, ["10.0.2.0/24"]);
        let v6 = "fd000000000000010000000000000000 40 00000000000000000000000000000000 00 0 0 0 0 0 eth0\n\
            fe800000000000000000000000000000 40 00000000000000000000000000000000 00 0 0 0 0 0 eth0\n\
            00000000000000000000000000000000 00 00000000000000000000000000000000 00 0 0 0 0 0 lo\n";
        let nets: Vec<_> = routes_v6(v6).map(|net| net.to_string()).collect();
        assert_eq!(nets, ["fd00:0:0:1::/64"]);
        assert_eq!(routes_v4("no table\nof routes\n").count(), 0);
    }

    #[test]
    fn free_networks_keep_clear_of_others() {
        let taken: Vec<IpNet> = ["10.208.0.0/16", "10.209.0.0/25"]
            .map(|net| net.parse().unwrap())
            .to_vec();
        assert_eq!(free_v4(16, &taken).unwrap().to_string(), "10.210.0.0/16");
        assert_eq!(free_v4(24, &taken).unwrap().to_string(), "10.209.1.0/24");
        let all: Vec<IpNet> = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"]
            .map(|net| net.parse().unwrap())
            .to_vec();
        assert!(free_v4(24, &all).is_err());
        let net = free_v6(&[], || Ok(0x1234_5678_9abc_def0)).unwrap();
        assert_eq!(net.to_string(), "fd34:5678:9abc:def0::/64");
    }

    #[test]
    fn leases_are_the_first_free_ones() {
        let small = subnet("10.1.0.0/30", "10.1.0.1", None);
        let first = lease(&small, &HashSet::new()).unwrap();
        assert_eq!(first.to_string(), "10.1.0.2");
        assert_eq!(lease(&small, &HashSet::from([first])), None);
        let ranged = subnet("10.1.0.0/16", "10.1.0.1", Some("10.1.7.0/24"));
        let first = lease(&ranged, &HashSet::new()).unwrap();
        assert_eq!(first.to_string(), "10.1.7.0");
        let six = subnet("fd00::/64", "fd00::1", None);
        assert_eq!(lease(&six, &HashSet::new()).unwrap().to_string(), "fd00::2");
        assert!(!can_have(&six, "fd00::".parse().unwrap()));
        assert!(!can_have(&small, "10.1.0.3".parse().unwrap()));
        assert!(!can_have(&small, "10.2.0.2".parse().unwrap()));
        let two = subnet("10.1.0.0/31", "10.1.0.0", None);
        assert_eq!(
            lease(&two, &HashSet::new()).unwrap().to_string(),
            "10.1.0.1"
        );
        assert_eq!(mac_of("10.1.0.2".parse().unwrap()), "0e:ca:0a:01:00:02");
    }
}
