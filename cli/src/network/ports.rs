//! Published ports: `-p [[IP:]HOST:]CONTAINER[/PROTOCOL]`, and sockets that hold ports of the host.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketType, sockopt},
};
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Most ports of one container: each is a socket and three rules.
const MOST: usize = 512;

/// Of the transport layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of a container that the host has too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Address of the host; `None` = all of them, an unspecified one = all of its family.
    pub host_ip: Option<IpAddr>,
    /// Port of the host; 0 = any that is free.
    pub host_port: u16,
    /// Port of the container.
    pub container_port: u16,
    /// Of both.
    pub protocol: Protocol,
}

impl Port {
    /// "80/tcp", as `inspect` and `port` name it.
    pub fn inner(&self) -> String {
        format!("{}/{}", self.container_port, self.protocol)
    }

    /// "0.0.0.0:8080", for each family that the container has.
    pub fn outer(&self, v4: bool, v6: bool) -> Vec<SocketAddr> {
        self.addresses(v4, v6)
            .into_iter()
            .map(|address| SocketAddr::new(address, self.host_port))
            .collect()
    }

    fn addresses(&self, v4: bool, v6: bool) -> Vec<IpAddr> {
        match self.host_ip {
            Some(address) => vec![address],
            None => [
                v4.then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
                v6.then_some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
            ]
            .into_iter()
            .flatten()
            .collect(),
        }
    }
}

/// Ports of "[IP:][HOST:]CONTAINER[/PROTOCOL]"; HOST and CONTAINER may be ranges of one length.
///
/// # Errors
/// Something else.
pub fn publish(text: &str) -> Result<Vec<Port>, Error> {
    let wrong = |why: &str| {
        Error::Usage(format!(
            "-p {text}: {why}; such as 8080:80, 127.0.0.1:8080:80 or 53:53/udp"
        ))
    };
    let (rest, container) = text.rsplit_once(':').unwrap_or(("", text));
    let (first, count, protocol) =
        inner(container).ok_or_else(|| wrong("not a port of the container"))?;
    // An address of IPv6 has colons of its own, and brackets around them.
    let (address, host) = match rest.rsplit_once(':') {
        _ if rest.ends_with(']') => (Some(rest), ""),
        Some((address, host)) => (Some(address), host),
        None => (None, rest),
    };
    let address = match address {
        None | Some("") => None,
        Some(address) => {
            let plain = address
                .strip_prefix('[')
                .and_then(|address| address.strip_suffix(']'))
                .unwrap_or(address);
            Some(
                plain
                    .parse::<IpAddr>()
                    .map_err(|_| wrong("not an address of this host"))?,
            )
        }
    };
    if address == Some(IpAddr::V6(Ipv6Addr::LOCALHOST)) {
        return Err(Error::Usage(format!(
            "-p {text}: nothing leads from the loopback of IPv6 to a container, since the kernel lets no \
             packet from ::1 leave it; publish at 127.0.0.1 or at another address of this host"
        )));
    }
    let host = match host {
        "" | "0" => None,
        text => {
            let (first, hosts) = range(text).ok_or_else(|| wrong("not a port of the host"))?;
            if hosts != count {
                return Err(wrong("the ranges are not of one length"));
            }
            Some(first)
        }
    };
    Ok((0..count)
        .map(|number| Port {
            host_ip: address,
            host_port: host.map_or(0, |host| host + number),
            container_port: first + number,
            protocol,
        })
        .collect())
}

/// First port, how many, and protocol of "80", "80-90", "53/udp".
fn inner(text: &str) -> Option<(u16, u16, Protocol)> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    let (first, count) = range(ports)?;
    Some((first, count, protocol))
}

fn range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.parse::<u16>().ok()?, last.parse::<u16>().ok()?);
    // As many as there are never fit: 0 is none.
    (first > 0 && first <= last).then(|| (first, last - first + 1))
}

/// Ports of a container that -P publishes: "80", "80-90", "53/udp" of `--expose` and of the image.
///
/// # Errors
/// Something else.
pub fn exposed<'a>(
    texts: impl IntoIterator<Item = &'a str>,
) -> Result<BTreeSet<(u16, Protocol)>, Error> {
    let mut all = BTreeSet::new();
    for text in texts {
        let (first, count, protocol) = inner(text).ok_or_else(|| {
            Error::Usage(format!(
                "exposed port {text}: not a port of tcp or udp, such as 80 or 53/udp"
            ))
        })?;
        all.extend((0..count).map(|number| (first + number, protocol)));
    }
    Ok(all)
}

/// Adds those of the exposed ports that -p has not published, at any port of the host.
pub fn publish_exposed(ports: &mut Vec<Port>, exposed: &BTreeSet<(u16, Protocol)>) {
    for (container_port, protocol) in exposed {
        let published = ports
            .iter()
            .any(|port| (port.container_port, port.protocol) == (*container_port, *protocol));
        if !published {
            ports.push(Port {
                host_ip: None,
                host_port: 0,
                container_port: *container_port,
                protocol: *protocol,
            });
        }
    }
}

/// Not more than a container can have.
///
/// # Errors
/// More.
pub fn check_number(ports: &[Port]) -> Result<(), Error> {
    if ports.len() > MOST {
        return Err(Error::Usage(format!(
            "-p: {} ports; a container can publish at most {MOST}",
            ports.len()
        )));
    }
    Ok(())
}

/// The ports as a container has them whose addresses are of these families: each once, and of a
/// pair at "0.0.0.0" and "[::]" only what its families have.
pub fn of_families(ports: &[Port], v4: bool, v6: bool) -> Vec<Port> {
    let is_all_of = |port: &Port, there: bool| {
        port.host_ip.is_some_and(|address| {
            address.is_unspecified() && there == if address.is_ipv4() { v4 } else { v6 }
        })
    };
    let mut kept: Vec<Port> = Vec::new();
    for port in ports {
        // Two that may be any port are two.
        let is_again = port.host_port != 0 && kept.contains(port);
        let is_other_half = |other: &Port| {
            is_all_of(other, true)
                && *port
                    == Port {
                        host_ip: port.host_ip,
                        ..other.clone()
                    }
        };
        // Without another half it is asked for in vain, which is an error of `reserve`.
        let is_half = is_all_of(port, false) && ports.iter().any(is_other_half);
        if !is_again && !is_half {
            kept.push(port.clone());
        }
    }
    kept
}

/// Sockets that keep others from ports of the host, whose packets go elsewhere before they get
/// there. The ports are free when this is dropped.
#[derive(Debug, Default)]
pub struct Reserved(#[expect(dead_code, reason = "held, not used")] Vec<OwnedFd>);

/// Takes ports of the host, and finds those that may be any.
///
/// # Errors
/// One is in use, or its address is not of this host or of a family that the container has not.
pub fn reserve(ports: &mut [Port], v4: bool, v6: bool) -> Result<Reserved, Error> {
    let mut sockets = Vec::new();
    for port in ports {
        for address in port.addresses(v4, v6) {
            let wanted = SocketAddr::new(address, port.host_port);
            if !(if address.is_ipv4() { v4 } else { v6 }) {
                return Err(Error::State(format!(
                    "cannot publish port {} at {wanted}: the container's networks have no address of \
                     that family; publish without an address of the host, or at one of the other family",
                    port.inner()
                )));
            }
            match take(wanted, port.protocol) {
                Ok((socket, taken)) => {
                    port.host_port = taken;
                    sockets.push(socket);
                }
                // A host without IPv6 has nobody to serve by it.
                Err(Errno::AFNOSUPPORT) if address.is_ipv6() && port.host_ip.is_none() => {}
                Err(error) => return Err(not_taken(wanted, port.protocol, error)),
            }
        }
    }
    Ok(Reserved(sockets))
}

fn not_taken(address: SocketAddr, protocol: Protocol, error: Errno) -> Error {
    let why = match error {
        Errno::ADDRINUSE => "the port is in use on this host".to_owned(),
        Errno::ADDRNOTAVAIL => format!("{} is no address of this host", address.ip()),
        Errno::ACCESS => format!(
            "ports below {} are root's on this host: publish at a higher one, or as root set \
             net.ipv4.ip_unprivileged_port_start lower (sysctl)",
            first_free_port()
        ),
        other => std::io::Error::from(other).to_string(),
    };
    Error::State(format!("cannot publish {address}/{protocol}: {why}"))
}

/// The first port that needs no root.
fn first_free_port() -> u16 {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let text = text.unwrap_or_default();
    text.trim().parse().unwrap_or(1024)
}

fn take(address: SocketAddr, protocol: Protocol) -> Result<(OwnedFd, u16), Errno> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let flags = rustix::net::SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    // It does not listen: whoever comes before the rules are there is turned away, and does not
    // wait for an answer that nobody gives.
    rustix::net::bind(&socket, &address)?;
    let taken = SocketAddr::try_from(rustix::net::getsockname(&socket)?)?.port();
    Ok((socket, taken))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(
        host_ip: Option<&str>,
        host_port: u16,
        container_port: u16,
        protocol: Protocol,
    ) -> Port {
        Port {
            host_ip: host_ip.map(|address| address.parse().unwrap()),
            host_port,
            container_port,
            protocol,
        }
    }

    #[test]
    fn flags_say_which_ports() {
        use Protocol::{Tcp, Udp};
        for (text, wanted) in [
            ("80", vec![port(None, 0, 80, Tcp)]),
            ("0:80", vec![port(None, 0, 80, Tcp)]),
            ("8080:80", vec![port(None, 8080, 80, Tcp)]),
            ("53:53/UDP", vec![port(None, 53, 53, Udp)]),
            ("127.0.0.1:1:2", vec![port(Some("127.0.0.1"), 1, 2, Tcp)]),
            ("127.0.0.1::2", vec![port(Some("127.0.0.1"), 0, 2, Tcp)]),
            ("0.0.0.0:1:2", vec![port(Some("0.0.0.0"), 1, 2, Tcp)]),
            ("[::]:1:2", vec![port(Some("::"), 1, 2, Tcp)]),
            ("[fd00::1]:1:2", vec![port(Some("fd00::1"), 1, 2, Tcp)]),
            ("[fd00::1]:2", vec![port(Some("fd00::1"), 0, 2, Tcp)]),
            (
                "7-8:1007-1008/udp",
                vec![port(None, 7, 1007, Udp), port(None, 8, 1008, Udp)],
            ),
        ] {
            assert_eq!(publish(text).unwrap(), wanted, "{text}");
        }
        for wrong in [
            "",
            "x",
            "0",
            "65536",
            "1:2:3",
            "80/sctp",
            "1-2:3",
            "9-8:9-8",
            "a.b:1:2",
            "1:",
            "::",
            "-1:80",
            "1:2:3:4",
            "80/",
            "[::1:80",
            "[::1]:1:2",
            "[0::1]:2",
        ] {
            let error = publish(wrong).unwrap_err().to_string();
            assert!(error.contains(&format!("-p {wrong}:")), "{error}");
        }
        let loopback = publish("[::1]:1:2").unwrap_err().to_string();
        assert!(loopback.contains("publish at 127.0.0.1"), "{loopback}");
        assert_eq!(publish("1-65535:1-65535").unwrap().len(), 65535);
        assert!(check_number(&publish("1-65535:1-65535").unwrap()).is_err());
    }

    #[test]
    fn exposed_ports_are_published_once() {
        let exposed = exposed(["80", "80/tcp", "53/udp"]).unwrap();
        let mut ports = publish("8080:80").unwrap();
        publish_exposed(&mut ports, &exposed);
        assert_eq!(
            ports,
            [
                port(None, 8080, 80, Protocol::Tcp),
                port(None, 0, 53, Protocol::Udp)
            ]
        );
        assert!(super::exposed(["http"]).is_err());
    }

    #[test]
    fn both_families_are_asked_for_by_one_flag_or_two() {
        let all = |flags: &[&str]| -> Vec<Port> {
            let ports = flags.iter().map(|flag| publish(flag).unwrap());
            ports.flatten().collect()
        };
        let outer = |ports: &[Port], v4, v6| -> Vec<String> {
            let addresses = ports.iter().flat_map(|port| port.outer(v4, v6));
            addresses.map(|address| address.to_string()).collect()
        };
        let pair = all(&["0.0.0.0:8080:80", "[::]:8080:80"]);
        for ports in [&pair, &all(&["8080:80"])] {
            for (v4, v6, shown) in [
                (true, true, vec!["0.0.0.0:8080", "[::]:8080"]),
                (true, false, vec!["0.0.0.0:8080"]),
                (false, true, vec!["[::]:8080"]),
            ] {
                assert_eq!(outer(&of_families(ports, v4, v6), v4, v6), shown);
            }
        }
        let one = all(&["0.0.0.0:8080:80", "0.0.0.0:8080:80"]);
        assert_eq!(
            outer(&of_families(&one, true, true), true, true),
            ["0.0.0.0:8080"]
        );
        let any = all(&["0.0.0.0::80", "0.0.0.0::80"]);
        assert_eq!(of_families(&any, true, true), any);
        // What is asked for alone, or for something else, is not left out in silence.
        for flags in [
            &["[::]:8080:80"][..],
            &["0.0.0.0:8080:80", "[::]:8080:81"],
            &["127.0.0.1:8080:80", "[::]:8080:80"],
        ] {
            let ports = all(flags);
            assert_eq!(of_families(&ports, true, false), ports);
            let mut six = ports
                .into_iter()
                .filter(|port| port.host_ip.is_some_and(|ip| ip.is_ipv6()))
                .collect::<Vec<_>>();
            let error = reserve(&mut six, true, false).unwrap_err().to_string();
            assert!(
                error.contains("at [::]:8080") && error.contains("family"),
                "{error}"
            );
        }
    }

    #[test]
    fn families_have_ports_of_their_own() {
        let mut four = [port(Some("0.0.0.0"), 0, 80, Protocol::Tcp)];
        let _held = reserve(&mut four, true, true).unwrap();
        let mut six = [port(Some("::"), four[0].host_port, 80, Protocol::Tcp)];
        match reserve(&mut six, true, true) {
            Ok(_) => {}
            // Of a host without IPv6.
            Err(error) => assert!(!error.to_string().contains("in use"), "{error}"),
        }
    }

    #[test]
    fn ports_in_use_are_not_given_away() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let mut ports = [port(Some("127.0.0.1"), 0, 80, protocol)];
            let held = reserve(&mut ports, true, false).unwrap();
            assert_ne!(ports[0].host_port, 0);
            let error = reserve(&mut ports, true, false).unwrap_err().to_string();
            assert!(error.contains("in use"), "{error}");
            drop(held);
            reserve(&mut ports, true, false).unwrap();
        }
        let mut far = [port(Some("192.0.2.1"), 0, 80, Protocol::Tcp)];
        let error = reserve(&mut far, true, false).unwrap_err().to_string();
        assert!(error.contains("192.0.2.1 is no address"), "{error}");
        let error = reserve(&mut far, false, true).unwrap_err().to_string();
        assert!(error.contains("family"), "{error}");
    }
}
