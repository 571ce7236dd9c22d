//! What is in a container's resolv.conf.

use std::{fs, net::IpAddr};

use super::{
    store::Network,
    wanted::{Mode, Wanted},
};

/// Lines of resolv.conf(5).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    /// Name servers.
    pub servers: Vec<IpAddr>,
    /// Domains that are searched.
    pub searches: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

impl Resolver {
    /// Reads resolv.conf(5).
    fn parse(text: &str) -> Self {
        let mut resolver = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                // A scope (fe80::1%eth0) means an interface of the host.
                Some("nameserver") => {
                    resolver
                        .servers
                        .extend(words.next().and_then(|word| word.parse::<IpAddr>().ok()));
                }
                // The last one counts.
                Some("search" | "domain") => {
                    resolver.searches = words.map(str::to_owned).collect();
                }
                Some("options") => resolver.options.extend(words.map(str::to_owned)),
                _ => {}
            }
        }
        resolver
    }
}

/// The host's words, and the name servers that a container could ask.
struct Host {
    /// Of its resolv.conf.
    own: Resolver,
    /// Those of its name servers that are not on its loopback. If all are, those that
    /// systemd-resolved asks take their place.
    remote: Vec<IpAddr>,
}

impl Host {
    fn read() -> Self {
        let own = Resolver::parse(&read("/etc/resolv.conf"));
        let local = |server: &IpAddr| server.is_loopback();
        let mut remote = own.servers.clone();
        if !remote.is_empty() && remote.iter().all(local) {
            remote = Resolver::parse(&read("/run/systemd/resolve/resolv.conf")).servers;
        }
        remote.retain(|server| !local(server));
        Self { own, remote }
    }

    /// The name servers that containers reach from networks of these families.
    fn servers(&self, v4: bool, v6: bool) -> Vec<IpAddr> {
        let mut servers = self.remote.clone();
        servers.retain(|server| if server.is_ipv4() { v4 } else { v6 });
        servers
    }

    /// See [`serves_names`].
    fn serves_names(&self, network: &Network) -> bool {
        // passt asks servers of the question's own family alone, and it has IPv4 only.
        let is_asked =
            |server: &IpAddr| network.is_default() || (network.is_passt() && server.is_ipv4());
        network.dns
            || (self.servers(network.has_v4(), network.has_v6()).is_empty()
                && self.own.servers.iter().any(is_asked))
    }

    /// See [`of_container`].
    fn for_container(self, wanted: &Wanted, networks: &[Network]) -> Resolver {
        let serving: Vec<IpAddr> = networks
            .iter()
            .filter(|network| self.serves_names(network))
            // passt asks those of the host alone.
            .filter(|network| !network.is_passt() || wanted.dns.is_empty())
            .flat_map(|network| network.subnets.iter().map(|subnet| subnet.gateway))
            .collect();
        let servers = match (serving.is_empty(), wanted.dns.is_empty()) {
            (false, _) => serving,
            (true, false) => wanted.dns.clone(),
            (true, true) => self.servers(
                networks.iter().any(Network::has_v4),
                networks.iter().any(Network::has_v6),
            ),
        };
        let or = |given: &[String], hosts: Vec<String>| {
            if given.is_empty() {
                hosts
            } else {
                // Docker's word for none at all.
                let mut given = given.to_vec();
                given.retain(|word| word != ".");
                given
            }
        };
        Resolver {
            servers,
            searches: or(&wanted.dns_searches, self.own.searches),
            options: or(&wanted.dns_options, self.own.options),
        }
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Whether netavark has a name server on the network: where containers have names, and on the
/// default network of a host none of whose own can be reached from there: they are on its loopback,
/// or of a family that the network has not. On such a host passt passes questions on, too.
pub fn serves_names(network: &Network) -> bool {
    Host::read().serves_names(network)
}

/// What a container of these networks is given. Where names are served the server asks those of
/// `--dns` itself.
pub fn of_container(wanted: &Wanted, networks: &[Network]) -> Resolver {
    if wanted.mode == Mode::None {
        return Resolver::default();
    }
    Host::read().for_container(wanted, networks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{
        passt,
        store::{DEFAULT, Subnet},
    };

    fn network(name: &str, subnets: &[&str]) -> Network {
        Network {
            name: name.to_owned(),
            id: name.to_owned(),
            subnets: subnets
                .iter()
                .map(|subnet| Subnet::of(subnet.parse().unwrap()))
                .collect(),
            ..passt::network().unwrap()
        }
    }

    fn host(own: &[&str], remote: &[&str]) -> Host {
        let all = |servers: &[&str]| servers.iter().map(|text| text.parse().unwrap()).collect();
        Host {
            own: Resolver {
                servers: all(own),
                ..Resolver::default()
            },
            remote: all(remote),
        }
    }

    #[test]
    fn servers_are_those_that_can_be_reached() {
        let four = network(DEFAULT, &["10.208.0.0/16"]);
        let six = network("six", &["fd00::/64"]);
        let both = network(DEFAULT, &["10.208.0.0/16", "fd00::/64"]);
        let passt = passt::network().unwrap();
        let (a, b, stub) = ("192.0.2.53", "2001:db8::53", "127.0.0.53");
        for (own, remote, networks, servers) in [
            (&[a, b][..], &[a, b][..], &[&four][..], &[a][..]),
            (&[a, b], &[a, b], &[&both], &[a, b]),
            (&[a, b], &[a, b], &[&six], &[b]),
            (&[a, b], &[a, b], &[&passt], &[a]),
            (&[b], &[b], &[&both], &[b]),
            // The bridge's own name server asks that of the host.
            (&[b], &[b], &[&four], &["10.208.0.1"]),
            (&[b], &[b], &[&four, &six], &["10.208.0.1"]),
            (&[stub], &[b], &[&four], &["10.208.0.1"]),
            (&[stub], &[a], &[&four], &[a]),
            (&[stub], &[], &[&four], &["10.208.0.1"]),
            (&[stub], &[b], &[&passt], &["10.207.0.1"]),
            (&[stub], &[], &[&passt], &["10.207.0.1"]),
            // It could ask none.
            (&[b], &[b], &[&passt], &[]),
            (&[], &[], &[&four], &[]),
            (&[a], &[a], &[&six], &[]),
        ] {
            let networks: Vec<Network> = networks.iter().copied().cloned().collect();
            let given = host(own, remote).for_container(&Wanted::default(), &networks);
            let given: Vec<String> = given.servers.iter().map(IpAddr::to_string).collect();
            assert_eq!(given, servers, "{own:?} {remote:?} {networks:?}");
        }
    }

    #[test]
    fn names_are_served_where_they_are_needed() {
        let four = network(DEFAULT, &["10.208.0.0/16"]);
        let mut named = network("app", &["10.209.0.0/24"]);
        let host = host(&["2001:db8::53"], &["2001:db8::53"]);
        assert!(host.serves_names(&four));
        assert!(!host.serves_names(&named));
        named.dns = true;
        assert!(host.serves_names(&named));
    }

    #[test]
    fn lines_are_read() {
        let resolver = Resolver::parse(
            "# comment\nnameserver 10.0.0.53\nnameserver fe80::1%eth0\ndomain a\nsearch b c\n\
             options ndots:2 rotate\nnameserver\nsortlist x\n",
        );
        assert_eq!(resolver.servers, ["10.0.0.53".parse::<IpAddr>().unwrap()]);
        assert_eq!(resolver.searches, ["b", "c"]);
        assert_eq!(resolver.options, ["ndots:2", "rotate"]);
    }

    #[test]
    fn flags_come_before_the_hosts_words() {
        let wanted = Wanted {
            mode: Mode::Networks(vec!["caisson".to_owned()]),
            dns: vec!["192.0.2.53".parse().unwrap()],
            dns_searches: vec![".".to_owned()],
            dns_options: vec!["ndots:3".to_owned()],
            ..Wanted::default()
        };
        let resolver = of_container(&wanted, &[]);
        assert_eq!(resolver.servers, wanted.dns);
        assert!(resolver.searches.is_empty());
        assert_eq!(resolver.options, ["ndots:3"]);
        let none = Wanted::default();
        assert_eq!(of_container(&none, &[]), Resolver::default());
    }
}
